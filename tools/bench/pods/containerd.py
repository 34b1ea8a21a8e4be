"""containerd with directories of its own, and nothing on but what pods need."""

from dataclasses import dataclass
from pathlib import Path

PROXY_NAME = "nydus-py"
SOCKET_NAME = "c.sock"
SNAPSHOTTER_SOCKET_NAME = "snap.sock"

_CONFIG = """version = 2
root = "{root}/data"
state = "{root}/state"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.internal.v1.opt", "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.internal.v1.tracing",
]
[grpc]
  address = "{root}/{socket}"
[proxy_plugins.{proxy}]
  type = "snapshot"
  address = "{root}/{proxy_socket}"
[plugins."io.containerd.grpc.v1.cri"]
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  sandbox_image = "{sandbox}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{root}/cni/bin"
    conf_dir = "{root}/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{snapshotter}"
    disable_snapshot_annotations = {no_annotations}
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{root}/certs.d"
"""


@dataclass(frozen=True, slots=True)
class ContainerdSetup:
    """`directory` has all of it, sockets too: its path is short. `sandbox` is the image that holds pods."""

    directory: Path
    sandbox: str
    snapshotter: str = PROXY_NAME
    has_annotations: bool = True

    def command(self) -> list[str]:
        """Writes the configuration; the command line that runs containerd with it."""
        file = self.directory / "config.toml"
        text = _CONFIG.format(
            root=self.directory,
            socket=SOCKET_NAME,
            proxy=PROXY_NAME,
            proxy_socket=SNAPSHOTTER_SOCKET_NAME,
            sandbox=self.sandbox,
            snapshotter=self.snapshotter,
            no_annotations=str(not self.has_annotations).lower(),
        )
        file.write_text(text)
        return ["containerd", "-c", str(file)]

    def trust_registry(self, registry: str) -> None:
        """Has containerd talk plain HTTP to a registry."""
        place = self.directory / "certs.d" / registry
        place.mkdir(parents=True, exist_ok=True)
        (place / "hosts.toml").write_text(
            f'server = "http://{registry}"\n[host."http://{registry}"]\ncapabilities = ["pull", "resolve"]\n'
        )

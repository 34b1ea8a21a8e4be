"""`make demo`: the whole way of an image, on this machine, in a minute.

A real tree (this machine's Python libraries and a model file) becomes an image in a registry on loopback, is
mounted lazily, read a little, and taken down again. Everything lives in a temporary directory.
"""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.sizes import format_size

TREES = (Path("/usr/lib/python3"), Path("/usr/lib/python3.11"), Path("/usr/share/doc"))
MODEL_BYTES = 256 << 20
MODEL_TENSORS = 16
STOP_TIMEOUT_S = 30

REGISTRY_CONFIG = """\
version: 0.1
log: {{level: info}}
storage: {{filesystem: {{rootdirectory: {directory}}}, maintenance: {{uploadpurging: {{enabled: false}}}}}}
http: {{addr: "{listen}", secret: demo}}
"""


@dataclass(frozen=True, slots=True)
class Shell:
    """Runs `nydus-py` with its cache and its run directory inside the demo."""

    directory: Path

    def nydus(self, *arguments: str | Path, quiet: bool = False) -> str:
        """Runs one command line, showing it first; returns its standard output."""
        if not quiet:
            print(f"$ nydus-py {' '.join(map(str, arguments))}", flush=True)
        command = [
            sys.executable,
            "-m",
            "tools.main",
            f"--cache-dir={self.directory}/cache",
            *map(str, arguments),
        ]
        environment = {**os.environ, "NYDUS_PY_RUN_DIR": str(self.directory / "run")}
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> int:
    """Runs the demo; returns its exit code."""
    if reason := missing():
        print(f"the demo cannot run here: {reason}", file=sys.stderr)
        return 1
    with contextlib.ExitStack() as cleanup:
        directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="nydus-py-demo-")))
        try:
            show(directory, cleanup)
        except subprocess.CalledProcessError as failed:
            print(f"the demo stops: a command failed with exit code {failed.returncode}", file=sys.stderr)
            return 1
    print("everything is stopped and removed again")
    return 0


def missing() -> str | None:
    """What this machine lacks for the demo."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no access to /dev/fuse (in a container: --device /dev/fuse --cap-add SYS_ADMIN)"
    if shutil.which("docker-registry") is None:
        return "docker-registry is not installed"
    return None


def show(directory: Path, cleanup: contextlib.ExitStack) -> None:
    """The demo itself, in an empty directory."""
    shell = Shell(directory)
    source = directory / "source"
    make_tree(source)
    entries = sum(1 for _ in source.rglob("*"))
    print(f"a tree of {entries} files and directories, {format_size(tree_size(source))}")

    address = cleanup.enter_context(registry(directory / "registry"))
    print(f"docker-registry listens on {address}")
    image = f"{address}/demo/tree:v1"
    timed("built and pushed", lambda: shell.nydus("build", source, image))

    mountpoint = directory / "mnt"
    mountpoint.mkdir()
    cleanup.callback(unmount_if_mounted, shell, mountpoint)
    timed("mounted", lambda: shell.nydus("mount", image, mountpoint))
    names = sum(1 for _ in mountpoint.rglob("*"))
    print(f"{names} files and directories are there; status says:")
    print(shell.nydus("status", mountpoint), end="")

    with (mountpoint / "model.safetensors").open("rb") as model:
        header = json.loads(model.read(int.from_bytes(model.read(8), "little")))
    print(f"read the header of model.safetensors: {len(header)} tensors; status says:")
    print(shell.nydus("status", mountpoint), end="")
    report(shell, mountpoint)
    shell.nydus("umount", mountpoint)


def report(shell: Shell, mountpoint: Path) -> None:
    """Prints bytes fetched / image size."""
    (status,) = json.loads(shell.nydus("status", mountpoint, "--json", quiet=True))
    fetched, size = status["fetched_bytes"], status["image_size_bytes"]
    print(f"bytes fetched / image size: {fetched} / {size} = {fetched / size:.2%}")


def make_tree(source: Path) -> None:
    """Copies this machine's Python libraries and writes a model file beside them."""
    source.mkdir()
    for tree in TREES:
        if tree.is_dir():
            shutil.copytree(tree, source / tree.name, symlinks=True, ignore_dangling_symlinks=True)
    write_model(source / "model.safetensors")


def write_model(path: Path) -> None:
    """A safetensors file: 8 bytes of header length, the header, then tensors of random numbers."""
    size = MODEL_BYTES // MODEL_TENSORS
    tensors = {
        f"layers.{i}.weight": {
            "dtype": "BF16",
            "shape": [size // 2048, 1024],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(MODEL_TENSORS)
    }
    header = json.dumps(tensors).encode()
    header += b" " * (-len(header) % 8)
    generator = random.Random(0)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(MODEL_TENSORS):
            file.write(generator.randbytes(size))


def tree_size(source: Path) -> int:
    """Bytes in the regular files of a tree."""
    return sum(path.lstat().st_size for path in source.rglob("*") if path.is_file() and not path.is_symlink())


@contextlib.contextmanager
def registry(directory: Path, listen: str = "127.0.0.1:0", prefix: Sequence[str] = ()) -> Iterator[str]:
    """Runs docker-registry, by default on a free loopback port; yields HOST:PORT.

    `prefix` is a command that starts it, somewhere else for example.
    """
    directory.mkdir()
    config = directory / "config.yml"
    config.write_text(REGISTRY_CONFIG.format(directory=directory, listen=listen))
    log = directory / "log"
    with log.open("wb") as output:
        command = [*prefix, "docker-registry", "serve", str(config)]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield wait_for_address(server, log)
    finally:
        server.terminate()
        try:
            server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_for_address(server: "subprocess.Popen[bytes]", log: Path) -> str:
    """The address that the registry has written into its log."""
    while server.poll() is None:
        if found := re.search(r"listening on ([\d.]+:\d+)", log.read_text()):
            return found[1]
        time.sleep(0.02)
    raise RuntimeError(f"docker-registry did not start:\n{log.read_text()}")


def unmount_if_mounted(shell: Shell, mountpoint: Path) -> None:
    """Takes the mount down where the demo stopped halfway."""
    if os.path.ismount(mountpoint):
        shell.nydus("umount", mountpoint)


def timed(what: str, action: Callable[[], object]) -> None:
    """Runs `action` and prints how long it took."""
    start = time.monotonic()
    action()
    print(f"{what} in {time.monotonic() - start:.2f} s")


if __name__ == "__main__":
    sys.exit(main())

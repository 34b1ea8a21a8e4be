"""A client of the Kubernetes container runtime interface, for what pods need."""

import contextlib
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import grpc

from rafs.errors import NydusError
from tools.bench.pods import cri_pb2 as cri

CALL_TIMEOUT_S = 600.0


class CriError(NydusError):
    """What CRI answers instead."""

    message = "{method}: {code}: {why}"
    exit_code: ClassVar[int] = 236


@dataclass(slots=True)
class Cri:
    """A client of the part of the interface that is needed."""

    channel: grpc.Channel
    logs: Path

    def call(self, service: str, method: str, request: Any, answer: Any = cri.Empty) -> Any:
        """One call; waits until containerd can be connected to. Raises `CriError`."""
        rpc = self.channel.unary_unary(
            f"/runtime.v1.{service}Service/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        try:
            return rpc(request, timeout=CALL_TIMEOUT_S, wait_for_ready=True)
        except grpc.RpcError as error:
            raise CriError(method=method, code=error.code().name, why=error.details()) from error

    def pull(self, image: str, username: str = "", password: str = "") -> str:
        """Pulls an image, with credentials if there are some; its reference by digest."""
        auth = cri.AuthConfig(username=username, password=password) if username else None
        request = cri.PullImageRequest(image=cri.ImageSpec(image=image), auth=auth)
        return str(self.call("Image", "PullImage", request, cri.PullImageResponse).image_ref)

    def remove_image(self, image: str) -> None:
        """Removes an image."""
        self.call("Image", "RemoveImage", cri.RemoveImageRequest(image=cri.ImageSpec(image=image)))

    def run_pod(self) -> "Pod":
        """A pod on the host's network."""
        options = cri.NamespaceOption(network=cri.NODE, pid=cri.CONTAINER)
        config = cri.PodSandboxConfig(
            metadata=cri.PodMetadata(name="pod", uid=uuid.uuid4().hex, namespace="default"),
            log_directory=str(self.logs),
            linux=cri.LinuxSandbox(security_context=cri.SandboxSecurity(namespace_options=options)),
        )
        request = cri.RunPodSandboxRequest(config=config)
        pod = self.call("Runtime", "RunPodSandbox", request, cri.PodId)
        return Pod(self, config, pod.pod_sandbox_id)


@dataclass(slots=True)
class Pod:
    """A pod; its containers are named by what it returns."""

    cri: Cri
    config: Any
    id: str
    started: int = 0

    def start(self, image: str, *command: str) -> str:
        """Starts a container that runs `command`; its ID. What it prints is in its log."""
        self.started += 1
        options = cri.NamespaceOption(network=cri.NODE, pid=cri.CONTAINER)
        config = cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name=f"c{self.started}"),
            image=cri.ImageSpec(image=image),
            command=command,
            log_path=f"{self.id}-{self.started}.log",
            linux=cri.LinuxContainer(security_context=cri.ContainerSecurity(namespace_options=options)),
        )
        request = cri.CreateContainerRequest(
            pod_sandbox_id=self.id, config=config, sandbox_config=self.config
        )
        made = self.cri.call("Runtime", "CreateContainer", request, cri.ContainerId)
        self.cri.call("Runtime", "StartContainer", made)
        return str(made.container_id)

    def log_path(self, number: int) -> Path:
        """Where what the container with that number (from 1) prints is kept."""
        return self.cri.logs / f"{self.id}-{number}.log"

    def run(self, container: str, *command: str) -> str:
        """What a command in a container prints; it must succeed. Raises `CriError`."""
        request = cri.ExecSyncRequest(container_id=container, cmd=command, timeout=60)
        done = self.cri.call("Runtime", "ExecSync", request, cri.ExecSyncResponse)
        if done.exit_code:
            why = f"{command} ended with {done.exit_code}: {bytes(done.stderr).decode(errors='replace')}"
            raise CriError(method="ExecSync", code="UNKNOWN", why=why)
        return bytes(done.stdout).decode()

    def remove(self) -> None:
        """Ends it, whatever state it is in."""
        with contextlib.suppress(CriError):
            self.cri.call("Runtime", "StopPodSandbox", cri.PodId(pod_sandbox_id=self.id))
        with contextlib.suppress(CriError):
            self.cri.call("Runtime", "RemovePodSandbox", cri.PodId(pod_sandbox_id=self.id))


def connect(address: Path, logs: Path) -> Cri:
    """A client of the containerd at that socket, which answers by now. Raises `CriError`."""
    # Its own choice of an authority for unix sockets changed between versions of gRPC.
    options = [("grpc.default_authority", "localhost")]
    client = Cri(grpc.insecure_channel(f"unix://{address}", options=options), logs)
    client.call("Runtime", "Version", cri.VersionRequest())
    return client

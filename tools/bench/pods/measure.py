"""What is measured: cold and warm starts, the calls of the snapshotter, many containers at once."""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import empty_pb2

from fuse.snapshotter import snapshots_pb2 as pb
from fuse.snapshotter.service import SERVICE
from tools.bench.origin import Origin
from tools.bench.pods.host import PodHost
from tools.bench.pods.image import FIRST_OUTPUT

CALL_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Cold:
    """A pod of an image that the host does not have. Seconds; bytes that the registry sent until then."""

    pull_s: float
    pod_s: float
    output_s: float
    origin_bytes: int

    @property
    def total_s(self) -> float:
        """From the beginning of the pull to the first output."""
        return self.pull_s + self.pod_s + self.output_s


@dataclass(frozen=True, slots=True)
class Calls:
    """Medians, in milliseconds, over so many snapshots of one image."""

    snapshots: int
    prepare_ms: float
    mounts_ms: float
    remove_ms: float


@dataclass(frozen=True, slots=True)
class Together:
    """Containers of one image that start at once. `slowest_s` to its first output.

    `unique_bytes`: what one container alone has the registry send.
    """

    containers: int
    slowest_s: float
    origin_bytes: int
    unique_bytes: int


def measure_cold(host: PodHost, origin: Origin, image: str, command: tuple[str, ...]) -> Cold:
    """Pull, pod, container, first output."""
    before = origin.sent_bytes()
    pull_s = host.pull_s(image)
    start = time.perf_counter()
    pod = host.cri.run_pod()
    pod_s = time.perf_counter() - start
    output_s = host.start_s(pod, image, command, FIRST_OUTPUT)
    pod.remove()
    return Cold(pull_s, pod_s, output_s, origin.sent_bytes() - before)


def measure_warm(host: PodHost, image: str, command: tuple[str, ...]) -> Callable[[], float]:
    """A function that starts one more container of an image that is known, and gives the seconds."""
    pod = host.cri.run_pod()
    return lambda: host.start_s(pod, image, command, FIRST_OUTPUT)


def measure_together(
    host: PodHost, origin: Origin, image: str, command: tuple[str, ...], count: int, unique_bytes: int
) -> Together:
    """`count` containers of a pod at once, on a host that does not have the image."""
    before = origin.sent_bytes()
    host.cri.pull(image)
    pods = [host.cri.run_pod() for _ in range(count)]
    start = time.perf_counter()
    with ThreadPoolExecutor(count) as workers:
        list(workers.map(lambda pod: host.start_s(pod, image, command, FIRST_OUTPUT), pods))
    slowest_s = time.perf_counter() - start
    for pod in pods:
        pod.remove()
    return Together(count, slowest_s, origin.sent_bytes() - before, unique_bytes)


def measure_calls(host: PodHost, count: int) -> Calls:
    """Prepare, Mounts and Remove of `count` snapshots of the topmost committed one."""
    options = [("grpc.default_authority", "localhost")]
    with grpc.insecure_channel(f"unix://{host.snapshotter_socket}", options=options) as channel:
        parent = _top(channel)
        keys = [f"bench/{number}" for number in range(count)]
        requests = [pb.PrepareRequest(key=key, parent=parent) for key in keys]
        prepare = [_timed(channel, "Prepare", request, pb.MountsResponse) for request in requests]
        named = [pb.KeyRequest(key=key) for key in keys]
        mounts = [_timed(channel, "Mounts", request, pb.MountsResponse) for request in named]
        remove = [_timed(channel, "Remove", request, empty_pb2.Empty) for request in named]
    medians = (statistics.median(times) * 1e3 for times in (prepare, mounts, remove))
    return Calls(count, *medians)


def _top(channel: grpc.Channel) -> str:
    rpc = channel.unary_stream(
        f"/{SERVICE}/List",
        request_serializer=pb.ListRequest.SerializeToString,
        response_deserializer=pb.ListResponse.FromString,
    )
    request = pb.ListRequest(filters=["kind==committed"])
    infos = [info for part in rpc(request, timeout=CALL_TIMEOUT_S) for info in part.info]
    parents = {info.parent for info in infos}
    return str(next(info.name for info in reversed(infos) if info.name not in parents))


def _timed(channel: grpc.Channel, method: str, request: Any, answer: Any) -> float:
    rpc = channel.unary_unary(
        f"/{SERVICE}/{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=answer.FromString,
    )
    start = time.perf_counter()
    rpc(request, timeout=CALL_TIMEOUT_S)
    return time.perf_counter() - start

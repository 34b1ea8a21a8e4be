"""A snapshotter as containerd calls it, over gRPC; a stand-in mounts images, and layers come from memory."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import empty_pb2

from backend.manifest import BLOB_ANNOTATION, BOOTSTRAP_ANNOTATION
from fuse.snapshotter import snapshots_pb2 as pb
from fuse.snapshotter.layer_labels import IMAGE_LABEL, LAYER_LABEL, MANIFEST_LABEL, PulledImage
from fuse.snapshotter.ledger import SNAPSHOT_REF
from fuse.snapshotter.mounts import OverlayOptions
from fuse.snapshotter.pull_plan import PlannedLayer, PullPlan, chain_ids
from fuse.snapshotter.records import SourceLayer
from fuse.snapshotter.service import SERVICE, start_service
from fuse.snapshotter.snapshotter import Snapshotter
from rafs.errors import NydusError

IMAGE = "reg.test/app:v1"
MANIFEST = "sha256:" + "d" * 64
DIFF_IDS = tuple(f"sha256:{number:064x}" for number in range(1, 4))
CHAIN = chain_ids(DIFF_IDS)


class Mounter:
    """Mounts a tmpfs for each image."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mounted: list[str] = []
        self.failure: Exception | None = None
        self.name: object | None = "agent 1"
        self.served: set[Path] = set()

    def identity(self) -> object | None:
        return self.name

    def wait(self, timeout_s: float) -> None:
        assert timeout_s > 0

    def mount(self, reference: str, directory: Path) -> None:
        if self.failure is not None:
            raise self.failure
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)
        (directory / "of-the-image").write_text(reference)
        os.chown(directory, 11, 12)
        self.mounted.append(reference)
        self.served.add(directory)

    def unmount(self, directory: Path) -> None:
        subprocess.run(["umount", "-l", directory], check=True)
        self.served.discard(directory)

    def mounted_digests(self) -> set[str]:
        return set()

    def serves(self, directory: Path) -> bool:
        return directory in self.served


@dataclass
class Registry:
    """Plans and layers. `plan` is for images by whose labels it is asked."""

    plans: dict[str, PullPlan] = field(default_factory=dict)
    asked: list[bool] = field(default_factory=list)
    failure: Exception | None = None
    restored: list[str] = field(default_factory=list)
    restore_failure: Exception | None = None

    def plan(self, pulled: PulledImage, is_nydus: bool) -> PullPlan:
        self.asked.append(is_nydus)
        if self.failure is not None:
            raise self.failure
        return self.plans[str(pulled.name)]

    def verify_bootstrap(self, pulled: PulledImage, plan: PullPlan) -> None:
        if plan.bootstrap_diff_id == "wrong":
            raise NydusError("its bootstrap is another one")

    def restore(self, layer: SourceLayer, lower: Sequence[Path], place: Path) -> Path:
        if self.restore_failure is not None:
            raise self.restore_failure
        self.restored.append(layer.digest)
        filled = place / "filled"
        filled.mkdir()
        (filled / f"layer-{layer.digest[-2:]}").write_text("x")
        return filled


def nydus_plan(bootstrap: str = "right") -> PullPlan:
    layers = [PlannedLayer(chain, diff) for chain, diff in zip(CHAIN, DIFF_IDS, strict=True)]
    layers[0] = PlannedLayer(CHAIN[0], DIFF_IDS[0], blob_id="a" * 64)
    layers[1] = PlannedLayer(CHAIN[1], DIFF_IDS[1], blob_id="b" * 64)
    return PullPlan(tuple(layers), f"reg.test/app@{MANIFEST}", is_nydus=True, bootstrap_diff_id=bootstrap)


def variant_plan() -> PullPlan:
    layers = [
        PlannedLayer(chain, diff, source=SourceLayer("reg.test/app@" + MANIFEST, diff, 1, diff))
        for chain, diff in zip(CHAIN, DIFF_IDS, strict=True)
    ]
    return PullPlan(tuple(layers), "reg.test/app@sha256:" + "e" * 64, is_nydus=False)


@dataclass
class Client:
    """containerd's side."""

    channel: grpc.Channel
    root: Path
    mounter: Mounter
    registry: Registry
    details: str = ""

    def call(self, method: str, request: Any, answer: Any) -> Any:
        rpc = self.channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        return rpc(request, timeout=30)

    def prepare(self, key: str, parent: str = "", method: str = "Prepare", **labels: str) -> list[Any]:
        request = pb.PrepareRequest(key=key, parent=parent, labels=labels)
        return list(self.call(method, request, pb.MountsResponse).mounts)

    def layer(self, number: int, more: dict[str, str] | None = None, *, nydus: bool = True) -> str:
        """What a Prepare of a layer is answered, by the name of its code."""
        labels = {
            SNAPSHOT_REF: CHAIN[number],
            IMAGE_LABEL: IMAGE,
            MANIFEST_LABEL: MANIFEST,
            LAYER_LABEL: DIFF_IDS[number],
        }
        if nydus:
            labels[BOOTSTRAP_ANNOTATION if number == 2 else BLOB_ANNOTATION] = "true"
        parent = self.find(number - 1) if number else ""
        request = pb.PrepareRequest(key=f"extract-{number}", parent=parent, labels=labels | (more or {}))
        return self.code("Prepare", request, pb.MountsResponse)

    def find(self, number: int) -> str:
        """The name of a layer that is there, as containerd finds it."""
        found = self.listed(f'labels."{SNAPSHOT_REF}"=={CHAIN[number]}')
        return str(found[0].name) if found else f"1/{CHAIN[number]}"

    def listed(self, *filters: str) -> list[Any]:
        rpc = self.channel.unary_stream(
            f"/{SERVICE}/List",
            request_serializer=pb.ListRequest.SerializeToString,
            response_deserializer=pb.ListResponse.FromString,
        )
        return [info for part in rpc(pb.ListRequest(filters=filters), timeout=30) for info in part.info]

    def commit(self, name: str, key: str, **labels: str) -> None:
        self.call("Commit", pb.CommitRequest(name=name, key=key, labels=labels), empty_pb2.Empty)

    def key(self, method: str, key: str, answer: Any = empty_pb2.Empty) -> Any:
        return self.call(method, pb.KeyRequest(key=key), answer)

    def code(self, method: str, request: Any, answer: Any = empty_pb2.Empty) -> str:
        """The name of the code of a call, OK when it succeeds."""
        try:
            self.call(method, request, answer)
        except grpc.RpcError as error:
            self.details = str(error.details())
            return str(error.code().name)
        return "OK"

    def directories(self) -> list[str]:
        return sorted(os.listdir(self.root / "snapshots"))


class running:
    """A snapshotter on a socket, and a client."""

    def __init__(self, root: Path, mounter: Mounter, registry: Registry, address: Path) -> None:
        self._parts = (root, mounter, registry, address)

    def __enter__(self) -> Client:
        root, mounter, registry, address = self._parts
        cache = root.parent / "cache"
        overlay = OverlayOptions(("index=off",))
        self.snapshotter = Snapshotter(root, mounter, registry, registry, cache, overlay)
        self.server = start_service(self.snapshotter, address)
        options = [("grpc.default_authority", "localhost")]
        self.channel = grpc.insecure_channel(f"unix://{address}", options=options)
        return Client(self.channel, root, mounter, registry)

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        self.server.stop(0).wait()
        self.snapshotter.close()


def options_of(mount: Any) -> dict[str, str]:
    return {name: value for name, _, value in (option.partition("=") for option in mount.options)}


@contextmanager
def served(tmp_path: Path) -> Iterator[Client]:
    """A snapshotter with stand-ins below a directory, where nothing is mounted afterwards."""
    root, mounter, registry = tmp_path / "root", Mounter(tmp_path), Registry()
    try:
        with running(root, mounter, registry, tmp_path / "s.sock") as client:
            yield client
    finally:
        unmount_below(tmp_path)


def unmount_below(directory: Path) -> None:
    """Detaches everything that is mounted below a directory."""
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        if (place := line.split()[4]).startswith(f"{directory}/"):
            subprocess.run(["umount", "-l", place], check=True)

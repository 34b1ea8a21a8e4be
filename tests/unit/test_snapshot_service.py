"""The service over gRPC, as containerd calls it; a stand-in mounts images, and layers come from memory."""

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import empty_pb2, field_mask_pb2

from backend.manifest import BLOB_ANNOTATION, BOOTSTRAP_ANNOTATION
from fuse.snapshotter import snapshots_pb2 as pb
from fuse.snapshotter.failures import SnapshotError
from fuse.snapshotter.layer_labels import IMAGE_LABEL, LAYER_LABEL, MANIFEST_LABEL, PulledImage
from fuse.snapshotter.ledger import SNAPSHOT_REF
from fuse.snapshotter.mounts import OverlayOptions
from fuse.snapshotter.pull_plan import PlannedLayer, PullPlan, chain_ids
from fuse.snapshotter.records import SourceLayer
from fuse.snapshotter.service import SERVICE, start_service
from fuse.snapshotter.snapshotter import Snapshotter
from rafs.errors import NydusError

pytestmark = [pytest.mark.needs_root]

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


@pytest.fixture(autouse=True)
def _nothing_mounted_afterwards(tmp_path: Path) -> Iterator[None]:
    yield
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        if (place := line.split()[4]).startswith(f"{tmp_path}/"):
            subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    root, mounter, registry = tmp_path / "root", Mounter(tmp_path), Registry()
    with running(root, mounter, registry, tmp_path / "s.sock") as client:
        yield client


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


# -- ordinary snapshots


def test_mounts_are_those_of_overlayfs(client: Client) -> None:
    (bind,) = client.prepare("one")
    first = client.root / "snapshots/1/fs"
    assert (bind.type, bind.source, list(bind.options)) == ("bind", str(first), ["rw", "rbind"])
    os.chown(first, 3, 4)
    client.commit("layer 1", "one")
    (overlay,) = client.prepare("two", "layer 1")
    second = client.root / "snapshots/2"
    assert (overlay.type, overlay.source) == ("overlay", "overlay")
    assert list(overlay.options) == [
        "index=off",
        f"workdir={second}/work",
        f"upperdir={second}/fs",
        f"lowerdir={first}",
    ]
    assert ((second / "fs").stat().st_uid, (second / "fs").stat().st_gid) == (3, 4)
    client.commit("layer 2", "two")
    (view,) = client.prepare("look", "layer 1", "View")
    assert (view.type, view.source, list(view.options)) == ("bind", str(first), ["ro", "rbind"])
    (both,) = client.prepare("look at both", "layer 2", "View")
    assert list(both.options) == ["index=off", f"lowerdir={second}/fs:{first}"]
    assert list(client.key("Mounts", "look at both", pb.MountsResponse).mounts) == [both]
    (nothing,) = client.prepare("empty", "", "View")
    assert list(nothing.options) == ["ro", "rbind"]


def test_the_codes_that_containerd_acts_on(client: Client) -> None:
    key = pb.KeyRequest
    assert client.code("Stat", key(key="nobody"), pb.InfoResponse) == "NOT_FOUND"
    assert client.code("Mounts", key(key="nobody"), pb.MountsResponse) == "NOT_FOUND"
    assert client.code("Usage", key(key="nobody"), pb.UsageResponse) == "NOT_FOUND"
    assert client.code("Remove", key(key="nobody")) == "NOT_FOUND"
    assert client.code("Commit", pb.CommitRequest(name="a", key="nobody")) == "NOT_FOUND"
    info = pb.UpdateRequest(info=pb.Info(name="nobody"))
    assert client.code("Update", info, pb.InfoResponse) == "NOT_FOUND"
    client.prepare("one")
    prepare = pb.PrepareRequest
    assert client.code("Prepare", prepare(key="one"), pb.MountsResponse) == "ALREADY_EXISTS"
    assert client.code("View", prepare(key="v", parent="nobody"), pb.MountsResponse) == "NOT_FOUND"
    assert client.code("View", prepare(key="v", parent="one"), pb.MountsResponse) == "INVALID_ARGUMENT"
    client.commit("base", "one")
    assert client.code("Mounts", key(key="base"), pb.MountsResponse) == "FAILED_PRECONDITION"
    client.prepare("two", "base")
    assert client.code("Commit", pb.CommitRequest(name="base", key="two")) == "ALREADY_EXISTS"
    assert client.code("Remove", key(key="base")) == "FAILED_PRECONDITION"
    assert client.code("List", pb.ListRequest(filters=["name=="]), pb.ListResponse) == "INVALID_ARGUMENT"
    mask = field_mask_pb2.FieldMask(paths=["parent"])
    update = pb.UpdateRequest(info=pb.Info(name="base"), update_mask=mask)
    assert client.code("Update", update, pb.InfoResponse) == "INVALID_ARGUMENT"
    assert len(client.directories()) == 2


def test_labels_change_as_the_mask_says(client: Client) -> None:
    client.prepare("one", a="1", b="2")

    def update(paths: list[str], **labels: str) -> dict[str, str]:
        info = pb.Info(name="one", labels=labels)
        mask = field_mask_pb2.FieldMask(paths=paths)
        answer = client.call("Update", pb.UpdateRequest(info=info, update_mask=mask), pb.InfoResponse)
        assert answer.info.updated_at.ToNanoseconds() > answer.info.created_at.ToNanoseconds()
        return dict(answer.info.labels)

    assert update(["labels.a", "labels.c"], a="9", c="3", d="4") == {"a": "9", "b": "2", "c": "3"}
    assert update(["labels.b"]) == {"a": "9", "c": "3"}
    assert update(["labels"], e="5") == {"e": "5"}
    assert update([], f="6") == {"f": "6"}


def test_lists_come_in_parts_and_are_filtered(client: Client) -> None:
    for number in range(250):
        client.prepare(f"key {number}", number=str(number % 5))
    assert len(client.listed()) == 250
    assert len(client.listed("labels.number==3")) == 50
    assert len(client.listed("labels.number==3", 'name=="key 0"')) == 51
    assert {info.kind for info in client.listed("kind==active")} == {pb.ACTIVE}


def test_usage_is_what_the_files_take(client: Client) -> None:
    (mount,) = client.prepare("one")
    (Path(mount.source) / "file").write_bytes(b"x" * 100_000)
    os.link(Path(mount.source) / "file", Path(mount.source) / "other name")
    usage = client.key("Usage", "one", pb.UsageResponse)
    assert usage.inodes == 2
    assert 100_000 <= usage.size <= 120_000
    client.commit("base", "one")
    assert client.key("Usage", "base", pb.UsageResponse) == usage


def test_what_is_removed_is_freed_by_cleanup(client: Client) -> None:
    (mount,) = client.prepare("one")
    (Path(mount.source) / "file").write_bytes(b"x")
    client.key("Remove", "one")
    assert not Path(mount.source).exists()
    client.call("Cleanup", pb.CleanupRequest(), empty_pb2.Empty)
    assert client.directories() == []


def test_one_of_many_prepares_of_a_key_wins(client: Client) -> None:
    def attempt(_: int) -> str:
        return client.code("Prepare", pb.PrepareRequest(key="same"), pb.MountsResponse)

    with ThreadPoolExecutor(16) as workers:
        codes = sorted(workers.map(attempt, range(32)))
    assert codes == ["ALREADY_EXISTS"] * 31 + ["OK"]
    assert len(client.directories()) == 1


def test_128_layers(client: Client) -> None:
    parent = ""
    for number in range(128):
        client.prepare(f"key {number}", parent)
        client.commit(f"layer {number}", f"key {number}")
        parent = f"layer {number}"
    (mount,) = client.prepare("top", parent)
    directories = options_of(mount)["lowerdir"].split(":")
    assert directories == [str(client.root / f"snapshots/{number}/fs") for number in range(128, 0, -1)]


def test_a_full_disk_leaves_nothing(client: Client) -> None:
    place = client.root / "snapshots"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=2,mode=700", "tmpfs", place], check=True)
    try:
        code = client.code("Prepare", pb.PrepareRequest(key="one"), pb.MountsResponse)
        assert (code, client.directories()) == ("RESOURCE_EXHAUSTED", [])
        assert "free some space" in client.details
        subprocess.run(["mount", "-o", "remount,nr_inodes=0", place], check=True)
        client.prepare("one")
    finally:
        subprocess.run(["umount", "-l", place], check=True)


# -- layers of images


def test_layers_of_an_image_need_no_unpacking(client: Client) -> None:
    client.registry.plans[IMAGE] = nydus_plan()
    assert [client.layer(number) for number in range(3)] == ["ALREADY_EXISTS"] * 3
    assert client.mounter.mounted == [f"reg.test/app@{MANIFEST}"]
    assert client.registry.asked == [True]
    top = client.listed(f'labels."{SNAPSHOT_REF}"=={CHAIN[2]},parent=={CHAIN[1]!r}')
    assert [(info.name, info.kind, info.parent) for info in top] == [(CHAIN[2], pb.COMMITTED, CHAIN[1])]
    (mount,) = client.prepare("container", CHAIN[2])
    lower = Path(options_of(mount)["lowerdir"])
    assert (lower / "of-the-image").exists()
    upper = Path(options_of(mount)["upperdir"]).stat()
    assert (upper.st_uid, upper.st_gid) == (11, 12)
    (view,) = client.prepare("look", CHAIN[2], "View")
    assert (view.type, view.source, list(view.options)) == ("bind", str(lower), ["ro", "rbind"])
    assert [client.layer(number) for number in range(3)] == ["ALREADY_EXISTS"] * 3
    assert len(client.listed()) == 5


def test_an_image_goes_with_its_last_snapshot(client: Client) -> None:
    client.registry.plans[IMAGE] = nydus_plan()
    for number in range(3):
        client.layer(number)
    client.prepare("container", CHAIN[2])
    assert client.code("Remove", pb.KeyRequest(key=CHAIN[2])) == "FAILED_PRECONDITION"
    for name in ("container", *reversed(CHAIN)):
        client.key("Remove", name)
    assert client.mounter.served == set()
    client.call("Cleanup", pb.CleanupRequest(), empty_pb2.Empty)
    assert client.directories() == []


@pytest.mark.logs_warning
def test_labels_that_do_not_fit_the_manifest_are_not_believed(client: Client) -> None:
    client.registry.plans[IMAGE] = nydus_plan()
    client.registry.plans["reg.test/mixed:v1"] = nydus_plan()
    other = {IMAGE_LABEL: "reg.test/mixed:v1", LAYER_LABEL: "sha256:" + "9" * 64}
    assert client.layer(0, other) == "UNAVAILABLE"
    assert "has no place in its manifest" in client.details
    assert client.layer(0, {SNAPSHOT_REF: "sha256:" + "9" * 64}) == "UNAVAILABLE"
    assert client.layer(0, {LAYER_LABEL: "sha256:" + "9" * 64}) == "UNAVAILABLE"
    assert client.listed() == []
    client.registry.plans["reg.test/other:v1"] = nydus_plan("wrong")
    assert client.layer(0, {IMAGE_LABEL: "reg.test/other:v1"}) == "UNAVAILABLE"
    assert "its bootstrap is another one" in client.details
    assert client.listed() == []
    assert client.mounter.served == set()


@pytest.mark.parametrize("value", ["", "no reference", "oci:/somewhere", "reg.test/app:v1" + "x" * 4096])
def test_a_nydus_layer_without_a_name_is_refused_with_advice(client: Client, value: str) -> None:
    assert client.layer(0, {IMAGE_LABEL: value}) == "UNAVAILABLE"
    assert "disable_snapshot_annotations" in client.details
    assert client.directories() == []


def test_ordinary_layers_are_unpacked_when_anything_is_missing(client: Client) -> None:
    client.registry.plans[IMAGE] = PullPlan((), "", is_nydus=False)
    assert client.layer(0, {MANIFEST_LABEL: ""}, nydus=False) == "OK"
    assert client.registry.asked == []
    client.key("Remove", "extract-0")
    assert client.layer(0, nydus=False) == "OK"
    client.key("Remove", "extract-0")
    assert client.layer(0, nydus=False) == "OK"
    assert client.registry.asked == [False]


@pytest.mark.parametrize("failure", [NydusError("401: not authorized"), ConnectionRefusedError("nobody")])
def test_an_ordinary_image_is_unpacked_when_its_variant_cannot_be_mounted(
    client: Client, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    client.registry.plans[IMAGE] = variant_plan()
    client.mounter.failure = failure
    assert client.layer(0, nydus=False) == "OK"
    client.commit(f"1/{CHAIN[0]}", "extract-0", **{SNAPSHOT_REF: CHAIN[0]})
    assert client.layer(1, nydus=False) == "OK"
    said = [record.getMessage() for record in caplog.records if "not mounted lazily" in record.getMessage()]
    assert len(said) == 1
    assert str(failure) in said[0]


def test_a_registry_that_refuses_half_way_makes_the_rest_ordinary(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    client.registry.plans[IMAGE] = variant_plan()
    assert client.layer(0, nydus=False) == "ALREADY_EXISTS"
    (image,) = client.mounter.served
    client.mounter.unmount(image)
    client.mounter.failure = NydusError("401: not authorized")
    request = pb.PrepareRequest(
        key="extract-1",
        parent=CHAIN[0],
        labels={SNAPSHOT_REF: CHAIN[1], IMAGE_LABEL: IMAGE, MANIFEST_LABEL: MANIFEST},
    )
    (mount,) = client.call("Prepare", request, pb.MountsResponse).mounts
    assert client.registry.restored == [DIFF_IDS[0]]
    lower = Path(options_of(mount)["lowerdir"])
    assert os.listdir(lower) == ["layer-01"]
    assert client.key("Usage", CHAIN[0], pb.UsageResponse).inodes == 2


def test_a_nydus_image_that_cannot_be_mounted_is_an_error_and_leaves_nothing(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    client.registry.plans[IMAGE] = nydus_plan()
    client.mounter.failure = NydusError("no driver works here")
    assert client.layer(0) == "UNAVAILABLE"
    assert "no driver works here" in client.details
    assert "can only be mounted" in client.details
    assert client.listed() == []


def test_a_layer_is_fetched_once_whoever_wants_it(client: Client) -> None:
    client.registry.plans[IMAGE] = variant_plan()
    for number in range(3):
        client.layer(number, nydus=False)
    with ThreadPoolExecutor(8) as workers:
        found = list(workers.map(lambda number: client.prepare(f"c{number}", CHAIN[1]), range(8)))
    assert sorted(client.registry.restored) == sorted(DIFF_IDS[:2])
    assert len({options_of(mounts[0])["lowerdir"] for mounts in found}) == 1
    client.registry.restore_failure = NydusError("connection refused")
    (image,) = client.prepare("of the image", CHAIN[2])
    assert "of-the-image" in os.listdir(options_of(image)["lowerdir"])


def test_a_layer_that_cannot_be_fetched_is_tried_again_later(client: Client) -> None:
    client.registry.plans[IMAGE] = variant_plan()
    client.layer(0, nydus=False)
    client.registry.restore_failure = NydusError("connection refused")
    request = pb.PrepareRequest(key="c", parent=CHAIN[0])
    assert client.code("Prepare", request, pb.MountsResponse) == "UNAVAILABLE"
    assert "connection refused" in client.details
    client.registry.restore_failure = None
    assert client.code("Prepare", request, pb.MountsResponse) == "OK"


def test_files_of_a_layer_that_a_killed_process_has_not_written_down_are_replaced(client: Client) -> None:
    client.registry.plans[IMAGE] = variant_plan()
    client.layer(0, nydus=False)
    (client.root / "snapshots/2/fs/half").write_text("")
    (mount,) = client.prepare("c", CHAIN[0])
    assert os.listdir(options_of(mount)["lowerdir"]) == ["layer-01"]


def test_a_blob_has_no_files(client: Client) -> None:
    client.registry.plans[IMAGE] = nydus_plan()
    client.layer(0)
    request = pb.PrepareRequest(key="c", parent=CHAIN[0])
    assert client.code("Prepare", request, pb.MountsResponse) == "FAILED_PRECONDITION"


# -- afterwards


def test_a_new_process_goes_on_and_sweeps(tmp_path: Path) -> None:
    mounter, registry, root = Mounter(tmp_path), Registry({IMAGE: nydus_plan()}), tmp_path / "root"
    with running(root, mounter, registry, tmp_path / "s.sock") as client:
        for number in range(3):
            client.layer(number)
        client.prepare("container", CHAIN[2])
        client.mounter.mount("never pulled to its end", _image_directory(client, "reg.test/b@" + MANIFEST))
    for rubbish in ("777", "removed-778"):
        (root / "snapshots" / rubbish / "fs").mkdir(parents=True)
    served = root / "snapshots/1/fs"
    for directory in list(mounter.served):
        mounter.unmount(directory)  # as a reboot does
    service = running(root, mounter, registry, tmp_path / "s.sock")
    with service as client:
        service.snapshotter.recover()
        assert mounter.served == {served}
        assert not {"777", "removed-778"} & set(client.directories())
        before = client.key("Mounts", "container", pb.MountsResponse)
        assert options_of(before.mounts[0])["lowerdir"] == str(served)
        mounter.unmount(served)


def _image_directory(client: Client, reference: str) -> Path:
    from fuse.snapshotter.ledger import Ledger

    ledger = Ledger(client.root / "snapshots.db")
    number = ledger.new_id()
    ledger.add_image(number, reference)
    ledger.close()
    directory = client.root / "snapshots" / str(number) / "fs"
    directory.mkdir(parents=True)
    return directory


@pytest.mark.logs_warning
def test_mounts_that_nobody_serves_any_more_are_made_anew(client: Client) -> None:
    client.registry.plans[IMAGE] = nydus_plan()
    for number in range(3):
        client.layer(number)
    (stale,) = client.mounter.served
    client.mounter.served.clear()
    client.mounter.name = "agent 2"
    client.prepare("container", CHAIN[2])
    assert client.mounter.mounted == [f"reg.test/app@{MANIFEST}"] * 2
    assert client.mounter.served == {stale}
    client.mounter.name = None
    client.mounter.failure = ConnectionRefusedError("connection refused")
    client.mounter.served.clear()
    request = pb.PrepareRequest(key="other", parent=CHAIN[2])
    assert client.code("Prepare", request, pb.MountsResponse) == "UNAVAILABLE"
    assert "agent does not answer" in client.details


def test_a_slow_image_keeps_nobody_waiting_but_those_who_want_it(client: Client) -> None:
    client.registry.plans[IMAGE] = nydus_plan()
    begun, go_on = threading.Event(), threading.Event()
    mount = client.mounter.mount

    def wait_and_mount(reference: str, directory: Path) -> None:
        begun.set()
        assert go_on.wait(30)
        mount(reference, directory)

    client.mounter.mount = wait_and_mount  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as workers:
        slow = workers.submit(client.layer, 0)
        assert begun.wait(30)
        client.prepare("other")
        client.commit("committed", "other")
        client.key("Remove", "committed")
        go_on.set()
        assert slow.result(30) == "ALREADY_EXISTS"


def test_a_socket_that_is_served_is_not_taken_over(client: Client, tmp_path: Path) -> None:
    other = running(tmp_path / "other", client.mounter, client.registry, tmp_path / "s.sock")
    with pytest.raises(SnapshotError, match="serves this socket already"):
        other.__enter__()
    other.snapshotter.close()
    client.prepare("still here")


def test_a_second_snapshotter_on_the_same_root_is_refused(client: Client, tmp_path: Path) -> None:
    registry: Callable[[], Registry] = Registry
    with pytest.raises(SnapshotError, match="another snapshotter uses it"):
        Snapshotter(client.root, client.mounter, registry(), registry(), tmp_path)
    shutil.rmtree(tmp_path / "nothing", ignore_errors=True)

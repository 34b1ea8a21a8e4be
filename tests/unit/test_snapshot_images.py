"""Layers of images that are mounted, and not unpacked, over gRPC."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from google.protobuf import empty_pb2

from fuse.snapshotter import snapshots_pb2 as pb
from fuse.snapshotter.layer_labels import IMAGE_LABEL, LAYER_LABEL, MANIFEST_LABEL
from fuse.snapshotter.ledger import SNAPSHOT_REF
from fuse.snapshotter.pull_plan import PullPlan
from rafs.errors import NydusError
from tests.snapshot_rig import (
    CHAIN,
    DIFF_IDS,
    IMAGE,
    MANIFEST,
    Client,
    Mounter,
    Registry,
    nydus_plan,
    options_of,
    running,
    served,
    unmount_below,
    variant_plan,
)

pytestmark = [pytest.mark.needs_root]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with served(tmp_path) as client:
        yield client


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


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory below which nothing stays mounted."""
    yield tmp_path
    unmount_below(tmp_path)


def test_a_new_process_goes_on_and_sweeps(place: Path) -> None:
    mounter, registry, root = Mounter(place), Registry({IMAGE: nydus_plan()}), place / "root"
    with running(root, mounter, registry, place / "s.sock") as client:
        for number in range(3):
            client.layer(number)
        client.prepare("container", CHAIN[2])
        client.mounter.mount("never pulled to its end", _image_directory(client, "reg.test/b@" + MANIFEST))
    for rubbish in ("777", "removed-778"):
        (root / "snapshots" / rubbish / "fs").mkdir(parents=True)
    served = root / "snapshots/1/fs"
    for directory in list(mounter.served):
        mounter.unmount(directory)  # as a reboot does
    service = running(root, mounter, registry, place / "s.sock")
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

"""Ordinary snapshots and the service itself, over gRPC."""

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from google.protobuf import empty_pb2, field_mask_pb2

from fuse.snapshotter import snapshots_pb2 as pb
from fuse.snapshotter.failures import SnapshotError
from fuse.snapshotter.snapshotter import Snapshotter
from tests.snapshot_rig import (
    Client,
    Registry,
    options_of,
    running,
    served,
)

pytestmark = [pytest.mark.needs_root]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with served(tmp_path) as client:
        yield client


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


def test_what_a_container_has_nested_deeper_than_any_path_is_freed_too(client: Client) -> None:
    (mount,) = client.prepare("one")
    here = os.open(mount.source, os.O_RDONLY)
    for _ in range(3000):  # more than Python recurses, and than PATH_MAX has room for
        os.mkdir("dd", dir_fd=here)
        deeper = os.open("dd", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    client.key("Remove", "one")
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


def test_a_socket_that_is_served_is_not_taken_over(client: Client, tmp_path: Path) -> None:
    other = running(tmp_path / "other", client.mounter, client.registry, tmp_path / "s.sock")
    with pytest.raises(SnapshotError, match="serves this socket already"):
        other.__enter__()
    other.snapshotter.close()
    client.prepare("still here")


def test_a_second_snapshotter_on_the_same_root_is_refused(client: Client, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="another snapshotter uses it"):
        Snapshotter(client.root, client.mounter, Registry(), Registry(), tmp_path)

"""The ledger: what containerd may rely on, and what a kill leaves."""

import itertools
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuse.snapshotter.failures import (
    NoRoom,
    RequestInvalid,
    RootUnusable,
    SnapshotError,
    SnapshotExists,
    SnapshotMissing,
    SnapshotUnfit,
)
from fuse.snapshotter.ledger import SNAPSHOT_REF, Ledger
from fuse.snapshotter.records import Kind, SourceLayer

SOURCE = SourceLayer("reg.test/a@sha256:" + "1" * 64, "sha256:" + "2" * 64, 9, "sha256:" + "3" * 64)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    clock = itertools.count(100)
    ledger = Ledger(tmp_path / "snapshots.db", lambda: next(clock))
    yield ledger
    ledger.close()


def committed(ledger: Ledger, name: str, parent: str = "") -> int:
    number = ledger.new_id()
    ledger.add(number, Kind.ACTIVE, f"key of {name}", parent, {})
    ledger.commit(f"key of {name}", name, {}, 10, 2)
    return number


def test_commit_replaces_labels_and_times_and_keeps_the_place(ledger: Ledger) -> None:
    committed(ledger, "base")
    ledger.add(ledger.new_id(), Kind.ACTIVE, "work", "base", {"a": "1", "empty": ""})
    before = ledger.get("work")
    assert before.labels == {"a": "1"}
    ledger.commit("work", "top", {"b": "2"}, 4096, 3)
    top = ledger.get("top")
    assert (top.id, top.kind, top.parent, top.labels) == (before.id, Kind.COMMITTED, "base", {"b": "2"})
    assert (top.size_bytes, top.inodes) == (4096, 3)
    assert top.created_ns == top.updated_ns > before.created_ns
    assert [snapshot.name for snapshot in ledger.chain("top")] == ["top", "base"]
    with pytest.raises(SnapshotMissing):
        ledger.get("work")


def test_what_cannot_be_is_refused_with_the_error_that_containerd_acts_on(ledger: Ledger) -> None:
    committed(ledger, "base")
    ledger.add(ledger.new_id(), Kind.ACTIVE, "work", "base", {})
    ledger.add(ledger.new_id(), Kind.VIEW, "look", "base", {})
    with pytest.raises(SnapshotExists):
        ledger.add(ledger.new_id(), Kind.VIEW, "work", "base", {})
    with pytest.raises(SnapshotMissing):
        ledger.add(ledger.new_id(), Kind.ACTIVE, "other", "nobody", {})
    with pytest.raises(RequestInvalid):
        ledger.add(ledger.new_id(), Kind.ACTIVE, "other", "work", {})
    with pytest.raises(SnapshotUnfit, match="children"):
        ledger.remove("base")
    with pytest.raises(SnapshotUnfit, match="not active"):
        ledger.commit("look", "name", {}, 0, 0)
    with pytest.raises(SnapshotExists):
        ledger.commit("work", "base", {}, 0, 0)
    with pytest.raises(SnapshotMissing):
        ledger.commit("nobody", "name", {}, 0, 0)
    for name in ("work", "look", "base"):
        ledger.remove(name)
    assert ledger.everything() == []
    with pytest.raises(SnapshotMissing):
        ledger.remove("base")


def test_a_layer_has_the_name_of_its_chain_id_for_each_parent(ledger: Ledger) -> None:
    committed(ledger, "one/1/base")
    ledger.add_layer(ledger.new_id(), "sha256:c0", "", {}, "ab", None, None)
    ledger.add_layer(ledger.new_id(), "sha256:c1", "sha256:c0", {"x": "y"}, "", SOURCE, None)
    ledger.add_layer(ledger.new_id(), "sha256:c1", "one/1/base", {}, "", None, None)
    layer = ledger.find_layer("sha256:c1", "sha256:c0")
    other = ledger.find_layer("sha256:c1", "one/1/base")
    assert layer
    assert other
    assert (layer.name, layer.source) == ("sha256:c1", SOURCE)
    assert layer.labels == {"x": "y", SNAPSHOT_REF: "sha256:c1"}
    assert other.name != layer.name
    assert other.labels[SNAPSHOT_REF] == "sha256:c1"
    assert ledger.find_layer("sha256:c1", "") is None
    with pytest.raises(SnapshotExists):
        ledger.add_layer(ledger.new_id(), "sha256:c1", "sha256:c0", {}, "", None, None)


def test_an_image_goes_when_nobody_needs_it(ledger: Ledger) -> None:
    image = ledger.add_image(ledger.new_id(), "reg.test/a@sha256:aa")
    assert ledger.add_image(ledger.new_id(), "reg.test/a@sha256:aa") == image
    assert image.digest == "sha256:aa"
    ledger.add_layer(ledger.new_id(), "sha256:c0", "", {}, "", None, image.id)
    assert not ledger.drop_image(image.id)
    ledger.remove("sha256:c0")
    assert ledger.drop_image(image.id)
    assert not ledger.drop_image(image.id)
    with pytest.raises(SnapshotUnfit, match="removed"):
        ledger.add_layer(ledger.new_id(), "sha256:c0", "", {}, "", None, image.id)
    assert ledger.find("sha256:c0") is None


def test_numbers_are_never_given_twice(tmp_path: Path) -> None:
    given: list[int] = []
    for _ in range(3):
        ledger = Ledger(tmp_path / "db")
        first = ledger.new_id(10)
        given += [*range(first, first + 10), ledger.new_id()]
        ledger.close()
    assert len(set(given)) == len(given) == 33


def test_labels_change_and_the_time_with_them(ledger: Ledger) -> None:
    committed(ledger, "base")
    before = ledger.get("base")
    after = ledger.relabel("base", lambda old: {**old, "a": "1", "b": ""})
    assert after.labels == {"a": "1"}
    assert after.updated_ns > before.updated_ns
    assert after.created_ns == before.created_ns
    with pytest.raises(SnapshotMissing):
        ledger.relabel("nobody", dict)


def test_a_database_of_another_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "db"
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(RootUnusable, match="another version"):
        Ledger(path)
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"not a database" * 1000)
    with pytest.raises(RootUnusable):
        Ledger(garbage)


def test_a_damaged_database_is_an_error_of_the_call(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "db")
    for number in range(200):
        ledger.add(1000 + number, Kind.ACTIVE, f"key {number}", "", {"label": "x" * 200})
    ledger.close()
    data = bytearray((tmp_path / "db").read_bytes())
    data[8192:] = b"\xa5" * (len(data) - 8192)
    (tmp_path / "db").write_bytes(data)
    ledger = Ledger(tmp_path / "db")
    with pytest.raises(SnapshotError):
        ledger.everything()
    with pytest.raises(SnapshotError):
        ledger.add(5000, Kind.ACTIVE, "another", "", {})
    ledger.close()


def test_a_full_disk_is_called_that_and_changes_nothing(ledger: Ledger) -> None:
    committed(ledger, "base")
    ledger._db.execute("PRAGMA max_page_count = 1")
    with pytest.raises(NoRoom, match="full"):
        ledger.add(1000, Kind.ACTIVE, "large", "base", {"label": "x" * 400_000})
    ledger._db.execute("PRAGMA max_page_count = 100000")
    kept = len(ledger.everything())
    ledger.add(5000, Kind.ACTIVE, "again", "base", {})
    assert len(ledger.everything()) == kept + 1


_WRITER = """
import itertools, sys
from pathlib import Path
from fuse.snapshotter.ledger import Ledger
from fuse.snapshotter.records import Kind
ledger = Ledger(Path(sys.argv[1]))
for number in itertools.count():
    identity = ledger.new_id()
    ledger.add(identity, Kind.ACTIVE, f"key {identity}", "", {"number": str(number)})
    ledger.commit(f"key {identity}", f"name {identity}", {}, 1, 1)
    print(identity, flush=True)
"""


def test_what_was_answered_before_a_kill_is_there_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "db"
    last = 0
    for wanted in (1, 5, 20):
        command = [sys.executable, "-c", _WRITER, str(path)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        ) as writer:
            assert writer.stdout is not None
            for _ in range(wanted):
                last = int(writer.stdout.readline())
            os.kill(writer.pid, signal.SIGKILL)
        ledger = Ledger(path)
        assert ledger.get(f"name {last}").kind is Kind.COMMITTED
        ledger.close()

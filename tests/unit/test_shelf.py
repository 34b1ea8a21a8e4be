"""Cache files that several mounts share, and that outlive the process that opened them."""

import os
from pathlib import Path

import pytest

from backend.cache import BlobShape
from backend.clone import clone_range
from backend.shelf import BlobShelf
from rafs.record import FormatError

SHAPE = BlobShape("a" * 64, 3 * 4096, 3)


async def test_a_blob_is_open_once_and_closed_with_its_last_user(tmp_path: Path) -> None:
    shelf = BlobShelf()
    first, second = shelf.open(tmp_path, SHAPE), shelf.open(tmp_path, SHAPE)
    assert first is second
    first.store(4096, [memoryview(b"x" * 4096)])
    first.add(1, 4096)
    shelf.close(tmp_path, first)
    assert second.is_ready(1)
    assert second.read(4096, 4096) == b"x" * 4096
    shelf.close(tmp_path, second)
    assert shelf.open(tmp_path, SHAPE) is not first


async def test_what_was_ready_but_not_marked_is_left_to_the_successor(tmp_path: Path) -> None:
    dead = BlobShelf().open(tmp_path, SHAPE)
    dead.store(0, [memoryview(b"y" * 4096)])
    dead.add(0, 4096)
    descriptors = tuple(os.dup(descriptor) for descriptor in dead.descriptors)
    # As after SIGKILL: nothing was flushed, nothing closed.
    assert len(descriptors) == 3
    shelf = BlobShelf({BlobShelf.key(tmp_path, SHAPE): (descriptors[0], descriptors[1], descriptors[2])})
    adopted = shelf.open(tmp_path, SHAPE)
    assert [adopted.is_ready(number) for number in range(3)] == [True, False, False]
    assert adopted.read(0, 4096) == b"y" * 4096
    await adopted.flush()
    other = BlobShelf().open(tmp_path, SHAPE)
    assert other.is_ready(0)
    for blob in (adopted, other, dead):
        blob.close()


async def test_completeness_is_told_once_the_last_chunk_is_ready(tmp_path: Path) -> None:
    blob = BlobShelf().open(tmp_path, SHAPE)
    told: list[int] = []
    blob.on_complete.append(lambda: told.append(blob.ready_count()))
    for number in (2, 0, 0):
        blob.add(number, 4096)
    assert told == []
    assert not blob.is_complete()
    blob.add(1, 4096)
    assert told == [3]
    await blob.flush()
    assert blob.is_complete()
    await blob.forget([1])
    assert not blob.is_complete()
    assert blob.epoch == 1
    blob.close()


@pytest.mark.logs_warning
async def test_a_file_that_was_shortened_is_not_taken_over(tmp_path: Path) -> None:
    dead = BlobShelf().open(tmp_path, SHAPE)
    os.ftruncate(dead.descriptor, 4096)
    one, two, three = dead.descriptors
    shelf = BlobShelf({BlobShelf.key(tmp_path, SHAPE): (one, two, three)})
    with pytest.raises(FormatError):
        shelf.open(tmp_path, SHAPE)
    dead.close()


def test_a_clone_has_the_range_and_its_exact_size(tmp_path: Path) -> None:
    content = os.urandom(3 * 4096 + 17)
    (tmp_path / "source").write_bytes(content)
    source = os.open(tmp_path / "source", os.O_RDONLY)
    target = tmp_path / "files" / "clone"
    assert clone_range(source, 4096, 4096 + 17, target, copies=True)
    assert target.read_bytes() == content[4096 : 2 * 4096 + 17]
    assert target.stat().st_mode & 0o777 == 0o600
    os.close(source)


def test_a_clone_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 5000)
    source = os.open(tmp_path / "source", os.O_RDONLY)
    with pytest.raises(OSError, match="too early"):
        clone_range(source, 4096, 1 << 20, tmp_path / "files" / "clone", copies=True)
    assert list((tmp_path / "files").iterdir()) == []
    os.close(source)

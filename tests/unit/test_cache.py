"""The decoded cache files: what is ready, what is marked, and what is thrown away."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backend.cache import OVERFLOW_BYTES, BlobCache, BlobShape, CacheUnusable
from backend.chunkmap import ChunkMap

SHAPE = BlobShape("ab" * 32, 40960, 10)


def data_path(tmp_path: Path) -> Path:
    return tmp_path / "blobs" / f"{SHAPE.blob_id}.blob.data"


def map_path(tmp_path: Path) -> Path:
    return tmp_path / "blobs" / f"{SHAPE.blob_id}.blob.data.chunk_map"


async def test_stored_chunk_is_ready_at_once_and_marked_by_the_flush(tmp_path: Path) -> None:
    blob = BlobCache(tmp_path).open(SHAPE)
    other = BlobCache(tmp_path).open(SHAPE)
    blob.store(4096, [memoryview(b"x" * 4096)])
    blob.add(1, 4096)
    assert blob.is_ready(1)
    assert blob.unmarked_bytes == 4096
    assert bytes(blob.view(4096, 3)) == b"xxx"
    assert not other.is_ready(1)
    await blob.flush()
    assert blob.unmarked_bytes == 0
    assert blob.is_ready(1)
    assert other.is_ready(1)
    assert bytes(other.view(4096, 3)) == b"xxx"
    assert blob.usage_bytes() == 4096
    blob.close()
    blob.close()
    other.close()


async def test_forgotten_chunk_is_absent_everywhere(tmp_path: Path) -> None:
    blob, other = BlobCache(tmp_path).open(SHAPE), BlobCache(tmp_path).open(SHAPE)
    blob.add(1, 4096)
    await blob.flush()
    blob.add(2, 4096)
    await blob.forget([1, 2])
    assert [blob.is_ready(i) for i in (1, 2)] == [False, False]
    assert not other.is_ready(1)
    assert (blob.unmarked_bytes, blob.ready_count()) == (0, 0)
    blob.close()
    other.close()


async def test_data_is_durable_before_its_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: events.append("data"))
    monkeypatch.setattr(ChunkMap, "add", lambda self, indexes: events.append("bits"))
    blob = BlobCache(tmp_path).open(SHAPE)
    blob.add(0, 4096)
    await blob.flush()
    assert events == ["data", "bits"]
    blob.close()


@pytest.mark.logs_warning
async def test_chunks_that_the_disk_lost_are_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    blob = BlobCache(tmp_path).open(SHAPE)
    blob.add(0, 4096)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        await blob.flush()
    assert not blob.is_ready(0)
    blob.close()


def test_store_goes_on_where_the_kernel_has_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pwritev(2) may write less than it was given, also in the middle of a part."""
    blob = BlobCache(tmp_path).open(SHAPE)
    parts = [memoryview(bytes([65 + number]) * size) for number, size in enumerate((4000, 96, 1, 5000))]

    def some(fd: int, buffers: list[memoryview], offset: int) -> int:
        return os.pwrite(fd, b"".join(buffers)[:3000], offset)

    monkeypatch.setattr(os, "pwritev", some)
    blob.store(4096, parts)
    whole = b"".join(parts)
    assert bytes(blob.read(4096, len(whole))) == whole
    blob.close()


KILLED = """
import os, sys
from pathlib import Path
import trio
from backend.cache import BlobCache, BlobShape
blob = BlobCache(Path(sys.argv[1])).open(BlobShape("ab" * 32, 40960, 10))
async def main():
    blob.store(0, [memoryview(b"a" * 4096)])
    blob.add(0, 4096)
    await blob.flush()
    blob.store(4096, [memoryview(b"b" * 4096)])
    blob.add(1, 4096)
    os.kill(os.getpid(), 9)
trio.run(main)
"""


def test_kill_leaves_only_whole_chunks_marked(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path], cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == -9
    blob = BlobCache(tmp_path).open(SHAPE)
    assert [blob.is_ready(i) for i in range(3)] == [True, False, False]
    assert bytes(blob.view(0, 4096)) == b"a" * 4096
    blob.close()


async def _fill(tmp_path: Path) -> None:
    blob = BlobCache(tmp_path).open(SHAPE)
    blob.store(0, [memoryview(b"a" * 4096)])
    blob.add(0, 4096)
    await blob.flush()
    blob.close()


@pytest.mark.logs_warning
@pytest.mark.parametrize("size", [0, 100, 40959, 40961])
async def test_data_file_of_a_wrong_size_is_made_anew(tmp_path: Path, size: int) -> None:
    await _fill(tmp_path)
    os.truncate(data_path(tmp_path), size)
    blob = BlobCache(tmp_path).open(SHAPE)
    assert not blob.is_ready(0)
    assert data_path(tmp_path).stat().st_size == 40960
    blob.close()


async def test_map_is_not_trusted_without_its_data_file(tmp_path: Path) -> None:
    await _fill(tmp_path)
    data_path(tmp_path).unlink()
    blob = BlobCache(tmp_path).open(SHAPE)
    assert not blob.is_ready(0)
    blob.close()


@pytest.mark.logs_warning
async def test_map_is_not_trusted_beside_an_empty_data_file(tmp_path: Path) -> None:
    await _fill(tmp_path)
    data_path(tmp_path).write_bytes(b"")
    os.truncate(data_path(tmp_path), 40960)
    blob = BlobCache(tmp_path).open(SHAPE)
    assert not blob.is_ready(0)
    blob.close()


@pytest.mark.logs_warning
async def test_foreign_map_is_made_anew_and_old_users_keep_theirs(tmp_path: Path) -> None:
    await _fill(tmp_path)
    user = BlobCache(tmp_path).open(SHAPE)
    map_path(tmp_path).rename(tmp_path / "old")
    map_path(tmp_path).write_bytes(b"\xff" * 4098)
    blob = BlobCache(tmp_path).open(SHAPE)
    assert not blob.is_ready(0)
    assert user.is_ready(0)
    blob.close()
    user.close()


@pytest.mark.logs_warning
async def test_full_disk_is_told_once_and_memory_is_bounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blob = BlobCache(tmp_path).open(SHAPE)
    full = OSError(errno.ENOSPC, "No space left on device")
    half = bytes(OVERFLOW_BYTES // 2)
    for index in range(3):
        blob.add_unstored(index, half, full)
    assert [blob.unstored(i) is None for i in range(3)] == [True, False, False]
    assert not blob.is_ready(2)
    assert caplog.text.count("No space left on device") == 1
    blob.add(2, len(half))
    assert blob.unstored(2) is None
    blob.close()


def test_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheUnusable, match="Not a directory"):
        BlobCache(tmp_path / "file")

"""Reads that do not stop the loop for a disk."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.peers.page_cache import PageCache, is_cached, read_cached
from backend.peers.server_counters import ServerCounters

SIZE = (1 << 20) + 100


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    number = os.open(path, os.O_RDONLY)
    yield number
    os.close(number)


def _cool(descriptor: int) -> None:
    """Puts the file out of memory."""
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    if is_cached(descriptor, 0, SIZE):
        pytest.skip("this file system keeps its files in memory")


def test_what_is_in_memory_is_read_at_once(descriptor: int) -> None:
    buffer = bytearray(1000)
    assert is_cached(descriptor, 0, SIZE)
    assert read_cached(descriptor, memoryview(buffer), 77)
    assert buffer == os.pread(descriptor, 1000, 77)
    assert not read_cached(descriptor, memoryview(buffer), SIZE - 999)


async def test_what_is_on_disk_is_brought_in(descriptor: int) -> None:
    counters = ServerCounters()
    pages = PageCache(1, counters)
    _cool(descriptor)
    await pages.read_in(descriptor, 0, SIZE)
    assert is_cached(descriptor, 0, 1 << 20)
    assert counters.cold_reads == 1


async def test_a_cold_read_has_the_bytes_of_the_file(descriptor: int) -> None:
    counters = ServerCounters()
    pages = PageCache(1, counters)
    _cool(descriptor)
    buffer = bytearray(300000)
    await pages.fill(descriptor, memoryview(buffer), 99)
    await pages.fill(descriptor, memoryview(buffer), 99)
    assert bytes(buffer) == os.pread(descriptor, 300000, 99)
    assert counters.cold_reads == 1


async def test_the_end_of_a_file_is_an_error(descriptor: int) -> None:
    pages = PageCache(1, ServerCounters())
    with pytest.raises(EOFError):
        await pages.fill(descriptor, memoryview(bytearray(101)), SIZE - 100)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            is_cached(descriptor, 0, 1)
        with pytest.raises(OSError, match="Bad file descriptor"):
            read_cached(descriptor, memoryview(bytearray(1)), 0)
    finally:
        os.close(descriptor)

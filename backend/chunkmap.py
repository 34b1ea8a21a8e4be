"""Which chunks of a decoded cache file are there: the presence bitmap `<id>.blob.data.chunk_map`.

The file is the one of nydusd (docs/format.md, "Node cache state"): a header of 4096 bytes, then one bit for
each chunk, most significant bit first. All processes that use a cache directory map it, so a bit that one
of them sets is seen by the others at once; bits are changed under flock, because two processes may change
the same byte. The file is never shortened or written anew in place: whoever finds it broken replaces it.
"""

import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from rafs.record import Buffer, FormatError, expect, take


@dataclass(frozen=True, slots=True)
class ChunkMapHeader:
    """The first 4096 bytes. `all_ready` says that every bit is set."""

    all_ready: bool
    version: int = 1

    SIZE: ClassVar[int] = 4096
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<IIII4080s")
    MAGIC: ClassVar[int] = 0x424D4150
    MAGIC_SECOND: ClassVar[int] = 0x434D4150
    MAGIC_ALL_READY: ClassVar[int] = 0x4D4D4150
    ALL_READY_OFFSET: ClassVar[int] = 12

    def pack(self) -> bytes:
        """The 4096 bytes; `reserved` is zero."""
        ready = self.MAGIC_ALL_READY if self.all_ready else 0
        return self.LAYOUT.pack(self.MAGIC, self.version, self.MAGIC_SECOND, ready, bytes(4080))

    @classmethod
    def unpack(cls, data: Buffer) -> Self:
        """Reads the header; raises `FormatError` for another file. Reserved bytes are not looked at."""
        name = "chunk map"
        magic, version, second, ready, _ = cls.LAYOUT.unpack(take(data, 0, cls.SIZE, name))
        expect(magic == cls.MAGIC, name, 0, f"magic {cls.MAGIC:#x}, found {magic:#x}")
        expect(version in (0, 1), name, 4, f"version 0 or 1, found {version}")
        expect(second == cls.MAGIC_SECOND, name, 8, f"magic {cls.MAGIC_SECOND:#x}, found {second:#x}")
        return cls(ready == cls.MAGIC_ALL_READY, version)


assert ChunkMapHeader.LAYOUT.size == ChunkMapHeader.SIZE


class ChunkMap:
    """The mapped bitmap of one blob.

    Reading a bit costs no system call. Changing bits takes a file lock and may wait for other processes:
    do it in a thread.
    """

    def __init__(self, file_descriptor: int, chunk_count: int) -> None:
        """Takes over `file_descriptor`; raises `FormatError` when it is not a map of `chunk_count` chunks."""
        self.chunk_count = chunk_count
        self._fd = file_descriptor
        size = os.fstat(file_descriptor).st_size
        expected = map_size(chunk_count)
        expect(size == expected, "chunk map", 0, f"{expected} bytes for {chunk_count} chunks, found {size}")
        # Read through the mapping, written by pwrite: a store into a mapping kills us when the disk is full.
        self._bits = mmap.mmap(file_descriptor, size, prot=mmap.PROT_READ)
        try:
            ChunkMapHeader.unpack(memoryview(self._bits)[: ChunkMapHeader.SIZE].tobytes())
            self._check_padding()
        except FormatError:
            self._bits.close()
            raise

    @classmethod
    def open(cls, path: Path, chunk_count: int) -> Self:
        """Maps the file at `path`. Raises `FileNotFoundError`, or `FormatError` when it is no such map."""
        return cls._take_over(os.open(path, os.O_RDWR | os.O_CLOEXEC), chunk_count)

    @classmethod
    def create(cls, path: Path, chunk_count: int) -> Self:
        """Puts an empty map at `path`; it gets its name when it is whole. An older file there is replaced."""
        fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, ChunkMapHeader(all_ready=False).pack())
            os.posix_fallocate(fd, 0, map_size(chunk_count))
            os.fsync(fd)
            os.rename(fresh, path)
        except BaseException:
            os.close(fd)
            fresh.unlink(missing_ok=True)
            raise
        return cls._take_over(fd, chunk_count)

    @classmethod
    def _take_over(cls, fd: int, chunk_count: int) -> Self:
        try:
            return cls(fd, chunk_count)
        except BaseException:
            os.close(fd)
            raise

    @property
    def descriptor(self) -> int:
        """The file, for a successor of this process."""
        return self._fd

    def close(self) -> None:
        """Unmaps the file. Twice is harmless."""
        if not self._bits.closed:
            self._bits.close()
            os.close(self._fd)

    def __contains__(self, index: int) -> bool:
        return self._bits[4096 + (index >> 3)] & (0x80 >> (index & 7)) != 0

    def count(self) -> int:
        """How many bits are set."""
        return int.from_bytes(self._bits[ChunkMapHeader.SIZE :]).bit_count()

    def is_complete(self) -> bool:
        """Whether the header says that every chunk is there."""
        at = ChunkMapHeader.ALL_READY_OFFSET
        return int.from_bytes(self._bits[at : at + 4], "little") == ChunkMapHeader.MAGIC_ALL_READY

    def add(self, indexes: Collection[int]) -> None:
        """Sets bits. The data of these chunks must be durable before. Raises `OSError`."""
        with self._locked():
            self._change(indexes, lambda byte, bit: byte | bit)
            if self.count() == self.chunk_count:
                self._write_all_ready(ChunkMapHeader.MAGIC_ALL_READY)

    def remove(self, indexes: Collection[int]) -> None:
        """Clears bits, and the mark that all are set before any of them. Raises `OSError`."""
        with self._locked():
            self._write_all_ready(0)
            self._change(indexes, lambda byte, bit: byte & ~bit)

    def _change(self, indexes: Collection[int], operation: Callable[[int, int], int]) -> None:
        if not indexes:
            return
        first, last = (ChunkMapHeader.SIZE + (index >> 3) for index in (min(indexes), max(indexes)))
        part = bytearray(self._bits[first : last + 1])
        for index in indexes:
            at = ChunkMapHeader.SIZE + (index >> 3) - first
            part[at] = operation(part[at], 0x80 >> (index & 7))
        os.pwrite(self._fd, part, first)

    def _write_all_ready(self, value: int) -> None:
        os.pwrite(self._fd, value.to_bytes(4, "little"), ChunkMapHeader.ALL_READY_OFFSET)

    def _check_padding(self) -> None:
        spare = -self.chunk_count % 8
        if spare and self._bits[-1] & ((1 << spare) - 1):
            raise FormatError("chunk map", len(self._bits) - 1, f"no bit past chunk {self.chunk_count - 1}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)


def map_size(chunk_count: int) -> int:
    """Bytes of the map file of a blob with that many chunks."""
    return ChunkMapHeader.SIZE + (chunk_count + 7) // 8

"""A hash table in a file: digests and their addresses, for images whose chunks do not fit in memory."""

import os
import struct
from pathlib import Path

_SLOT = struct.Struct("<32sQ")
_BUCKET_SIZE = 4096
_SLOTS = _BUCKET_SIZE // _SLOT.size
_EMPTY = bytes(32)
_FIRST_BITS = 14

assert _SLOT.size == 40


class DigestFile:
    """Buckets of one block each, chosen by the leading bits of the digest, which is as random as a hash.

    Reads and writes go through the page cache rather than a map, so that the table is no part of the
    process's memory. When half of the slots are taken, or a bucket is full, the number of buckets doubles.
    """

    def __init__(self, path: Path) -> None:
        """Creates `path` anew; an interrupted build may have left one there."""
        self._path = path
        self._bits = _FIRST_BITS
        self._count = 0
        self._fd = _create(path, self._bits)

    def __len__(self) -> int:
        return self._count

    def get(self, digest: bytes) -> int | None:
        """The address of a digest, or None."""
        bucket, at = self._find(digest)
        return None if at < 0 else int.from_bytes(bucket[at + 32 : at + 40], "little")

    def add(self, digest: bytes, address: int) -> bool:
        """Adds a digest; says whether it was new, and leaves a known one as it is."""
        bucket, at = self._find(digest)
        if at >= 0:
            return False
        free = _find_slot(bucket, _EMPTY)
        if free < 0 or self._count * 2 >= _SLOTS << self._bits:
            self._grow()
            return self.add(digest, address)
        os.pwrite(self._fd, _SLOT.pack(digest, address), self._offset(digest) + free)
        self._count += 1
        return True

    def replace(self, digest: bytes, address: int) -> None:
        """Gives a known digest another address; raises `KeyError` for an unknown one."""
        _, at = self._find(digest)
        if at < 0:
            raise KeyError(digest)
        os.pwrite(self._fd, address.to_bytes(8, "little"), self._offset(digest) + at + 32)

    def close(self) -> None:
        """Removes the file."""
        os.close(self._fd)
        self._path.unlink(missing_ok=True)  # the whole work directory may be gone by now

    def _offset(self, digest: bytes) -> int:
        return (int.from_bytes(digest[:8], "big") >> (64 - self._bits)) * _BUCKET_SIZE

    def _find(self, digest: bytes) -> tuple[bytes, int]:
        bucket = os.pread(self._fd, _BUCKET_SIZE, self._offset(digest))
        return bucket, _find_slot(bucket, digest)

    def _grow(self) -> None:
        """Splits every bucket in two by the next bit."""
        grown_path = self._path.with_suffix(".grown")
        grown = _create(grown_path, self._bits + 1)
        byte, bit = divmod(self._bits, 8)
        for number in range(1 << self._bits):
            halves = (bytearray(), bytearray())
            bucket = os.pread(self._fd, _BUCKET_SIZE, number * _BUCKET_SIZE)
            for at in range(0, _SLOTS * _SLOT.size, _SLOT.size):
                slot = bucket[at : at + _SLOT.size]
                if slot[:32] == _EMPTY:
                    break
                halves[slot[byte] >> (7 - bit) & 1].extend(slot)
            for half, slots in enumerate(halves):
                if slots:
                    os.pwrite(grown, slots, (2 * number + half) * _BUCKET_SIZE)
        os.close(self._fd)
        os.rename(grown_path, self._path)
        self._fd, self._bits = grown, self._bits + 1


def _create(path: Path, bits: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, _BUCKET_SIZE << bits)
    return fd


def _find_slot(bucket: bytes, key: bytes) -> int:
    """Offset of the slot with that key, or -1. A match across two slots is none."""
    at = bucket.find(key)
    while at >= 0 and (at % _SLOT.size or at >= _SLOTS * _SLOT.size):
        at = bucket.find(key, at + 1)
    return at

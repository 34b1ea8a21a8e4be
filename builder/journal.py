"""What makes an interrupted build cheap to repeat: the encoded extents so far, found again by what they hold.

A build appends encoded extents to `N.blob` in its work directory and a record of each to `N.journal`. The
next build of the same source finds the records by key and copies encoded bytes instead of compressing again.
A record is trusted only if the bytes it points to have the checksum that it names, so a torn write costs
time, not data.
"""

import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar

import blake3
import xxhash

from builder.options import BuildOptions
from rafs.errors import NydusError

_HEADER = struct.Struct("<8s32s")
_RECORD = struct.Struct("<32sQIIQ")
_MAGIC = b"NYDJRNL1"
_BUFFER_SIZE = 16 * _RECORD.size
"""So few, because a killed build loses the records that it did not hand to the kernel."""

assert _HEADER.size == 40
assert _RECORD.size == 56


class BuildRunning(NydusError):
    """Two builds in one work directory would overwrite each other."""

    message = (
        "{directory}: another build is using this work directory; wait for it or give another --work-dir"
    )
    exit_code: ClassVar[int] = 53


@dataclass(frozen=True, slots=True)
class StoredExtent:
    """Where a finished extent's encoded bytes are. Sizes and offset in bytes."""

    offset: int
    encoded_size: int
    decoded_size: int
    checksum: int


def extent_key(digests: bytes, options: BuildOptions) -> bytes:
    """Identity of an extent's encoded bytes: the digests of its chunks and what shapes the encoding."""
    shape = f"{options.compression.value} {options.level} {options.digester.value}".encode()
    return blake3.blake3(digests + shape).digest()


class WorkDirectory:
    """The directory of one build: locked, with at most one earlier, interrupted generation to take extents
    from.
    """

    def __init__(self, path: Path) -> None:
        """Creates and locks `path`. Raises `BuildRunning` when another process holds it."""
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise BuildRunning(directory=path) from None
        self._finished: dict[bytes, StoredExtent] = {}
        self._old: BinaryIO | None = None
        self._generation = self._adopt_old()

    @property
    def blob_path(self) -> Path:
        """The blob file of this build."""
        return self.path / f"{self._generation}.blob"

    @property
    def journal_path(self) -> Path:
        """The journal of this build."""
        return self.path / f"{self._generation}.journal"

    @property
    def extents_found(self) -> int:
        """How many finished extents the interrupted build left."""
        return len(self._finished)

    def find(self, key: bytes) -> bytes | None:
        """Encoded bytes of a finished extent with their decoded size proved by checksum, or None."""
        stored = self._finished.get(key)
        if stored is None or self._old is None:
            return None
        encoded = os.pread(self._old.fileno(), stored.encoded_size, stored.offset)
        if xxhash.xxh3_64_intdigest(encoded) != stored.checksum:
            del self._finished[key]
            return None
        return encoded

    def close(self) -> None:
        """Unlocks; files stay for the next build."""
        if self._old is not None:
            self._old.close()
            self._old = None
        os.close(self._lock)

    def _adopt_old(self) -> int:
        """Loads the richest journal, removes the others, and returns the number of the new generation."""
        generations = sorted(int(p.stem) for p in self.path.glob("*.journal") if p.stem.isdigit())
        best: dict[bytes, StoredExtent] = {}
        chosen = None
        for generation in generations:
            found = _load(self.path / f"{generation}.journal", self.path / f"{generation}.blob")
            if len(found) > len(best):
                best, chosen = found, generation
        for path in self.path.iterdir():
            if path.name not in ("lock", f"{chosen}.journal", f"{chosen}.blob"):
                path.unlink()
        if chosen is not None:
            self._finished = best
            self._old = (self.path / f"{chosen}.blob").open("rb")
        return generations[-1] + 1 if generations else 0


class JournalWriter:
    """Appends records; each is written after the bytes it describes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=_BUFFER_SIZE)
        self._file.write(_HEADER.pack(_MAGIC, bytes(32)))
        self._file.flush()

    def append(self, key: bytes, offset: int, encoded_size: int, decoded_size: int, checksum: int) -> None:
        """Adds one record to the buffer."""
        self._file.write(_RECORD.pack(key, offset, encoded_size, decoded_size, checksum))

    def flush(self) -> None:
        """Hands the records to the kernel, where they outlive this process."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._file.close()


def _load(journal: Path, blob: Path) -> dict[bytes, StoredExtent]:
    try:
        raw, size = journal.read_bytes(), blob.stat().st_size
    except OSError:
        return {}
    if len(raw) < _HEADER.size or _HEADER.unpack_from(raw)[0] != _MAGIC:
        return {}
    whole = len(raw) - (len(raw) - _HEADER.size) % _RECORD.size
    found = {}
    for key, offset, encoded_size, decoded_size, checksum in _RECORD.iter_unpack(raw[_HEADER.size : whole]):
        if offset + encoded_size <= size:
            found[key] = StoredExtent(offset, encoded_size, decoded_size, checksum)
    return found

"""What makes an interrupted build cheap to repeat: the encoded extents so far, found again by what they hold.

A build appends encoded extents to `N.blob` in its work directory and a record of each to `N.journal`. The
next build of the same source finds the records by key and copies encoded bytes instead of compressing again.
A record is trusted only if the bytes it points to have the checksum that it names, so a torn write costs
time, not data.
"""

import contextlib
import fcntl
import os
import struct
from pathlib import Path
from typing import ClassVar

import blake3
import xxhash

from builder.digest_file import DigestFile
from builder.options import BuildOptions
from rafs.errors import NydusError

_HEADER = struct.Struct("<8s32s")
_RECORD = struct.Struct("<32sQIIQ")
_MAGIC = b"NYDJRNL1"
_LOCK_NAME = "lock"
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


def extent_key(digests: bytes, options: BuildOptions) -> bytes:
    """Identity of an extent's encoded bytes: the digests of its chunks and what shapes the encoding."""
    shape = f"{options.compression.value} {options.level} {options.digester.value}".encode()
    return blake3.blake3(digests + shape).digest()


class _OldExtents:
    """The extents of an interrupted build: journal and blob as it left them, and an index in a file."""

    def __init__(self, directory: Path, generation: int) -> None:
        """Raises `FileNotFoundError` for a journal without its blob, `ValueError` when the journal is none,
        `OSError` when there is no room for the index.
        """
        self.names = [f"{generation}.{kind}" for kind in ("journal", "blob", "found")]
        journal, blob, index = (directory / name for name in self.names)
        with contextlib.ExitStack() as stack:
            self._journal = stack.enter_context(journal.open("rb"))
            self._blob = stack.enter_context(blob.open("rb"))
            header = self._journal.read(_HEADER.size)
            if len(header) < _HEADER.size or _HEADER.unpack(header)[0] != _MAGIC:
                raise ValueError(f"{journal} is no journal")
            self._index = DigestFile(index)
            stack.callback(self._index.close)
            self._load(os.fstat(self._blob.fileno()).st_size)
            self._open = stack.pop_all()

    def __len__(self) -> int:
        return len(self._index)

    def find(self, key: bytes) -> bytes | None:
        """Encoded bytes with the checksum that their record names, or None."""
        at = self._index.get(key)
        if at is None:
            return None
        _, offset, encoded_size, _, checksum = _RECORD.unpack(
            os.pread(self._journal.fileno(), _RECORD.size, at)
        )
        encoded = os.pread(self._blob.fileno(), encoded_size, offset)
        return encoded if xxhash.xxh3_64_intdigest(encoded) == checksum else None

    def close(self) -> None:
        """Removes the index; journal and blob stay."""
        self._open.close()

    def _load(self, blob_size: int) -> None:
        at = _HEADER.size
        while len(record := self._journal.read(_RECORD.size)) == _RECORD.size:
            key, offset, encoded_size, _, _ = _RECORD.unpack(record)
            if offset + encoded_size <= blob_size and not self._index.add(key, at):
                self._index.replace(key, at)  # the last one, should a torn write have left others
            at += _RECORD.size


def is_in_use(work_dir: Path) -> bool:
    """Whether a build has that work directory now; not where there is none."""
    try:
        lock = os.open(work_dir / _LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


class WorkDirectory:
    """The directory of one build: locked, with at most one earlier, interrupted generation to take extents
    from.
    """

    def __init__(self, path: Path) -> None:
        """Creates and locks `path`. Raises `BuildRunning` when another process holds it."""
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise BuildRunning(directory=path) from None
        self._old: _OldExtents | None = None
        try:
            self._generation = self._adopt_old()
        except BaseException:  # such as a full disk, which is no reason to lose what an earlier build did
            self.close()
            raise

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
        return len(self._old) if self._old is not None else 0

    def find(self, key: bytes) -> bytes | None:
        """Encoded bytes of a finished extent, proved by checksum, or None."""
        return self._old.find(key) if self._old is not None else None

    def close(self) -> None:
        """Unlocks; files stay for the next build."""
        if self._old is not None:
            self._old.close()
            self._old = None
        os.close(self._lock)

    def _adopt_old(self) -> int:
        """Opens the richest journal, removes the others, and returns the number of the new generation."""
        generations = sorted(int(p.stem) for p in self.path.glob("*.journal") if p.stem.isdigit())
        for generation in generations:
            try:
                found = _OldExtents(self.path, generation)
            except (FileNotFoundError, ValueError):
                continue
            poorer: _OldExtents | None = found
            if len(found) > self.extents_found:
                poorer, self._old = self._old, found
            if poorer is not None:
                poorer.close()
        kept = ["lock", *(self._old.names if self._old is not None else ())]
        for path in self.path.iterdir():
            if path.name not in kept:
                path.unlink()
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

"""Where on this host a chunk lies decoded, by its digest: a file of fixed size, shared by all processes.

A hash table of buckets of one read each. What it says is a hint and never the truth: whoever follows it
looks at the presence bit and compares the digest of the bytes. So nothing has to be locked, flushed or
repaired: an entry that was lost, torn by two writers or overwritten by garbage is a chunk that is fetched.
A bucket keeps its newest entries in order, a full one loses its oldest (decision 008).

It is read with pread, not through a mapping: a mapping of a file that somebody shortens, or whose disk
fails, kills the process.

Concurrency: any number of threads and processes may read and add at once.
"""

import logging
import os
import struct
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import msgspec
import xxhash

from rafs.digest import Digester
from rafs.record import BLOCK_SIZE, Buffer, FormatError, expect, take

log = logging.getLogger(__name__)

INDEX_NAME = "chunks.index"
BUCKETS = 1 << 17
"""At 8 entries each: a million chunks in 32 MiB."""
BUCKET_ENTRIES = 8
TAG_SIZE = 8


class ChunkPlace(msgspec.Struct, frozen=True):
    """A decoded chunk: the key of its blob (`blob_key`), its number, its byte offset in the cache file."""

    blob_key: int
    chunk: int
    offset: int


def blob_key(blob_id: str) -> int:
    """The 64 bits that stand for a blob in the index."""
    return xxhash.xxh3_64_intdigest(blob_id.encode())


@dataclass(frozen=True, slots=True)
class IndexHeader:
    """The first 4096 bytes of the file."""

    buckets: int

    SIZE: ClassVar[int] = 4096
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<8sII4080s")
    MAGIC: ClassVar[bytes] = b"NPYCHIX1"

    def pack(self) -> bytes:
        """The 4096 bytes; `reserved` is zero."""
        return self.LAYOUT.pack(self.MAGIC, self.buckets, BUCKET_ENTRIES, bytes(4080))

    @classmethod
    def unpack(cls, data: Buffer) -> Self:
        """Reads the header; raises `FormatError` for another file. Reserved bytes are not looked at."""
        name = "chunk index"
        magic, buckets, entries, _ = cls.LAYOUT.unpack(take(data, 0, cls.SIZE, name))
        expect(magic == cls.MAGIC, name, 0, f"magic {cls.MAGIC!r}, found {magic!r}")
        expect(buckets > 0, name, 8, "a bucket")
        expect(entries == BUCKET_ENTRIES, name, 12, f"{BUCKET_ENTRIES} entries a bucket, found {entries}")
        return cls(buckets)


assert IndexHeader.LAYOUT.size == IndexHeader.SIZE

ENTRY = struct.Struct("<8sQII")
"""Tag (8 bytes of the digest), blob key, chunk number, block of the cache file; then 8 bytes of checksum."""
ENTRY_SIZE = 32
BUCKET_SIZE = BUCKET_ENTRIES * ENTRY_SIZE

assert ENTRY.size + 8 == ENTRY_SIZE
assert IndexHeader.SIZE % BUCKET_SIZE == 0  # so that no bucket straddles two pages


def pack_entry(digest: bytes, digester: Digester, place: ChunkPlace) -> bytes:
    """The 32 bytes of an entry. The digester is in its checksum, so that algorithms never mix."""
    body = ENTRY.pack(digest[:TAG_SIZE], place.blob_key, place.chunk, place.offset // BLOCK_SIZE)
    return body + _checksum(body, digester)


def find_entry(bucket: bytes, digest: bytes, digester: Digester) -> ChunkPlace | None:
    """The newest sound entry for that digest in the bytes of a bucket, which may be anything."""
    tag = digest[:TAG_SIZE]
    at = bucket.find(tag)
    while at >= 0:
        entry = bucket[at : at + ENTRY_SIZE]
        if at % ENTRY_SIZE == 0 and len(entry) == ENTRY_SIZE:
            body = entry[: ENTRY.size]
            if entry[ENTRY.size :] == _checksum(body, digester):
                _, key, chunk, block = ENTRY.unpack(body)
                return ChunkPlace(key, chunk, block * BLOCK_SIZE)
        at = bucket.find(tag, at + 1)
    return None


def put_first(bucket: bytes, entry: bytes) -> bytes:
    """The bucket with `entry` as its newest; an older one for the same digest goes, or the oldest of all."""
    tag = entry[:TAG_SIZE]
    if tag not in bucket:
        return (entry + bucket)[:BUCKET_SIZE].ljust(BUCKET_SIZE, b"\0")
    starts = range(0, len(bucket) - ENTRY_SIZE + 1, ENTRY_SIZE)
    others = [bucket[at : at + ENTRY_SIZE] for at in starts if bucket[at : at + TAG_SIZE] != tag]
    return b"".join([entry, *others])[:BUCKET_SIZE].ljust(BUCKET_SIZE, b"\0")


def _checksum(body: bytes, digester: Digester) -> bytes:
    return xxhash.xxh3_64_digest(body, seed=int(digester) + 1)


class ChunkIndex:
    """The open index of a cache directory."""

    def __init__(self, file_descriptor: int, buckets: int) -> None:
        """Takes over `file_descriptor`. Use `open`."""
        self._fd = file_descriptor
        self._buckets = buckets
        self._failed = False

    @classmethod
    def open(cls, path: Path, buckets: int = BUCKETS) -> Self:
        """The index at `path`, made when it is not there. Blocking, about 0.1 ms.

        A file that is no index is replaced, with a WARNING. Raises `OSError`.
        """
        with suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                header = IndexHeader.unpack(os.pread(fd, IndexHeader.SIZE, 0))
                size, expected = os.fstat(fd).st_size, _file_size(header.buckets)
                expect(size == expected, "chunk index", 8, f"{expected} bytes, found {size}")
                # The hot path reads it from the page cache.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
                return cls(fd, header.buckets)
            except FormatError as error:
                os.close(fd)
                log.warning("%s: %s: it is made anew", path, error)
            except BaseException:
                os.close(fd)
                raise
        return cls(_create(path, buckets), buckets)

    def close(self) -> None:
        """Closes the file. Twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def find(self, digest: bytes, digester: Digester) -> ChunkPlace | None:
        """Where a chunk with that digest was put last, as far as is known. About 2 us."""
        try:
            bucket = os.pread(self._fd, BUCKET_SIZE, self._place(digest))
        except OSError as error:
            self._tell(error)
            return None
        return find_entry(bucket, digest, digester)

    def add(self, chunks: Iterable[tuple[bytes, ChunkPlace]], digester: Digester) -> None:
        """Notes chunks by digest. A disk that takes no more is said once. Blocking: about 5 us each."""
        try:
            for digest, place in chunks:
                at = self._place(digest)
                bucket = os.pread(self._fd, BUCKET_SIZE, at)
                entry = pack_entry(digest, digester, place)
                if not bucket.startswith(entry):
                    os.pwrite(self._fd, put_first(bucket, entry), at)
        except OSError as error:
            self._tell(error)

    def _place(self, digest: bytes) -> int:
        bucket = int.from_bytes(digest[TAG_SIZE : 2 * TAG_SIZE], "little") % self._buckets
        return IndexHeader.SIZE + bucket * BUCKET_SIZE

    def _tell(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            log.warning("index of the cached chunks: %s; chunks of other images are fetched", error.strerror)


def _file_size(buckets: int) -> int:
    return IndexHeader.SIZE + buckets * BUCKET_SIZE


def _create(path: Path, buckets: int) -> int:
    """Puts an empty index at `path`; it gets its name when it is whole."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd, fresh = tempfile.mkstemp(".new", f"{path.name}.", path.parent)
    try:
        os.write(fd, IndexHeader(buckets).pack())
        os.ftruncate(fd, _file_size(buckets))
        os.rename(fresh, path)
    except BaseException:
        os.close(fd)
        os.unlink(fresh)
        raise
    return fd

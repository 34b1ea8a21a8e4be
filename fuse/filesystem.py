"""The file system that an image is, without any transport: what every driver asks.

Concurrency: everything but `read` is free of checkpoints. `read_ready` looks whether chunks are ready and
makes its view in one go, and a driver must answer the kernel with that view before its next checkpoint:
later the chunks may be gone.
"""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import trio

from backend.cache import CachedBlob
from backend.fetch import ChunkFetcher
from backend.origin_stage import FetchFailed
from fuse.inodetable import Attributes, Directory, InodeAccess
from rafs.bootstrap import Bootstrap
from rafs.chunk import ADDRESS_SIZE
from rafs.errors import NydusError
from rafs.inode import Inode
from rafs.record import BLOCK_SIZE, Buffer, FormatError
from rafs.superblock import RafsFlags

FETCH_ATTEMPTS = 3
"""Chunks may be evicted between their fetch and the answer; more often than this in a row is a fault."""


class WrongFileType(NydusError):
    """An operation on an inode of another type: reading a directory, listing a file."""

    message = "inode {ino} is not a {wanted}"
    exit_code: ClassVar[int] = 70
    errno: ClassVar[int] = errno.EINVAL


class ReadTimeout(NydusError):
    """The source did not answer in time; the reader gets EIO instead of a hang."""

    message = "a read of {size} bytes at offset {offset} was not answered within {timeout_s:g} s"
    exit_code: ClassVar[int] = 71
    retryable = True


@dataclass(frozen=True, slots=True)
class ChunkPlace:
    """Where one chunk of a file is: its fetcher, its number and its offset in the decoded blob."""

    fetcher: ChunkFetcher
    chunk: int
    offset: int


class ReadySpan(NamedTuple):
    """A range of a cache file whose chunks are ready: its start, and the first and last of its chunks."""

    fetcher: ChunkFetcher
    first_chunk: int
    last_chunk: int
    start: int

    def note_read(self) -> None:
        """Counts a hit, and tells readahead. In the trio thread only."""
        self.fetcher.hits += 1
        if self.fetcher.readahead.markers:
            self.fetcher.touch(self.first_chunk, self.last_chunk)


class OpenFile:
    """A regular file that is being read, and the chunk addresses looked up so far."""

    __slots__ = ("inode", "places", "size")

    def __init__(self, inode: Inode) -> None:
        self.inode = inode
        self.size = inode.size
        self.places: dict[int, ChunkPlace] = {}


@dataclass(frozen=True, slots=True)
class FilesystemSize:
    """For `statfs`: decoded bytes of the image in blocks, none of them free, and its inodes."""

    block_size: int
    blocks: int
    files: int
    name_max: int = 255


class ImageFilesystem:
    """An immutable image as lookups, listings and reads.

    Methods raise `FormatError` for a broken record, `WrongFileType`, and reads what fetching raises.
    """

    def __init__(
        self,
        bootstrap: Bootstrap,
        fetchers: Mapping[int, ChunkFetcher],
        read_timeout_s: float = 60.0,
        *,
        maps_files: bool = True,
    ) -> None:
        """`fetchers` by blob index; a blob without chunks needs none.

        With `maps_files` reads give views of mapped cache files, else copies of their own.
        """
        self._bytes_of = CachedBlob.view if maps_files else CachedBlob.read
        self.inodes = InodeAccess(bootstrap)
        self.has_xattrs = bool(bootstrap.extended.flags & RafsFlags.HAS_XATTR)
        self._bootstrap = bootstrap
        self._fetchers = fetchers
        self._read_timeout_s = read_timeout_s
        self._chunk_size = bootstrap.chunk_size
        self._chunk_shift = bootstrap.chunk_size.bit_length() - 1

    def attributes(self, ino: int) -> Attributes:
        """What `stat` shows of an inode."""
        return self.inodes.attributes(self.inodes.nid_of(ino))

    def lookup(self, parent_ino: int, name: bytes) -> Attributes | None:
        """Attributes of the entry `name`, None when the directory has no such name."""
        entry = self._bootstrap.lookup(self._inode(parent_ino, "directory"), name)
        return None if entry is None else self.inodes.attributes(entry.nid)

    def open_directory(self, ino: int) -> Directory:
        """A directory to list; needs no closing."""
        return Directory(self.inodes, self._inode(ino, "directory"))

    def readlink(self, ino: int) -> bytes:
        """Target of a symbolic link."""
        return self._bootstrap.readlink(self._inode(ino, "symlink"))

    def list_xattrs(self, ino: int) -> Sequence[bytes]:
        """Full names of the extended attributes of an inode."""
        return list(self._bootstrap.xattrs(self.inodes.inode(ino)))

    def get_xattr(self, ino: int, name: bytes) -> bytes | None:
        """Value of an extended attribute, None when the inode has none of that name."""
        return self._bootstrap.xattrs(self.inodes.inode(ino)).get(name)

    def size(self) -> FilesystemSize:
        """For `statfs`."""
        decoded = sum(blob.uncompressed_size for blob in self._bootstrap.blobs)
        blocks = -(-(decoded + self._bootstrap.size_bytes) // BLOCK_SIZE)
        return FilesystemSize(BLOCK_SIZE, blocks, self._bootstrap.inode_count)

    def open_file(self, ino: int) -> OpenFile:
        """A regular file to read; needs no closing."""
        return OpenFile(self._inode(ino, "file"))

    def ready_span(self, file: OpenFile, offset: int, end: int) -> ReadySpan | None:
        """Where bytes `offset` to `end` (in the file, not empty) lie in one cache file, in one piece.

        None when some are not here yet, or lie in several pieces. Safe for any thread, see `CachedBlob`.
        """
        first, last = offset >> self._chunk_shift, (end - 1) >> self._chunk_shift
        place = file.places.get(first) or self._place(file, first)
        fetcher, chunk = place.fetcher, place.chunk
        if not fetcher.cached.is_ready(chunk):
            return None
        for index in range(first + 1, last + 1):
            following = file.places.get(index) or self._place(file, index)
            distance = (index - first) << self._chunk_shift
            if following.fetcher is not fetcher or following.offset - place.offset != distance:
                return None
            if not fetcher.cached.is_ready(following.chunk):
                return None
        start = place.offset + offset - (first << self._chunk_shift)
        return ReadySpan(fetcher, chunk, chunk + last - first, start)

    def read_ready(self, file: OpenFile, offset: int, size: int) -> Buffer | None:
        """The bytes from `offset` on (fewer at the end of the file), or None when some are not here yet.

        Not copied when they lie in one piece in the cache, as the chunks of a file usually do.
        """
        end = min(offset + size, file.size)
        if offset >= end:
            return b""
        span = self.ready_span(file, offset, end)
        if span is None:
            return self._join_ready(file, offset, end)
        span.note_read()
        return self._bytes_of(span.fetcher.cached, span.start, end - offset)

    async def read(self, file: OpenFile, offset: int, size: int) -> Buffer:
        """The bytes from `offset` on, fetched when they are not here.

        A checkpoint only when they must be fetched. Raises `ReadTimeout`, and what fetching raises.
        """
        data = self.read_ready(file, offset, size)
        if data is not None:
            return data
        with trio.move_on_after(self._read_timeout_s):
            return await self._read_missing(file, offset, min(offset + size, file.size))
        raise ReadTimeout(size=size, offset=offset, timeout_s=self._read_timeout_s)

    async def _read_missing(self, file: OpenFile, offset: int, end: int) -> Buffer:
        first, last = offset >> self._chunk_shift, (end - 1) >> self._chunk_shift
        places = [self._place(file, index) for index in range(first, last + 1)]
        for _ in range(FETCH_ATTEMPTS):
            unstored: dict[tuple[ChunkFetcher, int], bytes] = {}
            for fetcher in dict.fromkeys(place.fetcher for place in places):
                wanted = [place.chunk for place in places if place.fetcher is fetcher]
                for chunk in wanted:
                    fetcher.touch(chunk, chunk)
                kept = await fetcher.ensure_chunks(wanted)
                unstored.update(((fetcher, chunk), data) for chunk, data in kept.items())
            data = self._join(file, offset, end, unstored)
            if data is not None:
                return data
        raise FetchFailed(blob_id="", why="its chunks vanish from the cache faster than they are read")

    def _join_ready(self, file: OpenFile, offset: int, end: int) -> Buffer | None:
        data = self._join(file, offset, end, {})
        if data is not None:
            self._place(file, offset >> self._chunk_shift).fetcher.hits += 1
        return data

    def _join(
        self, file: OpenFile, offset: int, end: int, unstored: Mapping[tuple[ChunkFetcher, int], bytes]
    ) -> Buffer | None:
        """The bytes from wherever their chunks are; None when one is nowhere."""
        parts: list[Buffer] = []
        while offset < end:
            index = offset >> self._chunk_shift
            place = self._place(file, index)
            skip = offset - (index << self._chunk_shift)
            length = min(end - offset, self._chunk_size - skip)
            if place.fetcher.cached.is_ready(place.chunk):
                parts.append(self._bytes_of(place.fetcher.cached, place.offset + skip, length))
            elif (kept := unstored.get((place.fetcher, place.chunk))) is not None:
                parts.append(kept[skip : skip + length])
            else:
                return None
            offset += length
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _place(self, file: OpenFile, index: int) -> ChunkPlace:
        place = file.places.get(index)
        if place is None:
            ref = self._bootstrap.chunk_ref(file.inode, index)
            fetcher = self._fetchers[ref.blob_index]
            wanted = min(self._chunk_size, file.size - (index << self._chunk_shift))
            offset, size = fetcher.span_of(ref.chunk_index)
            if (offset, size) != (ref.uncompressed_offset, wanted):
                # Tables that disagree would have us answer with bytes of another chunk.
                where = file.inode.index_offset + index * ADDRESS_SIZE
                expectation = f"{size} bytes at {offset} as in blob.meta, "
                expectation += f"found {wanted} bytes at {ref.uncompressed_offset}"
                raise FormatError("chunk address", where, expectation)
            place = file.places[index] = ChunkPlace(fetcher, ref.chunk_index, ref.uncompressed_offset)
        return place

    def _inode(self, ino: int, wanted: str) -> Inode:
        inode = self.inodes.inode(ino)
        fits = {"directory": inode.is_dir, "file": inode.is_file, "symlink": inode.is_symlink}
        if not fits[wanted]:
            raise WrongFileType(ino=ino, wanted=wanted)
        return inode

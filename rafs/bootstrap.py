"""Read access to a bootstrap: everything is looked up in the mapped bytes, nothing is scanned at open."""

import errno
import mmap
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from rafs.blob_table import BLOBS_MAX, BlobEntry, DeviceSlot
from rafs.chunk import ADDRESS_SIZE, ROW_SIZE, ChunkDigests, ChunkRef
from rafs.dirent import Dirent, count_entries, name_at, search_block, unpack_block
from rafs.errors import NydusError
from rafs.inode import LAYOUT_FLAT_INLINE, SLOT_SIZE, Inode
from rafs.record import BLOCK_SIZE, Buffer, FormatError, expect, take
from rafs.superblock import ExtendedSuperblock, Superblock
from rafs.xattr import unpack_xattrs

BOOTSTRAP_SIZE_MAX = 0x8000_0000
SYMLINK_MAX = 4096
SYMLINK_DATA_MAX = 1 << 16


class NoSuchEntry(NydusError):
    """A path that the image does not have."""

    message = "{path}: no such file or directory in the image"
    exit_code: ClassVar[int] = 13
    errno: ClassVar[int] = errno.ENOENT


class NotADirectoryInImage(NydusError):
    """A path that goes through something that is no directory."""

    message = "{path}: not a directory in the image"
    exit_code: ClassVar[int] = 14
    errno: ClassVar[int] = errno.ENOTDIR


class Bootstrap:
    """One image's metadata over bytes or a memory map.

    Opening reads the superblocks and the blob table only. Inodes, directories and chunk addresses are decoded
    when asked for, by address, so the cost of a lookup does not depend on the size of the image.
    """

    def __init__(self, data: Buffer | mmap.mmap, name: str = "bootstrap") -> None:
        """Raises `FormatError` when the superblocks or the blob table are not those of a RAFS v6 image."""
        self.name = name
        self._mapping = data if isinstance(data, mmap.mmap) else None
        self._data = memoryview(data)
        size = len(self._data)
        expect(
            size < BOOTSTRAP_SIZE_MAX, "bootstrap", 0, f"less than {BOOTSTRAP_SIZE_MAX} bytes, found {size}"
        )
        self.superblock = Superblock.unpack(self._data)
        self.extended = ExtendedSuperblock.unpack(self._data)
        self.chunk_size = self.extended.chunk_size
        self.digester = self.extended.digester
        self.root_nid = self.superblock.root_nid
        self.inode_count = self.superblock.inode_count
        self.blobs = tuple(self._read_blobs())
        self.meta_offset = self.superblock.meta_block * BLOCK_SIZE
        self._digests: dict[int, ChunkDigests] | None = None

    @classmethod
    def open(cls, path: Path) -> Self:
        """Maps the file at `path` read-only."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            expect(
                size >= BLOCK_SIZE, "bootstrap", 0, f"at least one block of {BLOCK_SIZE} bytes, found {size}"
            )
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(mapping, path.name)

    def close(self) -> None:
        """Unmaps the file. Views handed out before must be gone."""
        self._digests = None
        self._data.release()
        if self._mapping is not None:
            self._mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        # Else its traceback may hold views of the map, which goes with the last of them.

    @property
    def size_bytes(self) -> int:
        """Length of the bootstrap."""
        return len(self._data)

    @property
    def data(self) -> memoryview:
        """The whole bootstrap."""
        return self._data

    @property
    def chunk_table(self) -> memoryview:
        """The packed 80-byte rows of the chunk table, one behind the other."""
        offset, size = self.extended.chunk_table_offset, self.extended.chunk_table_size
        return memoryview(take(self._data, offset, size, "chunk table"))

    @property
    def prefetch_nids(self) -> tuple[int, ...]:
        """Inodes to fetch first, in order; entries of 0 are padding."""
        offset, size = self.extended.prefetch_table_offset, self.extended.prefetch_table_size
        if offset == 0 or size == 0:
            return ()
        table = take(self._data, offset, size, "prefetch table")
        return tuple(nid for nid in memoryview(table).cast("I") if nid)

    def device_slots(self) -> tuple[DeviceSlot, ...]:
        """What EROFS reads of the blobs."""
        return tuple(DeviceSlot.unpack(self._data, i) for i in range(len(self.blobs)))

    def inode(self, nid: int) -> Inode:
        """The inode with that number; raises `FormatError` when there is none."""
        return Inode.unpack(self._data, self.meta_offset + nid * SLOT_SIZE, nid)

    def root(self) -> Inode:
        """The root directory."""
        inode = self.inode(self.root_nid)
        expect(inode.is_dir, "root inode", inode.offset_bytes, f"a directory, found mode {inode.mode:#o}")
        return inode

    def readdir(self, directory: Inode) -> Iterator[Dirent]:
        """All entries in disk order, "." and ".." among them."""
        for block, offset in self.data_blocks(directory):
            yield from unpack_block(block, offset)

    def lookup(self, directory: Inode, name: bytes) -> Dirent | None:
        """The entry of that name: a binary search over blocks, then inside one."""
        low, high = 0, max((directory.size + BLOCK_SIZE - 1) // BLOCK_SIZE - 1, -1)
        while low < high:
            middle = (low + high + 1) // 2
            block, offset = self._block(directory, middle)
            if name_at(block, 0, count_entries(block, offset), offset) <= name:
                low = middle
            else:
                high = middle - 1
        if high < 0:
            return None
        block, offset = self._block(directory, low)
        return search_block(block, name, offset)

    def readlink(self, inode: Inode) -> bytes:
        """Target of a symbolic link."""
        limit = SYMLINK_DATA_MAX
        expect(
            0 < inode.size <= limit,
            "symlink",
            inode.offset_bytes,
            f"a target of 1..{limit} bytes, found {inode.size}",
        )
        return b"".join(bytes(block) for block, _ in self.data_blocks(inode))

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        """Extended attributes by full name."""
        return unpack_xattrs(self._data, inode.offset_bytes + inode.header_size, inode.xattr_size)

    def chunk_count_of(self, inode: Inode) -> int:
        """Number of chunks of a regular file."""
        return -(-inode.size // self.chunk_size)

    def chunk_ref(self, inode: Inode, index: int) -> ChunkRef:
        """Address of chunk `index` of a file; its blob and place are checked against the blob table."""
        offset = inode.index_offset + index * ADDRESS_SIZE
        ref = ChunkRef.unpack(self._data, offset)
        if ref.blob_index >= len(self.blobs):
            raise FormatError(
                "chunk address", offset, f"a blob below {len(self.blobs)}, found {ref.blob_index}"
            )
        blob = self.blobs[ref.blob_index]
        if ref.uncompressed_offset >= blob.uncompressed_size or ref.chunk_index >= blob.chunk_count:
            raise FormatError(
                "chunk address",
                offset,
                f"a chunk below {blob.chunk_count} and an offset below {blob.uncompressed_size}, "
                f"found {ref.chunk_index} and {ref.uncompressed_offset}",
            )
        return ref

    def chunk_refs(self, inode: Inode) -> Iterator[ChunkRef]:
        """Addresses of all chunks of a file, in order."""
        return (self.chunk_ref(inode, index) for index in range(self.chunk_count_of(inode)))

    def chunk_digests(self, blob_index: int) -> ChunkDigests:
        """Digests of a blob's chunks; the first call scans the chunk table once for all blobs."""
        if self._digests is None:
            self._digests = self._index_chunk_table()
        return self._digests[blob_index]

    def chunk_rows(self) -> Iterator[Buffer]:
        """The packed 80-byte rows of the chunk table, in disk order."""
        table = self.chunk_table
        return (table[at : at + ROW_SIZE] for at in range(0, len(table), ROW_SIZE))

    def resolve(self, path: bytes) -> Inode:
        """The inode at an absolute or relative path from the root. Symbolic links are not followed."""
        inode = self.root()
        for name in path.split(b"/"):
            if name in (b"", b"."):
                continue
            if not inode.is_dir:
                raise NotADirectoryInImage(path=os.fsdecode(path))
            entry = self.lookup(inode, name)
            if entry is None:
                raise NoSuchEntry(path=os.fsdecode(path))
            inode = self.inode(entry.nid)
        return inode

    def walk(self) -> Iterator[tuple[bytes, Inode]]:
        """Every name in the image with its inode, from b"/" on, parents first, names sorted.

        Raises `FormatError` when a directory is reached twice, which would never end, and for a name that is
        none: it could lead out of a directory that the tree is written to.
        """
        seen: set[int] = set()
        pending = [(b"/", self.root())]
        while pending:
            path, inode = pending.pop()
            yield path, inode
            if not inode.is_dir:
                continue
            if inode.nid in seen:
                raise FormatError("directory", inode.offset_bytes, "each directory under one name only")
            seen.add(inode.nid)
            prefix = path if path == b"/" else path + b"/"
            children = [
                (prefix + entry.name, self.inode(entry.nid))
                for entry in self.readdir(inode)
                if entry.name not in (b".", b"..")
            ]
            for name, child in children:
                if b"/" in name[len(prefix) :] or b"\0" in name:
                    at = child.offset_bytes
                    raise FormatError("directory entry", at, f"a name without / and NUL, found {name!r}")
            pending.extend(reversed(children))

    def data_blocks(self, inode: Inode) -> Iterator[tuple[memoryview, int]]:
        """Each block of a directory's or symlink's data, the last one cut to size, with its offset."""
        for index in range(-(-inode.size // BLOCK_SIZE)):
            yield self._block(inode, index)

    def _block(self, inode: Inode, index: int) -> tuple[memoryview, int]:
        """Block `index` of a directory's or symlink's data, and its offset in the bootstrap."""
        full, tail = divmod(inode.size, BLOCK_SIZE)
        if index == full and inode.layout == LAYOUT_FLAT_INLINE:
            offset, size = inode.body_offset, tail
        else:
            offset, size = (inode.u + index) * BLOCK_SIZE, BLOCK_SIZE if index < full else tail
        what = "directory data" if inode.is_dir else "symlink data"
        return memoryview(take(self._data, offset, size, what)), offset

    def _read_blobs(self) -> Iterator[BlobEntry]:
        count = self.extended.blob_table_size // BlobEntry.SIZE
        at = ExtendedSuperblock.OFFSET + 16
        expect(count <= BLOBS_MAX, "RAFS superblock", at, f"at most {BLOBS_MAX} blobs, found {count}")
        devices = self.superblock.device_count
        expect(
            count == devices, "RAFS superblock", at, f"as many blobs as devices ({devices}), found {count}"
        )
        for index in range(count):
            yield BlobEntry.unpack(
                self._data, self.extended.blob_table_offset + index * BlobEntry.SIZE, index
            )

    def _index_chunk_table(self) -> dict[int, ChunkDigests]:
        table, base = self.chunk_table, self.extended.chunk_table_offset
        rows: dict[int, dict[int, int] | array[int]] = {}
        for blob in self.blobs:
            # An array where most chunks have rows; a number in the blob table must not make it huge.
            dense = blob.chunk_count <= 4 * len(table) // ROW_SIZE
            rows[blob.index] = array("q", (-1,)) * blob.chunk_count if dense else {}
        words = table.cast("I")
        step = ROW_SIZE // 4
        counts = [blob.chunk_count for blob in self.blobs]
        for position, blob_index, index in zip(
            range(0, len(table), ROW_SIZE), words[8::step], words[18::step], strict=True
        ):
            if blob_index >= len(counts) or index >= counts[blob_index]:
                raise FormatError(
                    "chunk table row",
                    base + position,
                    f"a chunk of a known blob, found blob {blob_index} chunk {index}",
                )
            rows[blob_index][index] = position
        return {blob.index: ChunkDigests(table, rows[blob.index], blob.chunk_count) for blob in self.blobs}

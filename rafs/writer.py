"""Writes a bootstrap from an inode table: one pass places everything, one pass writes it."""

import os
import stat
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rafs.blob_table import BLOBS_MAX, BlobEntry, blob_table_offset, map_flat, slot_offset
from rafs.chunk import ADDRESS_SIZE
from rafs.codec import Compressor
from rafs.digest import Digester
from rafs.dirent import directory_size, pack_directory
from rafs.errors import NydusError
from rafs.inode import (
    CHUNK_FORMAT_BITS_MASK,
    CHUNK_FORMAT_INDEXES,
    EXTENDED,
    EXTENDED_SIZE,
    FILE_TYPES,
    LAYOUT_CHUNK_BASED,
    LAYOUT_FLAT_INLINE,
    LAYOUT_FLAT_PLAIN,
    SLOT_SIZE,
)
from rafs.inode_table import InodeTable
from rafs.record import BLOCK_SIZE, round_up
from rafs.superblock import (
    BLOCK_SIZE_BITS,
    COMPRESSION_FLAGS,
    DIGEST_FLAGS,
    ROOT_NID,
    ExtendedSuperblock,
    RafsFlags,
    Superblock,
)
from rafs.xattr import xattr_icount

_FLUSH_BYTES = 4 << 20
_SMALL_FILE = struct.Struct(EXTENDED.format + "Q")
_NO_BYTES = bytes(16)
_ONE_PIECE_MAX = 1 << CHUNK_FORMAT_BITS_MASK + BLOCK_SIZE_BITS


class ImageTooLarge(NydusError):
    """A tree that the format cannot hold."""

    message = "the image is too large for RAFS v6: {why}"
    exit_code: ClassVar[int] = 15


@dataclass(frozen=True, slots=True)
class BootstrapContent:
    """All that goes into a bootstrap.

    `chunk_rows` gives packed 80-byte rows, one or many at a time, sorted by `rafs.chunk.row_order`;
    `prefetch` are rows of `table`, first ones first.
    """

    table: InodeTable
    blobs: Sequence[BlobEntry]
    chunk_rows: Iterable[bytes]
    chunk_size: int
    compressor: Compressor
    digester: Digester
    prefetch: Sequence[int] = ()


def write_bootstrap(path: Path, content: BootstrapContent) -> int:
    """Writes a new file at `path` and returns its number of inodes.

    Raises `ImageTooLarge` for what the format cannot hold.
    """
    if len(content.blobs) > BLOBS_MAX:
        raise ImageTooLarge(why=f"{len(content.blobs)} blobs, at most {BLOBS_MAX}")
    placement = _Placement(content)
    with path.open("wb") as file:
        writer = _Writer(content, placement, file.fileno())
        writer.write_inodes()
        writer.write_tables()
    return placement.inode_count


class _Placement:
    """Where each inode and run of data blocks lies: inodes first, then the blocks, then the chunk table."""

    def __init__(self, content: BootstrapContent) -> None:
        blob_count = len(content.blobs)
        self.blob_table = blob_table_offset(blob_count)
        self.prefetch_table = self.blob_table + BlobEntry.SIZE * blob_count
        tables_end = self.prefetch_table + 4 * len(content.prefetch)
        self.meta = round_up(tables_end, BLOCK_SIZE) if blob_count or content.prefetch else 0
        self.nids = array("I", bytes(4 * len(content.table)))
        self.data_blocks: dict[int, int] = {}
        self.inode_count = 0
        self.end = self._place_inodes(content)

    def _place_inodes(self, content: BootstrapContent) -> int:
        table = content.table
        position = self.meta + BLOCK_SIZE  # the first block stays empty, so that the root is nid 128
        runs: list[tuple[int, int]] = []
        kinds, xattrs, nids = table.mode, table.xattrs, self.nids
        chunk_size, meta = content.chunk_size, self.meta
        for row in table.inode_rows():
            self.inode_count += 1
            head = EXTENDED_SIZE + (len(xattrs[row]) if row in xattrs else 0)
            kind = stat.S_IFMT(kinds[row])
            if kind == stat.S_IFREG:
                chunks = -(-table.size[row] // chunk_size)
                size = round_up(head, 8) + ADDRESS_SIZE * chunks if chunks else head
            elif kind in (stat.S_IFDIR, stat.S_IFLNK):
                full, tail = divmod(self._data_size(table, row, kind), BLOCK_SIZE)
                inline = tail > 0 and head + tail <= BLOCK_SIZE
                size = head + tail if inline else head
                if inline and position % BLOCK_SIZE + size > BLOCK_SIZE:
                    position = round_up(position, BLOCK_SIZE)
                blocks = full if inline else full + (tail > 0)
                if blocks:
                    runs.append((row, blocks))
            else:
                size = head
            nids[row] = (position - meta) // SLOT_SIZE
            position = round_up(position + size, SLOT_SIZE)
        position = round_up(position, BLOCK_SIZE)
        for row, blocks in runs:
            self.data_blocks[row] = position // BLOCK_SIZE
            position += blocks * BLOCK_SIZE
        if position >= 0x8000_0000:
            raise ImageTooLarge(why=f"{position} bytes of metadata, at most 2 GiB")
        return position

    @staticmethod
    def _data_size(table: InodeTable, row: int, kind: int) -> int:
        if kind == stat.S_IFLNK:
            table.size[row] = len(table.symlinks[row])
        else:
            table.size[row] = directory_size([len(name) for name, _ in _entries(table, row)])
        return table.size[row]


class _Writer:
    def __init__(self, content: BootstrapContent, placement: _Placement, fd: int) -> None:
        self._content = content
        self._placement = placement
        self._fd = fd
        self._buffer = bytearray()
        self._buffer_offset = placement.meta + BLOCK_SIZE
        chunk_bits = content.chunk_size.bit_length() - 1
        self._small_file_format = CHUNK_FORMAT_INDEXES | (chunk_bits - BLOCK_SIZE_BITS)
        for row, target in enumerate(content.table.target):
            placement.nids[row] = placement.nids[target]
        if placement.nids[0] != ROOT_NID:
            raise AssertionError("the root inode is not at nid 128")

    def write_inodes(self) -> None:
        table, nids = self._content.table, self._placement.nids
        for ino, row in enumerate(table.inode_rows(), start=1):
            offset = self._placement.meta + nids[row] * SLOT_SIZE - self._buffer_offset
            buffer = self._buffer
            buffer += bytes(offset - len(buffer))
            buffer += self._inode(row, ino)
            if len(buffer) > _FLUSH_BYTES:
                self._flush()
        self._flush()

    def write_tables(self) -> None:
        content, placement = self._content, self._placement
        chunk_table_size = 0
        for rows in content.chunk_rows:
            self._pwrite(rows, placement.end + chunk_table_size)
            chunk_table_size += len(rows)
        end = round_up(placement.end + chunk_table_size, BLOCK_SIZE)
        os.ftruncate(self._fd, end)
        for index, slot in enumerate(map_flat(end, content.blobs)):
            self._pwrite(slot.pack(), slot_offset(index))
        self._pwrite(b"".join(blob.pack() for blob in content.blobs), placement.blob_table)
        prefetch = array("I", (placement.nids[row] for row in content.prefetch))
        self._pwrite(prefetch.tobytes(), placement.prefetch_table)
        self._pwrite(self._superblock().pack(), Superblock.OFFSET)
        self._pwrite(self._extended(chunk_table_size).pack(), ExtendedSuperblock.OFFSET)

    def _superblock(self) -> Superblock:
        blocks = sum(blob.uncompressed_size for blob in self._content.blobs) // BLOCK_SIZE
        return Superblock(
            self._placement.inode_count,
            min(blocks, 0xFFFF_FFFF),
            self._placement.meta // BLOCK_SIZE,
            len(self._content.blobs),
        )

    def _extended(self, chunk_table_size: int) -> ExtendedSuperblock:
        content, placement = self._content, self._placement
        flags = COMPRESSION_FLAGS[content.compressor] | DIGEST_FLAGS[content.digester]
        flags |= RafsFlags.EXPLICIT_UID_GID | RafsFlags.ENCRYPTION_NONE
        if content.table.xattrs:
            flags |= RafsFlags.HAS_XATTR
        return ExtendedSuperblock(
            flags,
            placement.blob_table,
            BlobEntry.SIZE * len(content.blobs),
            content.chunk_size,
            placement.end,
            chunk_table_size,
            placement.prefetch_table if content.prefetch else 0,
            4 * len(content.prefetch),
        )

    def _inode(self, row: int, ino: int) -> bytes:
        """Record, xattrs and what follows them inline; full blocks of data are written on the way."""
        table = self._content.table
        kind = stat.S_IFMT(table.mode[row])
        xattrs = table.xattrs.get(row, b"")
        if kind == stat.S_IFREG and not xattrs and 0 < table.size[row] <= self._content.chunk_size:
            return self._small_file(row, ino)
        layout, u, body = LAYOUT_FLAT_PLAIN, 0, b""
        if kind == stat.S_IFREG:
            layout = LAYOUT_CHUNK_BASED
            u, body = self._addresses(row, EXTENDED_SIZE + len(xattrs))
        elif kind == stat.S_IFDIR:
            layout, u, body = self._flat(row, self._directory(row), len(xattrs))
        elif kind == stat.S_IFLNK:
            layout, u, body = self._flat(row, table.symlinks[row], len(xattrs))
        else:
            u = table.device[row]
        head = EXTENDED.pack(
            1 | layout << 1,
            xattr_icount(len(xattrs)),
            table.mode[row],
            0,
            table.size[row],
            u,
            ino,
            table.uid[row],
            table.gid[row],
            table.mtime_s[row],
            table.mtime_ns[row],
            table.nlink[row],
            bytes(16),
        )
        return head + xattrs + body

    def _small_file(self, row: int, ino: int) -> bytes:
        """What most inodes are, in one go: a file without xattrs and with one chunk, its address aligned."""
        table = self._content.table
        return _SMALL_FILE.pack(
            1 | LAYOUT_CHUNK_BASED << 1,
            0,
            table.mode[row],
            0,
            table.size[row],
            self._small_file_format,
            ino,
            table.uid[row],
            table.gid[row],
            table.mtime_s[row],
            table.mtime_ns[row],
            table.nlink[row],
            _NO_BYTES,
            table.addresses[table.chunk_start[row]],
        )

    def _addresses(self, row: int, head_size: int) -> tuple[int, bytes]:
        table, chunk_size = self._content.table, self._content.chunk_size
        size = table.size[row]
        count = -(-size // chunk_size)
        start = table.chunk_start[row]
        addresses = table.addresses[start : start + count]
        bits = chunk_size.bit_length() - 1
        # Five bits hold the size, so the kernel needs all addresses of a file past 8 TiB.
        if count > 1 and size <= _ONE_PIECE_MAX and _is_continuous(addresses, chunk_size // BLOCK_SIZE):
            bits = (size - 1).bit_length()
        padding = bytes(-head_size % 8) if count else b""
        return CHUNK_FORMAT_INDEXES | (bits - BLOCK_SIZE_BITS), padding + addresses.tobytes()

    def _flat(self, row: int, data: bytes, xattr_size: int) -> tuple[int, int, bytes]:
        """Layout, start block and inline tail of a directory or symlink."""
        tail = len(data) % BLOCK_SIZE
        inline = tail > 0 and EXTENDED_SIZE + xattr_size + tail <= BLOCK_SIZE
        block = self._placement.data_blocks.get(row, 0)
        if block:
            self._pwrite(data[: len(data) - tail] if inline else data, block * BLOCK_SIZE)
        return (
            (LAYOUT_FLAT_INLINE, block, data[len(data) - tail :])
            if inline
            else (LAYOUT_FLAT_PLAIN, block, b"")
        )

    def _directory(self, row: int) -> bytes:
        table, nids = self._content.table, self._placement.nids
        entries = _entries(table, row)
        modes, target = table.mode, table.target
        return pack_directory(
            [name for name, _ in entries],
            [nids[child] for _, child in entries],
            [FILE_TYPES[modes[target[child]] & 0xF000] for _, child in entries],
        )

    def _flush(self) -> None:
        self._pwrite(self._buffer, self._buffer_offset)
        self._buffer_offset += len(self._buffer)
        self._buffer = bytearray()

    def _pwrite(self, data: bytes | bytearray, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written


def _entries(table: InodeTable, directory: int) -> list[tuple[bytes, int]]:
    """Names and rows of a directory in disk order: "." and ".." are sorted in with the others."""
    names, starts = table.names, table.name_start
    entries = [(bytes(names[starts[row] : starts[row + 1]]), row) for row in table.children(directory)]
    dots = [(b".", directory), (b"..", table.parent[directory])]
    if entries and entries[0][0] < b"..":
        return sorted(entries + dots)
    return dots + entries


def _is_continuous(addresses: "array[int]", chunk_blocks: int) -> bool:
    """Whether all chunks lie in one blob, each right behind the one before in the decoded blob."""
    first = addresses[0]
    device, block = first >> 16 & 0xFF, first >> 32
    return all(
        address >> 16 & 0xFF == device and address >> 32 == block + index * chunk_blocks
        for index, address in enumerate(addresses)
    )

"""Checks of a bootstrap's fixed records: superblocks, device slots, blob table and chunk table."""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from rafs.blob_table import (
    FLAT_DEVICE_ALIGNMENT,
    BlobEntry,
    BlobFeatures,
    DeviceSlot,
    slot_offset,
)
from rafs.bootstrap import Bootstrap
from rafs.check_fault import Fault, Space
from rafs.chunk import ROW, ROW_SIZE, ChunkFlags
from rafs.record import BLOCK_SIZE, FormatError
from rafs.superblock import ROOT_NID, ExtendedSuperblock, RafsFlags, Superblock

_OLD_BLOCKS = 4096
"""Images of 2022 carry this constant as the number of blocks."""
# Plain integers: there is one row for each chunk, and the enum's operators are slow.
_ROW_FLAGS = int(ChunkFlags.COMPRESSED | ChunkFlags.ENCRYPTED | ChunkFlags.BATCH | ChunkFlags.HAS_CRC32)
_NOT_PLAIN = int(ChunkFlags.COMPRESSED | ChunkFlags.BATCH)
_HAS_CRC32 = int(ChunkFlags.HAS_CRC32)
FOREIGN_SIZES = BlobFeatures.SEPARATE | BlobFeatures.ENCRYPTED | BlobFeatures.ZRAN
"""Features with which a chunk's encoded size says nothing about its decoded one."""


def check_superblocks(bootstrap: Bootstrap, space: Space) -> Iterator[Fault]:
    """Sizes, counts and places in both superblocks; takes the bytes of all tables in `space`."""
    record, at = "EROFS superblock", Superblock.OFFSET
    superblock = bootstrap.superblock
    if superblock.root_nid != ROOT_NID:
        yield Fault(record, at + 14, f"root inode {ROOT_NID}, found {superblock.root_nid}")
    wanted = min(sum(blob.uncompressed_size for blob in bootstrap.blobs) // BLOCK_SIZE, 0xFFFF_FFFF)
    if superblock.blocks not in (wanted, _OLD_BLOCKS):
        yield Fault(record, at + 36, f"{wanted} blocks as all blobs have, found {superblock.blocks}")
    if bootstrap.size_bytes % BLOCK_SIZE:
        yield Fault("bootstrap", 0, f"whole blocks of {BLOCK_SIZE} bytes, found {bootstrap.size_bytes} bytes")
    if bootstrap.size_bytes > BLOCK_SIZE:
        space.claim(0, slot_offset(len(bootstrap.blobs)))
    extended = bootstrap.extended
    for table, field, start, size in (
        ("blob table", 8, extended.blob_table_offset, extended.blob_table_size),
        ("chunk table", 24, extended.chunk_table_offset, extended.chunk_table_size),
        ("prefetch table", 40, extended.prefetch_table_offset, extended.prefetch_table_size),
    ):
        if size and start:
            problem = space.claim(start, start + size)
            if problem:
                yield Fault(table, ExtendedSuperblock.OFFSET + field, problem)


def check_blobs(bootstrap: Bootstrap) -> Iterator[Fault]:
    """Each blob table entry by itself, against the superblock and against its device slot."""
    seen: set[str] = set()
    position = bootstrap.size_bytes
    for blob in bootstrap.blobs:
        at = bootstrap.extended.blob_table_offset + blob.index * BlobEntry.SIZE
        yield from _check_blob(bootstrap, blob, at)
        if blob.blob_id in seen:
            yield Fault(_entry(blob), at, f"each blob once, found {blob.blob_id} again")
        seen.add(blob.blob_id)
        try:
            slot = DeviceSlot.unpack(bootstrap.data, blob.index)
        except FormatError as error:
            yield Fault.of(error)
            continue
        yield from _check_slot(blob, slot, position)
        if slot.mapped_block:
            position = (slot.mapped_block + slot.blocks) * BLOCK_SIZE


def _entry(blob: BlobEntry) -> str:
    return f"blob table entry {blob.index}"


def _check_blob(bootstrap: Bootstrap, blob: BlobEntry, at: int) -> Iterator[Fault]:
    name = _entry(blob)
    if blob.chunk_size != bootstrap.chunk_size:
        yield Fault(name, at + 68, f"the image's chunk size {bootstrap.chunk_size}, found {blob.chunk_size}")
    if blob.chunk_count == 0:
        yield Fault(name, at + 72, "at least one chunk")
    if blob.digester != bootstrap.digester:
        wanted, found = bootstrap.digester.name.lower(), blob.digester.name.lower()
        yield Fault(name, at + 80, f"the image's digest {wanted}, found {found}")
    if blob.chunk_count * BLOCK_SIZE > blob.uncompressed_size and blob.features & BlobFeatures.ALIGNED:
        yield Fault(name, at + 96, f"a block for each of {blob.chunk_count} chunks at least")
    if blob.features & BlobFeatures.CAP_TAR_TOC and not blob.features & BlobFeatures.SEPARATE:
        end = blob.ci_offset + blob.ci_compressed_size
        if end > blob.compressed_size or blob.data_end < 0:
            yield Fault(
                name,
                at + 112,
                f"chunk infos inside the blob of {blob.compressed_size} bytes, found end {end}",
            )
    if blob.cipher > 1:
        yield Fault(name, at + 216, f"cipher 0 or 1, found {blob.cipher}")


def _check_slot(blob: BlobEntry, slot: DeviceSlot, position: int) -> Iterator[Fault]:
    name, at = f"device slot {blob.index}", slot_offset(blob.index)
    if slot.blob_id != blob.blob_id:
        yield Fault(name, at, f"blob ID {blob.blob_id} as in the blob table, found {slot.blob_id}")
    blocks = blob.uncompressed_size // BLOCK_SIZE
    if slot.blocks != blocks:
        yield Fault(name, at + 64, f"{blocks} blocks as in the blob table, found {slot.blocks}")
    mapped = slot.mapped_block * BLOCK_SIZE
    if mapped and (mapped % FLAT_DEVICE_ALIGNMENT or mapped < position):
        yield Fault(
            name,
            at + 68,
            f"a multiple of {FLAT_DEVICE_ALIGNMENT} from byte {position} of a flat device on, found {mapped}",
        )


class RowIndex:
    """Chunk table rows by blob and chunk number; 8 bytes of memory per row."""

    def __init__(self, table: memoryview, complete: bool) -> None:
        """`complete` is whether every chunk of a file has to have a row."""
        self.complete = complete
        self._words = table.cast("I")
        self._longs = table.cast("Q")
        self._keys = array("Q")

    def __len__(self) -> int:
        return len(self._keys)

    def fill(self, keys: "list[int]") -> None:
        """Takes the keys of all usable rows: blob index << 56 | chunk index << 32 | row number."""
        self._keys = array("Q", sorted(keys))

    def duplicates(self) -> Iterator[int]:
        """Numbers of rows that say again what another row says of the same chunk."""
        return (after & 0xFFFF_FFFF for before, after in pairwise(self._keys) if before >> 32 == after >> 32)

    def find(self, blob_index: int, chunk_index: int) -> int:
        """The row of a chunk, -1 for none."""
        key = blob_index << 24 | chunk_index
        at = bisect_left(self._keys, key << 32)
        if at < len(self._keys) and self._keys[at] >> 32 == key:
            return self._keys[at] & 0xFFFF_FFFF
        return -1

    def place(self, row: int) -> tuple[int, int]:
        """Decoded offset and size of the chunk of a row, in bytes."""
        return self._longs[row * 10 + 7], self._words[row * 20 + 11]


def check_rows(bootstrap: Bootstrap, index: RowIndex) -> Iterator[Fault]:
    """Each row of the chunk table by itself, and their order; fills `index` with the usable ones."""
    base, table = bootstrap.extended.chunk_table_offset, bootstrap.chunk_table
    # Builders before this bit wrote the rows in any order.
    ordered = all(blob.features & BlobFeatures.CAP_TAR_TOC for blob in bootstrap.blobs)
    limits = [_Limits.of(blob) for blob in bootstrap.blobs]
    keys: list[int] = []
    before = (b"", 0)
    for number, row in enumerate(ROW.iter_unpack(table)):
        digest, blob_index, chunk_index = row[0], row[1], row[8]
        at = base + number * ROW_SIZE
        if ordered and (digest, blob_index) < before:
            yield Fault(f"chunk table row {number}", at, "rows in the order of their digests")
        before = (digest, blob_index)
        if blob_index >= len(limits):
            wanted = f"a blob below {len(limits)}, found {blob_index}"
            yield Fault(f"chunk table row {number}", at + 32, wanted)
            continue
        limit = limits[blob_index]
        if chunk_index >= limit.chunk_count or chunk_index >> 24:
            wanted = f"a chunk below {limit.chunk_count}, found {chunk_index}"
            yield Fault(f"chunk table row {number}", at + 72, wanted)
            continue
        keys.append((blob_index << 24 | chunk_index) << 32 | number)
        yield from _check_row(limit, row, number, at)
    index.fill(keys)
    for number in index.duplicates():
        yield Fault(f"chunk table row {number}", base + number * ROW_SIZE, "one row for each chunk of a blob")


@dataclass(frozen=True, slots=True)
class _Limits:
    """What the rows of one blob are measured against."""

    chunk_count: int
    chunk_size: int
    data_end: int
    uncompressed_size: int
    foreign_sizes: bool

    @classmethod
    def of(cls, blob: BlobEntry) -> Self:
        foreign = bool(blob.features & FOREIGN_SIZES)
        return cls(blob.chunk_count, blob.chunk_size, blob.data_end, blob.uncompressed_size, foreign)


def _check_row(
    blob: _Limits, row: tuple[bytes, int, int, int, int, int, int, int, int, int], number: int, at: int
) -> Iterator[Fault]:
    _, _, flags, csize, usize, coffset, uoffset, _, _, crc = row
    name = f"chunk table row {number}"
    if flags & ~_ROW_FLAGS:
        yield Fault(name, at + 36, f"known flags, found {flags:#x}")
    if not 0 < usize <= blob.chunk_size:
        yield Fault(name, at + 44, f"1 to {blob.chunk_size} decoded bytes, found {usize}")
    if coffset + csize > blob.data_end:
        yield Fault(name, at + 48, f"encoded bytes before {blob.data_end}, found {coffset} + {csize}")
    if uoffset % BLOCK_SIZE or uoffset + usize > blob.uncompressed_size:
        yield Fault(
            name,
            at + 56,
            f"decoded bytes on a block before {blob.uncompressed_size}, found {uoffset} + {usize}",
        )
    if csize != usize and not flags & _NOT_PLAIN and not blob.foreign_sizes:
        yield Fault(name, at + 40, f"{usize} encoded bytes as it is not compressed, found {csize}")
    if crc and not flags & _HAS_CRC32:
        yield Fault(name, at + 76, f"no checksum without its flag, found {crc:#x}")


def check_flags(bootstrap: Bootstrap, has_xattrs: bool) -> Iterator[Fault]:
    """Whether the image says that it has xattrs when it has; readers skip them otherwise."""
    if has_xattrs and not bootstrap.extended.flags & RafsFlags.HAS_XATTR:
        yield Fault("RAFS superblock", ExtendedSuperblock.OFFSET, "the flag HAS_XATTR 0x20: inodes have some")

"""Every record: values survive packing, packed bytes are canonical, and no other bytes do harm."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafs.blob_table import BlobEntry, BlobFeatures, DeviceSlot, slot_offset
from rafs.blobmeta import BatchContext, BlobMetaHeader, ChunkInfo
from rafs.chunk import ChunkFlags, ChunkRef, ChunkRow
from rafs.codec import Compressor
from rafs.digest import Digester
from rafs.errors import NydusError
from rafs.inode import EXTENDED, Inode
from rafs.superblock import ExtendedSuperblock, RafsFlags, Superblock
from rafs.toc import ENTRY_NAMES, TocEntry, TocFlags, pack_tar_header, read_tar_header
from rafs.zran import ZranContext
from tests.hostile import value_or_error

U8 = st.integers(0, 0xFF)
U16 = st.integers(0, 0xFFFF)
U32 = st.integers(0, 0xFFFF_FFFF)
U64 = st.integers(0, 0xFFFF_FFFF_FFFF_FFFF)
U24 = st.integers(0, 0xFF_FFFF)
BLOB_IDS = st.binary(min_size=32, max_size=32).map(bytes.hex)
DIGESTS = st.binary(min_size=32, max_size=32)
FILE_BYTES = 1 << 16


def blob_features() -> st.SearchStrategy[BlobFeatures]:
    plain = BlobFeatures.ALIGNED | BlobFeatures.CAP_TAR_TOC
    batch = plain | BlobFeatures.CHUNK_INFO_V2 | BlobFeatures.BATCH
    return st.sampled_from([BlobFeatures.ALIGNED, plain, batch, plain | BlobFeatures.SEPARATE])


def superblocks() -> st.SearchStrategy[Superblock]:
    return st.builds(
        Superblock,
        inode_count=st.integers(1, 2**64 - 1),
        blocks=U32,
        meta_block=st.integers(0, FILE_BYTES // 4096 - 1),
        device_count=st.integers(0, 254),
        root_nid=U16,
        feature_compat=U32.map(lambda bits: bits | 0x4000_0000),
    )


@st.composite
def extended_superblocks(draw: st.DrawFn) -> ExtendedSuperblock:
    compression = draw(st.sampled_from([0x1, 0x2, 0x40, 0x80]))
    digest = draw(st.sampled_from([0x4, 0x8]))
    flags = RafsFlags(compression | digest | draw(st.sampled_from([0, 0x130, 0x0400_0000])))
    return ExtendedSuperblock(
        flags,
        blob_table_offset=4096,
        blob_table_size=256 * draw(st.integers(0, 16)),
        chunk_size=1 << draw(st.integers(12, 24)),
        chunk_table_offset=8192,
        chunk_table_size=80 * draw(st.integers(0, 51)),
        prefetch_table_offset=12288,
        prefetch_table_size=4 * draw(st.integers(0, 1024)),
    )


def blob_entries() -> st.SearchStrategy[BlobEntry]:
    return st.builds(
        BlobEntry,
        blob_id=BLOB_IDS,
        index=st.just(0),
        chunk_size=U32,
        chunk_count=st.integers(0, 1 << 24),
        compressor=st.sampled_from(Compressor),
        digester=st.sampled_from(Digester),
        features=blob_features(),
        compressed_size=st.integers(0, 1 << 40),
        uncompressed_size=st.integers(0, (1 << 32) - 1).map(lambda blocks: blocks * 4096),
        toc_size=U32,
        ci_compressor=st.sampled_from(Compressor),
        ci_offset=U64,
        ci_compressed_size=U64,
        ci_uncompressed_size=U64,
        toc_digest=DIGESTS,
        meta_digest=DIGESTS,
        meta_size=U64,
        cipher_iv=U64,
        cipher=U32,
    )


def chunk_infos_v1() -> st.SearchStrategy[ChunkInfo]:
    def build(compressed_offset: int, compressed: int, block: int, uncompressed: int) -> ChunkInfo:
        is_compressed = compressed != uncompressed
        return ChunkInfo(compressed_offset, compressed, block * 4096, uncompressed, is_compressed)

    sizes = st.integers(1, 1 << 24)
    return st.builds(build, st.integers(0, 2**40 - 1), sizes, U32, sizes)


@st.composite
def chunk_infos_v2(draw: st.DrawFn) -> ChunkInfo:
    offset, block, size = draw(st.integers(0, 2**40 - 1)), draw(U32), draw(st.integers(1, 1 << 24))
    if draw(st.booleans()):
        return ChunkInfo(offset, 0, block * 4096, size, True, True, draw(U32), draw(U32))
    if draw(st.booleans()):
        context, place = draw(U32), draw(U32)
        return ChunkInfo(
            offset, draw(U24), block * 4096, size, True, False, context, place, None, is_zran=True
        )
    checksum = draw(st.none() | U32)
    return ChunkInfo(offset, draw(U24), block * 4096, size, draw(st.booleans()), crc32c=checksum)


@st.composite
def headers(draw: st.DrawFn) -> BlobMetaHeader:
    features, entries, contexts = draw(blob_features()), draw(U32), draw(st.integers(0, 1000))
    entry_size = 24 if features & BlobFeatures.CHUNK_INFO_V2 else 16
    context_bytes = 40 * contexts + draw(st.integers(0, 1 << 20)) if contexts else 0
    return BlobMetaHeader(
        features,
        draw(st.integers(0, 3)),
        entries,
        draw(U64),
        draw(U64),
        entries * entry_size + context_bytes,
        entries * entry_size if contexts else 0,
        context_bytes,
        contexts,
    )


@dataclass(frozen=True, slots=True)
class Record:
    """How one record is generated, packed and read."""

    values: st.SearchStrategy[Any]
    pack: Callable[[Any], bytes]
    unpack: Callable[[bytes], Any]
    size: int


def inside_a_file(offset: int, unpack: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A reader that wants the whole bootstrap, as one of the record's bytes."""
    return lambda raw: unpack((bytes(offset) + raw).ljust(FILE_BYTES, b"\0"))


def cut_at(offset: int, unpack: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """The same with a file that ends with the record."""
    return lambda raw: unpack(bytes(offset) + raw)


RECORDS: dict[str, Record] = {
    "superblock": Record(
        superblocks(), Superblock.pack, inside_a_file(Superblock.OFFSET, Superblock.unpack), 128
    ),
    "extension": Record(
        extended_superblocks(),
        ExtendedSuperblock.pack,
        inside_a_file(ExtendedSuperblock.OFFSET, ExtendedSuperblock.unpack),
        256,
    ),
    "device slot": Record(
        st.builds(DeviceSlot, BLOB_IDS, U32.filter(bool), U32),
        DeviceSlot.pack,
        inside_a_file(slot_offset(0), lambda data: DeviceSlot.unpack(data, 0)),
        128,
    ),
    "blob entry": Record(blob_entries(), BlobEntry.pack, lambda raw: BlobEntry.unpack(raw, 0, 0), 256),
    "chunk address": Record(
        st.builds(ChunkRef, st.integers(0, 253), U24, U32.map(lambda block: block * 4096)),
        ChunkRef.pack,
        lambda raw: ChunkRef.unpack(raw, 0),
        8,
    ),
    "chunk row": Record(
        st.builds(ChunkRow, DIGESTS, U32, U32.map(ChunkFlags), U32, U32, U64, U64, U64, U32, U32),
        ChunkRow.pack,
        lambda raw: ChunkRow.unpack(raw, 0),
        80,
    ),
    "chunk info V1": Record(chunk_infos_v1(), ChunkInfo.pack_v1, ChunkInfo.unpack_v1, 16),
    "chunk info V2": Record(chunk_infos_v2(), ChunkInfo.pack_v2, ChunkInfo.unpack_v2, 24),
    "batch context": Record(st.builds(BatchContext, U32, U32), BatchContext.pack, BatchContext.unpack, 40),
    "zran context": Record(
        st.builds(ZranContext, U64, U64, U64, U32, U32, U32, U8, U8), ZranContext.pack, ZranContext.unpack, 40
    ),
    "blob.meta header": Record(
        headers(), BlobMetaHeader.pack, lambda raw: BlobMetaHeader.unpack(raw, 0), 4096
    ),
    "ToC entry": Record(
        st.builds(TocEntry, U32.map(TocFlags), st.sampled_from(ENTRY_NAMES), DIGESTS, U64, U64, U64),
        TocEntry.pack,
        lambda raw: TocEntry.unpack(raw, 0),
        128,
    ),
    "tar header": Record(
        st.tuples(st.sampled_from([*ENTRY_NAMES, "rafs.blob.toc"]), st.integers(0, 8**11 - 1)),
        lambda value: pack_tar_header(*value),
        lambda raw: read_tar_header(raw, 0),
        512,
    ),
}
FIXED_INPUT = {"chunk info V1", "chunk info V2", "batch context", "zran context"}
"""Records that their readers are only ever given whole."""


@pytest.mark.parametrize("name", RECORDS)
@given(data=st.data())
def test_packed_values_read_back_and_pack_the_same(name: str, data: st.DataObject) -> None:
    record = RECORDS[name]
    value = data.draw(record.values)
    raw = record.pack(value)
    assert len(raw) == record.size
    assert record.unpack(raw) == value
    assert record.pack(record.unpack(raw)) == raw


@pytest.mark.parametrize("name", RECORDS)
@given(data=st.data())
def test_any_bytes_are_a_value_or_a_format_error(name: str, data: st.DataObject) -> None:
    record = RECORDS[name]
    drawn = min(record.size, 256)
    raw = data.draw(st.binary(min_size=drawn, max_size=drawn)).ljust(record.size, b"\0")
    with value_or_error():
        value = record.unpack(raw)
        # Flags for what this project does not write are read over.
        assert record.unpack(record.pack(value)) == value or name in ("ToC entry", "chunk info V2")


@pytest.mark.parametrize("name", RECORDS)
@given(data=st.data())
def test_every_bit_flip_is_a_value_or_a_format_error(name: str, data: st.DataObject) -> None:
    record = RECORDS[name]
    raw = bytearray(record.pack(data.draw(record.values)))
    position = data.draw(st.integers(0, len(raw) - 1))
    for bit in range(8):
        raw[position] ^= 1 << bit
        with value_or_error():
            record.unpack(bytes(raw))
        raw[position] ^= 1 << bit


@pytest.mark.parametrize("name", sorted(RECORDS.keys() - FIXED_INPUT))
@given(data=st.data())
def test_every_truncation_is_a_format_error(name: str, data: st.DataObject) -> None:
    record = RECORDS[name]
    whole = record.pack(data.draw(record.values))
    offsets = {"superblock": Superblock.OFFSET, "extension": ExtendedSuperblock.OFFSET}
    offset = offsets.get(name, slot_offset(0) if name == "device slot" else 0)
    readers: dict[str, Callable[[bytes], Any]] = {
        "superblock": cut_at(offset, Superblock.unpack),
        "extension": cut_at(offset, ExtendedSuperblock.unpack),
        "device slot": cut_at(offset, lambda raw: DeviceSlot.unpack(raw, 0)),
    }
    unpack = readers.get(name, record.unpack)
    for length in {0, 1, len(whole) // 2, len(whole) - 1, data.draw(st.integers(0, len(whole) - 1))}:
        with pytest.raises(NydusError):
            unpack(whole[:length])


@given(raw=st.binary(max_size=80), nid=st.integers(0, 2**64 - 1))
def test_any_bytes_are_an_inode_or_a_format_error(raw: bytes, nid: int) -> None:
    with value_or_error():
        inode = Inode.unpack(raw, 0, nid)
        assert inode.header_size in (32, 64)
        assert 0 <= inode.mtime_ns < 10**9
        assert inode.index_offset % 8 == 0


@given(
    mode=st.sampled_from([0o100644, 0o40755, 0o120777, 0o20600, 0o60600, 0o10600, 0o140600]),
    rest=st.tuples(U16, U64, U32, U32, U32, U32, st.integers(-(2**63), 2**63 - 1), U32),
    nanoseconds=st.integers(0, 10**9 - 1),
)
def test_extended_inodes_read_back(
    mode: int, rest: tuple[int, int, int, int, int, int, int, int], nanoseconds: int
) -> None:
    icount, size, u, ino, uid, gid, mtime, nlink = rest
    layout = 4 if mode & 0o170000 == 0o100000 else 0
    raw = EXTENDED.pack(
        1 | layout << 1, icount, mode, 0, size, u, ino, uid, gid, mtime, nanoseconds, nlink, bytes(16)
    )
    inode = Inode.unpack(raw, 0, 7)
    seen = (inode.mode, inode.size, inode.u, inode.ino, inode.uid, inode.gid, inode.mtime_s, inode.nlink)
    assert seen == (mode, size, u, ino, uid, gid, mtime, nlink)
    assert inode.mtime_ns == nanoseconds
    for length in range(len(raw)):
        with pytest.raises(NydusError):
            Inode.unpack(raw[:length], 0, 7)

"""blob.meta: the bytes of the format page, extents, batches, and files that are none."""

from dataclasses import replace
from pathlib import Path

import pytest

from rafs.blob_table import BlobFeatures
from rafs.blobmeta import (
    HEADER_SIZE,
    BatchContext,
    BlobMeta,
    BlobMetaHeader,
    ChunkInfo,
    Extent,
    node_form,
    pack_array,
)
from rafs.blobmeta_header import check_against_blob
from rafs.record import FormatError
from tests.golden import golden
from tests.unit.test_blob_table import ENTRY

PLAIN = ChunkInfo(0x1234, 1000, 0x5000, 5000, True)
BATCH = ChunkInfo(0x1234, 0, 0x5000, 100, True, True, 2, 300)
HEADER = BlobMetaHeader(BlobFeatures(0x85), 3, 2, 1500, 40, 88, 48, 40, 1)


def test_chunk_infos_of_the_format_page() -> None:
    summed = replace(PLAIN, crc32c=0xDEADBEEF)
    assert PLAIN.pack_v1() == golden("chunk-info-v1")
    assert ChunkInfo.unpack_v1(golden("chunk-info-v1")) == PLAIN
    assert summed.pack_v2() == golden("chunk-info-v2")
    assert ChunkInfo.unpack_v2(golden("chunk-info-v2")) == summed
    assert BATCH.pack_v2() == golden("chunk-info-batch")
    assert ChunkInfo.unpack_v2(golden("chunk-info-batch")) == BATCH


def test_context_and_header_of_the_format_page() -> None:
    assert BatchContext(900, 4000).pack() == golden("batch-context")
    assert HEADER.pack()[:64] == golden("blob-meta-header")


@pytest.mark.parametrize("size", [1, 2, 0xFFFFF, 0x100000, 0x100001, 0x1000000])
def test_sizes_of_both_forms(size: int) -> None:
    info = ChunkInfo(2**40 - 1, size, 2**44 - 4096, size, False)
    assert ChunkInfo.unpack_v1(info.pack_v1()) == info
    if size < 1 << 24:
        assert ChunkInfo.unpack_v2(info.pack_v2()) == info


def made(infos: list[ChunkInfo], batches: list[BatchContext]) -> bytes:
    array = pack_array(infos, batches)
    features = BlobFeatures.ALIGNED | BlobFeatures.CHUNK_INFO_V2 | BlobFeatures.BATCH
    at = 24 * len(infos)
    header = BlobMetaHeader(
        features, 0, len(infos), 0, len(array), len(array), at, 40 * len(batches), len(batches)
    )
    return node_form(array, header)


def in_batch(number: int, offset: int) -> ChunkInfo:
    return ChunkInfo(7000, 0, 0, 100, True, True, number, offset)


def test_chunks_of_a_batch_share_an_extent() -> None:
    infos = [PLAIN, in_batch(0, 0), in_batch(0, 100), in_batch(1, 0), PLAIN]
    meta = BlobMeta(made(infos, [BatchContext(90, 200), BatchContext(100, 100)]))
    assert [meta.batch_range(index) for index in range(5)] == [
        range(1),
        range(1, 3),
        range(1, 3),
        range(3, 4),
        range(4, 5),
    ]
    assert meta.extent(0) == Extent(0x1234, 1000, 5000, True)
    assert meta.extent(1) == meta.extent(2) == Extent(7000, 90, 200, True)
    assert meta.extent(3) == Extent(7000, 100, 100, False)


@pytest.mark.parametrize("sizes", [(0, 100), (0, 0), (101, 100), (1, 0xFFFFFFFF)])
def test_impossible_batches(sizes: tuple[int, int]) -> None:
    meta = BlobMeta(made([in_batch(0, 0)], [BatchContext(*sizes)]))
    with pytest.raises(FormatError, match="batch context"):
        meta.extent(0)


def test_chunks_and_contexts_that_are_not_there() -> None:
    meta = BlobMeta(made([in_batch(3, 0)], [BatchContext(90, 200)]))
    for index in (-1, 1, 1 << 40):
        with pytest.raises(FormatError, match="a chunk below 1"):
            meta.chunk(index)
    with pytest.raises(FormatError, match="a context below 1"):
        meta.extent(0)


@pytest.mark.parametrize(
    ("offset", "wrong", "expectation"),
    [
        (0, b"\0", "magic"),
        (4092, b"\0", "magic"),
        (5, b"\x10", "known features"),
        (8, b"\7", "known algorithm"),
        (12, b"\7", "bytes for 7 chunks"),
        (40, b"\7", "contexts behind the array"),
        (56, b"\7", "contexts inside"),
    ],
)
def test_each_wrong_field_of_a_header_is_named(offset: int, wrong: bytes, expectation: str) -> None:
    data = bytearray(HEADER.pack())
    data[offset : offset + len(wrong)] = wrong
    with pytest.raises(FormatError) as caught:
        BlobMetaHeader.unpack(data, 0)
    assert expectation in caught.value.expectation


def test_files_that_are_no_blob_meta(tmp_path: Path) -> None:
    path = tmp_path / "x.blob.meta"
    whole = made([PLAIN], [])
    for data in (b"", bytes(HEADER_SIZE - 1), bytes(8192), whole[1:], whole[:-1], bytes(4096) + whole):
        path.write_bytes(data)
        with pytest.raises(FormatError):
            BlobMeta.open(path)
    path.write_bytes(whole)
    meta = BlobMeta.open(path)
    assert meta.chunk(0) == PLAIN
    meta.close()


def test_header_that_says_something_else_than_the_blob_table() -> None:
    header = BlobMetaHeader(ENTRY.features, 3, 2, 1500, 40, 48)
    check_against_blob(header, ENTRY)
    for other in (
        replace(header, ci_entries=1),
        replace(header, ci_compressor=1),
        replace(header, ci_offset=1),
        replace(header, ci_compressed_size=1),
        replace(header, ci_uncompressed_size=1),
    ):
        with pytest.raises(FormatError, match="as in the blob table"):
            check_against_blob(other, ENTRY)

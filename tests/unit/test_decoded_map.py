"""Chunks by their place in the decoded file."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from rafs.blobmeta import ChunkInfo
from rafs.decoded_map import DecodedMap
from rafs.record import BLOCK_SIZE


class Table:
    """A chunk table, as far as it is asked."""

    def __init__(self, starts: list[int]) -> None:
        self._starts = starts

    def start_blocks(self) -> list[int]:
        return self._starts


def found(starts: list[int], offset: int, size: int) -> list[int]:
    return list(DecodedMap(Table(starts)).chunks_in(offset, size))  # type: ignore[arg-type]


def test_a_range_inside_one_chunk() -> None:
    assert found([0, 4, 8], 5 * BLOCK_SIZE, 100) == [1]


def test_a_range_over_borders_and_behind_the_last_chunk() -> None:
    assert found([0, 4, 8], 3 * BLOCK_SIZE, 2 * BLOCK_SIZE) == [0, 1]
    assert found([0, 4, 8], 0, 1 << 30) == [0, 1, 2]
    assert found([0, 4, 8], 100 * BLOCK_SIZE, 1) == [2]


def test_nothing_lies_before_the_first_chunk() -> None:
    assert found([4], 0, BLOCK_SIZE) == []
    assert found([], 0, BLOCK_SIZE) == []


@given(
    st.lists(st.integers(0, 50), unique=True, min_size=1, max_size=20),
    st.integers(0, 60 * BLOCK_SIZE),
    st.integers(1, 20 * BLOCK_SIZE),
)
def test_it_finds_what_a_scan_finds_in_whatever_order(starts: list[int], offset: int, size: int) -> None:
    order = sorted(range(len(starts)), key=starts.__getitem__)
    ends = {a: starts[b] for a, b in itertools.pairwise(order)} | {order[-1]: 1 << 40}
    first, last = offset // BLOCK_SIZE, (offset + size - 1) // BLOCK_SIZE
    expected = [n for n in order if starts[n] <= last and ends[n] > first]
    assert found(starts, offset, size) == expected


def test_it_reads_both_forms_of_the_table() -> None:
    from rafs.blob_table import BlobFeatures
    from rafs.blobmeta import BlobMeta, BlobMetaHeader, node_form

    chunks = [ChunkInfo(n * 100, 100, n * 3 * BLOCK_SIZE, 3 * BLOCK_SIZE, True) for n in range(5)]
    for features, packed in (
        (BlobFeatures.CHUNK_INFO_V2, b"".join(chunk.pack_v2() for chunk in chunks)),
        (BlobFeatures(0), b"".join(chunk.pack_v1() for chunk in chunks)),
    ):
        header = BlobMetaHeader(features, 0, len(chunks), 0, len(packed), len(packed))
        meta = BlobMeta(node_form(packed, header))
        assert list(meta.start_blocks()) == [0, 3, 6, 9, 12]
        assert list(DecodedMap(meta).chunks_in(4 * BLOCK_SIZE, 4 * BLOCK_SIZE)) == [1, 2]

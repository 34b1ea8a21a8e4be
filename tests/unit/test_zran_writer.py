"""Which chunks share a context, and which cannot be reached at all."""

from contextlib import closing
from pathlib import Path
from typing import cast

import pytest

from builder.gzip_index import GzipIndexer, RestartPoint
from builder.options import BuildOptions
from builder.row_spool import RowSpool
from builder.zran_writer import CannotIndex, ZranWriter
from rafs.blobmeta import BlobMeta

MIB = 1 << 20


class EvenStream:
    """Stands in for an indexed stream that halves everything and has a point every `spacing` bytes."""

    def __init__(self, spacing: int) -> None:
        self._spacing = spacing

    def point_before(self, offset: int) -> RestartPoint:
        start = offset // self._spacing * self._spacing
        return RestartPoint(start // 2, start, 0, 0, bytes(10) if start else b"")

    def encoded_end(self, offset: int) -> int:
        return offset // 2


def contexts_of(tmp_path: Path, spacing: int, chunks: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Number of the context, start and length of its content, for each chunk of a start and a size."""
    with closing(RowSpool(tmp_path / "rows")) as rows, (tmp_path / "windows").open("w+b") as windows:
        writer = ZranWriter(cast(GzipIndexer, EvenStream(spacing)), rows, windows, BuildOptions())
        for number, (start, size) in enumerate(chunks):
            writer.add(number.to_bytes(32, "big"), start, size)
        assert writer.finish("0" * 64, 1 << 30, tmp_path / "rafs.blob", tmp_path / "blob.meta") is not None
    meta = BlobMeta((tmp_path / "blob.meta").read_bytes())
    infos = [meta.chunk(index) for index in range(meta.count)]
    found = []
    for info, (start, _) in zip(infos, chunks, strict=True):
        context = meta.zran_context(info.batch_index)
        assert context.out_offset + info.offset_in_batch == start
        assert (info.compressed_offset, info.compressed_size) == (context.in_offset, context.in_len)
        found.append((info.batch_index, context.out_offset, context.out_len))
    return found


def test_chunks_share_a_context_up_to_its_size(tmp_path: Path) -> None:
    chunks = [(MIB * number + 512, MIB - 512) for number in range(5)]
    assert contexts_of(tmp_path, 64 << 10, chunks) == [
        (0, 0, 2 * MIB),
        (0, 0, 2 * MIB),
        (1, 2 * MIB, 2 * MIB),
        (1, 2 * MIB, 2 * MIB),
        (2, 4 * MIB, MIB),
    ]


def test_a_context_starts_at_the_last_point_before_its_first_chunk(tmp_path: Path) -> None:
    (found,) = contexts_of(tmp_path, 100_000, [(12_345_678, 1000)])
    assert found == (0, 12_300_000, 46_678)


def test_a_chunk_far_behind_its_point_has_a_large_context(tmp_path: Path) -> None:
    assert contexts_of(tmp_path, 30 * MIB, [(29 * MIB, 1000)]) == [(0, 0, 29 * MIB + 1000)]


def test_a_chunk_too_far_behind_its_point_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotIndex, match="without --no-copy"):
        contexts_of(tmp_path, 100 * MIB, [(70 * MIB, 1000)])


def test_chunks_in_one_long_block_share_its_context(tmp_path: Path) -> None:
    """A context for each of them would hold all before it once more, and a window."""
    found = contexts_of(tmp_path, 8 * MIB, [(MIB * number, MIB) for number in range(10)])
    assert found == [(0, 0, 8 * MIB)] * 8 + [(1, 8 * MIB, 2 * MIB)] * 2

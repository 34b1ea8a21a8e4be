"""Any gzip stream can be entered at any point of its index, whatever pieces it comes in."""

import io
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.gzip_index import BrokenGzip, GzipIndexer, RestartPoint
from rafs.codec import CodecError
from rafs.zran import ZranContext
from rafs.zran_inflate import inflate_context
from tests.gzip_streams import compress_members, gzip_streams, make_content


class Indexed:
    """A stream that was indexed, nothing forgotten."""

    def __init__(self, stream: bytes, piece: int) -> None:
        file = io.BytesIO(stream)
        self.stream, self.content = stream, b""
        self.points: list[RestartPoint] = []
        with GzipIndexer(lambda size: file.read(min(size, piece)), "a layer") as self.indexer:
            while data := self.indexer.inflate():
                self.content += bytes(data)

    def context(self, start: int, end: int) -> tuple[ZranContext, bytes, bytes]:
        """The context from the point before `start` up to `end`, its window and its encoded bytes."""
        point = self.indexer.point_before(start)
        assert point is not None
        encoded_end = self.indexer.encoded_end(end)
        context = ZranContext(
            point.in_offset,
            point.out_offset,
            0,
            encoded_end - point.in_offset,
            end - point.out_offset,
            len(point.window),
            point.byte,
            point.bits,
        )
        return context, point.window, self.stream[point.in_offset : encoded_end]


@settings(max_examples=60, deadline=None)
@given(made=gzip_streams(), piece=st.sampled_from([997, 65_536, 1 << 20]), data=st.data())
def test_every_range_inflates_from_the_point_before_it(
    made: tuple[bytes, bytes], piece: int, data: st.DataObject
) -> None:
    content, stream = made
    indexed = Indexed(stream + bytes(data.draw(st.sampled_from([0, 0, 1, 5000]))), piece)
    assert indexed.content == content
    for _ in range(10 if content else 0):
        start = data.draw(st.integers(0, len(content) - 1))
        end = data.draw(st.integers(start + 1, len(content)))
        context, window, encoded = indexed.context(start, end)
        assert context.out_offset <= start
        assert inflate_context(context, window, encoded) == content[context.out_offset : end]


def test_blocks_start_at_every_bit() -> None:
    content = make_content(7, 120)
    indexed = Indexed(compress_members(content, 7, 1 << 30), 1 << 20)
    seen = set()
    for start in range(0, len(content), 40_000):
        context, window, encoded = indexed.context(start, start + 1)
        seen.add(context.ctx_bits)
        assert inflate_context(context, window, encoded)[-1:] == content[start : start + 1]
    assert seen == set(range(8))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_lying_context_is_an_error_or_gives_as_many_bytes(data: st.DataObject) -> None:
    content = make_content(3, 6)
    indexed = Indexed(compress_members(content, 3, 70_000), 1 << 20)
    context, window, encoded = indexed.context(len(content) // 2, len(content) - 1)
    lie = replace(
        context,
        out_len=data.draw(st.integers(1, 1 << 22)),
        ctx_bits=data.draw(st.integers(0, 7)),
        ctx_byte=data.draw(st.integers(0, 255)),
    )
    cut = data.draw(st.integers(0, len(encoded)))
    try:
        decoded = inflate_context(lie, window[data.draw(st.integers(0, 40)) :], encoded[cut:])
    except CodecError:
        return
    assert len(decoded) == lie.out_len


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (b"", "ends early"),
        (b"not gzip at all", "incorrect header"),
        (compress_members(bytes(100_000), 1, 1 << 30)[:-9], "ends early"),
        (compress_members(bytes(100), 1, 1 << 30)[:-8] + bytes(8), "incorrect data check"),
        (compress_members(b"a", 1, 1) + bytes(512) + compress_members(b"b", 1, 1), "behind the padding"),
        (compress_members(b"a", 1, 1) + b"garbage behind it", "incorrect header"),
    ],
    ids=["empty", "other", "cut", "checksum", "padding inside", "garbage"],
)
@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_a_broken_stream_is_named(stream: bytes, why: str, piece: int) -> None:
    with pytest.raises(BrokenGzip, match=why):
        Indexed(stream, piece)


def test_empty_blocks_cost_no_memory() -> None:
    """A point is noted where 32 KiB of content lie behind the last one, however many blocks there are."""
    encoder = zlib.compressobj(wbits=31)
    stream = encoder.compress(b"x") + encoder.flush(zlib.Z_FULL_FLUSH)
    stream += b"\0\0\0\xff\xff" * 100_000 + encoder.flush()
    indexed = Indexed(stream, 1 << 20)
    assert indexed.content == b"x"
    assert len({id(indexed.indexer.point_before(offset)) for offset in range(2)}) == 1

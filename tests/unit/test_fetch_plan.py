"""The parts of the fetch pipeline that decide: extents, runs, readahead, priorities, prefetch plans."""

import itertools
from collections.abc import Sequence
from random import Random

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from backend.extents import (
    GAP_BYTES,
    RUN_BYTES,
    RUN_DECODED_BYTES,
    WIDEN_BYTES,
    BlobExtent,
    ExtentIndex,
    merge_runs,
    widen,
)
from backend.memory_blob import make_memory_blob
from backend.priority import FetchClass, PriorityGate, Ticket
from backend.readahead import (
    LOCAL_WINDOW_MAX_BYTES,
    STREAMS_MAX,
    WINDOW_MAX_BYTES,
    WINDOW_MIN_BYTES,
    Readahead,
)
from rafs.codec import Compressor


def index_of(groups: Sequence[bytes | Sequence[bytes]]) -> ExtentIndex:
    return ExtentIndex(make_memory_blob(groups, Compressor.NONE).meta)


def test_extents_of_a_blob() -> None:
    extents = index_of([b"a" * 10, [b"b" * 5, b"c" * 5], b"d"])
    assert [(e.chunks, e.start, e.end) for e in extents.following(0)] == [
        (range(1), 0, 10),
        (range(1, 3), 10, 20),
        (range(3, 4), 20, 21),
    ]
    assert extents.of(2) is extents.of(1)
    assert [e.chunks for e in extents.preceding(3)] == [range(1, 3), range(1)]


def test_widening_goes_forward_then_back_and_stops_at_what_is_there() -> None:
    extents = index_of([bytes(100) for _ in range(9)])
    taken = widen(extents, [extents.of(4)], lambda extent: extent.chunks.start not in (2, 7))
    assert [e.chunks.start for e in taken] == [5, 6, 3]


def test_widening_is_bounded() -> None:
    extents = index_of([bytes(100_000) for _ in range(9)])
    taken = widen(extents, [extents.of(4)], lambda extent: True)
    assert [e.chunks.start for e in taken] == [5]
    large = index_of([bytes(WIDEN_BYTES)] * 2)
    assert widen(large, [large.of(0)], lambda extent: True) == []


sizes = st.lists(st.tuples(st.integers(0, 200_000), st.integers(0, 3_000_000)), max_size=40)


@given(sizes, st.randoms())
def test_runs_hold_every_extent_once_and_keep_their_limits(
    places: list[tuple[int, int]], random: Random
) -> None:
    extents, at = [], 0
    for number, (gap, size) in enumerate(places):
        at += gap
        extents.append(BlobExtent(range(number, number + 1), at, size, 3 * size, True))
        at += size
    shuffled = list(extents)
    random.shuffle(shuffled)
    runs = merge_runs(shuffled)
    assert sorted((e for run in runs for e in run), key=lambda e: e.chunks.start) == extents
    for run in runs:
        assert run == sorted(run, key=lambda e: e.start)
        assert len(run) == 1 or run[-1].end - run[0].start <= RUN_BYTES
        assert len(run) == 1 or sum(e.decoded_size for e in run) <= RUN_DECODED_BYTES
        assert all(b.start - a.end <= GAP_BYTES for a, b in itertools.pairwise(run))


@pytest.mark.parametrize("window_max_bytes", [WINDOW_MAX_BYTES, LOCAL_WINDOW_MAX_BYTES])
def test_readahead_grows_with_a_sequential_reader(window_max_bytes: int) -> None:
    readahead = Readahead(window_max_bytes)
    assert readahead.on_miss(0, 1) is None
    stream = readahead.on_miss(1, 2)
    assert stream is not None
    assert stream.window_bytes == WINDOW_MIN_BYTES
    windows = []
    for _ in range(10):
        readahead.advance(stream, stream.next_chunk + 2)
        readahead.extend(stream, stream.next_chunk + 2)
        (marker,) = readahead.markers
        assert readahead.on_marker(marker + 1) is None
        assert readahead.on_marker(marker) is stream
        windows.append(stream.window_bytes)
    assert windows == sorted(windows)
    assert windows[-1] == window_max_bytes


def test_readahead_follows_several_readers_and_forgets_the_oldest() -> None:
    readahead = Readahead()
    for reader in range(STREAMS_MAX):
        readahead.on_miss(1000 * reader, 1000 * reader + 1)
    stream = readahead.on_miss(1, 2)
    assert stream is not None
    readahead.advance(stream, 10)
    for reader in range(STREAMS_MAX):
        readahead.on_miss(500_000 + 1000 * reader, 500_000 + 1000 * reader + 1)
    assert readahead.on_miss(10, 11) is None
    assert not readahead.markers


async def test_gate_admits_by_class_then_by_age() -> None:
    gate = PriorityGate(2, 1)
    order: list[str] = []
    release = trio.Event()

    async def enter(name: str, fetch_class: FetchClass, ticket: Ticket | None = None) -> None:
        async with gate.slot(ticket or Ticket(fetch_class)):
            order.append(name)
            await release.wait()

    late = Ticket(FetchClass.BACKGROUND)
    async with trio.open_nursery() as nursery:
        for name, fetch_class in (
            ("first", FetchClass.PREFETCH),
            ("second", FetchClass.PREFETCH),
            ("third", FetchClass.READAHEAD),
            ("demand", FetchClass.ON_DEMAND),
        ):
            nursery.start_soon(enter, name, fetch_class)
            await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(enter, "raised", FetchClass.BACKGROUND, late)
        await trio.testing.wait_all_tasks_blocked()
        assert order == ["first", "demand"]
        gate.raise_to(late, FetchClass.ON_DEMAND)
        release.set()
    assert order == ["first", "demand", "raised", "third", "second"]


async def test_gate_forgets_who_gave_up() -> None:
    gate = PriorityGate(1, 0)
    async with gate.slot(Ticket(FetchClass.ON_DEMAND)):
        with trio.move_on_after(0):
            async with gate.slot(Ticket(FetchClass.ON_DEMAND)):
                raise AssertionError
    async with gate.slot(Ticket(FetchClass.BACKGROUND)):
        pass


@pytest.mark.parametrize(("slots", "reserved"), [(0, 0), (1, 1), (2, -1)])
def test_gate_without_a_common_slot_is_refused(slots: int, reserved: int) -> None:
    with pytest.raises(ValueError):
        PriorityGate(slots, reserved)

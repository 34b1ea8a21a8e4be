"""The index of cached chunks: what was added is found or lost, and never turned into something else."""

import multiprocessing
import os
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.chunk_index import (
    BUCKET_ENTRIES,
    BUCKET_SIZE,
    ENTRY_SIZE,
    ChunkIndex,
    ChunkPlace,
    IndexHeader,
    blob_key,
    find_entry,
    pack_entry,
    put_first,
)
from rafs.digest import Digester
from rafs.record import FormatError

BLAKE3, SHA256 = Digester.BLAKE3, Digester.SHA256
PLACE = ChunkPlace(blob_key("a" * 64), 7, 5 * 4096)

digests = st.binary(min_size=32, max_size=32)
places = st.builds(
    ChunkPlace,
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 32) - 1).map(lambda block: block * 4096),
)


def digest(number: int) -> bytes:
    return Digester.SHA256.digest(number.to_bytes(8))


def test_the_file_has_the_documented_bytes(tmp_path: Path) -> None:
    path = tmp_path / "index"
    index = ChunkIndex.open(path, buckets=1)
    name = bytes(range(1, 33))
    index.add([(name, ChunkPlace(0x1122334455667788, 3, 2 * 4096))], BLAKE3)
    index.close()
    index.close()
    data = path.read_bytes()
    assert data[:16] == b"NPYCHIX1" + bytes.fromhex("01000000 08000000")
    assert data[16:4096] == bytes(4080)
    assert data[4096:4120] == bytes.fromhex("0102030405060708 8877665544332211 03000000 02000000")
    assert data[4128:] == bytes(7 * ENTRY_SIZE)
    assert list(tmp_path.iterdir()) == [path]


def test_header_round_trip_and_truncation() -> None:
    packed = IndexHeader(77).pack()
    assert IndexHeader.unpack(packed) == IndexHeader(77)
    for length in (0, 7, 8, 15, 4095):
        with pytest.raises(FormatError):
            IndexHeader.unpack(packed[:length])


def test_what_was_added_is_there_after_a_restart_and_for_others(tmp_path: Path) -> None:
    first, other = ChunkIndex.open(tmp_path / "index", 64), ChunkIndex.open(tmp_path / "index")
    first.add([(digest(1), PLACE)], BLAKE3)
    assert other.find(digest(1), BLAKE3) == PLACE
    assert other.find(digest(2), BLAKE3) is None
    first.close()
    other.close()
    again = ChunkIndex.open(tmp_path / "index")
    assert again.find(digest(1), BLAKE3) == PLACE
    again.close()


def test_the_newest_place_of_a_chunk_counts(tmp_path: Path) -> None:
    index = ChunkIndex.open(tmp_path / "index", 1)
    for block in range(3):
        index.add([(digest(1), ChunkPlace(1, 1, block * 4096)), (digest(2), PLACE)], BLAKE3)
    assert index.find(digest(1), BLAKE3) == ChunkPlace(1, 1, 2 * 4096)
    assert index.find(digest(2), BLAKE3) == PLACE
    index.close()


def test_a_full_bucket_loses_its_oldest_and_the_file_does_not_grow(tmp_path: Path) -> None:
    path = tmp_path / "index"
    index = ChunkIndex.open(path, 1)
    size = path.stat().st_size
    for number in range(BUCKET_ENTRIES + 3):
        index.add([(digest(number), ChunkPlace(1, number, 0))], BLAKE3)
    found = [number for number in range(BUCKET_ENTRIES + 3) if index.find(digest(number), BLAKE3)]
    assert found == [*range(3, BUCKET_ENTRIES + 3)]
    assert path.stat().st_size == size == IndexHeader.SIZE + BUCKET_SIZE
    index.close()


@given(digests, places)
def test_digesters_do_not_mix(name: bytes, place: ChunkPlace) -> None:
    bucket = put_first(bytes(BUCKET_SIZE), pack_entry(name, BLAKE3, place))
    assert find_entry(bucket, name, BLAKE3) == place
    assert find_entry(bucket, name, SHA256) is None


@given(st.lists(st.tuples(st.integers(0, 30), places), max_size=60), st.integers(1, 3))
@settings(deadline=None)
def test_every_answer_is_the_last_that_was_given(added: list[tuple[int, ChunkPlace]], buckets: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        index = ChunkIndex.open(Path(folder, "index"), buckets)
        expected: dict[int, ChunkPlace] = {}
        for number, place in added:
            index.add([(digest(number), place)], SHA256)
            expected[number] = place
            assert index.find(digest(number), SHA256) == place
        for number in range(31):
            assert index.find(digest(number), SHA256) in (None, expected.get(number))
        if len(expected) <= BUCKET_ENTRIES:
            assert all(index.find(digest(number), SHA256) for number in expected)
        index.close()


@given(st.binary(max_size=BUCKET_SIZE + 64), digests)
def test_garbage_is_a_miss(bucket: bytes, name: bytes) -> None:
    assert find_entry(bucket, name, BLAKE3) is None
    assert find_entry(bucket[:40] + name + bucket[40:], name, BLAKE3) is None
    entry = pack_entry(name, BLAKE3, PLACE)
    assert find_entry(put_first(bucket[:BUCKET_SIZE], entry), name, BLAKE3) == PLACE
    assert len(put_first(bucket[:BUCKET_SIZE], entry)) == BUCKET_SIZE


def test_every_flipped_bit_is_a_miss() -> None:
    entry = pack_entry(digest(1), BLAKE3, PLACE)
    for bit in range(len(entry) * 8):
        broken = bytearray(entry)
        broken[bit >> 3] ^= 1 << (bit & 7)
        assert find_entry(bytes(broken), digest(1), BLAKE3) is None
    for length in range(ENTRY_SIZE):
        assert find_entry(entry[:length], digest(1), BLAKE3) is None


@pytest.mark.parametrize("damage", ["empty", "short", "long", "magic", "entries", "no bucket", "noise"])
def test_a_file_that_is_no_index_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = tmp_path / "index"
    ChunkIndex.open(path, 4).close()
    sound = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "short": sound[:-1],
            "long": sound + b"\0",
            "magic": b"X" + sound[1:],
            "entries": sound[:12] + b"\x09" + sound[13:],
            "no bucket": sound[:8] + bytes(4) + sound[12:],
            "noise": random.Random(1).randbytes(len(sound)),
        }[damage]
    )
    index = ChunkIndex.open(path, 4)
    assert "it is made anew" in caplog.text
    index.add([(digest(1), PLACE)], BLAKE3)
    assert index.find(digest(1), BLAKE3) == PLACE
    index.close()


def test_a_file_that_is_cut_or_filled_with_noise_under_us_is_a_miss(tmp_path: Path) -> None:
    path = tmp_path / "index"
    index = ChunkIndex.open(path, 64)
    index.add(((digest(number), PLACE) for number in range(100)), BLAKE3)
    os.truncate(path, 4096)
    assert [index.find(digest(number), BLAKE3) for number in range(100)] == [None] * 100
    with path.open("r+b") as file:
        file.write(random.Random(2).randbytes(1 << 15))
    assert [index.find(digest(number), BLAKE3) for number in range(100)] == [None] * 100
    index.add([(digest(1), PLACE)], BLAKE3)
    assert index.find(digest(1), BLAKE3) == PLACE
    index.close()


def test_a_disk_that_takes_no_more_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ChunkIndex.open(tmp_path / "index", 4).close()
    full = os.open("/dev/full", os.O_RDWR)
    index = ChunkIndex(full, 4)
    index.add([(digest(1), PLACE)], BLAKE3)
    index.add([(digest(1), PLACE)], BLAKE3)
    assert caplog.text.count("No space left on device") == 1
    index.close()


def add_many(path: Path, start: int) -> None:
    index = ChunkIndex.open(path)
    for number in range(start, start + 2000):
        index.add([(digest(number % 300), ChunkPlace(number % 300, number, 0))], BLAKE3)
    index.close()


def test_processes_that_write_the_same_buckets_lose_entries_at_most(tmp_path: Path) -> None:
    path = tmp_path / "index"
    index = ChunkIndex.open(path, 16)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=add_many, args=(path, start)) for start in (0, 100_000)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        for number in range(300):
            place = index.find(digest(number), BLAKE3)
            assert place is None or place.blob_key == number
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    index.close()

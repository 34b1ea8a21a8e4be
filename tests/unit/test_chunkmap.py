"""The presence bitmap: its bytes, its locks, and files that are none."""

import multiprocessing
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.chunkmap import ChunkMap, ChunkMapHeader, map_size
from rafs.record import FormatError


def test_new_map_has_the_documented_bytes(tmp_path: Path) -> None:
    path = tmp_path / "map"
    chunk_map = ChunkMap.create(path, 10)
    chunk_map.add([0, 9])
    chunk_map.close()
    data = path.read_bytes()
    assert data[:16] == bytes.fromhex("50414d42 01000000 50414d43 00000000")
    assert data[16:4096] == bytes(4080)
    assert data[4096:] == bytes([0b1000_0000, 0b0100_0000])
    assert list(tmp_path.iterdir()) == [path]


def test_header_round_trip_is_canonical() -> None:
    for header in (ChunkMapHeader(all_ready=False), ChunkMapHeader(all_ready=True, version=0)):
        assert ChunkMapHeader.unpack(header.pack()) == header


def test_all_ready_is_marked_with_the_last_bit_and_cleared_with_the_first(tmp_path: Path) -> None:
    chunk_map = ChunkMap.create(tmp_path / "map", 9)
    chunk_map.add(range(8))
    assert not chunk_map.is_complete()
    chunk_map.add([8])
    assert chunk_map.is_complete()
    assert chunk_map.count() == 9
    assert (tmp_path / "map").read_bytes()[12:16] == bytes.fromhex("50414d4d")
    chunk_map.remove([3])
    assert not chunk_map.is_complete()
    assert 3 not in chunk_map
    assert 4 in chunk_map
    chunk_map.close()


def test_bits_survive_and_are_seen_by_other_mappings(tmp_path: Path) -> None:
    path = tmp_path / "map"
    first = ChunkMap.create(path, 100)
    second = ChunkMap.open(path, 100)
    first.add([7, 64])
    assert 7 in second
    assert 64 in second
    assert 65 not in second
    first.close()
    second.close()
    again = ChunkMap.open(path, 100)
    assert [i for i in range(100) if i in again] == [7, 64]
    again.close()
    again.close()


@pytest.mark.parametrize(
    ("offset", "value"),
    [(0, 0x51), (4, 2), (8, 0), (4097, 0b0010_0000)],
    ids=["magic", "version", "second magic", "bit past the end"],
)
def test_foreign_file_is_refused(tmp_path: Path, offset: int, value: int) -> None:
    path = tmp_path / "map"
    ChunkMap.create(path, 10).close()
    data = bytearray(path.read_bytes())
    data[offset] = value
    path.write_bytes(data)
    with pytest.raises(FormatError):
        ChunkMap.open(path, 10)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, map_size(10) - 1, map_size(10) + 1])
def test_file_of_a_wrong_size_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "map"
    ChunkMap.create(path, 10).close()
    path.write_bytes((path.read_bytes() + b"\0")[:size])
    with pytest.raises(FormatError, match=f"found {size}"):
        ChunkMap.open(path, 10)


def _set_bits(path: Path, bits: range) -> None:
    chunk_map = ChunkMap.open(path, 4096)
    for bit in bits:
        chunk_map.add([bit])
    chunk_map.close()


def test_two_processes_never_lose_bits_of_one_byte(tmp_path: Path) -> None:
    path = tmp_path / "map"
    ChunkMap.create(path, 4096).close()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_set_bits, args=(path, range(i, 4096, 2))) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    chunk_map = ChunkMap.open(path, 4096)
    assert chunk_map.count() == 4096
    assert chunk_map.is_complete()
    chunk_map.close()


HEADS = st.one_of(st.binary(min_size=16, max_size=16), st.just(ChunkMapHeader(all_ready=True).pack()[:16]))


@given(HEADS, st.binary(min_size=3, max_size=3))
@settings(max_examples=50)
def test_any_bytes_are_a_map_or_a_format_error(head: bytes, bits: bytes) -> None:
    _open_bytes(head + bytes(4080) + bits)


@pytest.mark.parametrize("offset", [*range(16), 4096, 4097, 4098])
def test_every_flipped_bit_is_a_map_or_a_format_error(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "map"
    ChunkMap.create(path, 20).close()
    good = path.read_bytes()
    for bit in range(8):
        changed = bytearray(good)
        changed[offset] ^= 1 << bit
        _open_bytes(bytes(changed))


def _open_bytes(data: bytes) -> None:
    """Opens `data` as a map of 20 chunks: it is refused, or all that it says is about these chunks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "map"
        path.write_bytes(data)
        try:
            chunk_map = ChunkMap.open(path, 20)
        except FormatError:
            return
        assert chunk_map.count() == sum(index in chunk_map for index in range(20))
        chunk_map.close()

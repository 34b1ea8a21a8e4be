"""The index of known chunks, in memory and in its file."""

import hashlib
from pathlib import Path

import pytest

from builder import dedup as dedup_module
from builder.dedup import DedupIndex
from builder.digest_file import DigestFile
from rafs.chunk import ChunkFlags, ChunkRef, ChunkRow


def _digest(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def _ref(address: int) -> ChunkRef:
    return ChunkRef.unpack(address.to_bytes(8, "little"), 0)


def test_a_chunk_is_claimed_once(tmp_path: Path) -> None:
    index = DedupIndex(tmp_path / "spill")
    assert index.claim(_digest(1))
    assert not index.claim(_digest(1))
    assert _digest(1) in index
    assert _digest(2) not in index


def test_place_gives_the_address(tmp_path: Path) -> None:
    index = DedupIndex(tmp_path / "spill")
    index.claim(_digest(1))
    with pytest.raises(KeyError):
        index.address(_digest(1))
    index.place(_digest(1), 70_000, 5)
    assert _ref(index.address(_digest(1))) == ChunkRef(0, 70_000, 5 * 4096)


def test_a_dictionary_chunk_keeps_its_place_in_the_other_blob(tmp_path: Path) -> None:
    index = DedupIndex(tmp_path / "spill")
    row = ChunkRow(_digest(1), 9, ChunkFlags.COMPRESSED, 10, 20, 0, 8192, 0, 77, 0)
    index.place_dictionary_chunk(_digest(1), 3, row)
    assert not index.claim(_digest(1))
    assert _ref(index.address(_digest(1))) == ChunkRef(3, 77, 8192)


@pytest.mark.parametrize("limit", [1, 5, 1000])
def test_the_file_answers_like_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(dedup_module, "IN_MEMORY_MAX", limit)
    index = DedupIndex(tmp_path / "spill")
    for number in range(300):
        assert index.claim(_digest(number))
        assert not index.claim(_digest(number))
        index.place(_digest(number), number, number)
    for number in range(300):
        assert not index.claim(_digest(number))
        assert _ref(index.address(_digest(number))).chunk_index == number
    assert _digest(301) not in index
    index.close()
    assert not (tmp_path / "spill").exists()


def test_the_file_of_an_interrupted_build_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup_module, "IN_MEMORY_MAX", 1)
    (tmp_path / "spill").write_bytes(b"\xff" * 1_000_000)
    index = DedupIndex(tmp_path / "spill")
    assert index.claim(_digest(1))
    assert index.claim(_digest(2))
    index.close()


def test_a_full_bucket_splits(tmp_path: Path) -> None:
    """All digests share their first 14 bits, so they meet in one bucket of 102."""
    table = DigestFile(tmp_path / "table")
    digests = [b"\xab\xcc" + _digest(number)[2:] for number in range(102)]
    digests += [b"\xab\xcf" + _digest(number)[2:] for number in range(102)]
    for number, digest in enumerate(digests):
        assert table.add(digest, number)
        assert not table.add(digest, 7)
    assert [table.get(digest) for digest in digests] == list(range(204))
    table.replace(digests[3], 1 << 63)
    assert table.get(digests[3]) == 1 << 63
    with pytest.raises(KeyError):
        table.replace(_digest(0), 1)
    assert len(table) == 204
    table.close()
    assert list(tmp_path.iterdir()) == []


def test_digests_with_zeros_are_not_taken_for_free_slots(tmp_path: Path) -> None:
    table = DigestFile(tmp_path / "table")
    digests = [bytes(31) + bytes([number]) for number in range(1, 50)]
    digests += [bytes([0, 0, number]) + bytes(29) for number in range(1, 50)]
    for digest in digests:
        assert table.add(digest, 0)
    assert [table.get(digest) for digest in digests] == [0] * len(digests)
    assert table.get(bytes(30) + b"\1\0") is None
    table.close()

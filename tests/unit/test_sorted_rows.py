"""Rows of a chunk table on disk: every digest is found, whatever the digests are like."""

from pathlib import Path

import blake3
import pytest

from builder.sorted_rows import SortedRows
from rafs.chunk import ROW_SIZE

_OFFSET = 24


def _row(digest: bytes) -> bytes:
    return digest + digest[:16] + b"\xff" * (ROW_SIZE - 48)


def _random(count: int) -> list[bytes]:
    return [blake3.blake3(number.to_bytes(4, "little")).digest() for number in range(count)]


def _close(count: int) -> list[bytes]:
    """Most begin with the same 24 bytes, so that their place cannot be guessed from those."""
    return _random(9) + [bytes(24) + number.to_bytes(8, "big") for number in range(1, count)]


def _file(path: Path, digests: list[bytes]) -> Path:
    path.write_bytes(bytes(_OFFSET) + b"".join(map(_row, digests)))
    return path


@pytest.mark.parametrize("count", [0, 1, 50, 51, 52, 103, 20_000])
@pytest.mark.parametrize("kind", [_random, _close])
def test_every_digest_is_found_and_no_other(tmp_path: Path, count: int, kind: object) -> None:
    made = _random(count + 50) if kind is _random else _close(count + 50)
    digests, others = sorted(made[: len(made) - 50]), made[-50:]
    with _file(tmp_path / "rows", digests).open("rb", buffering=0) as file:
        rows = SortedRows(file, _OFFSET, len(digests))
        assert rows.is_sorted()
        assert all(rows.find(digest) == _row(digest) for digest in digests)
        assert not any(rows.find(digest) for digest in [*others, bytes(32), b"\xff" * 32])


def test_a_digest_across_two_fields_is_none(tmp_path: Path) -> None:
    digests = _random(1)
    with _file(tmp_path / "rows", digests).open("rb", buffering=0) as file:
        assert SortedRows(file, _OFFSET, 1).find(_row(digests[0])[16:48]) is None


def test_rows_are_sorted_into_a_file_without_a_name(tmp_path: Path) -> None:
    digests = _random(25_000)
    (tmp_path / "work").mkdir()
    with _file(tmp_path / "rows", digests).open("rb", buffering=0) as file:
        rows = SortedRows(file, _OFFSET, len(digests))
        assert not rows.is_sorted()
        with rows.write_sorted(tmp_path / "work") as in_order:
            assert not list((tmp_path / "work").iterdir())
            ordered = SortedRows(in_order, 0, len(digests))
            assert b"".join(ordered.blocks()) == b"".join(map(_row, sorted(digests)))


def test_a_table_that_became_shorter(tmp_path: Path) -> None:
    with _file(tmp_path / "rows", _random(10)).open("rb", buffering=0) as file:
        rows = SortedRows(file, _OFFSET, 11)
        with pytest.raises(EOFError, match="before row 11"):
            rows.find(bytes(32))

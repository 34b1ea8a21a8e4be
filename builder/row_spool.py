"""Rows of the chunk table in a file while they come, and out again sorted, in bounded memory."""

from collections.abc import Iterator
from pathlib import Path

from rafs.chunk import ROW_SIZE, row_order

SORTED_AT_ONCE = 150_000
"""Rows that are sorted in memory in one go, at about 130 bytes each."""
_READ_ROWS = 50_000


class RowSpool:
    """Appends packed rows to a file.

    Digests are evenly distributed, so rows are sorted part by part of the range of their first 16 bits.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, rows: bytes) -> None:
        """Adds packed rows, one or several joined."""
        self._file.write(rows)
        self._count += len(rows) // ROW_SIZE

    def sorted_rows(self) -> Iterator[bytes]:
        """All rows in the order of a chunk table, many at a time."""
        self._file.flush()
        parts = -(-self._count // SORTED_AT_ONCE)
        for part in range(parts):
            low, high = (part << 16) // parts, ((part + 1) << 16) // parts
            rows = [row for row in self._rows() if low <= (row[0] << 8 | row[1]) < high]
            rows.sort(key=row_order)
            yield b"".join(rows)

    def close(self) -> None:
        """Removes the file."""
        try:
            self._file.close()
        finally:
            self._path.unlink(missing_ok=True)

    def _rows(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            while block := file.read(_READ_ROWS * ROW_SIZE):
                for at in range(0, len(block), ROW_SIZE):
                    yield block[at : at + ROW_SIZE]

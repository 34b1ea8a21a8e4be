"""Rows of a chunk table in a file, found by digest without reading the table."""

import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO

from builder.row_spool import RowSpool
from rafs.chunk import ROW_SIZE

_WINDOW = 51
"""Rows of one look: as many as a block of 4096 bytes has."""
_SCAN_ROWS = 10_000
_INTERPOLATIONS = 3
"""Two find nearly every digest of a table, digests being random; a table made on purpose is halved then."""


class SortedRows:
    """Packed rows sorted by digest. Memory does not depend on their number: reads, and no map, which would
    count as the process's own.
    """

    def __init__(self, file: IO[bytes], offset_bytes: int, count: int) -> None:
        """`file` is unbuffered and stays the caller's."""
        self._file = file
        self._offset = offset_bytes
        self._count = count

    def __len__(self) -> int:
        return self._count

    def find(self, digest: bytes) -> bytes | None:
        """A packed row of that digest, or None."""
        key = int.from_bytes(digest[:8], "big")
        low, high, low_key, high_key = 0, self._count, 0, 1 << 64
        looks = 0
        while high - low > _WINDOW:
            guess = (low + high) // 2
            if looks < _INTERPOLATIONS or looks % 2:
                guess = low + (key - low_key) * (high - low) // max(high_key - low_key, 1)
            looks += 1
            start = max(low, min(guess - _WINDOW // 2, high - _WINDOW))
            rows = self._read(start, _WINDOW)
            first, last = rows[:32], rows[-ROW_SIZE : 32 - ROW_SIZE]
            if digest < first:
                high, high_key = start, int.from_bytes(first[:8], "big")
            elif digest > last:
                low, low_key = start + _WINDOW, int.from_bytes(last[:8], "big")
            else:
                return _row_of(rows, digest)
        return _row_of(self._read(low, high - low), digest)

    def blocks(self) -> Iterator[bytes]:
        """All rows in disk order, many at a time."""
        for start in range(0, self._count, _SCAN_ROWS):
            yield self._read(start, min(_SCAN_ROWS, self._count - start))

    def is_sorted(self) -> bool:
        """Whether the rows are what `find` takes them for; images of old builders have them otherwise."""
        last = b""
        for rows in self.blocks():
            digests = [last, *(rows[at : at + 32] for at in range(0, len(rows), ROW_SIZE))]
            if any(second < first for first, second in pairwise(digests)):
                return False
            last = digests[-1]
        return True

    def write_sorted(self, directory: Path) -> IO[bytes]:
        """A file of the same rows in order, which has no name any more."""
        spool = RowSpool(directory / "dictionary")
        file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  # the caller's
        try:
            for rows in self.blocks():
                for at in range(0, len(rows), ROW_SIZE):
                    spool.append(rows[at : at + ROW_SIZE])
            for rows in spool.sorted_rows():
                view = memoryview(rows)
                while view:
                    view = view[file.write(view) :]
        except BaseException:
            file.close()
            raise
        finally:
            spool.close()
        return file

    def _read(self, start: int, count: int) -> bytes:
        self._file.seek(self._offset + start * ROW_SIZE)
        rows = self._file.read(count * ROW_SIZE)
        if len(rows) != count * ROW_SIZE:
            raise EOFError(f"a chunk table ends before row {start + count}")
        return rows


def _row_of(rows: bytes, digest: bytes) -> bytes | None:
    at = rows.find(digest)
    while at >= 0 and at % ROW_SIZE:
        at = rows.find(digest, at + 1)
    return None if at < 0 else rows[at : at + ROW_SIZE]

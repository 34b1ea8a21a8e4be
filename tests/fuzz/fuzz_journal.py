"""Takes over what an interrupted build left: the input is the journal, the blob is sound."""

import tempfile
from pathlib import Path

import xxhash

from builder.journal import JournalWriter, WorkDirectory
from tests.hostile import value_or_error

_EXTENTS = tuple(bytes([number]) * (number + 1) for number in range(20))
_KEYS = tuple(bytes([number + 1]) * 32 for number in range(20))
_NO_KEY = bytes(32)
"""No digest, and what the index marks its free slots with; nobody looks for it."""


def _journal() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        writer, offset = JournalWriter(path), 0
        for key, data in zip(_KEYS, _EXTENTS, strict=True):
            writer.append(key, offset, len(data), 4096, xxhash.xxh3_64_intdigest(data))
            offset += len(data)
        writer.close()
        return path.read_bytes()


SEEDS = (_journal(),)


def exercise(data: bytes) -> None:
    """Only errors of this project may come up; what is found has the checksum of its record."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "3.journal").write_bytes(data)
        (directory / "3.blob").write_bytes(b"".join(_EXTENTS))
        with value_or_error():
            work = WorkDirectory(directory)
            try:
                keys = {data[at : at + 32] for at in range(40, min(len(data), 40 + 56 * 40), 56)}
                found = [work.find(key) for key in (*_KEYS, *keys) if key != _NO_KEY and len(key) == 32]
                assert work.extents_found or found.count(None) == len(found)
                assert work.blob_path.name in ("0.blob", "4.blob")
            finally:
                work.close()


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_journal")

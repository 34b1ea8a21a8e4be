"""Opens a chunk map of twelve chunks and changes it."""

import tempfile
from pathlib import Path

from backend.chunkmap import ChunkMap, ChunkMapHeader
from tests.hostile import value_or_error

_CHUNKS = 12
SEEDS = (
    ChunkMapHeader(all_ready=False).pack() + b"\xa5\x30",
    ChunkMapHeader(all_ready=True).pack() + b"\xff\xf0",
    ChunkMapHeader(all_ready=False, version=0).pack() + bytes(2),
)


def exercise(data: bytes) -> None:
    """Only errors of this project may come up; bits that were set are found, by others too."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "map"
        path.write_bytes(data)
        with value_or_error():
            found = ChunkMap.open(path, _CHUNKS)
            try:
                _change(found)
                again = ChunkMap.open(path, _CHUNKS)
                assert again.count() == found.count()
                again.close()
            finally:
                found.close()


def _change(found: ChunkMap) -> None:
    before = {index for index in range(_CHUNKS) if index in found}
    assert found.count() == len(before)
    found.add((2, 11))
    assert {index for index in range(_CHUNKS) if index in found} == before | {2, 11}
    found.remove((0, 11))
    assert {index for index in range(_CHUNKS) if index in found} == (before | {2}) - {0, 11}
    assert not found.is_complete()


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_chunk_map")

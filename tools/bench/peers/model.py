"""What the images of this bench are made of: a file that does not compress, so that its size travels.

Or one that does: of its units of 4 KiB some are random, the others are these again.
"""

import random
from pathlib import Path

CHUNK_BYTES = 1 << 20
FILE = "model.safetensors"


UNIT_BYTES = 4096


def write_model(directory: Path, size_bytes: int, seed: int, noise: float = 1.0) -> Path:
    """A directory with one file, of which a share of `noise` is random; the path of the file."""
    rng = random.Random(f"model {seed}")
    directory.mkdir(parents=True)
    path = directory / FILE
    with path.open("wb") as file:
        for offset in range(0, size_bytes, CHUNK_BYTES):
            file.write(_chunk(rng, min(CHUNK_BYTES, size_bytes - offset), noise))
    return path


def _chunk(rng: random.Random, size_bytes: int, noise: float) -> bytes:
    if noise >= 1.0:
        return rng.randbytes(size_bytes)
    count = -(-size_bytes // UNIT_BYTES)
    fresh = [rng.randbytes(UNIT_BYTES) for _ in range(max(1, round(noise * count)))]
    units = fresh + rng.choices(fresh, k=count - len(fresh))
    rng.shuffle(units)
    return b"".join(units)[:size_bytes]


def write_next_version(directory: Path, first: Path, share: float, seed: int) -> int:
    """A directory with the file `first` in which `share` of the chunks are others, one at least; how many."""
    rng = random.Random(f"changes {seed}")
    content = bytearray(first.read_bytes())
    chunks = -(-len(content) // CHUNK_BYTES)
    changed = rng.sample(range(chunks), max(1, round(share * chunks)))
    for chunk in changed:
        start = chunk * CHUNK_BYTES
        length = min(CHUNK_BYTES, len(content) - start)
        content[start : start + length] = rng.randbytes(length)
    directory.mkdir(parents=True)
    (directory / FILE).write_bytes(content)
    return len(changed)


def damage(path: Path, every_bytes: int = CHUNK_BYTES // 4) -> int:
    """Flips one byte in each `every_bytes` of a file, where it has bytes; how many."""
    flipped = 0
    with path.open("r+b", buffering=0) as file:
        size = path.stat().st_size
        for offset in range(every_bytes // 2, size, every_bytes):
            file.seek(offset)
            (value,) = file.read(1)
            file.seek(offset)
            flipped += file.write(bytes([value ^ 0xFF]))
    return flipped

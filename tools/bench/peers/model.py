"""What the images of this bench are made of: a file that does not compress, so that its size travels."""

import random
from pathlib import Path

CHUNK_BYTES = 1 << 20
FILE = "model.safetensors"


def write_model(directory: Path, size_bytes: int, seed: int) -> Path:
    """A directory with one file of random bytes; the path of the file."""
    rng = random.Random(f"model {seed}")
    directory.mkdir(parents=True)
    path = directory / FILE
    with path.open("wb") as file:
        for offset in range(0, size_bytes, CHUNK_BYTES):
            file.write(rng.randbytes(min(CHUNK_BYTES, size_bytes - offset)))
    return path


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

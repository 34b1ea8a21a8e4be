"""Contents that compress like real data: pieces cut from the files of this machine."""

import os
import random
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOTS = (Path("/usr/lib"), Path("/usr/share"))
SMALLEST_BYTES = 64


class Corpus:
    """Cuts pieces from a list of files; the same generator state gives the same pieces."""

    def __init__(self, files: Sequence[tuple[Path, int]]) -> None:
        """`files`: paths and their sizes in bytes. Raises `ValueError` for an empty list."""
        if not files:
            raise ValueError("no files to cut contents from")
        self._files = files

    @classmethod
    def of_machine(cls, roots: Sequence[Path] = ROOTS) -> "Corpus":
        """All regular files under `roots`, in a fixed order."""
        return cls(sorted(found for root in roots for found in _regular_files(root)))

    def cut(self, size_bytes: int, rng: random.Random, piece_max_bytes: int = 1 << 20) -> bytes:
        """`size_bytes` bytes: pieces of at most `piece_max_bytes` of files drawn by `rng`, joined."""
        content = bytearray()
        while len(content) < size_bytes:
            path, size = self._files[rng.randrange(len(self._files))]
            wanted = min(size_bytes - len(content), piece_max_bytes)
            offset = rng.randrange(max(size - wanted, 0) + 1)
            content += _read(path, offset, wanted)
        return bytes(content)


def _regular_files(root: Path) -> Iterator[tuple[Path, int]]:
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_size >= SMALLEST_BYTES and os.access(path, os.R_OK):
                yield path, status.st_size


def _read(path: Path, offset: int, size_bytes: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), size_bytes, offset)

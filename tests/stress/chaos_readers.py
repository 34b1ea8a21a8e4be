"""Readers that verify every byte they get: `python -m tests.stress.chaos_readers KIND MOUNT TRUTH SECONDS`.

KIND is sequential, random, mapped or tree. Each drops what the kernel has cached before it reads, so that
reads reach the driver, and paces itself, so that the image is not complete before the run ends. The result is
one JSON line.
"""

import errno
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

LARGE = "large.bin"
BLOCK_BYTES = 1 << 20
PAGE_BYTES = 4096
SEQUENTIAL_BYTES_PER_S = 32 << 20
RANDOM_READS_PER_S = 60.0
REPORTED_ERRORS = 10


@dataclass(slots=True)
class Report:
    """What one reader has seen. `stall_s` is its slowest single operation, `find_s` its slowest listing."""

    kind: str
    operations: int = 0
    bytes_read: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    stall_s: float = 0.0
    find_s: float = 0.0

    def run(self, what: str, operation: Callable[..., bool], *arguments: object, lists: bool = False) -> None:
        """Does one operation, which tells whether what it got was right."""
        start = time.monotonic()
        try:
            right = operation(*arguments)
        except OSError as error:
            self.errors.append(f"{what}: {errno.errorcode.get(error.errno or 0, str(error))}")
            right = True
        took_s = time.monotonic() - start
        self.operations += 1
        self.wrong += not right
        if lists:
            self.find_s = max(self.find_s, took_s)
        else:
            self.stall_s = max(self.stall_s, took_s)


class LargeFile:
    """The large file through the mount, and what must be in it."""

    def __init__(self, mount: Path, truth: Path) -> None:
        self.descriptor = os.open(mount / LARGE, os.O_RDONLY)
        with open(truth / LARGE, "rb") as file:
            self.truth = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        self.size = len(self.truth)

    def drop(self, offset: int, size: int) -> None:
        """Has the kernel forget what it has cached."""
        os.posix_fadvise(self.descriptor, offset, size, os.POSIX_FADV_DONTNEED)

    def read(self, offset: int, size: int) -> bool:
        """Reads a range and compares it."""
        size = min(size, self.size - offset)
        self.drop(offset, size)
        data = os.pread(self.descriptor, size, offset)
        if len(data) != size:  # what the kernel makes of an error behind the first page
            raise OSError(errno.EIO, "short read")
        return data == self.truth[offset : offset + size]


def paced(end: float, per_second: float) -> Iterator[None]:
    """Steps until the monotonic time `end`, at most so many in a second on the average."""
    due = time.monotonic()
    while time.monotonic() < end:
        yield
        due = max(due + 1 / per_second, time.monotonic() - 1.0)
        time.sleep(max(0.0, due - time.monotonic()))


def read_sequentially(report: Report, mount: Path, truth: Path, end: float) -> None:
    """From one end to the other, again and again."""
    large, offset = LargeFile(mount, truth), 0
    for _ in paced(end, SEQUENTIAL_BYTES_PER_S / BLOCK_BYTES):
        report.run(f"read at {offset}", large.read, offset, BLOCK_BYTES)
        report.bytes_read += BLOCK_BYTES
        offset = (offset + BLOCK_BYTES) % large.size


def read_randomly(report: Report, mount: Path, truth: Path, end: float) -> None:
    """A page or sixteen, anywhere, without the kernel's readahead."""
    large, chance = LargeFile(mount, truth), random.Random(1)
    os.posix_fadvise(large.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    for _ in paced(end, RANDOM_READS_PER_S):
        at, size = _page(large, chance), chance.choice((PAGE_BYTES, 16 * PAGE_BYTES))
        report.run(f"pread at {at}", large.read, at, size)
        report.bytes_read += size


def read_mapped(report: Report, mount: Path, truth: Path, end: float) -> None:
    """Page faults; an error there is SIGBUS, which ends this process, and is seen by that."""
    large, chance = LargeFile(mount, truth), random.Random(2)
    mapping = mmap.mmap(large.descriptor, 0, prot=mmap.PROT_READ)
    view = memoryview(mapping)

    def read(at: int, size: int) -> bool:
        mapping.madvise(mmap.MADV_DONTNEED, at, size)
        large.drop(at, size)
        return view[at : at + size] == large.truth[at : at + size]

    for _ in paced(end, RANDOM_READS_PER_S):
        at = _page(large, chance)
        size = min(8 * PAGE_BYTES, large.size - at)
        report.run(f"fault at {at}", read, at, size)
        report.bytes_read += size


def read_tree(report: Report, mount: Path, truth: Path, end: float) -> None:
    """Listings with attributes, small files, and now and then all names."""
    chance = random.Random(3)
    folders = sorted(entry.name for entry in os.scandir(truth) if entry.is_dir())
    sizes = {folder: _sizes(truth / folder) for folder in folders}

    def read_file(folder: str, name: str) -> bool:
        path = mount / folder / name
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return file.read() == (truth / folder / name).read_bytes()

    def list_folder(folder: str) -> bool:
        return _sizes(mount / folder) == sizes[folder]

    def find() -> bool:
        return {folder: _sizes(mount / folder) for folder in folders} == sizes

    for step, _ in enumerate(paced(end, 100.0)):
        folder = chance.choice(folders)
        report.run(f"list {folder}", list_folder, folder)
        name = chance.choice(sorted(sizes[folder]))
        report.run(f"read {folder}/{name}", read_file, folder, name)
        report.bytes_read += sizes[folder][name]
        if step % 100 == 0:
            _drop_names()
            report.run("find", find, lists=True)


def _drop_names() -> None:
    """Directory entries and inodes that nobody holds are asked for again."""
    Path("/proc/sys/vm/drop_caches").write_text("2")


def _sizes(folder: Path) -> dict[str, int]:
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder)}


def _page(large: LargeFile, chance: random.Random) -> int:
    return chance.randrange(large.size // PAGE_BYTES) * PAGE_BYTES


READERS = {
    "sequential": read_sequentially,
    "random": read_randomly,
    "mapped": read_mapped,
    "tree": read_tree,
}


def main(kind: str, mount: str, truth: str, seconds: str) -> None:
    """Reads and reports."""
    report = Report(kind)
    READERS[kind](report, Path(mount), Path(truth), time.monotonic() + float(seconds))
    report.errors = report.errors[:REPORTED_ERRORS]
    print(json.dumps(asdict(report)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

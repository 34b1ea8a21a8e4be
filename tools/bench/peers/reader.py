"""What a host does once everybody starts: mounts the image and reads, every byte compared with the source.

`python -m tools.bench.peers.reader JOB` (JSON) imports all it needs, says `ready` and waits for a line: the
start of eight interpreters on a small machine is not what is measured. Then it runs the command line of
`nydus-py` in this process, reads, and prints what it found as JSON. Times are of CLOCK_MONOTONIC, which all
hosts share.
"""

import importlib
import os
import random
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout

import msgspec

from tools.main import run

BLOCK_BYTES = 1 << 20
PAGE_BYTES = 4096


class Job(msgspec.Struct, frozen=True):
    """`mount` is the command line that mounts, without the program. `readers` 0: the whole file, in order.

    Otherwise so many threads do `reads` reads each of 4 KiB, at offsets that follow from `seed`.
    """

    mount: list[str]
    file: str
    source: str
    readers: int = 0
    reads: int = 0
    seed: str = ""


class Done(msgspec.Struct, frozen=True):
    """What a reader found. `touched`: the offsets of its reads, in blocks of 1 MiB, when they are random."""

    mounted_s: float
    finished_s: float
    read_bytes: int
    wrong_bytes: int
    touched: list[int]
    cpu_s: float
    error: str = ""


def main(argument: str) -> int:
    """Waits, works and reports; 1 when something failed."""
    job = msgspec.json.decode(argument, type=Job)
    for verb in ("mount", "agent_client", "mount_stay"):
        importlib.import_module(f"tools.{verb}")
    print("ready", flush=True)
    if not sys.stdin.readline():
        return 1
    done = work(job)
    print(msgspec.json.encode(done).decode(), flush=True)
    return 1 if done.error else 0


def work(job: Job) -> Done:
    """Mounts and reads."""
    mounted_s = 0.0
    read = wrong = 0
    touched: set[int] = set()
    error = ""
    before = _cpu_s()
    with redirect_stdout(sys.stderr):
        code = run(job.mount)
    cpu_s = _cpu_s() - before  # the reads are the user's, not ours
    mounted_s = time.monotonic()
    try:
        if code:
            error = f"nydus-py {' '.join(job.mount)}: exit code {code}"
        elif job.readers:
            read, wrong, touched = read_pages(job)
        else:
            read, wrong = read_whole(job)
    except OSError as failure:
        error = str(failure)
    return Done(mounted_s, time.monotonic(), read, wrong, sorted(touched), cpu_s, error)


def read_whole(job: Job) -> tuple[int, int]:
    """Reads the file from end to end; bytes read, and how many of them are wrong."""
    read = wrong = 0
    with open(job.file, "rb", buffering=0) as file, open(job.source, "rb", buffering=0) as source:
        while block := file.read(BLOCK_BYTES):
            read += len(block)
            wrong += differing(block, source.read(len(block)))
        wrong += os.fstat(source.fileno()).st_size - read  # what is missing at the end
    return read, wrong


def read_pages(job: Job) -> tuple[int, int, set[int]]:
    """Reads at random; bytes read, how many are wrong, and the blocks that were touched."""
    with open(job.file, "rb", buffering=0) as file, open(job.source, "rb", buffering=0) as source:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        pages = os.fstat(source.fileno()).st_size // PAGE_BYTES

        def read(reader: int) -> tuple[int, set[int]]:
            rng = random.Random(f"{job.seed} {reader}")
            wrong = 0
            touched = set()
            for _ in range(job.reads):
                offset = rng.randrange(pages) * PAGE_BYTES
                found = os.pread(file.fileno(), PAGE_BYTES, offset)
                wrong += differing(found, os.pread(source.fileno(), PAGE_BYTES, offset))
                touched.add(offset // BLOCK_BYTES)
            return wrong, touched

        with ThreadPoolExecutor(job.readers) as pool:
            results = list(pool.map(read, range(job.readers)))
    all_touched: set[int] = set()
    return (
        job.readers * job.reads * PAGE_BYTES,
        sum(wrong for wrong, _ in results),
        all_touched.union(*(touched for _, touched in results)),
    )


def differing(found: bytes, expected: bytes) -> int:
    """How many bytes are not the expected ones."""
    if found == expected:
        return 0
    missing = abs(len(found) - len(expected))
    return missing + sum(a != b for a, b in zip(found, expected, strict=False))


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

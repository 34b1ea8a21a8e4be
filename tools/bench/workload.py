"""What is done to a mounted file system, in a process of its own: `python -m tools.bench.workload KIND ...`.

Only the work itself is timed, not the start of the interpreter. The result is one JSON line.
"""

import hashlib
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Callable

BLOCK_BYTES = 1 << 20
PAGE_BYTES = 4096


def read_sequentially(path: str) -> dict[str, float]:
    """Reads a file from end to end, 1 MiB at a time, into one buffer."""
    buffer = bytearray(BLOCK_BYTES)
    buffer[:] = os.urandom(BLOCK_BYTES)  # its pages are there before the clock starts
    total = 0
    with open(path, "rb", buffering=0) as file:
        start = time.perf_counter()
        while count := file.readinto(buffer):
            total += count
        seconds = time.perf_counter() - start
    return {"bytes": total, "seconds": seconds}


def read_randomly(path: str, count: str, seed: str) -> dict[str, float]:
    """Reads `count` different pages of a file in random order, one after the other, without readahead."""
    fd = os.open(path, os.O_RDONLY)
    pages = os.fstat(fd).st_size // PAGE_BYTES
    chosen = random.Random(int(seed)).sample(range(pages), min(int(count), pages))
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    buffer = bytearray(PAGE_BYTES)
    start = time.perf_counter()
    for page in chosen:
        os.preadv(fd, [buffer], page * PAGE_BYTES)
    return {"reads": len(chosen), "seconds": time.perf_counter() - start}


def read_mapped(path: str) -> dict[str, float]:
    """Copies a file out of a mapping of it, 1 MiB at a time."""
    buffer = bytearray(os.urandom(BLOCK_BYTES))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        size = len(mapping)
        start = time.perf_counter()
        for offset in range(0, size, BLOCK_BYTES):
            block = mapping[offset : offset + BLOCK_BYTES]
            buffer[: len(block)] = block
        seconds = time.perf_counter() - start
    return {"bytes": size, "seconds": seconds}


def read_all(root: str, names: str) -> dict[str, float]:
    """Opens, reads and closes every file of a list."""
    with open(names) as file:
        paths = file.read().splitlines()
    os.chdir(root)
    buffer = bytearray(os.urandom(BLOCK_BYTES))
    start = time.perf_counter()
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        while os.readv(fd, [buffer]) == BLOCK_BYTES:
            pass
        os.close(fd)
    return {"files": len(paths), "seconds": time.perf_counter() - start}


def stat_all(root: str, names: str) -> dict[str, float]:
    """Asks for the attributes of every file of a list, without listing directories."""
    with open(names) as file:
        paths = file.read().splitlines()
    os.chdir(root)
    stat = os.stat
    start = time.perf_counter()
    for path in paths:
        stat(path)
    return {"files": len(paths), "seconds": time.perf_counter() - start}


def digest_files(root: str, names: str) -> dict[str, str]:
    """SHA-256 over the names and contents of every file of a list."""
    total = hashlib.sha256()
    with open(names) as file:
        paths = file.read().splitlines()
    for path in paths:
        with open(os.path.join(root, path), "rb") as file_bytes:
            content = hashlib.file_digest(file_bytes, "sha256").digest()
        total.update(path.encode() + b"\0" + content)
    return {"sha256": total.hexdigest()}


def digest_file(path: str) -> dict[str, str]:
    """SHA-256 of one file."""
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


KINDS: dict[str, Callable[..., dict[str, float] | dict[str, str]]] = {
    "sequential": read_sequentially,
    "random": read_randomly,
    "mapped": read_mapped,
    "stat": stat_all,
    "read-all": read_all,
    "digest-tree": digest_files,
    "digest-file": digest_file,
}

if __name__ == "__main__":
    print(json.dumps(KINDS[sys.argv[1]](*sys.argv[2:])))

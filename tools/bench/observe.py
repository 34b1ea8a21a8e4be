"""Runs the workloads in processes of their own and returns what they measured."""

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tools.bench.process import run_measured

WORKLOAD_TIMEOUT_S = 600.0
# One CPU for client and server: on few cores the placement of the two decides how fast small requests are.
PINNED = ("taskset", "-c", "0")


class _Timed(msgspec.Struct):
    seconds: float
    bytes: int = 0
    reads: int = 0


class _Digest(msgspec.Struct):
    sha256: str


def sequential_rate(path: Path) -> float:
    """MB/s (10^6 bytes) of one pass over a file."""
    timed = msgspec.json.decode(_run("sequential", path), type=_Timed)
    return timed.bytes / timed.seconds / 1e6


def random_rate(path: Path, reads: int, seed: int, *, pinned: bool) -> float:
    """Reads of 4 KiB per second, one at a time."""
    output = _run("random", path, str(reads), str(seed), prefix=PINNED if pinned else ())
    timed = msgspec.json.decode(output, type=_Timed)
    return timed.reads / timed.seconds


def mapped_rate(path: Path) -> float:
    """MB/s (10^6 bytes) of one pass over a mapped file."""
    timed = msgspec.json.decode(_run("mapped", path), type=_Timed)
    return timed.bytes / timed.seconds / 1e6


def stat_time_s(root: Path, names: Path) -> float:
    """Seconds to stat every file of a list."""
    return msgspec.json.decode(_run("stat", root, names), type=_Timed).seconds


def read_all_time_s(root: Path, names: Path, *, pinned: bool = False) -> float:
    """Seconds to open, read and close every file of a list."""
    output = _run("read-all", root, names, prefix=PINNED if pinned else ())
    return msgspec.json.decode(output, type=_Timed).seconds


def find_time_s(root: Path) -> float:
    """Seconds of `find` over a tree; it prints the names of all files."""
    return run_measured(["find", root, "-type", "f"], timeout_s=WORKLOAD_TIMEOUT_S).wall_s


def find_size_time_s(root: Path) -> float:
    """Seconds of `find` over a tree that asks for the attributes of all files."""
    command: list[str | Path] = ["find", root, "-type", "f", "-printf", "%s %p\\n"]
    return run_measured(command, timeout_s=WORKLOAD_TIMEOUT_S).wall_s


def tree_digest(root: Path, names: Path) -> str:
    """SHA-256 over names and contents of the files of a list."""
    return msgspec.json.decode(_run("digest-tree", root, names), type=_Digest).sha256


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return msgspec.json.decode(_run("digest-file", path), type=_Digest).sha256


def _run(kind: str, *arguments: str | Path, prefix: Sequence[str] = ()) -> str:
    command = [*prefix, sys.executable, "-m", "tools.bench.workload", kind, *arguments]
    return run_measured(command, timeout_s=WORKLOAD_TIMEOUT_S).output

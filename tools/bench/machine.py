"""Facts of the machine and the programs that a result depends on."""

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tools.bench.volumes import lacking

PROGRAMS = (
    ("zstd", "--version"),
    ("mksquashfs", "-version"),
    ("mkfs.erofs", "-V"),
    ("docker-registry", "--version"),
    ("mkfs.ext4", "-V"),
)
PACKAGES = ("nydus-py", "pyfuse3", "trio", "zstandard", "blake3")


@dataclass(frozen=True, slots=True)
class Load:
    """Load averages over 1, 5 and 15 minutes."""

    one: float
    five: float
    fifteen: float


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a result was measured."""

    kernel: str
    processor: str
    cores: int
    memory_bytes: int
    file_system: str
    python: str
    versions: tuple[str, ...]


def load_now() -> Load:
    """The load averages of this moment."""
    return Load(*os.getloadavg())


def describe_machine(directory: Path) -> Machine:
    """The facts; `directory` is where the benchmark works."""
    return Machine(
        kernel=platform.release(),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        file_system=_file_system(directory),
        python=platform.python_version(),
        versions=tuple(_package(name) for name in PACKAGES) + tuple(_program(*call) for call in PROGRAMS),
    )


def _processor() -> str:
    match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else platform.machine()


def _file_system(directory: Path) -> str:
    command = ["findmnt", "-n", "-o", "FSTYPE", "-T", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} not installed"


def _program(name: str, option: str) -> str:
    if reason := lacking(name):
        return reason
    run = subprocess.run([name, option], capture_output=True, text=True, check=False)
    match = re.search(r"v?\d+\.\d+(\.\d+)?", run.stdout + run.stderr)
    return f"{name} {match[0] if match else '(version unknown)'}"

"""What is read from: images mounted by the kernel, and an image mounted by nydus-py."""

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tools.bench.ledger import NYDUS
from tools.bench.nydus import Nydus
from tools.bench.process import run_measured

EXT4_SPARE = 1.25
EXT4_SPARE_BYTES = 64 << 20
EXT4_BYTES_PER_FILE = 4096 + 256


@dataclass(frozen=True, slots=True)
class Volume:
    """Something to mount. `attach(prefix)` mounts it for the time of a with block and yields the directory.

    `prefix` is a command that starts the server of the file system, for those that have one.
    """

    name: str
    attach: Callable[[Sequence[str]], AbstractContextManager[Path]]


def kernel_volume(name: str, fstype: str, image: Path, mountpoint: Path) -> Volume:
    """An image that the kernel mounts from a loop device."""
    return Volume(name, lambda prefix: kernel_mount(fstype, image, mountpoint, "loop,ro"))


def nydus_volume(nydus: Nydus, reference: str, mountpoint: Path) -> Volume:
    """An image that nydus-py mounts."""
    return Volume(NYDUS, lambda prefix: nydus.mounted(reference, mountpoint, prefix))


@contextlib.contextmanager
def kernel_mount(fstype: str, image: Path, mountpoint: Path, options: str) -> Iterator[Path]:
    """Mounts `image`; the loop device goes away with the mount."""
    mountpoint.mkdir(parents=True, exist_ok=True)
    run_measured(["mount", "-t", fstype, "-o", options, image, mountpoint])
    try:
        yield mountpoint
    finally:
        if subprocess.run(["umount", str(mountpoint)], check=False).returncode:
            subprocess.run(["umount", "-l", str(mountpoint)], check=False)


def make_ext4(source: Path, image: Path, size_bytes: int, files: int) -> None:
    """Makes an ext4 image with a copy of `source`. Raises `CommandFailed`."""
    room = int(size_bytes * EXT4_SPARE) + files * EXT4_BYTES_PER_FILE + EXT4_SPARE_BYTES
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(room)
    run_measured(["mkfs.ext4", "-q", "-F", "-N", str(files + files // 10 + 4096), image])
    with kernel_mount("ext4", image, image.with_suffix(".rw"), "loop") as target:
        run_measured(["cp", "-a", f"{source}/.", target])


def lacking(*programs: str) -> str | None:
    """Why something that needs these programs cannot be done here; None when it can."""
    absent = [program for program in programs if shutil.which(program) is None]
    return f"{', '.join(absent)} not installed" if absent else None

"""How running mounts are found: for each a record, a status socket and a log file in the run directory."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from rafs.errors import NydusError


class NotMounted(NydusError):
    """No mount of nydus-py is at that directory."""

    message = "{directory}: no image of nydus-py is mounted here; `nydus-py status` lists all"
    exit_code = 92


@dataclass(frozen=True, slots=True)
class MountRecord:
    """What a mount has written down about itself, for when it cannot be asked.

    `is_complete`: the kernel needs no process of ours any more to read it.
    """

    mountpoint: str
    reference: str
    digest: str
    driver: str
    pid: int
    is_complete: bool = False


@dataclass(frozen=True, slots=True)
class MountFiles:
    """The files of one mount."""

    record: Path
    socket: Path
    log: Path

    def read(self) -> MountRecord | None:
        """The record; None when there is none (any more), or none that can be read."""
        try:
            return msgspec.json.decode(self.record.read_bytes(), type=MountRecord)
        except (OSError, msgspec.DecodeError):
            return None

    def write(self, record: MountRecord) -> None:
        """Writes the record; a reader sees all of it or nothing."""
        with tempfile.NamedTemporaryFile(dir=self.record.parent, delete=False) as file:
            file.write(msgspec.json.encode(record))
        os.replace(file.name, self.record)

    def remove(self) -> None:
        """Forgets the mount. Its log stays until the next mount at the same directory."""
        for path in (self.record, self.socket):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def mount_files(run_dir: Path, mountpoint: Path) -> MountFiles:
    """The files of the mount at `mountpoint`, an absolute path; makes their directory."""
    directory = run_dir / "mounts"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return _files(directory, hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16])


def known_mounts(run_dir: Path) -> Iterator[tuple[MountFiles, MountRecord]]:
    """Every mount that has left a record, by mount point, running or not."""
    directory = run_dir / "mounts"
    found = [(files, files.read()) for files in (_files(directory, p.stem) for p in directory.glob("*.json"))]
    present = [(files, record) for files, record in found if record is not None]
    yield from sorted(present, key=lambda pair: pair[1].mountpoint)


def _files(directory: Path, key: str) -> MountFiles:
    return MountFiles(directory / f"{key}.json", directory / f"{key}.sock", directory / f"{key}.log")

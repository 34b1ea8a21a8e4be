"""The kernel's table of mounts, in the namespace of this process (proc_pid_mountinfo(5))."""

import os
from dataclasses import dataclass
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")
"""A poll for POLLPRI on it tells that it has changed."""
FILESYSTEM_TYPE = "fuse.nydus-py"
BOOTSTRAP_NAME = "image.boot"
"""What an EROFS mount of ours has as its source (backend/bootstrap_layer.py)."""


@dataclass(frozen=True, slots=True)
class MountEntry:
    """A line of /proc/self/mountinfo. `device` is "MAJOR:MINOR"."""

    device: str
    mountpoint: str
    filesystem: str
    source: str

    @property
    def is_ours(self) -> bool:
        """Whether nydus-py has mounted it."""
        if self.filesystem == "erofs":
            return Path(self.source).name == BOOTSTRAP_NAME
        return self.filesystem == FILESYSTEM_TYPE


def find_mount(directory: Path, mountinfo: Path = MOUNTINFO) -> MountEntry | None:
    """The topmost mount at `directory`, an absolute path without links; None when it is no mount point."""
    wanted = os.fsencode(directory)
    found = None
    for line in mountinfo.read_bytes().splitlines():
        fields = line.split(b" ")
        if _unescape(fields[4]) != wanted:
            continue
        kind, source = fields[fields.index(b"-") + 1 :][:2]
        texts = (fields[2], _unescape(fields[4]), kind, _unescape(source))
        found = MountEntry(*map(os.fsdecode, texts))
    return found


def _unescape(field: bytes) -> bytes:
    for code, byte in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
        field = field.replace(code, byte)
    return field

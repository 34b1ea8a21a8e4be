"""Two trees on disk, compared in everything that an image keeps."""

import hashlib
import os
import stat
from pathlib import Path
from typing import Any


def describe_tree(root: Path, *, with_times: bool = True) -> dict[str, dict[str, Any]]:
    """Every path below `root` with all that an image keeps of it; hard links by the first of their names."""
    base = os.fsencode(root)
    found: dict[str, dict[str, Any]] = {}
    first: dict[int, str] = {}
    pending = [base]
    while pending:
        path = pending.pop()
        status = os.lstat(path)
        name = os.fsdecode(path[len(base) :] or b"/")
        facts: dict[str, Any] = {
            "mode": oct(status.st_mode),
            "owner": (status.st_uid, status.st_gid),
            "xattrs": {key: os.getxattr(path, key, follow_symlinks=False) for key in _xattrs(path)},
        }
        if with_times:
            facts["mtime"] = status.st_mtime_ns
        if stat.S_ISLNK(status.st_mode):
            facts["target"] = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            facts["content"] = hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest()
            facts["link"] = first.setdefault(status.st_ino, name)
        elif stat.S_ISDIR(status.st_mode):
            names = sorted((os.path.join(path, entry) for entry in os.listdir(path)), reverse=True)
            pending.extend(names)
        elif not stat.S_ISFIFO(status.st_mode):
            facts["device"] = status.st_rdev
        found[name] = facts
    return found


def _xattrs(path: bytes) -> list[str]:
    return sorted(os.listxattr(path, follow_symlinks=False))

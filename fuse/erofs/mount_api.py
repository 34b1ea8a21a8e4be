"""Mounting EROFS by the file descriptor based system calls (fsopen(2) and its kin).

mount(2) cuts options at 4 KiB, which is not enough for the devices of an image with many blobs, and mount(8)
sets up loop devices.
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

SYS_MOVE_MOUNT, SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 429, 430, 431, 432
"""The same numbers on every architecture."""
FSOPEN_CLOEXEC = 1
FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 0, 1, 6
FSMOUNT_CLOEXEC = 1
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOATIME = 0x1, 0x2, 0x4, 0x10
MOVE_MOUNT_F_EMPTY_PATH = 4
AT_FDCWD = -100
VALUE_MAX_BYTES = 255
"""fsconfig(2) takes strings of at most 256 bytes with their NUL."""

SUPERBLOCKS = Path("/sys/fs/erofs")
BDIS = Path("/sys/class/bdi")


def mount_erofs(source: Path, devices: Sequence[int], directory: Path) -> None:
    """Mounts the bootstrap `source` at `directory`, read-only; `devices` are descriptors, in device order.

    Raises `OSError`; its text has what the kernel says of the image.
    """
    attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOATIME
    context = _call(SYS_FSOPEN, b"erofs", FSOPEN_CLOEXEC)
    try:
        try:
            _set(context, b"source", _value(source))
            _call(SYS_FSCONFIG, context, FSCONFIG_SET_FLAG, b"ro", None, 0)
            for device in devices:
                _set(context, b"device", f"/proc/self/fd/{device}".encode())
            _call(SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}{_kernel_says(context)}") from error
        mount = _call(SYS_FSMOUNT, context, FSMOUNT_CLOEXEC, attributes)
    finally:
        os.close(context)
    try:
        _call(SYS_MOVE_MOUNT, mount, b"", AT_FDCWD, os.fsencode(directory), MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(mount)


def superblocks() -> set[str]:
    """Names of all live EROFS superblocks without a block device; mounts do not tell theirs."""
    if not SUPERBLOCKS.is_dir():
        return set()
    return {entry.name for entry in SUPERBLOCKS.iterdir() if entry.name != "features"}


def is_alive(superblock: str) -> bool:
    """Whether a superblock is in use somewhere: mounted in any namespace, or detached with an open file."""
    return (SUPERBLOCKS / superblock).exists()


def set_readahead(superblock: str, size_kib: int) -> None:
    """How far the kernel reads ahead of a sequential reader. Raises `OSError`."""
    (BDIS / superblock / "read_ahead_kb").write_text(str(size_kib))


def _value(path: Path) -> bytes:
    value = os.fsencode(path)
    if len(value) > VALUE_MAX_BYTES:
        raise OSError(f"the path of the cache directory is too long for EROFS: {path}")
    return value


def _set(context: int, key: bytes, value: bytes) -> None:
    _call(SYS_FSCONFIG, context, FSCONFIG_SET_STRING, key, value, 0)


def _kernel_says(context: int) -> str:
    """What the kernel has written into the context for people to read, behind a colon."""
    lines = []
    try:
        while line := os.read(context, 1024):
            lines.append(line.decode(errors="replace").strip())
    except OSError:
        pass  # ENODATA: that was all
    return "".join(f": {line}" for line in lines)


def _call(number: int, *arguments: object) -> int:
    result = ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)

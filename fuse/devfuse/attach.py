"""Getting a /dev/fuse descriptor mounted: by mount(2) as root, else through fusermount3. Blocking."""

import array
import ctypes
import errno
import os
import select
import socket
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fuse.devfuse.wire import (
    IN_HEADER,
    INIT_IN,
    INIT_OUT,
    OUT_HEADER,
    PROTOCOL_MAJOR,
    PROTOCOL_MINOR,
    PROTOCOL_MINOR_MIN,
    READ_BUFFER_MIN,
    InitFlags,
    Opcode,
)
from fuse.mount_table import FILESYSTEM_TYPE
from fuse.mountpoint import FUSE_DEVICE, MountFailed

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOATIME = 0x1, 0x2, 0x4, 0x400
READ_PAGES_MAX = 256
"""One request reads at most 1 MiB: larger ones gain nothing."""
BACKGROUND_MAX = 64
INIT_TIMEOUT_S = 10.0
BDI_READAHEAD = "/sys/class/bdi/{device}/read_ahead_kb"

WANTED = (
    InitFlags.ASYNC_READ
    | InitFlags.EXPORT_SUPPORT
    | InitFlags.DO_READDIRPLUS
    | InitFlags.NO_OPEN_SUPPORT
    | InitFlags.PARALLEL_DIROPS
    | InitFlags.MAX_PAGES
    | InitFlags.CACHE_SYMLINKS
    | InitFlags.NO_OPENDIR_SUPPORT
    | InitFlags.EXPLICIT_INVAL_DATA
    | InitFlags.INIT_EXT
    | InitFlags.HAS_RESEND
)


@dataclass(frozen=True, slots=True)
class Connection:
    """What was agreed on with the kernel. `resends`: it sends lost requests again (Linux 6.9)."""

    resends: bool
    passthrough: bool


def open_device() -> int:
    """A /dev/fuse descriptor, not yet mounted. Raises `OSError`."""
    return os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)


def mount_device(device: int, mountpoint: Path, source: str, *, allow_other: bool) -> None:
    """Mounts with mount(2), which root may. Raises `MountFailed`."""
    options = [
        f"fd={device}",
        f"rootmode={stat.S_IFDIR:o}",
        f"user_id={os.geteuid()}",
        f"group_id={os.getegid()}",
        "default_permissions",
    ]
    if allow_other:
        options.append("allow_other")
    libc = ctypes.CDLL(None, use_errno=True)
    kind, flags = FILESYSTEM_TYPE.encode(), MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOATIME
    arguments = (os.fsencode(source), os.fsencode(mountpoint), kind, flags, ",".join(options).encode())
    if libc.mount(*arguments) != 0:
        raise MountFailed(directory=mountpoint, why=os.strerror(ctypes.get_errno()))


def mount_by_helper(mountpoint: Path, source: str, *, allow_other: bool) -> int:
    """Mounts as an ordinary user and gives the descriptor. Raises `MountFailed`."""
    name = source.encode("ascii", "replace").decode().replace(",", "?").replace("\\", "?")
    options = f"ro,nosuid,nodev,noatime,default_permissions,fsname={name},subtype=nydus-py"
    if allow_other:
        options += ",allow_other"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = ["fusermount3", "-o", options, "--", os.fspath(mountpoint)]
        environment = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}
        done = subprocess.run(
            command,
            env=environment,
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            why = (done.stderr.strip() or f"fusermount3 ended with {done.returncode}").splitlines()[-1]
            raise MountFailed(directory=mountpoint, why=why)
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(array.array("i").itemsize))
    numbers = array.array("i")
    numbers.frombytes(ancillary[0][2])
    os.set_inheritable(numbers[0], False)
    return numbers[0]


def negotiate(device: int, mountpoint: Path, *, passthrough: bool) -> Connection:
    """Answers the first request, INIT, after which the mount is usable.

    Asks for as little traffic as a read-only image needs. Raises `MountFailed`.
    """
    waiting = select.poll()  # not select(2), which knows no descriptor above 1023
    waiting.register(device, select.POLLIN)
    if not waiting.poll(INIT_TIMEOUT_S * 1000):
        raise MountFailed(directory=mountpoint, why="the kernel does not begin")
    request = os.read(device, READ_BUFFER_MIN)
    _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
    if opcode != Opcode.INIT:
        raise MountFailed(directory=mountpoint, why=f"the kernel begins with request {opcode}")
    major, minor, readahead, low, high = INIT_IN.unpack_from(request.ljust(64, b"\0"), IN_HEADER.size)
    if (major, minor) < (PROTOCOL_MAJOR, PROTOCOL_MINOR_MIN):
        os.write(device, OUT_HEADER.pack(OUT_HEADER.size, -errno.EPROTO, unique))
        raise MountFailed(directory=mountpoint, why=f"FUSE {major}.{minor}; Linux 5.4 or later is needed")
    offered = InitFlags(low | high << 32)
    wanted = WANTED
    if passthrough:
        # The kernel never asks OPEN again once it was told that there is no need.
        wanted = (wanted | InitFlags.PASSTHROUGH) & ~InitFlags.NO_OPEN_SUPPORT
    agreed = offered & wanted
    has_passthrough = bool(agreed & InitFlags.PASSTHROUGH)
    body = INIT_OUT.pack(
        PROTOCOL_MAJOR,
        min(minor, PROTOCOL_MINOR),
        max(readahead, 1 << 20),
        agreed & 0xFFFF_FFFF,
        BACKGROUND_MAX,
        BACKGROUND_MAX * 3 // 4,
        4096,
        1,
        READ_PAGES_MAX,
        0,
        agreed >> 32,
        1 if has_passthrough else 0,
        0,
        b"",
    )
    os.write(device, OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body)
    return Connection(bool(agreed & InitFlags.HAS_RESEND), has_passthrough)


def raise_readahead(device_number: str, size_kib: int) -> None:
    """Has the kernel read ahead further than 128 KiB. `device_number` as in mountinfo. Raises `OSError`."""
    Path(BDI_READAHEAD.format(device=device_number)).write_text(str(size_kib))

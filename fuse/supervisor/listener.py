"""A unix socket for its owner alone, wherever its path leads."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path


def listen(path: Path) -> socket.socket:
    """A non-blocking listening socket at `path`, mode 0600; one that was left there is replaced."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with short_address(path) as address:
            listener.bind(address)
            os.chmod(address, 0o600)  # nobody can connect before `listen`
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


def is_served(path: Path) -> bool:
    """Whether somebody accepts connections at `path`."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError), short_address(path) as address:
        probe.connect(address)
        return True
    return False


@contextlib.contextmanager
def short_address(path: Path) -> Iterator[str]:
    """`path` by way of a descriptor: the address of a unix socket has room for 107 bytes only."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)

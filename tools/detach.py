"""Going to the background without starting Python a second time.

`detach` forks. The parent waits until the child is ready and exits with 0, or exits with the code of
a child that gave up. The child keeps standard error until it is ready, so that it reports its own
failure as any other verb does; from then on it talks to a log file.

Must be called before trio or any thread runs: neither survives a fork.
"""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NoReturn

from rafs.errors import NydusError

LOG_MODE = 0o600


class BackgroundProcessDied(NydusError):
    """The process in the background ended without a word."""

    message = "the background process was killed by {signal_name} before it was ready; log: {log}"
    exit_code: ClassVar[int] = 91


def detach(log_path: Path) -> Callable[[], None]:
    """Forks and returns in the child alone: the function to call, once, when it is ready.

    The parent leaves by `SystemExit`, or `BackgroundProcessDied` when a signal ended the child.
    Paths must be absolute afterwards: the child's working directory is /.
    """
    assert threading.active_count() == 1, "a thread would not survive the fork"
    ready_read, ready_write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(ready_write)
        _wait_for_child(pid, ready_read, log_path)
    os.close(ready_read)
    os.setsid()
    os.chdir("/")
    _redirect(Path(os.devnull), os.O_RDONLY, (0,))

    def ready() -> None:
        _redirect(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, (1, 2))
        os.write(ready_write, b"\0")
        os.close(ready_write)

    return ready


def _wait_for_child(pid: int, ready_read: int, log_path: Path) -> NoReturn:
    """Ends the parent; see `detach`."""
    try:
        is_ready = os.read(ready_read, 1) != b""
    except KeyboardInterrupt:
        # The child has left the terminal's process group and would not hear of it.
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        raise
    if is_ready:
        raise SystemExit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        raise BackgroundProcessDied(signal_name=signal.Signals(-code).name, log=log_path)
    raise SystemExit(code)


def _redirect(path: Path, flags: int, descriptors: tuple[int, ...]) -> None:
    opened = os.open(path, flags, LOG_MODE)
    for descriptor in descriptors:
        os.dup2(opened, descriptor)
    os.close(opened)

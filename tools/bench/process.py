"""Runs a command and measures it with everything that it starts.

CPU time comes from wait4, which counts the descendants that were waited for. Memory is polled: PSS counts a
page that several processes share once, so its sum over the processes is what the command really takes.
(ru_maxrss will not do: it knows one process, and starts with the memory of the parent at the fork.)
The processes of a command are those of its session.
"""

import contextlib
import os
import resource
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rafs.errors import NydusError

POLL_INTERVAL_S = 0.05
GRACE_S = 10.0
TAIL_CHARACTERS = 300
SESSION_FIELD = 3  # of /proc/PID/stat, counted from the state behind the name; proc(5)

Argument = str | Path


class CommandFailed(NydusError):
    """A command that is measured failed."""

    message = "{command}: {why}"
    exit_code: ClassVar[int] = 105


@dataclass(frozen=True, slots=True)
class Usage:
    """What a command took, its processes together, and what it wrote to standard output."""

    wall_s: float
    cpu_s: float
    peak_pss_bytes: int
    peak_rss_bytes: int
    output: str


def run_measured(
    command: Sequence[Argument],
    *,
    environment: dict[str, str] | None = None,
    timeout_s: float = 1800,
    poll_memory: bool = False,
) -> Usage:
    """Runs `command` to its end. Raises `CommandFailed`."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise CommandFailed(command=_shown(command), why=error.strerror or str(error)) from error
        with _deadline(process, timeout_s), _MemoryPoll(process.pid, poll_memory) as memory:
            usage, status = _wait(process)
        wall_s = time.perf_counter() - start
        if status:
            errors.seek(0)
            why = f"exit code {status}: {_tail(errors.read())}"
            raise CommandFailed(command=_shown(command), why=why)
        output.seek(0)
        return Usage(
            wall_s=wall_s,
            cpu_s=usage.ru_utime + usage.ru_stime,
            peak_pss_bytes=memory.peak_pss_bytes,
            peak_rss_bytes=memory.peak_rss_bytes,
            output=output.read().decode(errors="replace"),
        )


def _wait(process: "subprocess.Popen[bytes]") -> tuple["resource.struct_rusage", int]:
    """Waits for the command; one that is left halfway (Ctrl-C) is ended with its session."""
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        _signal(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        _signal(process.pid, signal.SIGKILL)
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage, process.returncode


@contextlib.contextmanager
def _deadline(process: "subprocess.Popen[bytes]", timeout_s: float) -> Iterator[None]:
    timer = threading.Timer(timeout_s, _signal, [process.pid, signal.SIGKILL])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


class _MemoryPoll:
    """Polls the memory of a session in a thread; a context manager."""

    def __init__(self, session: int, active: bool) -> None:
        self.peak_pss_bytes = 0
        self.peak_rss_bytes = 0
        self._session = session
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run) if active else None

    def __enter__(self) -> "_MemoryPoll":
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(POLL_INTERVAL_S):
            sizes = [memory_of(pid) for pid in session_members(self._session)]
            self.peak_pss_bytes = max(self.peak_pss_bytes, sum(pss for pss, _ in sizes))
            self.peak_rss_bytes = max(self.peak_rss_bytes, sum(rss for _, rss in sizes))


def session_members(session: int) -> list[int]:
    """The processes of a session."""
    members = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path("/proc", name, "stat").read_bytes().rpartition(b")")[2].split()
                if int(fields[SESSION_FIELD]) == session:
                    members.append(int(name))
    return members


def memory_of(pid: int) -> tuple[int, int]:
    """PSS and RSS of a process in bytes; zeros when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return sizes.get("Pss", 0), sizes.get("Rss", 0)


def _shown(command: Sequence[Argument]) -> str:
    return shlex.join(map(str, command))


def _tail(output: bytes) -> str:
    return " ".join(output.decode(errors="replace").split())[-TAIL_CHARACTERS:]

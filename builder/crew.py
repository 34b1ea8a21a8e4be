"""The worker processes of a build and the arena that they share with it."""

import collections
import mmap
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from builder.options import BuildOptions
from builder.worker import CompressResult, CompressTask, ReadResult, ReadTask
from rafs.errors import NydusError

SLOT_SIZE_MIN = 4 << 20
"""Bytes of files that one task takes: enough to hide the cost of a message, little enough to keep memory low.
"""
ARENA_SIZE_MAX = 96 << 20
"""Bytes of the whole arena, which all workers share: with more of them, each has fewer slots in flight."""
_OUTSTANDING = 2
"""Messages sent to a worker ahead of its answers, so that it never waits for the parent."""
_START = "import sys; from builder.worker import main; main(sys.argv[1:])"

Task = ReadTask | CompressTask
Result = ReadResult | CompressResult


class WorkerDied(NydusError):
    """A worker process ended without being told to."""

    message = "build worker {pid} ended with status {status}; was it killed for lack of memory?"
    exit_code: ClassVar[int] = 52


@dataclass(slots=True)
class _Member:
    process: subprocess.Popen[bytes]
    connection: Connection
    outstanding: int = 0


@dataclass(slots=True)
class Crew:
    """Workers and their arena. A context manager; leaving it ends the processes whatever happened.

    Tasks go to the least busy worker; compression goes before reading, because it frees slots. There are
    `options.threads` workers, but no more than slots: each task needs one.
    """

    options: BuildOptions
    slot_size: int = 0
    slot_count: int = 0
    arena: memoryview = field(init=False)
    _mapping: mmap.mmap = field(init=False)
    _members: list[_Member] = field(default_factory=list)
    _reads: collections.deque[ReadTask] = field(default_factory=collections.deque)
    _compressions: collections.deque[CompressTask] = field(default_factory=collections.deque)

    def __enter__(self) -> Self:
        self.slot_size = max(SLOT_SIZE_MIN, self.options.chunk_size)
        # One slot is enough for progress: it is free again when its task is written, and nobody waits for a
        # slot who has not submitted the one before. Two let the parent fill one meanwhile.
        affordable = max(2, ARENA_SIZE_MAX // self.slot_size)
        self.slot_count = min(3 * self.options.threads + 2, affordable)
        arena_fd = os.memfd_create("nydus-build-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(arena_fd, self.slot_size * self.slot_count)
            self._mapping = mmap.mmap(arena_fd, self.slot_size * self.slot_count)
            self.arena = memoryview(self._mapping)
            for _ in range(min(self.options.threads, self.slot_count)):
                self._members.append(self._start(arena_fd))
        finally:
            os.close(arena_fd)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self._members:
            member.connection.close()
            if error is not None:
                member.process.kill()
        for member in self._members:
            member.process.wait()
        self.arena.release()
        if error is None:  # an exception's traceback may still hold views of it
            self._mapping.close()

    def slot(self, index: int) -> memoryview:
        """The bytes of one slot."""
        return self.arena[index * self.slot_size : (index + 1) * self.slot_size]

    def submit(self, task: Task) -> None:
        """Queues a task; results come from `collect` in any order."""
        if isinstance(task, CompressTask):
            self._compressions.append(task)
        else:
            self._reads.append(task)
        self._dispatch()

    def collect(self) -> list[Result]:
        """Waits for at least one result. Raises the worker's error, or `WorkerDied`."""
        by_connection = {member.connection: member for member in self._members}
        results = []
        for connection in wait(list(by_connection)):
            member = by_connection[connection]  # type: ignore[index]
            results.append(self._receive(member))
            member.outstanding -= 1
        self._dispatch()
        return results

    def _start(self, arena_fd: int) -> _Member:
        ours, theirs = socket.socketpair()
        with theirs:
            root = str(Path(__file__).parent.parent)
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",  # the current directory belongs to the user: no modules come from there
                    "-c",
                    _START,
                    *map(str, (theirs.fileno(), arena_fd, self.slot_size, self.slot_count)),
                ],
                pass_fds=(theirs.fileno(), arena_fd),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": root},
            )
        connection = Connection(ours.detach())
        connection.send(self.options)
        return _Member(process, connection)

    def _dispatch(self) -> None:
        while self._compressions or self._reads:
            member = min(self._members, key=lambda candidate: candidate.outstanding)
            if member.outstanding >= _OUTSTANDING:
                return
            task: Task = self._compressions.popleft() if self._compressions else self._reads.popleft()
            try:
                member.connection.send(task)
            except OSError as error:
                raise self._died(member) from error
            member.outstanding += 1

    def _receive(self, member: _Member) -> Result:
        try:
            answer = member.connection.recv()
        except (EOFError, OSError) as error:
            raise self._died(member) from error
        if isinstance(answer, NydusError):
            raise answer
        result: Result = answer
        return result

    @staticmethod
    def _died(member: _Member) -> WorkerDied:
        return WorkerDied(pid=member.process.pid, status=member.process.wait())

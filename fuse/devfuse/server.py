"""Reads requests from /dev/fuse and answers them.

Threads: `THREADS` serve; each reads a request, and answers it at once when everything for it is here. A read
of what must be fetched goes to the trio thread, which answers it when it has come. So a hit never waits for
the loop, and nobody waits for somebody else's fetch. Notes on what happens when the process dies between
two statements: docs/notes/fuse.md.

Buffers are made of touched memory: the kernel copies while the process may be killed, and a page
fault in the middle would end the request with EIO instead of sending it again.
"""

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable
from typing import Protocol

import trio

from fuse.devfuse.replies import Refused, Replies
from fuse.devfuse.wire import (
    GETXATTR_IN,
    IN_HEADER,
    INTERRUPT_IN,
    OUT_HEADER,
    READ_BUFFER_MIN,
    READ_IN,
    RELEASE_IN,
    RESENT,
    Opcode,
)
from fuse.errno_map import errno_of
from fuse.failure_log import FailureLog
from fuse.filesystem import ImageFilesystem, OpenFile

log = logging.getLogger(__name__)

THREADS = 2
REQUEST_BYTES = max(READ_BUFFER_MIN, 16384)
SMALL_READ_BYTES = 32768
"""Up to here a new bytes object is cheaper than a slice of the thread's buffer."""
REPLY_BYTES = 1 << 20
FILES_MAX = 4096
"""Files whose chunk addresses are remembered; FORGET is ignored, so the kernel would not bound them."""
HEADER = IN_HEADER.size
REPLY_HEAD = OUT_HEADER.size


class Opens(Protocol):
    """What answers OPEN, where the kernel asks it (fuse/devfuse/passthrough.py)."""

    def open(self, node: int) -> bytes:
        """fuse_open_out. For any thread."""
        ...

    def release(self, handle: int, node: int) -> None:
        """A file was closed; called after the kernel has its answer. For any thread."""
        ...


class RequestServer:
    """The requests of one mount."""

    def __init__(self, device: int, filesystem: ImageFilesystem, opens: Opens | None = None) -> None:
        """`device` stays the caller's. `opens` only when the kernel was told to ask OPEN."""
        self._device = device
        self._filesystem = filesystem
        self._replies = Replies(filesystem)
        self._opens = opens
        self._files: dict[int, OpenFile] = {}
        self._waiting: dict[int, trio.CancelScope] = {}
        self._failures = FailureLog(log)
        self._nursery: trio.Nursery | None = None
        self._running = 0
        self._ended = trio.Event()
        self._handlers: dict[int, Callable[[int, memoryview], bytes]] = {
            Opcode.LOOKUP: lambda node, body: self._replies.lookup(node, bytes(body[:-1])),
            Opcode.GETATTR: lambda node, body: self._replies.getattr(node),
            Opcode.READLINK: lambda node, body: self._replies.readlink(node),
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.GETXATTR: self._getxattr,
            Opcode.LISTXATTR: self._listxattr,
            Opcode.STATFS: lambda node, body: self._replies.statfs(),
            Opcode.DESTROY: lambda node, body: b"",
        }
        if opens is not None:
            self._handlers[Opcode.OPEN] = lambda node, body: opens.open(node)
        # Everything else is ENOSYS. For OPEN and OPENDIR the kernel takes it as: need not be asked.

    async def serve(self) -> None:
        """Answers until the mount is gone for good. A checkpoint.

        When cancelled it leaves the threads in their reads: only the end of the process may stop them, and
        what they hold then is sent again.
        """
        token = trio.lowlevel.current_trio_token()
        self._running = THREADS
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for number in range(THREADS):
                name = f"fuse-{self._device}-{number}"
                threading.Thread(target=self._run, args=(token,), name=name, daemon=True).start()
            await self._ended.wait()
            nursery.cancel_scope.cancel()

    # -- in the serving threads

    def _run(self, token: trio.lowlevel.TrioToken) -> None:
        try:
            self._serve(token)
        except BaseException:
            # A request is lost with this thread. Dying gives it back: the successor gets it again.
            log.critical("the transport has failed; this process ends", exc_info=True)
            os._exit(os.EX_SOFTWARE)
        try:
            token.run_sync_soon(self._note_end)
        except trio.RunFinishedError:
            return

    def _note_end(self) -> None:
        self._running -= 1
        if self._running == 0:
            self._ended.set()

    def _serve(self, token: trio.lowlevel.TrioToken) -> None:
        device, readv, unpack = self._device, os.readv, IN_HEADER.unpack_from
        request = bytearray(b"\1") * REQUEST_BYTES
        buffers, view = [request], memoryview(request)
        reply = memoryview(bytearray(b"\1") * REPLY_BYTES)
        read_request = READ_IN.unpack_from
        while True:
            try:
                length = readv(device, buffers)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue  # ENOENT: its caller was killed before we had it
                if error.errno == errno.ENODEV:
                    return
                raise
            _, opcode, unique, node, *_ = unpack(request)
            if opcode == Opcode.READ:
                _, offset, size = read_request(request, HEADER)
                if not self._read_now(token, unique, node, offset, size, reply):
                    self._read_later(token, unique, node, offset, size)
            elif opcode == Opcode.INTERRUPT:
                (victim,) = INTERRUPT_IN.unpack_from(request, HEADER)
                token.run_sync_soon(self._interrupt, victim)
            elif opcode not in (Opcode.FORGET, Opcode.BATCH_FORGET):
                self._answer(unique, opcode, node, view[HEADER:length])

    def _read_now(
        self,
        token: trio.lowlevel.TrioToken,
        unique: int,
        node: int,
        offset: int,
        size: int,
        reply: memoryview,
    ) -> bool:
        """Answers a read of what is here; False when something must be fetched."""
        try:
            file = self._files.get(node) or self._open_file(node)
            end = min(offset + size, file.size)
            if offset >= end:
                self._write(OUT_HEADER.pack(REPLY_HEAD, 0, unique))
                return True
            span = self._filesystem.ready_span(file, offset, end)
            if span is None:
                return False
            cached, wanted = span.fetcher.cached, end - offset
            epoch = cached.epoch
            data: bytes | memoryview
            if wanted <= SMALL_READ_BYTES:
                data = os.pread(cached.descriptor, wanted, span.start)
                got = len(data)
            else:
                data = reply[:wanted]
                got = os.preadv(cached.descriptor, [data], span.start)
            if got != wanted or cached.epoch != epoch:
                return False
        except Exception as error:
            self._fail(unique, "read", error)
            return True
        self._write(OUT_HEADER.pack(REPLY_HEAD + wanted, 0, unique), data)
        span.fetcher.note_hit(span.first_chunk, span.last_chunk, token)
        return True

    def _read_later(
        self, token: trio.lowlevel.TrioToken, unique: int, node: int, offset: int, size: int
    ) -> None:
        # When this process ends, the request comes again to its successor.
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(self._start_read, unique, node, offset, size)

    def _answer(self, unique: int, opcode: int, node: int, body: memoryview) -> None:
        """Answers whatever is no read."""
        if opcode == Opcode.RELEASE and self._opens is not None:
            (handle,) = RELEASE_IN.unpack_from(body)
            self._write(OUT_HEADER.pack(REPLY_HEAD, 0, unique))
            # Only now: when this process dies before, the kernel asks again, and would be counted twice.
            self._opens.release(handle, node)
            return
        handler = self._handlers.get(opcode)
        if handler is None:
            self._write(OUT_HEADER.pack(REPLY_HEAD, -errno.ENOSYS, unique))
            return
        try:
            answer = handler(node, body)
        except Refused as refused:
            self._write(OUT_HEADER.pack(REPLY_HEAD, -refused.number, unique))
        except Exception as error:
            self._fail(unique, Opcode(opcode).name.lower(), error)
        else:
            self._write(OUT_HEADER.pack(REPLY_HEAD + len(answer), 0, unique), answer)

    def _readdirplus(self, node: int, body: memoryview) -> bytes:
        _, place, size = READ_IN.unpack_from(body)
        return self._replies.readdirplus(node, place, size)

    def _getxattr(self, node: int, body: memoryview) -> bytes:
        size, _ = GETXATTR_IN.unpack_from(body)
        return self._replies.getxattr(node, bytes(body[GETXATTR_IN.size : -1]), size)

    def _listxattr(self, node: int, body: memoryview) -> bytes:
        size, _ = GETXATTR_IN.unpack_from(body)
        return self._replies.listxattr(node, size)

    def _open_file(self, node: int) -> OpenFile:
        file = self._filesystem.open_file(node)
        if len(self._files) >= FILES_MAX:
            self._files.clear()
        self._files[node] = file
        return file

    # -- in the trio thread

    def _start_read(self, unique: int, node: int, offset: int, size: int) -> None:
        assert self._nursery is not None
        # A nursery that has closed meanwhile takes no more: the request comes again to the successor.
        with contextlib.suppress(RuntimeError):
            self._nursery.start_soon(self._read, unique, node, offset, size)

    async def _read(self, unique: int, node: int, offset: int, size: int) -> None:
        """Answers a read whose chunks must be fetched, or with EINTR when nobody waits for it any more."""
        with trio.CancelScope() as scope:
            self._waiting[unique & ~RESENT] = scope
            try:
                file = self._files.get(node) or self._open_file(node)
                data = await self._filesystem.read(file, offset, size)
                self._write(OUT_HEADER.pack(REPLY_HEAD + len(data), 0, unique), data)
            except Exception as error:
                self._fail(unique, "read", error)
            finally:
                del self._waiting[unique & ~RESENT]
        if scope.cancelled_caught:
            self._write(OUT_HEADER.pack(REPLY_HEAD, -errno.EINTR, unique))

    def _interrupt(self, unique: int) -> None:
        """Nobody waits for a request any more. One that is not known was answered, or is about to be."""
        scope = self._waiting.get(unique & ~RESENT)
        if scope is not None:
            scope.cancel()

    # -- in any thread

    def _fail(self, unique: int, operation: str, error: Exception) -> None:
        """Answers with the errno of an exception; logs the first one of its kind."""
        self._failures.note(operation, error)
        self._write(OUT_HEADER.pack(REPLY_HEAD, -errno_of(error), unique))

    def _write(self, *parts: bytes | memoryview | bytearray) -> None:
        try:
            os.writev(self._device, parts)
        except OSError as error:
            # ENOENT: interrupted, or sent again meanwhile. ENODEV: unmounted.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise

"""Answers the kernel's pre-content events: whoever reads a device waits until its chunks are there.

Concurrency: one thread reads events, one at a time, notes each in the journal, and answers at once what is
ready; every other event gets a task in the trio thread. Devices are added and removed by the trio thread, the
reading one looks them up. What must follow on what: docs/notes/erofs.md.
"""

import contextlib
import errno
import logging
import os
import select
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from backend.cache import CachedBlob
from backend.fetch import ChunkFetcher
from fuse.erofs.device import BlobDevice, DeviceShortened
from fuse.erofs.fanotify import (
    FAN_PRE_ACCESS,
    Event,
    add_mark,
    allow,
    deny,
    remove_mark,
)
from fuse.erofs.journal import ATTEMPTS_MAX, Journal, Pending
from fuse.erofs.lengths import LengthWatch
from fuse.failure_log import FailureLog
from fuse.filesystem import ReadTimeout
from rafs.errors import NydusError

log = logging.getLogger(__name__)

ROOM_PAUSE_S = 0.1
WAITING_MAX = 8192
"""Events that wait for a fetch, each with an open descriptor; more stay in the kernel's queue."""
RANGE_MAX_BYTES = 64 << 20
"""EROFS asks for what one bio covers. Only mmap(2) of another process asks for more: for the whole file."""
DENIALS = frozenset({errno.EIO, errno.EPERM, errno.EBUSY, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT})

FileKey = tuple[int, int]
"""Device and inode number of a file."""


@dataclass(frozen=True, slots=True)
class EventOptions:
    """`timeout_s`: the kernel asks a second time after a denial, so a reader waits up to twice as long."""

    timeout_s: float = 30.0


class EventServer:
    """The events of one fanotify group, which all EROFS mounts of an agent share."""

    def __init__(
        self, group: int, journal: Journal, options: EventOptions, adopted: Sequence[Pending] = ()
    ) -> None:
        """`adopted`: events of a dead agent; their descriptor numbers are occupied in this process."""
        self._group = group
        self._journal = journal
        self._options = options
        self._adopted = list(adopted)
        self._devices: dict[FileKey, BlobDevice] = {}
        self._lengths = LengthWatch(self._on_change)
        self._room = threading.Semaphore(WAITING_MAX)
        self._nursery: trio.Nursery | None = None
        self._stopping = False
        self._failures = FailureLog(log)
        self.answered = self.filled = self.denied = 0

    # -- devices

    def add_device(self, cached: CachedBlob, fetcher: ChunkFetcher) -> None:
        """Watches a cache file, which must be held by the supervisor already and not yet be mounted.

        Also for the next mount of the same file, and for one of a dead agent. Raises `OSError`.
        """
        key = _key(cached.descriptor)
        fetcher.prepare_map()  # not when the first reader waits
        add_mark(self._group, cached.descriptor)
        device = self._devices.get(key)
        if device is None:
            device = BlobDevice(cached, lambda: self.release_if_complete(cached))
            self._devices[key] = device
            cached.on_complete.append(device.release)
        device.is_watched = True
        device.fetchers += (fetcher,)

    def remove_device(self, cached: CachedBlob, fetcher: ChunkFetcher) -> bool:
        """Takes a mount's fetcher back, and with the last one the file itself; whether it was the last.

        Only when no superblock uses the file: the mark goes, and reads would find zeros in its holes.
        """
        key = _key(cached.descriptor)
        device = self._devices.get(key)
        if device is None or fetcher not in device.fetchers:
            return False
        device.fetchers = tuple(other for other in device.fetchers if other is not fetcher)
        if device.fetchers:
            return False
        del self._devices[key]
        self._lengths.remove(cached.descriptor)
        cached.on_complete.remove(device.release)
        remove_mark(self._group, cached.descriptor)
        return True

    def release_if_complete(self, cached: CachedBlob) -> None:
        """Stops watching a file that lacks nothing: from now on its reads cost nothing at all.

        It was marked when it was mounted, so that it can be watched again.
        """
        device = self._devices.get(_key(cached.descriptor))
        if device is not None and device.is_watched and cached.is_complete():
            self._lengths.add(cached.descriptor)
            device.is_watched = False
            remove_mark(self._group, cached.descriptor)

    def _on_change(self, descriptor: int) -> None:
        """Watches a file again that somebody has shortened: what it lacks must not be read as zeros."""
        device = self._devices.get(_key(descriptor))
        if device is not None and os.fstat(descriptor).st_size < device.size_bytes:
            device.is_watched = True
            add_mark(self._group, descriptor)
            error = DeviceShortened(blob_id=device.cached.shape.blob_id[:12])
            log.error("%s", error)

    # -- events

    async def serve(self) -> None:
        """Answers events until cancelled; what is unanswered then stays in the journal."""
        token = trio.lowlevel.current_trio_token()
        stop = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._lengths.run)
                nursery.start_soon(self._end_with, stop)
                for pending in self._adopted:
                    nursery.start_soon(self._serve_adopted, pending)
                await trio.to_thread.run_sync(self._read_events, token, stop)
        finally:
            os.close(stop)

    async def _end_with(self, stop: int) -> None:
        """Ends the reading thread when the loop goes."""
        try:
            await trio.sleep_forever()
        finally:
            self._stopping = True
            os.eventfd_write(stop, 1)

    # In the reading thread: a hit must not wait for the loop, which costs ten times as much as the answer.

    def _read_events(self, token: trio.lowlevel.TrioToken, stop: int) -> None:
        readable = select.poll()
        readable.register(self._group, select.POLLIN)
        readable.register(stop, select.POLLIN)
        while not self._stopping:
            try:
                event = self._journal.take(self._group)
            except BlockingIOError:
                readable.poll()
            except OSError as error:
                # EMFILE: the kernel has denied the event that it could not hand out.
                log.warning("an event was lost, its reader gets an error: %s", error.strerror)
            else:
                self._begin(token, event)

    def _begin(self, token: trio.lowlevel.TrioToken, event: Event) -> None:
        if not event.mask & FAN_PRE_ACCESS or event.descriptor < 0:
            raise EventsLost(mask=event.mask)
        status = os.fstat(event.descriptor)
        key = (status.st_dev, status.st_ino)
        self._journal.note(event.descriptor, *key, event.offset, event.size)
        device = self._devices.get(key)
        if device is None or not is_read(event.size) or status.st_size < device.size_bytes:
            self._refuse(event, key, device)
        elif device.read_ready(event.offset, event.size, token):
            self._answer(event.descriptor, allow(event.descriptor))
        else:
            while not self._room.acquire(timeout=ROOM_PAUSE_S):
                if self._stopping:
                    return  # it is noted: the successor serves it
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(self._start, device, key, event)

    # In the trio thread.

    def _start(self, device: BlobDevice, key: FileKey, event: Event) -> None:
        assert self._nursery is not None
        # A nursery that has closed meanwhile takes no more: the event is noted, the successor serves it.
        with contextlib.suppress(RuntimeError):
            self._nursery.start_soon(self._serve_later, device, key, event)

    def _refuse(self, event: Event, key: FileKey, device: BlobDevice | None) -> None:
        if device is not None and os.fstat(event.descriptor).st_size < device.size_bytes:
            error = DeviceShortened(blob_id=device.cached.shape.blob_id[:12])
            self._failures.note("a read", error, key)
        # Without a size it is no read: somebody wants to shorten the file.
        number = errno.EIO if event.size else errno.EPERM
        self.denied += 1
        self._answer(event.descriptor, deny(event.descriptor, number))

    async def _serve_later(self, device: BlobDevice, key: FileKey, event: Event) -> None:
        number = await self._fill(device, key, event.offset, event.size)
        self._answer(event.descriptor, _answer_for(event.descriptor, number))
        self._room.release()

    async def _serve_adopted(self, pending: Pending) -> None:
        """Serves an event that a dead agent has taken; its number is ours to free afterwards."""
        number = errno.EIO
        if pending.attempts < ATTEMPTS_MAX and is_read(pending.size):
            self._journal.count_attempt(pending.number)
            # What was in the hand of the dead one names no file: the range is filled wherever it may belong.
            for key, device in self._could_mean(pending):
                number = await self._fill(device, key, pending.offset, pending.size)
                if number:
                    break
        self._answer(pending.number, _answer_for(pending.number, number))

    def _could_mean(self, pending: Pending) -> list[tuple[FileKey, BlobDevice]]:
        if pending.inode:
            key = (pending.device, pending.inode)
            return [(key, self._devices[key])] if key in self._devices else []
        return [(key, device) for key, device in self._devices.items() if pending.offset < device.size_bytes]

    async def _fill(self, device: BlobDevice, key: FileKey, offset: int, size: int) -> int:
        """Fetches; 0, or the errno for the reader. Raises nothing but cancellation."""
        try:
            with trio.move_on_after(self._options.timeout_s):
                await device.fill(offset, size)
                self.filled += 1
                return 0
            raise ReadTimeout(size=size, offset=offset, timeout_s=self._options.timeout_s)
        except Exception as error:
            self.denied += 1
            self._failures.note("a read", error, key)
            number = error.errno if isinstance(error, NydusError) else errno.EIO
            return number if number in DENIALS else errno.EIO

    def _answer(self, descriptor: int, answer: bytes) -> None:
        """Answers an event, forgets it and frees its number, in this order. Free of checkpoints."""
        try:
            os.write(self._group, answer)
            self.answered += 1
        except OSError as error:
            if error.errno != errno.ENOENT:  # ENOENT: its reader was killed meanwhile
                raise
        finally:
            self._journal.clear(descriptor)
            os.close(descriptor)


class EventsLost(NydusError):
    """The kernel's queue has overflowed: an event is lost, and its reader waits."""

    message = "the kernel has lost pre-content events (mask {mask:#x})"
    exit_code = 84


def is_read(size: int) -> bool:
    """Whether an event of that size is a read of EROFS: not truncate(2), not mmap(2) of the cache file."""
    return 0 < size <= RANGE_MAX_BYTES


def _key(descriptor: int) -> FileKey:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _answer_for(descriptor: int, number: int) -> bytes:
    return deny(descriptor, number) if number else allow(descriptor)

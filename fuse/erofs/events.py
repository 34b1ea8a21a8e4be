"""Answers the kernel's pre-content events: whoever reads a device waits until its chunks are there.

Concurrency: one task reads events, one at a time, and answers at once what is ready; every other event is
noted in the journal and gets a task of its own. From the read of an event to its entry in the journal, and
from an answer to its removal there, no checkpoint: docs/notes/erofs.md.
"""

import errno
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from backend.cache import CachedBlob
from backend.fetch import ChunkFetcher
from fuse.erofs.device import BlobDevice, DeviceShortened
from fuse.erofs.fanotify import (
    EVENT_SIZE,
    FAN_PRE_ACCESS,
    Event,
    add_mark,
    allow,
    deny,
    remove_mark,
    unpack_event,
)
from fuse.erofs.journal import ATTEMPTS_MAX, Journal, Pending
from fuse.erofs.lengths import LengthWatch
from fuse.failure_log import FailureLog
from fuse.filesystem import ReadTimeout
from rafs.errors import NydusError

log = logging.getLogger(__name__)

EVENTS_AT_ONCE = 64
"""Events that are read before other tasks get their turn."""
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
        self._waiting = 0
        self._has_room = trio.Event()
        self._failures = FailureLog(log)
        self.answered = self.filled = self.denied = 0

    # -- devices

    def add_device(self, cached: CachedBlob, fetcher: ChunkFetcher) -> None:
        """Watches a cache file, which must be held by the supervisor already and not yet be mounted.

        Also for the next mount of the same file, and for one of a dead agent. Raises `OSError`.
        """
        key = _key(cached.descriptor)
        add_mark(self._group, cached.descriptor)
        device = self._devices.get(key)
        if device is None:
            device = BlobDevice(cached, lambda: self.release_if_complete(cached))
            self._devices[key] = device
            cached.on_complete.append(device.release)
        device.is_watched = True
        device.fetchers.append(fetcher)

    def remove_device(self, cached: CachedBlob, fetcher: ChunkFetcher) -> bool:
        """Takes a mount's fetcher back, and with the last one the file itself; whether it was the last.

        Only when no superblock uses the file: the mark goes, and reads would find zeros in its holes.
        """
        key = _key(cached.descriptor)
        device = self._devices.get(key)
        if device is None or fetcher not in device.fetchers:
            return False
        device.fetchers.remove(fetcher)
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
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._lengths.run)
            for pending in self._adopted:
                nursery.start_soon(self._serve_adopted, pending)
            while True:
                await trio.lowlevel.wait_readable(self._group)
                if self._waiting >= WAITING_MAX:
                    self._has_room = trio.Event()
                    await self._has_room.wait()
                self._take(nursery)

    def _take(self, nursery: trio.Nursery) -> None:
        """Reads what is queued. Free of checkpoints."""
        for _ in range(EVENTS_AT_ONCE):
            try:
                data = os.read(self._group, EVENT_SIZE)
            except BlockingIOError:
                return
            except OSError as error:
                # EMFILE: the kernel has denied the event that it could not hand out.
                log.warning("an event was lost, its reader gets an error: %s", error.strerror)
                return
            self._begin(nursery, unpack_event(data))

    def _begin(self, nursery: trio.Nursery, event: Event) -> None:
        if not event.mask & FAN_PRE_ACCESS or event.descriptor < 0:
            raise EventsLost(mask=event.mask)
        status = os.fstat(event.descriptor)
        key = (status.st_dev, status.st_ino)
        device = self._devices.get(key)
        if device is None or not 0 < event.size <= RANGE_MAX_BYTES or status.st_size < device.size_bytes:
            self._refuse(event, key, device)
        elif device.read_ready(event.offset, event.size):
            self._answer(event.descriptor, allow(event.descriptor))
        else:
            self._journal.note(event.descriptor, *key, event.offset, event.size)
            nursery.start_soon(self._serve_later, device, key, event)

    def _refuse(self, event: Event, key: FileKey, device: BlobDevice | None) -> None:
        if device is not None and os.fstat(event.descriptor).st_size < device.size_bytes:
            error = DeviceShortened(blob_id=device.cached.shape.blob_id[:12])
            self._failures.note("a read", error, key)
        # Without a size it is no read: somebody wants to shorten the file.
        number = errno.EIO if event.size else errno.EPERM
        self.denied += 1
        self._answer(event.descriptor, deny(event.descriptor, number))

    async def _serve_later(self, device: BlobDevice, key: FileKey, event: Event) -> None:
        self._waiting += 1
        number = await self._fill(device, key, event.offset, event.size)
        self._answer(event.descriptor, _answer_for(event.descriptor, number))
        self._waiting -= 1
        self._has_room.set()

    async def _serve_adopted(self, pending: Pending) -> None:
        """Serves an event that a dead agent has taken; its number is ours to free afterwards."""
        key = (pending.device, pending.inode)
        device = self._devices.get(key)
        number = errno.EIO
        attempts = pending.attempts + 1
        if device is not None and attempts <= ATTEMPTS_MAX:
            self._journal.note(pending.number, *key, pending.offset, pending.size, attempts)
            number = await self._fill(device, key, pending.offset, pending.size)
        self._answer(pending.number, _answer_for(pending.number, number))

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


def _key(descriptor: int) -> FileKey:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _answer_for(descriptor: int, number: int) -> bytes:
    return deny(descriptor, number) if number else allow(descriptor)

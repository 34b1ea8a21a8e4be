"""`--passthrough`: the kernel reads large complete files itself, without us and without a second page cache.

The kernel takes a backing file for that, byte for byte the file itself: a clone of its range of the cache
file. On file systems that share blocks a clone costs nothing; elsewhere it is a copy, which takes the space
again.

A file goes over to this mode at an open at which nobody has it open in the ordinary one, and stays in it: the
kernel fails opens that mix the two. How files are open outlives the agent in the ledger.
"""

import fcntl
import logging
import os
import threading
from pathlib import Path

from backend.clone import clone_range
from fuse.devfuse.open_ledger import LedgerFull, OpenLedger
from fuse.devfuse.wire import BACKING_MAP, FUSE_DEV_IOC_BACKING_OPEN, OPEN_OUT, OpenFlags
from fuse.filesystem import ImageFilesystem, ReadySpan

log = logging.getLogger(__name__)

FILE_BYTES_MIN = 16 << 20
"""Smaller files are not worth the system calls of every open, nor a file of their own."""
HANDLE_PLAIN, HANDLE_COUNTED, HANDLE_PASSTHROUGH = 0, 1, 2
KEPT = OpenFlags.KEEP_CACHE | OpenFlags.NOFLUSH


class PassthroughOpens:
    """Answers OPEN and RELEASE. For any thread."""

    def __init__(self, device: int, ledger: int, filesystem: ImageFilesystem, cache_dir: Path) -> None:
        """`ledger` is a memory file of `open_ledger`; both descriptors stay the caller's."""
        self._device = device
        self._ledger = OpenLedger(ledger)
        self._filesystem = filesystem
        self._directory = cache_dir / "files"
        self._lock = threading.Lock()
        self._copying: set[int] = set()

    def open(self, node: int) -> bytes:
        """fuse_open_out: in which mode the file is opened."""
        if self._filesystem.attributes(node).size < FILE_BYTES_MIN:
            return OPEN_OUT.pack(HANDLE_PLAIN, KEPT, 0)
        with self._lock:
            opens, backing_id = self._ledger.read(node)
            try:
                if backing_id == 0 and opens == 0:
                    backing_id = self._register(node)
                if backing_id == 0:
                    # Before the answer: after a death it may be counted twice, but never not at all.
                    self._ledger.write(node, opens + 1, 0)
                else:
                    self._ledger.write(node, 0, backing_id)
            except LedgerFull:
                return OPEN_OUT.pack(HANDLE_PLAIN, KEPT, 0)
        if backing_id == 0:
            return OPEN_OUT.pack(HANDLE_COUNTED, KEPT, 0)
        flags = OpenFlags.PASSTHROUGH | OpenFlags.NOFLUSH
        return OPEN_OUT.pack(HANDLE_PASSTHROUGH, flags, backing_id)

    def release(self, handle: int, node: int) -> None:
        """A file was closed."""
        if handle == HANDLE_COUNTED:
            with self._lock:
                opens, backing_id = self._ledger.read(node)
                self._ledger.write(node, max(0, opens - 1), backing_id)

    def _register(self, node: int) -> int:
        """Gives the kernel the file's clone; its id, or 0 when there is none yet."""
        file = self._filesystem.open_file(node)
        span = self._filesystem.ready_span(file, 0, file.size)
        if span is None:
            return 0  # not complete, or not in one piece
        clone = self._clone_path(span, file.size)
        try:
            if not clone.exists() and not self._clone(node, span, file.size, clone):
                return 0
            backing = os.open(clone, os.O_RDONLY | os.O_CLOEXEC)
            try:
                request = bytearray(BACKING_MAP.pack(backing, 0, 0))
                return int(fcntl.ioctl(self._device, FUSE_DEV_IOC_BACKING_OPEN, request))
            finally:
                os.close(backing)
        except OSError as error:
            log.warning("no passthrough for %s: %s", clone.name[:12], error.strerror)
            return 0

    def _clone_path(self, span: ReadySpan, size_bytes: int) -> Path:
        blob_id = span.fetcher.cached.shape.blob_id
        return self._directory / f"{blob_id}-{span.start:x}-{size_bytes:x}"

    def _clone(self, node: int, span: ReadySpan, size_bytes: int, clone: Path) -> bool:
        """Makes the clone at once where that is cheap, else in the background for a later open."""
        source = span.fetcher.cached.descriptor
        if clone_range(source, span.start, size_bytes, clone, copies=False):
            return True
        if node not in self._copying:
            self._copying.add(node)
            duplicate = os.dup(source)
            arguments = (node, duplicate, span.start, size_bytes, clone)
            threading.Thread(target=self._copy, args=arguments, daemon=True).start()
        return False

    def _copy(self, node: int, source: int, offset: int, size_bytes: int, clone: Path) -> None:
        try:
            clone_range(source, offset, size_bytes, clone, copies=True)
        except OSError as error:
            log.warning("no passthrough for %s: %s", clone.name[:12], error.strerror)
        finally:
            os.close(source)
            self._copying.discard(node)

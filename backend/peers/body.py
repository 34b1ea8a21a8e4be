"""Sends the body of an answer slice by slice, as it is there or arrives.

Large spans of a file go out with sendfile. Small ones are read into one buffer with what stands between them,
and sent with one call: for 4 KiB the calls are dearer than the copy.

Concurrency: one task. A part of a file that was there may be gone later, so presence is looked at again after
the bytes were read, and the connection reset when they are not to be trusted.
"""

from backend.peers.arrival import wait_for_bytes
from backend.peers.page_cache import read_cached
from backend.peers.ranges import Body, Span, slices
from backend.peers.refusal import Dropped, Refusal
from backend.peers.served import BlobRequest, ServedFile
from backend.peers.site import Site
from backend.peers.transport import Transport

SLICE_BYTES = 256 << 10
SLICE_MIN_BYTES = 256
"""At 100 bytes a second one goes out every 3 s: who waits for the rest sees that this host lives."""
SMALL_BYTES = 32 << 10  # sendfile is no cheaper than a copy up to here; see `tools.bench.serving`


class BodySender:
    """Sends one body; `sent_bytes` of the file are on their way."""

    def __init__(self, file: ServedFile, request: BlobRequest, transport: Transport, site: Site) -> None:
        self.sent_bytes = 0
        self._file = file
        self._request = request
        self._transport = transport
        self._site = site

    async def send(self, head: bytes, body: Body) -> None:
        """Sends `head` and `body`. Raises `Dropped`: the connection cannot be used any more."""
        slice_bytes = max(SLICE_MIN_BYTES, min(SLICE_BYTES, self._site.slice_bytes()))
        for batch in slices(body.spans, slice_bytes, min(SMALL_BYTES, slice_bytes)):
            size = sum([span.end - span.offset for span in batch])
            await self._site.pace(size, self._request)
            last = body.tail if batch[-1].end == body.spans[-1].end else b""
            if size > SMALL_BYTES and len(batch) == 1:
                await self._send_large(head + batch[0].lead, batch[0])
                if last:
                    await self._transport.send(last)
            else:
                await self._send_small(head, batch, last)
            head = b""

    async def _send_large(self, lead: bytes, span: Span) -> None:
        if lead:
            await self._transport.send(lead, more=True)
        offset = span.offset
        while offset < span.end:
            ready = self._file.ready_until(offset, span.end)
            if ready == offset:
                ready = await self._wait(offset, span.end)
            await self._transport.send_file(self._file.descriptor, offset, ready)
            self._check_present(offset, ready)
            self._count(ready - offset)
            offset = ready

    async def _send_small(self, head: bytes, batch: list[Span], tail: bytes) -> None:
        length = len(head) + len(tail) + sum([len(span.lead) + span.end - span.offset for span in batch])
        buffer = memoryview(bytearray(length))
        buffer[: len(head)] = head
        begin, place, unsent = 0, len(head), 0
        descriptor = self._file.descriptor
        for offset, end, lead in batch:
            if self._file.ready_until(offset, end) < end:
                await self._transport.send(buffer[begin:place])
                self._count(unsent)
                begin, unsent = place, 0
                await self._wait_whole(offset, end)
            start = place + len(lead)
            buffer[place:start] = lead
            place = start + end - offset
            if not read_cached(descriptor, buffer[start:place], offset):
                await self._read(buffer[start:place], offset)
            self._check_present(offset, end)
            unsent += end - offset
        buffer[place:] = tail
        await self._transport.send(buffer[begin:])
        self._count(unsent)

    async def _read(self, buffer: memoryview, offset: int) -> None:
        try:
            await self._site.pages.read(self._file.descriptor, buffer, offset)
        except EOFError:
            raise Dropped(Refusal.TORN) from None  # the file is shorter than it was

    async def _wait_whole(self, offset: int, end: int) -> None:
        while (ready := self._file.ready_until(offset, end)) < end:
            await self._wait(ready, end)

    async def _wait(self, offset: int, end: int) -> int:
        timeout_s = self._site.options.arrival_timeout_s
        ready = await wait_for_bytes(self._file, offset, end, self._transport, timeout_s)
        if ready == offset:
            raise Dropped(Refusal.TORN)
        return ready

    def _check_present(self, offset: int, end: int) -> None:
        if self._file.ready_until(offset, end) < end:
            raise Dropped(Refusal.TORN)

    def _count(self, size: int) -> None:
        self.sent_bytes += size
        self._site.counters.bytes_sent += size

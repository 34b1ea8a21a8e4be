"""What is asked of a host for some flights, and what becomes of its answer: chosen, verified, stored.

Concurrency: for the trio thread; decoding and digests are in threads.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import trio

from backend.cache import CachedBlob
from backend.decode import ChunkDecoder, ChunkOutcome, DecodedChunk, EncodedExtent
from backend.encoded import EncodedBlob, decode_and_keep, wanted_of
from backend.extents import BlobExtent
from backend.peers.encoded_choice import EncodedChoice
from backend.peers.portion import ChunkSpan, Portion, decoded_portion, encoded_portion, range_at
from backend.peers.wire import HostInfo
from backend.singleflight import Flight
from rafs.blobmeta import BlobMeta

Results = list[list[ChunkOutcome]]


class Given(NamedTuple):
    """Who has given which of the ranges that were asked for, in their order."""

    host: HostInfo
    ranges: Sequence[tuple[int, int]]

    def has(self, offset: int, size: int) -> bool:
        """Whether these bytes are in one of the ranges."""
        return range_at(self.ranges, offset, size) is not None


class Deliveries:
    """For one blob and one image."""

    def __init__(
        self,
        meta: BlobMeta,
        decoder: ChunkDecoder,
        cached: CachedBlob,
        lacking: Callable[[BlobExtent], Iterable[int]],
    ) -> None:
        """`lacking` tells which chunks an extent still needs."""
        self.encoded: EncodedBlob | None = None
        """Where encoded bytes are kept, if they are."""
        self._meta = meta
        self._decoder = decoder
        self._cached = cached
        self._lacking = lacking
        self._choice = EncodedChoice(meta)

    def portion(self, host: HostInfo, rate_bps: float, flights: Sequence[Flight]) -> Portion | None:
        """What to ask a host that was measured to send at `rate_bps`; None when nothing is lacking."""
        chunks = self._spans(flights)
        if not chunks:
            return None
        keeps = self.encoded is not None
        if self._choice.is_better(host, rate_bps, trio.current_time(), keeps=keeps):
            portion = encoded_portion((flight.extent for flight in flights), chunks)
            if portion is not None:
                return portion
        return decoded_portion(chunks)

    def note_absent(self, host: HostInfo, now: float) -> None:
        """The host had not the encoded bytes that it was asked for."""
        self._choice.note_absent(host, now)

    async def check(
        self, got: Given, flights: Sequence[Flight], portion: Portion, buffer: memoryview
    ) -> tuple[list[Flight], Results]:
        """Verifies and stores what was given; the flights that it is enough for, and what became of each."""
        if portion.is_encoded:
            here = [flight for flight in flights if got.has(flight.extent.start, flight.extent.size)]
            return here, await self._decode(here, portion, buffer)
        chunks = [chunk for chunk in portion.chunks if got.has(chunk.offset, chunk.size)]
        given = {chunk.number for chunk in chunks}
        here = [f for f in flights if all(number in given for number in self._lacking(f.extent))]
        return here, await self._verify(here, chunks, portion, buffer)

    def _spans(self, flights: Iterable[Flight]) -> list[ChunkSpan]:
        """Every chunk that is lacking, by offset in the decoded file."""
        spans = []
        for flight in flights:
            for number in self._lacking(flight.extent):
                chunk = self._meta.chunk(number)
                spans.append(ChunkSpan(number, chunk.uncompressed_offset, chunk.uncompressed_size))
        return sorted(spans, key=lambda span: span.offset)

    async def _verify(
        self, flights: Sequence[Flight], wanted: Sequence[ChunkSpan], portion: Portion, buffer: memoryview
    ) -> Results:
        chunks = [DecodedChunk(span.number, portion.view(buffer, span.offset, span.size)) for span in wanted]
        outcomes = await trio.to_thread.run_sync(self._decoder.take, chunks, self._cached.store)
        by_chunk = {outcome.index: outcome for outcome in outcomes}
        return [[by_chunk[n] for n in flight.extent.chunks if n in by_chunk] for flight in flights]

    async def _decode(self, flights: Sequence[Flight], portion: Portion, buffer: memoryview) -> Results:
        work = []
        for extent in (flight.extent for flight in flights):
            data = portion.view(buffer, extent.start, extent.size)
            work.append(
                EncodedExtent(extent, data, wanted_of(extent, self._decoder, self.encoded, self._lacking))
            )
        return await decode_and_keep(self._decoder, work, self._cached.store, self.encoded)

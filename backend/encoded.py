"""The encoded bytes of a blob, kept as they are in the registry: `blobs/<id>.blob`, sparse.

An extent is kept when every chunk in it, decoded from these bytes, had the digest that the image names. For
what is no chunk (the chunk table, gaps, headers in a gzip layer) nothing but the digest of the blob vouches:
so there is one more part, behind all others, which is there when that digest was compared. Only then is the
blob whole. Whoever makes parts absent again begins with that one.

Presence, its survival and its order with the bytes are those of every cache file: backend/cache.py.

Concurrency: `keep` is for worker threads, everything else for the trio thread.
"""

import hashlib
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from backend.cache import BlobShape, CachedBlob
from backend.decode import ChunkDecoder, ChunkOutcome, EncodedExtent, Store
from backend.extents import BlobExtent
from rafs.encoded_map import EncodedMap

log = logging.getLogger(__name__)

COMPLETED_BYTES_MIN = 16 << 20
COMPLETED_SHARE = 0.05
"""What may be lacking of a blob that is to be made whole: chunk tables, and what a crash has lost."""
READ_BYTES = 8 << 20

ReadRange = Callable[[int, int], Awaitable[bytes]]
"""Gives so many bytes (the second) of the blob from an offset on, unverified."""


def encoded_shape(blob_id: str, parts: EncodedMap) -> BlobShape:
    """The shape of the file: one part more than the blob has, for its digest."""
    return BlobShape(blob_id, parts.size_bytes, parts.count + 1, is_encoded=True)


class EncodedBlob:
    """See above. The file is closed by whoever has opened it."""

    def __init__(self, cached: CachedBlob, parts: EncodedMap) -> None:
        self.cached = cached
        self.parts = parts
        self._is_broken = self._has_given_way = False
        self._completing = trio.Lock()

    @property
    def is_whole(self) -> bool:
        """Whether all of the blob is there and has the digest that it is named by."""
        return self.cached.is_complete()

    def has(self, offset: int, end: int) -> bool:
        """Whether bytes `offset` to `end` (not empty) are there."""
        return all(map(self.cached.is_ready, self.parts.parts_in(offset, end - offset)))

    def lacking(self) -> list[tuple[int, int]]:
        """Start and end of what is not there, neighbours merged."""
        runs: list[tuple[int, int]] = []
        for part in range(self.parts.count):
            if not self.cached.is_ready(part):
                start, end = self.parts.start_of(part), self.parts.start_of(part + 1)
                if runs and runs[-1][1] == start:
                    start = runs.pop()[0]
                runs.append((start, end))
        return runs

    def keep(
        self, work: Iterable[EncodedExtent], results: Iterable[Sequence[ChunkOutcome]]
    ) -> list[tuple[int, int]]:
        """Writes extents of which all chunks were right; start and end of each, for `note`. Blocking."""
        kept: list[tuple[int, int]] = []
        for encoded, outcomes in zip(work, results, strict=True):
            extent = encoded.extent
            is_verified = len(encoded.wanted) == len(extent.chunks) and not any(o.fault for o in outcomes)
            if is_verified and not self._is_broken and self._write(extent.start, encoded.data):
                kept.append((extent.start, extent.end))
        return kept

    def note(self, kept: Iterable[tuple[int, int]]) -> None:
        """Makes what `keep` has written ready. Free of checkpoints."""
        for start, end in kept:
            for part in self.parts.parts_in(start, end - start):
                if not self.cached.is_ready(part):
                    self.cached.add(part, self.parts.size_of(part))

    async def complete(self, read: ReadRange) -> bool:
        """Makes the blob whole, if little is lacking; whether it is. Raises what `read` raises.

        `read` brings what is lacking; the digest of all says whether that, and the rest, is right.
        """
        async with self._completing:
            if self.is_whole:
                return True
            lacking = self.lacking()
            allowed = max(COMPLETED_BYTES_MIN, COMPLETED_SHARE * self.parts.size_bytes)
            if self._is_broken or sum(end - start for start, end in lacking) > allowed:
                return False
            for start, end in lacking:
                for offset in range(start, end, READ_BYTES):
                    data = await read(offset, min(READ_BYTES, end - offset))
                    if not await trio.to_thread.run_sync(self._write, offset, memoryview(data)):
                        await self.note_disk(is_full=True)  # nothing more may come to be decoded
                        return False
            epoch = self.cached.epoch
            digest = await trio.to_thread.run_sync(file_digest, self.cached.descriptor, self.parts.size_bytes)
            if epoch != self.cached.epoch:
                return False  # something of it was forgotten meanwhile
            if digest != self.cached.shape.blob_id:
                await self._give_up()
                return False
            self.note(lacking)
            self.cached.add(self.parts.count, 0)
            return True

    async def drop(self) -> None:
        """Forgets all of it and gives the disk its space back."""
        await self.cached.forget(range(self.parts.count + 1))
        await trio.to_thread.run_sync(self._empty)

    async def note_disk(self, *, is_full: bool) -> None:
        """Gives way to decoded bytes where the disk is full for them, or has taken no encoded ones."""
        if (is_full or self._is_broken) and not self._has_given_way:
            self._is_broken = self._has_given_way = True
            await self.drop()

    async def _give_up(self) -> None:
        blob_id = self.cached.shape.blob_id
        log.warning("the encoded bytes of blob %s have another digest: they are not kept", blob_id[:12])
        self._is_broken = self._has_given_way = True
        await self.drop()

    def _empty(self) -> None:
        """Nobody has the file mapped, so it may be shortened for a moment."""
        os.ftruncate(self.cached.descriptor, 0)
        os.ftruncate(self.cached.descriptor, self.parts.size_bytes)

    def _write(self, offset: int, data: memoryview) -> bool:
        try:
            self.cached.store(offset, [data])
        except OSError as error:
            if not self._is_broken:
                blob_id = self.cached.shape.blob_id[:12]
                log.warning("encoded bytes of blob %s are not kept any more: %s", blob_id, error.strerror)
            self._is_broken = True
            return False
        return True


def wanted_of(
    extent: BlobExtent,
    decoder: ChunkDecoder,
    encoded: EncodedBlob | None,
    lacking: Callable[[BlobExtent], Iterable[int]],
) -> list[int]:
    """The chunks of an extent to verify and to store: those lacking; all, where its bytes are to be kept."""
    if encoded is not None and all(map(decoder.can_verify, extent.chunks)):
        return list(extent.chunks)
    return list(lacking(extent))


async def decode_and_keep(
    decoder: ChunkDecoder, work: Sequence[EncodedExtent], store: Store, encoded: EncodedBlob | None
) -> list[list[ChunkOutcome]]:
    """`ChunkDecoder.decode` in a thread, which also has `encoded` keep what was right. A checkpoint."""

    def decode() -> tuple[list[list[ChunkOutcome]], list[tuple[int, int]]]:
        results = decoder.decode(work, store)
        return results, encoded.keep(work, results) if encoded is not None else []

    results, kept = await trio.to_thread.run_sync(decode)
    if encoded is not None:
        encoded.note(kept)
        await encoded.note_disk(is_full=any(each.disk_error for outcomes in results for each in outcomes))
    return results


def file_digest(descriptor: int, size_bytes: int) -> str:
    """The sha256 of the first `size_bytes` of a file, in hexadecimal. Blocking: about 1 s for each GB."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    offset = 0
    while offset < size_bytes:
        got = os.preadv(descriptor, [buffer[: min(len(buffer), size_bytes - offset)]], offset)
        if not got:
            break  # it was shortened: another digest than that of all of it
        digest.update(buffer[:got])
        offset += got
    return digest.hexdigest()

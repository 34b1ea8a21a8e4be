"""From encoded bytes to verified chunks in the cache. Blocking: runs in worker threads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from backend.contract import BackendError
from backend.extents import BlobExtent
from rafs.blob_table import BlobEntry, BlobFeatures
from rafs.blobmeta import BlobMeta
from rafs.codec import CodecError
from rafs.content import WrongChunk, cut_chunk, decode_extent, has_digest
from rafs.record import BLOCK_SIZE, FormatError, round_up


class ChunkInvalid(BackendError):
    """The source gave bytes, more than once, that are not those which the image names."""

    message = "blob {blob_id}: chunk {chunk_index} is not what the image names: {why}; it was not stored"
    exit_code: ClassVar[int] = 120


class BlobUnsupported(BackendError):
    """A blob in a form that cannot be decoded chunk by chunk here."""

    message = "blob {blob_id}: {what} blobs cannot be read"
    exit_code: ClassVar[int] = 121


@dataclass(frozen=True, slots=True)
class ChunkOutcome:
    """What became of one chunk.

    Neither `fault` nor `unstored`: it is in the file. `unstored`: the verified bytes, and in `disk_error` why
    they are not in the file. `fault`: the bytes were wrong.
    """

    index: int
    size_bytes: int
    unstored: bytes | None = None
    disk_error: OSError | None = None
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class GoodChunk:
    """A verified chunk and its offset in the decoded blob."""

    index: int
    offset: int
    data: memoryview


class ChunkDecoder:
    """Decodes and verifies chunks of one blob."""

    def __init__(self, blob: BlobEntry, meta: BlobMeta, digests: Sequence[bytes]) -> None:
        """Raises `BlobUnsupported`."""
        for feature in (BlobFeatures.TARFS, BlobFeatures.ENCRYPTED):
            if blob.features & feature:
                raise BlobUnsupported(blob_id=blob.blob_id, what=str(feature.name).lower())
        self._blob = blob
        self._meta = meta
        self._digests = digests

    def decode(
        self,
        extent: BlobExtent,
        encoded: memoryview,
        wanted: Sequence[int],
        store: Callable[[int, memoryview], None],
    ) -> list[ChunkOutcome]:
        """Decodes an extent, verifies its chunks `wanted` and hands good ones to `store(offset, data)`.

        A chunk that fails does not touch the others. Raises nothing for wrong bytes or a full disk.
        """
        try:
            decoded = decode_extent(
                self._blob,
                self._meta,
                extent.chunks[0],
                encoded,
                extent.decoded_size,
                is_compressed=extent.is_compressed,
            )
        except (CodecError, FormatError) as error:
            return [ChunkOutcome(index, 0, fault=str(error)) for index in wanted]
        checked = [self._verify(index, decoded) for index in wanted]
        good = [chunk for chunk in checked if isinstance(chunk, GoodChunk)]
        outcomes = [chunk for chunk in checked if isinstance(chunk, ChunkOutcome)]
        for run in _adjacent(good):
            outcomes += _store_run(run, store)
        return outcomes

    def can_verify(self, index: int) -> bool:
        """Whether the image names the chunk; others are neighbours in a blob of another image."""
        return has_digest(self._digests, index)

    def _verify(self, index: int, decoded: memoryview) -> "GoodChunk | ChunkOutcome":
        try:
            data = cut_chunk(self._blob, self._meta, self._digests, index, decoded)
        except WrongChunk as error:
            return ChunkOutcome(index, 0, fault=error.why)
        offset = self._meta.chunk(index).uncompressed_offset
        if offset + len(data) > self._blob.uncompressed_size:
            return ChunkOutcome(index, len(data), fault="it lies outside the decoded blob")
        return GoodChunk(index, offset, data)


def _adjacent(chunks: Sequence[GoodChunk]) -> list[list[GoodChunk]]:
    """Groups chunks that follow each other in the decoded file: thousands of small files are few writes."""
    runs: list[list[GoodChunk]] = []
    end = -1
    for chunk in chunks:
        if chunk.offset != end or not runs:
            runs.append([])
        runs[-1].append(chunk)
        end = round_up(chunk.offset + len(chunk.data), BLOCK_SIZE)
    return runs


def _store_run(run: list[GoodChunk], store: Callable[[int, memoryview], None]) -> list[ChunkOutcome]:
    data = run[0].data
    if len(run) > 1:
        # What lies between a chunk's end and the next block belongs to nobody and is zero.
        padded = (part for chunk in run for part in (chunk.data, bytes(-len(chunk.data) % BLOCK_SIZE)))
        data = memoryview(b"".join(padded))[: run[-1].offset + len(run[-1].data) - run[0].offset]
    try:
        store(run[0].offset, data)
    except OSError as error:
        return [ChunkOutcome(c.index, len(c.data), unstored=bytes(c.data), disk_error=error) for c in run]
    return [ChunkOutcome(chunk.index, len(chunk.data)) for chunk in run]

"""From encoded bytes to verified chunks in the cache. Blocking: runs in worker threads."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from backend.contract import BackendError
from backend.extents import BlobExtent
from rafs.blob_table import BlobEntry, BlobFeatures
from rafs.blobmeta import BlobMeta
from rafs.codec import CodecError
from rafs.content import WrongChunk, cut_chunk, decode_extent, has_digest
from rafs.record import BLOCK_SIZE, FormatError, round_up

Store = Callable[[int, Sequence[memoryview]], None]
"""Takes an offset in the decoded file and the parts that are to stand there, one behind the other."""

RUN_CHUNKS_MAX = 512
"""pwritev(2) takes 1,024 parts: a chunk and the zeros behind it are two."""
_ZEROS = memoryview(bytes(BLOCK_SIZE))


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
class EncodedExtent:
    """An extent, its encoded bytes, and which of its chunks are wanted."""

    extent: BlobExtent
    data: memoryview
    wanted: Sequence[int]


class GoodChunk(NamedTuple):
    """A verified chunk, its offset in the decoded blob, and where its outcome goes."""

    number: int
    offset: int
    data: memoryview
    outcomes: list[ChunkOutcome]


class DecodedChunk(NamedTuple):
    """A chunk's number and the bytes that are said to be it."""

    number: int
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

    def decode(self, extents: Iterable[EncodedExtent], store: Store) -> list[list[ChunkOutcome]]:
        """Decodes extents, verifies the chunks wanted of them and stores good ones; what became of each.

        Good chunks that follow each other in the decoded file, of whatever extent, are stored at once.
        A chunk that fails does not touch the others. Raises nothing for wrong bytes or a full disk.
        """
        results: list[list[ChunkOutcome]] = []
        good: list[GoodChunk] = []
        for encoded in extents:
            outcomes: list[ChunkOutcome] = []
            results.append(outcomes)
            good += self._verified(encoded, outcomes)
        store_chunks(good, store)
        return results

    def take(self, chunks: Iterable[DecodedChunk], store: Store) -> list[ChunkOutcome]:
        """Verifies chunks that came decoded and stores good ones; what became of each. As `decode`."""
        outcomes: list[ChunkOutcome] = []
        good: list[GoodChunk] = []
        for index, data in chunks:
            if self._blob.digester.digest(data) == self._digests[index]:
                offset = self._meta.chunk(index).uncompressed_offset
                good.append(GoodChunk(index, offset, data, outcomes))
            else:
                outcomes.append(ChunkOutcome(index, 0, fault="another digest than the image names"))
        good.sort(key=lambda chunk: chunk.offset)
        store_chunks(good, store)
        return outcomes

    def can_verify(self, index: int) -> bool:
        """Whether the image names the chunk; others are neighbours in a blob of another image."""
        return has_digest(self._digests, index)

    def _verified(self, encoded: EncodedExtent, outcomes: list[ChunkOutcome]) -> list[GoodChunk]:
        """The wanted chunks that are right; `outcomes` gets the others."""
        extent = encoded.extent
        try:
            decoded = decode_extent(
                self._blob,
                self._meta,
                extent.chunks[0],
                encoded.data,
                extent.decoded_size,
                is_compressed=extent.is_compressed,
            )
        except (CodecError, FormatError) as error:
            outcomes += [ChunkOutcome(index, 0, fault=str(error)) for index in encoded.wanted]
            return []
        good = []
        for index in encoded.wanted:
            try:
                chunk, data = cut_chunk(self._blob, self._meta, self._digests, index, decoded)
            except WrongChunk as error:
                outcomes.append(ChunkOutcome(index, 0, fault=error.why))
                continue
            if chunk.uncompressed_offset + len(data) > self._blob.uncompressed_size:
                fault = "it lies outside the decoded blob"
                outcomes.append(ChunkOutcome(index, len(data), fault=fault))
            else:
                good.append(GoodChunk(index, chunk.uncompressed_offset, data, outcomes))
        return good


def store_chunks(chunks: Sequence[GoodChunk], store: Store) -> None:
    """Stores verified chunks, neighbours in the decoded file together; their outcomes tell how it went."""
    for run in _adjacent(chunks):
        _store_run(run, store)


def _adjacent(chunks: Sequence[GoodChunk]) -> list[list[GoodChunk]]:
    """Groups chunks that follow each other in the decoded file: thousands of small files are few writes."""
    runs: list[list[GoodChunk]] = []
    end = -1
    for chunk in chunks:
        if chunk.offset != end or len(runs[-1]) == RUN_CHUNKS_MAX:
            runs.append([])
        runs[-1].append(chunk)
        end = round_up(chunk.offset + len(chunk.data), BLOCK_SIZE)
    return runs


def _store_run(run: list[GoodChunk], store: Store) -> None:
    parts: list[memoryview] = []
    for chunk in run:
        # What lies between a chunk's end and the next block belongs to nobody and is zero.
        parts += [chunk.data, _ZEROS[: -len(chunk.data) % BLOCK_SIZE]]
    try:
        store(run[0].offset, parts[:-1])
    except OSError as error:
        for index, _, data, outcomes in run:
            outcomes.append(ChunkOutcome(index, len(data), unstored=bytes(data), disk_error=error))
    else:
        for index, _, data, outcomes in run:
            outcomes.append(ChunkOutcome(index, len(data)))

"""From encoded bytes to verified chunks in the cache. Blocking: runs in worker threads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from backend.contract import BackendError
from backend.extents import BlobExtent
from rafs.blob_table import BlobEntry, BlobFeatures
from rafs.blobmeta import BlobMeta
from rafs.codec import CodecError, Compressor, decompress
from rafs.record import FormatError


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


class ChunkDecoder:
    """Decodes and verifies chunks of one blob."""

    def __init__(self, blob: BlobEntry, meta: BlobMeta, digests: Sequence[bytes]) -> None:
        """Raises `BlobUnsupported`."""
        for feature in (BlobFeatures.ZRAN, BlobFeatures.TARFS, BlobFeatures.ENCRYPTED):
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
        """Decodes an extent, verifies its chunks `wanted` and hands each good one to `store(offset, data)`.

        A chunk that fails does not touch the others. Raises nothing for wrong bytes or a full disk.
        """
        codec = self._blob.compressor if extent.is_compressed else Compressor.NONE
        try:
            decoded = memoryview(decompress(codec, encoded, extent.decoded_size))
        except CodecError as error:
            return [ChunkOutcome(index, 0, fault=str(error)) for index in wanted]
        return [self._finish(index, decoded, store) for index in wanted]

    def _finish(
        self, index: int, decoded: memoryview, store: Callable[[int, memoryview], None]
    ) -> ChunkOutcome:
        size = 0
        try:
            chunk = self._meta.chunk(index)
            size = chunk.uncompressed_size
            data = decoded[chunk.offset_in_batch : chunk.offset_in_batch + size]
            found, expected = self._blob.digester.digest(data), self._digests[index]
        except (FormatError, IndexError) as error:
            return ChunkOutcome(index, size, fault=str(error))
        if found != expected:
            return ChunkOutcome(
                index, size, fault=f"digest {found.hex()[:16]} instead of {expected.hex()[:16]}"
            )
        if chunk.uncompressed_offset + size > self._blob.uncompressed_size:
            return ChunkOutcome(index, size, fault="it lies outside the decoded blob")
        try:
            store(chunk.uncompressed_offset, data)
        except OSError as error:
            return ChunkOutcome(index, size, unstored=bytes(data), disk_error=error)
        return ChunkOutcome(index, size)

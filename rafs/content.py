"""From the encoded bytes of an extent to the verified chunks in it."""

from collections.abc import Sequence
from typing import ClassVar

from rafs.blob_table import BlobEntry, BlobFeatures
from rafs.blobmeta import BlobMeta, ChunkInfo
from rafs.codec import Compressor, decompress
from rafs.errors import NydusError
from rafs.record import Buffer, FormatError
from rafs.zran_inflate import inflate_context


class WrongChunk(NydusError):
    """A chunk's bytes are not those that the image names."""

    message = "blob {blob_id}: chunk {chunk_index} at offset {offset}: {why}"
    exit_code: ClassVar[int] = 16

    def __init__(self, blob_id: str, chunk_index: int, offset: int, why: str) -> None:
        """`offset` is that of the chunk's encoded bytes in the blob."""
        super().__init__(blob_id=blob_id, chunk_index=chunk_index, offset=offset, why=why)
        self.why = why


def decode_extent(
    blob: BlobEntry, meta: BlobMeta, index: int, encoded: Buffer, decoded_size: int, *, is_compressed: bool
) -> memoryview:
    """The `decoded_size` bytes of the extent of chunk `index`, not copied when it is stored as it is.

    Raises `CodecError`, and `FormatError` for a gzip context that cannot be true.
    """
    if blob.features & BlobFeatures.ZRAN and (chunk := meta.chunk(index)).is_zran:
        context = meta.zran_context(chunk.batch_index)
        return memoryview(inflate_context(context, meta.zran_dictionary(context), encoded))
    if not is_compressed and len(encoded) == decoded_size:
        return memoryview(encoded)
    codec = blob.compressor if is_compressed else Compressor.NONE
    return memoryview(decompress(codec, encoded, decoded_size))


def cut_chunk(
    blob: BlobEntry, meta: BlobMeta, digests: Sequence[bytes], index: int, decoded: memoryview
) -> tuple[ChunkInfo, memoryview]:
    """Chunk `index` out of its decoded extent, its digest compared; raises `WrongChunk`."""
    try:
        chunk = meta.chunk(index)
        expected = digests[index]
    except (FormatError, IndexError) as error:
        raise WrongChunk(blob.blob_id, index, 0, str(error)) from error
    data = decoded[chunk.offset_in_batch : chunk.offset_in_batch + chunk.uncompressed_size]
    found = blob.digester.digest(data)
    if found != expected:
        why = f"digest {found.hex()[:16]} instead of {expected.hex()[:16]}"
        raise WrongChunk(blob.blob_id, index, chunk.compressed_offset, why)
    return chunk, data


def has_digest(digests: Sequence[bytes], index: int) -> bool:
    """Whether the image names the chunk. Of another image's blob it may use some chunks only."""
    try:
        return bool(digests[index])
    except (FormatError, IndexError):
        return False

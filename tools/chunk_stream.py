"""Decoded, verified chunks of an image in a given order, straight from its store: for `cat` and `unpack`."""

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import ClassVar

from rafs.blobmeta import Extent
from rafs.chunk import ChunkRef
from rafs.codec import Compressor, decompress
from rafs.errors import NydusError
from tools.image import OpenImage
from tools.run_stream import OpenBlob, ResultIterator, Run, run_stream


class ChunkMismatch(NydusError):
    """A chunk's bytes are not those that the image names."""

    message = "blob {blob_id}: chunk {chunk_index} at offset {offset}: {why}"
    exit_code: ClassVar[int] = 93


def chunk_stream(
    image: OpenImage, refs: Iterable[ChunkRef]
) -> AbstractAsyncContextManager[ResultIterator[bytes]]:
    """Iterates over the chunks that `refs` name, in that order.

    The iterator raises `ChunkMismatch`, `CodecError` and `BackendError`s at the run they concern.
    """
    return run_stream(image, refs, decode_run)


def decode_run(run: Run, data: bytes) -> list[bytes]:
    """The verified chunks of a run, `data` being its encoded bytes; raises `ChunkMismatch`, `CodecError`."""
    extent: Extent | None = None
    decoded = b""
    chunks = []
    for index in run.chunks:
        holder = run.blob.meta.extent(index)
        if holder != extent:
            codec = run.blob.entry.compressor if holder.is_compressed else Compressor.NONE
            decoded = decompress(codec, run.encoded(data, holder), holder.uncompressed_size)
            extent = holder
        chunks.append(_cut(run.blob, index, decoded))
    return chunks


def _cut(blob: OpenBlob, index: int, decoded: bytes) -> bytes:
    """Chunk `index` out of its decoded extent, its digest compared."""
    info = blob.meta.chunk(index)
    start = info.offset_in_batch if info.is_batch else 0
    chunk = decoded[start : start + info.uncompressed_size]
    offset = info.compressed_offset
    if len(chunk) != info.uncompressed_size:
        why = f"its batch has no {info.uncompressed_size} bytes at {start}"
        raise ChunkMismatch(blob_id=blob.entry.blob_id, chunk_index=index, offset=offset, why=why)
    if blob.entry.digester.digest(chunk) != blob.digests[index]:
        why = "its digest is not the one that the image names"
        raise ChunkMismatch(blob_id=blob.entry.blob_id, chunk_index=index, offset=offset, why=why)
    return chunk

"""Decoded, verified chunks of an image in a given order, straight from its store: for `cat` and `unpack`."""

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager

from rafs.blobmeta import Extent
from rafs.chunk import ChunkRef
from rafs.content import cut_chunk, decode_extent
from tools.image import OpenImage
from tools.run_stream import ResultIterator, Run, run_stream


def chunk_stream(
    image: OpenImage, refs: Iterable[ChunkRef]
) -> AbstractAsyncContextManager[ResultIterator[bytes]]:
    """Iterates over the chunks that `refs` name, in that order.

    The iterator raises `WrongChunk`, `CodecError` and `BackendError`s at the run they concern.
    """
    return run_stream(image, refs, decode_run)


def decode_run(run: Run, encoded_run: bytes) -> list[bytes]:
    """The verified chunks of a run, given its encoded bytes; raises `WrongChunk`, `CodecError`."""
    blob = run.blob
    extent: Extent | None = None
    decoded = memoryview(b"")
    chunks = []
    for index in run.chunks:
        holder = blob.meta.extent(index)
        if holder != extent:
            encoded = run.encoded(encoded_run, holder)
            decoded = decode_extent(
                blob.entry,
                blob.meta,
                index,
                encoded,
                holder.uncompressed_size,
                is_compressed=holder.is_compressed,
            )
            extent = holder
        _, data = cut_chunk(blob.entry, blob.meta, blob.digests, index, decoded)
        chunks.append(bytes(data))
    return chunks

"""How much of each blob an image uses."""

from dataclasses import dataclass

from rafs.blob_table import BlobFeatures
from rafs.bootstrap import Bootstrap
from rafs.chunk import ROW
from rafs.record import BLOCK_SIZE, round_up


@dataclass(frozen=True, slots=True)
class BlobUsage:
    """Chunks of a blob that an image uses, their decoded bytes, their share of the decoded blob (0..1)."""

    chunks: int
    decoded_bytes: int
    ratio: float


def chunk_usage(bootstrap: Bootstrap) -> tuple[BlobUsage, ...]:
    """For each blob, in the order of the blob table, what the image uses of it.

    The chunk table is read and not the files: builders write a row for each chunk that a file uses. Raises
    `FormatError` for a row of a blob or chunk that is not there.
    """
    chunks, sizes, places = ([0] * len(bootstrap.blobs) for _ in range(3))
    if not bootstrap.blobs:
        return ()
    bootstrap.chunk_digests(0)  # finds rows of unknown blobs and chunks
    for _, index, _, _, size, _, _, _, _, _ in ROW.iter_unpack(bootstrap.chunk_table):
        chunks[index] += 1
        sizes[index] += size
        is_aligned = BlobFeatures.ALIGNED in bootstrap.blobs[index].features
        places[index] += round_up(size, BLOCK_SIZE) if is_aligned else size
    return tuple(
        BlobUsage(count, size, min(1.0, place / blob.uncompressed_size) if blob.uncompressed_size else 0.0)
        for blob, count, size, place in zip(bootstrap.blobs, chunks, sizes, places, strict=True)
    )

"""What a host that holds one image has to fetch for another."""

from collections.abc import Callable
from dataclasses import dataclass

from backend.extents import ExtentIndex
from rafs.bootstrap import Bootstrap
from rafs.chunk import ROW, ROW_SIZE


@dataclass(frozen=True, slots=True)
class BlobNeed:
    """What is missing of one blob. Sizes in bytes: of the missing chunks, and of what travels for them."""

    blob_id: str
    chunks: int
    chunks_missing: int
    decoded_bytes: int
    encoded_bytes: int


@dataclass(slots=True)
class _Count:
    chunks: int = 0
    missing: int = 0
    decoded_bytes: int = 0
    encoded_bytes: int = 0


def chunks_to_fetch(
    held: Bootstrap, wanted: Bootstrap, extents_of: Callable[[str], ExtentIndex]
) -> tuple[BlobNeed, ...]:
    """For each blob of `wanted`, in the order of its blob table, what `held` does not have of it.

    A chunk counts as held when `held` uses one with the same digest, in whatever blob: hosts copy such
    chunks. Where the digesters differ nothing can be told, and every chunk is to be fetched. An equal chunk
    in two blobs is fetched once. An extent travels whole, so a batch counts in full for one missing chunk in
    it. `extents_of` is asked for the blobs of missing chunks, by ID. About 100 bytes of memory for each chunk
    of `held` and each missing one. Raises `FormatError` and what `extents_of` raises.
    """
    if not wanted.blobs:
        return ()
    known = _digests(held) if held.digester == wanted.digester else set[bytes]()
    counts = [_Count() for _ in wanted.blobs]
    indexes: dict[int, ExtentIndex] = {}
    travelling: set[tuple[int, int]] = set()
    # Looking at the digests first finds rows of unknown blobs and chunks.
    for blob in wanted.blobs:
        counts[blob.index].chunks = len(wanted.chunk_digests(blob.index))
    for digest, blob_index, _, _, decoded_bytes, _, _, _, chunk_index, _ in ROW.iter_unpack(
        wanted.chunk_table
    ):
        if digest in known:
            continue
        known.add(digest)
        count = counts[blob_index]
        count.missing += 1
        count.decoded_bytes += decoded_bytes
        if blob_index not in indexes:
            indexes[blob_index] = extents_of(wanted.blobs[blob_index].blob_id)
        extent = indexes[blob_index].of(chunk_index)
        if (blob_index, extent.start) not in travelling:
            travelling.add((blob_index, extent.start))
            count.encoded_bytes += extent.size
    return tuple(
        BlobNeed(blob.blob_id, count.chunks, count.missing, count.decoded_bytes, count.encoded_bytes)
        for blob, count in zip(wanted.blobs, counts, strict=True)
    )


def _digests(bootstrap: Bootstrap) -> set[bytes]:
    table = bootstrap.chunk_table
    return {bytes(table[at : at + 32]) for at in range(0, len(table), ROW_SIZE)}

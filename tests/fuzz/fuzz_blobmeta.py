"""Reads a node-side blob.meta: every chunk, its extent and its batch; then checks it against a blob."""

from dataclasses import replace
from itertools import islice

from rafs.blobmeta import BlobMeta
from rafs.bootstrap import Bootstrap
from rafs.check import check_blob_meta, check_extent, extents_of
from tests.fuzz.seeds import batched_image, small_image
from tests.hostile import value_or_error

SEEDS = (small_image().blobs[0].meta, batched_image().blobs[0].meta)
_CHUNKS_MAX = 500


def exercise(data: bytes) -> None:
    """Only errors of this project may come up, and out of the checker none."""
    with value_or_error():
        meta = BlobMeta(data)
        _read_chunks(meta)
        bootstrap = Bootstrap(batched_image().bootstrap)
        # As many chunks as it says that it has: the rest of the comparison is worth reaching.
        blob = replace(bootstrap.blobs[0], features=meta.header.features, chunk_count=meta.count)
        digests = bootstrap.chunk_digests(0)
        for fault in islice(check_blob_meta(blob, meta, digests), _CHUNKS_MAX):
            assert str(fault)
        for chunks in islice(extents_of(meta), 20):
            with value_or_error():
                size = meta.extent(chunks[0]).compressed_size
                assert all(str(fault) for fault in check_extent(blob, meta, digests, chunks, bytes(size)))


def _read_chunks(meta: BlobMeta) -> None:
    for index in range(min(meta.count, _CHUNKS_MAX)):
        chunk = meta.chunk(index)
        assert chunk.uncompressed_offset % 4096 == 0
        assert 1 <= chunk.uncompressed_size <= 1 << 24
        with value_or_error():
            assert 0 <= meta.extent(index).uncompressed_size <= 1 << 24
        assert index in meta.batch_range(index)
    for index in range(min(meta.header.context_count, _CHUNKS_MAX)):
        with value_or_error():
            meta.zran_dictionary(meta.zran_context(index))


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_blobmeta")

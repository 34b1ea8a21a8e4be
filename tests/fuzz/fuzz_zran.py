"""Reads a blob.meta of a gzip layer, and inflates its contexts from bytes that are sound or are not."""

import io
import tarfile
import tempfile
from itertools import islice
from pathlib import Path

from builder.options import BuildOptions
from builder.zran_layer import index_layer
from rafs.blobmeta import BlobMeta
from rafs.bootstrap import Bootstrap
from rafs.check import check_blob_meta, check_extent, extents_of
from tests.gzip_streams import compress_members, make_content
from tests.hostile import value_or_error

_CHUNK_SIZE = 4096
_EXTENTS_MAX = 8


def _make() -> tuple[bytes, Bootstrap, bytes]:
    """A layer, its bootstrap and its blob.meta."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        member = tarfile.TarInfo("file")
        content = make_content(11, 3)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    layer = compress_members(tar.getvalue(), 11, 50_000)
    with tempfile.TemporaryDirectory() as name:
        made = index_layer(io.BytesIO(layer), "layer", Path(name), BuildOptions(_CHUNK_SIZE, 0))
        assert made.meta is not None
        return layer, Bootstrap(made.bootstrap.read_bytes()), made.meta.read_bytes()


_LAYER, _BOOTSTRAP, _META = _make()
SEEDS = (_META,)


def exercise(data: bytes) -> None:
    """A context that lies is an error or a fault; chunks that pass are those that the image names."""
    with value_or_error():
        meta = BlobMeta(data)
        blob, digests = _BOOTSTRAP.blobs[0], _BOOTSTRAP.chunk_digests(0)
        for fault in islice(check_blob_meta(blob, meta, digests), 100):
            assert str(fault)
        for chunks in islice(extents_of(meta), _EXTENTS_MAX):
            with value_or_error():
                extent = meta.extent(chunks[0])
                encoded = _LAYER[extent.compressed_offset :][: extent.compressed_size]
                encoded += bytes(min(extent.compressed_size - len(encoded), 1 << 20))
                assert all(str(fault) for fault in check_extent(blob, meta, digests, chunks, encoded))


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_zran")

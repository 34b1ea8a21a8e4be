"""Small images for the tests of stores: real blob tables and chunk tables, chunk data that nobody decodes."""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

from backend.store import BlobFile, ImageFiles
from rafs.blob_table import BlobEntry, BlobFeatures, DeviceSlot, blob_table_offset, map_flat, slot_offset
from rafs.blobmeta import BlobMetaHeader, ChunkInfo, node_form, pack_array
from rafs.codec import Compressor, compress
from rafs.digest import Digester
from rafs.record import BLOCK_SIZE
from rafs.superblock import ExtendedSuperblock, RafsFlags, Superblock

CHUNK_SIZE = 1 << 20
FEATURES = BlobFeatures.ALIGNED | BlobFeatures.CHUNK_INFO_V2 | BlobFeatures.CAP_TAR_TOC


@dataclass(frozen=True, slots=True)
class SampleBlob:
    """A blob with chunk data and its table behind, and the node-side form of the table."""

    data: bytes
    entry: BlobEntry
    table: bytes


def make_blob(data_bytes: int, index: int = 0, seed: int = 0) -> SampleBlob:
    """A blob of `data_bytes` bytes of chunk data, stored as they are."""
    data = random.Random(seed).randbytes(data_bytes)
    sizes = [min(CHUNK_SIZE, data_bytes - at) for at in range(0, data_bytes, CHUNK_SIZE)]
    array = pack_array(
        ChunkInfo(i * CHUNK_SIZE, size, i * CHUNK_SIZE, size, is_compressed=False)
        for i, size in enumerate(sizes)
    )
    encoded = compress(Compressor.ZSTD, array)
    header = BlobMetaHeader(FEATURES, Compressor.ZSTD, len(sizes), data_bytes, len(encoded), len(array))
    blob = data + encoded + header.pack()
    entry = BlobEntry(
        blob_id=hashlib.sha256(blob).hexdigest(),
        index=index,
        chunk_size=CHUNK_SIZE,
        chunk_count=len(sizes),
        compressor=Compressor.ZSTD,
        digester=Digester.BLAKE3,
        features=FEATURES,
        compressed_size=len(blob),
        uncompressed_size=-(-data_bytes // BLOCK_SIZE) * BLOCK_SIZE,
        toc_size=0,
        ci_compressor=Compressor.ZSTD,
        ci_offset=data_bytes,
        ci_compressed_size=len(encoded),
        ci_uncompressed_size=len(array),
    )
    return SampleBlob(blob, entry, node_form(array, header))


def make_bootstrap(blobs: list[SampleBlob], tail: bytes = b"") -> bytes:
    """A bootstrap that opens: superblocks, device slots and blob table. It has no inodes."""
    table_at = blob_table_offset(len(blobs))
    size = table_at + BLOCK_SIZE
    image = bytearray(size) + tail
    superblock = Superblock(1, 0, table_at // BLOCK_SIZE, len(blobs))
    flags = RafsFlags.COMPRESSION_ZSTD | RafsFlags.HASH_BLAKE3
    extended = ExtendedSuperblock(flags, table_at, len(blobs) * BlobEntry.SIZE, CHUNK_SIZE, 0, 0, 0, 0)
    _put(image, Superblock.OFFSET, superblock.pack())
    _put(image, ExtendedSuperblock.OFFSET, extended.pack())
    entries = [blob.entry for blob in blobs]
    for index, slot in enumerate(map_flat(size, entries)):
        assert isinstance(slot, DeviceSlot)
        _put(image, slot_offset(index), slot.pack())
    for index, entry in enumerate(entries):
        _put(image, table_at + index * BlobEntry.SIZE, entry.pack())
    return bytes(image)


def _put(image: bytearray, offset: int, data: bytes) -> None:
    image[offset : offset + len(data)] = data


def write_image(directory: Path, blobs: list[SampleBlob], tail: bytes = b"") -> ImageFiles:
    """An image's files as the builder leaves them."""
    directory.mkdir(parents=True, exist_ok=True)
    bootstrap = directory / "image.boot"
    bootstrap.write_bytes(make_bootstrap(blobs, tail))
    files = []
    for blob in blobs:
        blob_id = blob.entry.blob_id
        (directory / blob_id).write_bytes(blob.data)
        (directory / f"{blob_id}.blob.meta").write_bytes(blob.table)
        files.append(
            BlobFile(blob_id, len(blob.data), directory / blob_id, directory / f"{blob_id}.blob.meta")
        )
    return ImageFiles(bootstrap, tuple(files))


def make_image(
    directory: Path, blob_sizes: tuple[int, ...] = (10_000, 5_000_000), seed: int = 0
) -> ImageFiles:
    """An image with a blob for each of the sizes; another seed gives other blobs."""
    blobs = [make_blob(size, index, seed * 100 + index) for index, size in enumerate(blob_sizes)]
    return write_image(directory, blobs)

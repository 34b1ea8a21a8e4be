"""Reads a blob's chunk table from the end of the blob itself, for images whose bootstrap layer has none."""

from pathlib import Path
from typing import ClassVar

import trio

from backend.bootstrap_layer import BLOB_META_SIZE_MAX_BYTES, blob_meta_name
from backend.contract import BackendError, BlobReader
from backend.publishing import reporting_writes
from rafs.blob_table import BlobEntry, BlobFeatures
from rafs.blobmeta import HEADER_SIZE, BlobMetaHeader, check_against_blob, node_form
from rafs.codec import CodecError, decompress
from rafs.record import FormatError

_ELSEWHERE = BlobFeatures.SEPARATE | BlobFeatures.ENCRYPTED | BlobFeatures.TARFS


class BlobMetaBroken(BackendError):
    """The chunk table at the end of a blob is missing, damaged or not what the bootstrap says."""

    message = "{where}: no usable chunk table at the end of blob {blob_id}: {why}"
    exit_code: ClassVar[int] = 114


async def fetch_blob_meta(reader: BlobReader, entry: BlobEntry, directory: Path, where: str) -> None:
    """Stores the chunk table of `entry` as a node-side file in `directory`: one range of the blob is read.

    Raises `BlobMetaBroken`, `CannotWrite` and what the reader raises.
    """
    table = await read_blob_meta(reader, entry, where)
    target = directory / blob_meta_name(entry.blob_id)
    with reporting_writes(target):
        await trio.to_thread.run_sync(target.write_bytes, table)


def has_blob_meta(entry: BlobEntry) -> bool:
    """Whether the blob that `table_blob_id` names carries the chunk table at its end, in the clear."""
    is_elsewhere = entry.features & _ELSEWHERE and not entry.features & BlobFeatures.ZRAN
    return entry.chunk_count > 0 and not is_elsewhere


def table_blob_id(entry: BlobEntry) -> str:
    """ID of the blob that has the chunk table at its end: that of a gzip layer is in a blob of its own."""
    return entry.meta_digest.hex() if entry.features & BlobFeatures.ZRAN else entry.blob_id


async def read_blob_meta(reader: BlobReader, entry: BlobEntry, where: str) -> bytes:
    """The chunk table at the end of a blob, in its node-side form; one range of the blob is read.

    `reader` is that of the blob that `table_blob_id` names. Raises `BlobMetaBroken` and what the reader
    raises.
    """
    if entry.features & _ELSEWHERE and not entry.features & BlobFeatures.ZRAN:
        why = f"blobs with features {int(entry.features):#x} keep it elsewhere"
        raise BlobMetaBroken(where=where, blob_id=entry.blob_id, why=why)
    if max(entry.ci_compressed_size, entry.ci_uncompressed_size) > BLOB_META_SIZE_MAX_BYTES:
        why = f"its size of {entry.ci_uncompressed_size} bytes is over {BLOB_META_SIZE_MAX_BYTES}"
        raise BlobMetaBroken(where=where, blob_id=entry.blob_id, why=why)
    tail = await reader.read_range(entry.ci_offset, entry.ci_compressed_size + HEADER_SIZE)
    return await trio.to_thread.run_sync(_node_form, tail, entry, where)


def _node_form(tail: bytes, entry: BlobEntry, where: str) -> bytes:
    view = memoryview(tail)
    try:
        header = BlobMetaHeader.unpack(view[entry.ci_compressed_size :], entry.ci_offset)
        check_against_blob(header, entry)
        array = decompress(entry.ci_compressor, view[: entry.ci_compressed_size], entry.ci_uncompressed_size)
    except (FormatError, CodecError) as error:
        raise BlobMetaBroken(where=where, blob_id=entry.blob_id, why=str(error)) from error
    return node_form(array, header)

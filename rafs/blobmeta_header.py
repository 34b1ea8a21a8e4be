"""Whether a blob.meta header says the same as the bootstrap's blob table."""

from collections.abc import Iterator

from rafs.blob_table import BlobEntry
from rafs.blobmeta import BlobMetaHeader
from rafs.record import FormatError


def header_differences(header: BlobMetaHeader, blob: BlobEntry) -> Iterator[str]:
    """Where the header does not say the same as the bootstrap's blob table."""
    for field, found, wanted in (
        ("chunk count", header.ci_entries, blob.chunk_count),
        ("array compressor", header.ci_compressor, int(blob.ci_compressor)),
        ("array offset", header.ci_offset, blob.ci_offset),
        ("encoded array size", header.ci_compressed_size, blob.ci_compressed_size),
        ("array size", header.ci_uncompressed_size, blob.ci_uncompressed_size),
    ):
        if found != wanted:
            yield f"{field} {wanted} as in the blob table, found {found}"


def check_against_blob(header: BlobMetaHeader, blob: BlobEntry) -> None:
    """Raises `FormatError` unless the header says the same as the bootstrap's blob table."""
    for difference in header_differences(header, blob):
        raise FormatError(f"blob.meta header of {blob.blob_id[:12]}", 0, difference)

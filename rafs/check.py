"""Verifies images: every fault with its record, offset and expectation, as many as there are.

`check_bootstrap` needs the metadata alone, `check_blob_meta` the blob.meta of one blob beside it, and
`check_extent` the encoded bytes of one unit of decoding, which the caller reads.
"""

from collections.abc import Iterator

from rafs.bootstrap import Bootstrap
from rafs.check_blob import check_blob_meta, check_extent, extents_of, is_decodable
from rafs.check_fault import Fault, Space
from rafs.check_tables import RowIndex, check_blobs, check_flags, check_rows, check_superblocks
from rafs.check_tree import TreeCheck
from rafs.record import Buffer, FormatError
from rafs.superblock import RafsFlags

__all__ = [
    "Fault",
    "check_blob_meta",
    "check_bootstrap",
    "check_bootstrap_bytes",
    "check_extent",
    "extents_of",
    "is_decodable",
]


def check_bootstrap(bootstrap: Bootstrap) -> Iterator[Fault]:
    """All faults of an opened bootstrap, found on the way; nothing is yielded for a sound one."""
    space = Space(bootstrap.size_bytes)
    yield from check_superblocks(bootstrap, space)
    yield from check_blobs(bootstrap)
    table = bootstrap.chunk_table
    # With digests in the blobs an image may do without the table.
    inlined = bool(bootstrap.extended.flags & RafsFlags.INLINED_CHUNK_DIGEST)
    rows = RowIndex(table, complete=len(table) > 0 or not inlined)
    yield from check_rows(bootstrap, rows)
    tree = TreeCheck(bootstrap, space, rows)
    yield from tree.run()
    yield from check_flags(bootstrap, tree.has_xattrs)


def check_bootstrap_bytes(data: Buffer, name: str) -> Iterator[Fault]:
    """As `check_bootstrap`, and the fault that keeps a bootstrap from being opened at all."""
    try:
        bootstrap = Bootstrap(data, name)
    except FormatError as error:
        yield Fault.of(error)
        return
    yield from check_bootstrap(bootstrap)

"""Reads each small record at the start of the input: inode, directory block, xattrs, tables."""

from collections.abc import Callable

from rafs.blob_table import BlobEntry
from rafs.blobmeta import BlobMetaHeader
from rafs.chunk import ChunkRef, ChunkRow
from rafs.dirent import pack_directory, search_block, unpack_block
from rafs.inode import Inode
from rafs.xattr import pack_xattrs, unpack_xattrs
from tests.fuzz.seeds import small_image
from tests.hostile import value_or_error

_XATTRS = pack_xattrs({b"user.a": b"1", b"security.capability": bytes(20)}, "seed")
_INODE_AT = 3 * 4096
"""The root of an image with one blob."""
SEEDS = (
    small_image().bootstrap[_INODE_AT : _INODE_AT + 256],
    small_image().entries[0].pack(),
    small_image().blobs[0].meta[-4096:],
    pack_directory([b".", b"..", b"name"], [128, 128, 200], [2, 2, 1]),
    _XATTRS,
)


def _directory_block(data: bytes) -> None:
    for entry in unpack_block(data[:4096], 0):
        search_block(data[:4096], entry.name, 0)


_PARSERS: tuple[Callable[[bytes], object], ...] = (
    lambda data: Inode.unpack(data, 0, 1).rdev,
    lambda data: BlobEntry.unpack(data, 0, 0).data_end,
    lambda data: BlobMetaHeader.unpack(data, 0).entry_size,
    lambda data: ChunkRef.unpack(data, 0).pack(),
    lambda data: ChunkRow.unpack(data, 0).pack(),
    lambda data: unpack_xattrs(data, 0, len(data)),
    _directory_block,
)


def exercise(data: bytes) -> None:
    """Only errors of this project may come up."""
    for parse in _PARSERS:
        with value_or_error():
            parse(data)


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_records")

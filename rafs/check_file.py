"""Checks of regular files: the chunk format word and each chunk address behind an inode."""

from collections.abc import Iterator

from rafs.bootstrap import Bootstrap
from rafs.check_fault import Fault
from rafs.check_tables import RowIndex
from rafs.chunk import ADDRESS, ADDRESS_SIZE
from rafs.inode import CHUNK_FORMAT_BITS_MASK, CHUNK_FORMAT_INDEXES, Inode
from rafs.record import BLOCK_SIZE
from rafs.superblock import BLOCK_SIZE_BITS

Address = tuple[int, int, int]
"""As stored: low chunk bits, device word, block."""


def check_file(bootstrap: Bootstrap, inode: Inode, rows: RowIndex) -> Iterator[Fault]:
    """The chunk addresses of a file, whose array lies inside the bootstrap, against blobs and chunk table."""
    start = inode.index_offset
    count = bootstrap.chunk_count_of(inode)
    addresses = ADDRESS.iter_unpack(bootstrap.data[start : start + count * ADDRESS_SIZE])
    left = inode.size
    for number, address in enumerate(addresses):
        size = min(left, bootstrap.chunk_size)
        left -= size
        wrong = _wrong_address(bootstrap, address, size, rows)
        if wrong:
            at = start + number * ADDRESS_SIZE
            yield Fault(f"chunk {number} of inode {inode.nid}", at + wrong[0], wrong[1])
    wrong_format = _wrong_format(bootstrap, inode, count)
    if wrong_format:
        yield Fault(f"inode {inode.nid}", inode.offset_bytes + 16, wrong_format)


def _wrong_address(
    bootstrap: Bootstrap, address: Address, size_bytes: int, rows: RowIndex
) -> tuple[int, str] | None:
    """Which byte of an address is wrong and what was expected there; None for a right one."""
    low, device, block = address
    blob_index = (device & 0xFF) - 1
    if not 0 <= blob_index < len(bootstrap.blobs):
        return 2, f"a device from 1 to {len(bootstrap.blobs)}, found {device & 0xFF}"
    blob = bootstrap.blobs[blob_index]
    chunk_index = low | device >> 8 << 16
    offset = block * BLOCK_SIZE
    if chunk_index >= blob.chunk_count:
        return 0, f"a chunk below {blob.chunk_count} of blob {blob_index}, found {chunk_index}"
    if offset + size_bytes > blob.uncompressed_size:
        return 4, f"decoded bytes before {blob.uncompressed_size}, found {offset} + {size_bytes}"
    row = rows.find(blob_index, chunk_index)
    if row < 0:
        wanted = f"a chunk with a row in the chunk table, found chunk {chunk_index} of blob {blob_index}"
        return (0, wanted) if rows.complete else None
    row_offset, row_size = rows.place(row)
    if row_offset != offset:
        return 4, f"decoded offset {row_offset} as in chunk table row {row}, found {offset}"
    if row_size != size_bytes:
        return 0, f"a chunk of {size_bytes} bytes, chunk table row {row} has {row_size}"
    return None


def _wrong_format(bootstrap: Bootstrap, inode: Inode, count: int) -> str | None:
    """What was expected of the chunk format word; None for a right one."""
    if inode.u & ~CHUNK_FORMAT_BITS_MASK != CHUNK_FORMAT_INDEXES:
        return f"chunk format {CHUNK_FORMAT_INDEXES:#x} and a size of 5 bits, found {inode.u:#x}"
    bits = (inode.u & CHUNK_FORMAT_BITS_MASK) + BLOCK_SIZE_BITS
    if 1 << bits == bootstrap.chunk_size:
        return None
    # The kernel divides by this size, so it then uses the first address for the whole file.
    if count < 2 or 1 << bits < inode.size:
        return f"chunks of {bootstrap.chunk_size} bytes, or one that holds the file, found 2^{bits} bytes"
    refs = bootstrap.data[inode.index_offset : inode.index_offset + count * ADDRESS_SIZE]
    first_device = first_block = -1
    for number, (_, device, block) in enumerate(ADDRESS.iter_unpack(refs)):
        if number == 0:
            first_device, first_block = device & 0xFF, block
        expected = first_block + number * bootstrap.chunk_size // BLOCK_SIZE
        if (device & 0xFF, block) != (first_device, expected):
            return f"chunks in a row in one blob with chunk size 2^{bits}, chunk {number} is elsewhere"
    return None

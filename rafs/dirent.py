"""Directory blocks: 12-byte entries, then their names, each 4096-byte block on its own."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rafs.record import BLOCK_SIZE, Buffer, FormatError

DIRENT = struct.Struct("<QHBB")
DIRENT_SIZE = 12
NAME_MAX = 255

assert DIRENT.size == DIRENT_SIZE


@dataclass(frozen=True, slots=True)
class Dirent:
    """A name in a directory: the inode it leads to and the EROFS file type (1 regular .. 7 symlink)."""

    name: bytes
    nid: int
    file_type: int


def count_entries(block: Buffer, offset_bytes: int) -> int:
    """How many entries a directory block holds; raises `FormatError` when its head is impossible."""
    if len(block) < DIRENT_SIZE:
        expectation = f"at least one 12-byte entry, found {len(block)} bytes"
        raise FormatError("directory block", offset_bytes, expectation)
    first = block[8] | block[9] << 8
    if first % DIRENT_SIZE or not DIRENT_SIZE <= first < len(block):
        expectation = f"names behind whole entries inside {len(block)} bytes, found {first}"
        raise FormatError("directory block", offset_bytes + 8, expectation)
    return first // DIRENT_SIZE


def name_at(block: Buffer, index: int, count: int, offset_bytes: int) -> bytes:
    """Name `index` of `count` in a block; raises `FormatError` for one that is empty, too long or outside."""
    at = index * DIRENT_SIZE + 8
    start = block[at] | block[at + 1] << 8
    if index + 1 < count:
        end = block[at + DIRENT_SIZE] | block[at + DIRENT_SIZE + 1] << 8
    else:
        end = len(block)
    if not count * DIRENT_SIZE <= start < end <= len(block):
        expectation = f"a name inside the block, found bytes {start}..{end} of {len(block)}"
        raise FormatError("directory entry", offset_bytes + at, expectation)
    name = bytes(block[start:end])
    if index + 1 == count:
        name = name.split(b"\0", 1)[0]
    if not 1 <= len(name) <= NAME_MAX:
        expectation = f"a name of 1..255 bytes, found {len(name)}"
        raise FormatError("directory entry", offset_bytes + at, expectation)
    return name


def unpack_block(block: Buffer, offset_bytes: int) -> Iterator[Dirent]:
    """All entries of one block that starts at `offset_bytes` of the bootstrap, in disk order."""
    count = count_entries(block, offset_bytes)
    for index in range(count):
        nid, _, file_type, _ = DIRENT.unpack_from(block, index * DIRENT_SIZE)
        yield Dirent(name_at(block, index, count, offset_bytes), nid, file_type)


def search_block(block: Buffer, name: bytes, offset_bytes: int) -> Dirent | None:
    """Binary search for `name` in one block."""
    count = count_entries(block, offset_bytes)
    low, high = 0, count - 1
    while low <= high:
        middle = (low + high) // 2
        found = name_at(block, middle, count, offset_bytes)
        if found == name:
            nid, _, file_type, _ = DIRENT.unpack_from(block, middle * DIRENT_SIZE)
            return Dirent(found, nid, file_type)
        if found < name:
            low = middle + 1
        else:
            high = middle - 1
    return None


def split_blocks(name_lengths: Sequence[int]) -> list[int]:
    """How many of the names (sorted, lengths in bytes) go into each block, in order."""
    if DIRENT_SIZE * len(name_lengths) + sum(name_lengths) <= BLOCK_SIZE:
        return [len(name_lengths)]
    counts, used, count = [], 0, 0
    for length in name_lengths:
        needed = DIRENT_SIZE + length
        if used + needed > BLOCK_SIZE:
            counts.append(count)
            used = count = 0
        used += needed
        count += 1
    counts.append(count)
    return counts


def directory_size(name_lengths: Sequence[int]) -> int:
    """`i_size` of a directory: whole blocks, and the bytes used in the last one."""
    counts = split_blocks(name_lengths)
    last = counts[-1]
    tail = DIRENT_SIZE * last + sum(name_lengths[len(name_lengths) - last :])
    return (len(counts) - 1) * BLOCK_SIZE + tail


def pack_directory(names: Sequence[bytes], nids: Sequence[int], file_types: Sequence[int]) -> bytes:
    """Directory data, every block but the last padded to 4096 bytes. Names are sorted, with "." and ".."."""
    out, start = [], 0
    counts = split_blocks([len(name) for name in names])
    for count in counts:
        end = start + count
        offset = DIRENT_SIZE * count
        heads = bytearray(offset)
        position = 0
        for index in range(start, end):
            DIRENT.pack_into(heads, position, nids[index], offset, file_types[index], 0)
            position += DIRENT_SIZE
            offset += len(names[index])
        out.append(bytes(heads))
        out.append(b"".join(names[start:end]))
        if end < len(names):
            out.append(bytes(BLOCK_SIZE - offset))
        start = end
    return b"".join(out)

"""Inline extended attributes: a 12-byte header, then entries padded to 4 bytes."""

import struct
from collections.abc import Mapping
from typing import ClassVar

from rafs.errors import NydusError
from rafs.inode import XATTR_HEADER_SIZE
from rafs.record import Buffer, FormatError, expect, round_up, take

ENTRY = struct.Struct("<BBH")
PREFIXES: tuple[tuple[int, bytes], ...] = (
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
)
"""Prefixes that are stored as a number."""
_PREFIX_BY_INDEX = dict(PREFIXES)
VALUE_MAX = 0xFFFF
SUFFIX_MAX = 255
TOTAL_MAX = XATTR_HEADER_SIZE + 4 * 0xFFFE
"""`i_xattr_icount` has 16 bits."""


class XattrUnsupported(NydusError):
    """An extended attribute that the format cannot hold."""

    message = "{path}: extended attribute {name!r} cannot be stored: {why}"
    exit_code: ClassVar[int] = 12


def pack_xattrs(xattrs: Mapping[bytes, bytes], path: str) -> bytes:
    """The bytes behind an inode, b"" for none; sorted by name, so that the same set gives the same bytes.

    Raises `XattrUnsupported`, which names `path`, for a prefix without a number or sizes past the limits.
    """
    if not xattrs:
        return b""
    out = bytearray(XATTR_HEADER_SIZE)
    for name in sorted(xattrs):
        value = xattrs[name]
        index, suffix = _split(name, path)
        if len(suffix) > SUFFIX_MAX or len(value) > VALUE_MAX:
            raise XattrUnsupported(
                path=path, name=name, why=f"value of {len(value)} bytes, the limit is {VALUE_MAX}"
            )
        out += ENTRY.pack(len(suffix), index, len(value)) + suffix + value
        out += bytes(-len(out) % 4)
    if len(out) > TOTAL_MAX:
        raise XattrUnsupported(
            path=path, name=max(xattrs), why=f"all together {len(out)} bytes, the limit is {TOTAL_MAX}"
        )
    return bytes(out)


def unpack_xattrs(data: Buffer, offset_bytes: int, size_bytes: int) -> dict[bytes, bytes]:
    """Attributes by full name in `size_bytes` at `offset_bytes`; raises `FormatError` for misfits."""
    if size_bytes == 0:
        return {}
    record = "xattrs"
    head = take(data, offset_bytes, XATTR_HEADER_SIZE, record)
    expect(head[4] == 0, record, offset_bytes + 4, f"no shared xattrs, found {head[4]}")
    take(data, offset_bytes, size_bytes, record)
    found: dict[bytes, bytes] = {}
    at, end = offset_bytes + XATTR_HEADER_SIZE, offset_bytes + size_bytes
    while at < end:
        length, index, value_size = ENTRY.unpack(take(data, at, ENTRY.size, record))
        if index not in _PREFIX_BY_INDEX:
            raise FormatError(record, at + 1, f"a known name prefix, found number {index}")
        value_at = at + ENTRY.size + length
        if value_at + value_size > end:
            raise FormatError(
                record, at, f"an attribute before byte {end}, found one to {value_at + value_size}"
            )
        name = _PREFIX_BY_INDEX[index] + bytes(data[at + ENTRY.size : value_at])
        if name in found:
            raise FormatError(record, at, f"each attribute once, found {name!r} again")
        found[name] = bytes(data[value_at : value_at + value_size])
        at = offset_bytes + round_up(value_at + value_size - offset_bytes, 4)
    return found


def xattr_icount(packed_size: int) -> int:
    """`i_xattr_icount` for that many bytes of packed attributes."""
    return (packed_size - XATTR_HEADER_SIZE) // 4 + 1 if packed_size else 0


def is_storable(name: bytes) -> bool:
    """Whether the name has one of the prefixes that the format numbers."""
    return any(name.startswith(prefix) for _, prefix in PREFIXES)


def _split(name: bytes, path: str) -> tuple[int, bytes]:
    for index, prefix in PREFIXES:
        if name.startswith(prefix):
            return index, name[len(prefix) :]
    raise XattrUnsupported(path=path, name=name, why="its prefix has no number in the format")

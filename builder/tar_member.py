"""A member's header as the attributes of an inode."""

import base64
import os
import re
import stat
import tarfile
import urllib.parse

from builder.tar_acl import acl_xattrs
from rafs.inode_table import Attributes
from rafs.xattr import is_storable

KINDS = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.AREGTYPE: stat.S_IFREG,
    tarfile.CONTTYPE: stat.S_IFREG,
    tarfile.GNUTYPE_SPARSE: stat.S_IFREG,
    tarfile.LNKTYPE: stat.S_IFREG,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}
_PAX_XATTR = "SCHILY.xattr."
"""In these names GNU tar writes `=` as `%3D` and `%` as `%25`; others leave both out."""
_LIBARCHIVE_XATTR = "LIBARCHIVE.xattr."
_DECIMAL = re.compile(r"-?(\d+\.?\d*|\.\d+)", re.ASCII)
_SYMLINK_MAX = 4095


def read_attributes(member: tarfile.TarInfo) -> Attributes:
    """Raises `ValueError` or `OverflowError` for what an inode cannot hold. Its type is one of `KINDS`."""
    kind = KINDS[member.type]
    seconds, nanoseconds = _mtime(member)
    return Attributes(
        kind | member.mode & 0o7777,
        _limited(member.uid, 1 << 32, "owner"),
        _limited(member.gid, 1 << 32, "group"),
        _limited(member.size, 1 << 63, "size") if kind == stat.S_IFREG else 0,
        seconds,
        nanoseconds,
        _device(member) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0,
    )


def read_target(member: tarfile.TarInfo) -> bytes:
    """Target of a symbolic link; raises `ValueError` for one that cannot be."""
    target = os.fsencode(member.linkname)
    if not 0 < len(target) <= _SYMLINK_MAX or b"\0" in target:
        raise ValueError(f"a link target of {len(target)} bytes")
    return target


def read_xattrs(member: tarfile.TarInfo) -> dict[bytes, bytes]:
    """Extended attributes that an image can hold, by full name; raises `ValueError` for broken ones."""
    found: dict[bytes, bytes] = {}
    for key, value in member.pax_headers.items():
        if key.startswith(_PAX_XATTR):
            name = os.fsencode(key[len(_PAX_XATTR) :].replace("%3D", "=").replace("%25", "%"))
            content = value.encode("utf-8", "surrogateescape")
        elif key.startswith(_LIBARCHIVE_XATTR):
            name = urllib.parse.unquote_to_bytes(key[len(_LIBARCHIVE_XATTR) :])
            content = base64.b64decode(value + "==")
        else:
            continue
        if is_storable(name):
            found.setdefault(name, content)
    for name, content in acl_xattrs(member.pax_headers):
        found.setdefault(name, content)
    return found


def _mtime(member: tarfile.TarInfo) -> tuple[int, int]:
    """Seconds and nanoseconds. The decimal text of a PAX header is exact, the float made of it is not."""
    text = member.pax_headers.get("mtime")
    if text is None:
        return _seconds(int(member.mtime)), 0
    if not _DECIMAL.fullmatch(text):
        raise ValueError(f"time {text!r}")
    whole, _, fraction = text.partition(".")
    nanoseconds = int((fraction + "000000000")[:9])
    seconds = int(whole) if whole not in ("", "-") else 0
    if text.startswith("-") and nanoseconds:
        return _seconds(seconds - 1), 1_000_000_000 - nanoseconds
    return _seconds(seconds), nanoseconds


def _seconds(seconds: int) -> int:
    if not -(1 << 63) <= seconds < 1 << 63:
        raise ValueError(f"time {seconds}")
    return seconds


def _limited(value: int, limit: int, what: str) -> int:
    if not 0 <= value < limit:
        raise ValueError(f"{what} {value}")
    return value


def _device(member: tarfile.TarInfo) -> int:
    """Limits are those of the 12 and 20 bits that the kernel and RAFS have."""
    return os.makedev(
        _limited(member.devmajor, 1 << 12, "device major"), _limited(member.devminor, 1 << 20, "device minor")
    )

"""Access control lists as text, the form they have in archives, in the binary form of extended attributes."""

import grp
import pwd
import struct
from collections.abc import Iterator, Mapping

_HEADER = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")
_NO_ID = 0xFFFF_FFFF
# Tags by kind, for the owner, the owning group and the rest, and for a named user or group.
_TAGS = {"user": (0x01, 0x02), "group": (0x04, 0x08), "mask": (0x10, 0x10), "other": (0x20, 0x20)}
_BITS = {"r": 4, "w": 2, "x": 1, "-": 0}
_MINIMAL = 3
"""An access list of this many entries says what the mode says, and the kernel stores none."""

_RECORDS = (
    ("SCHILY.acl.access", b"system.posix_acl_access"),
    ("SCHILY.acl.default", b"system.posix_acl_default"),
)


def acl_xattrs(headers: Mapping[str, str]) -> Iterator[tuple[bytes, bytes]]:
    """Names and values of the attributes for the lists in the records of a member.

    Users and groups are looked up on this host where the list has names only. Raises `ValueError` for a list
    that cannot be read and for names that are unknown here.
    """
    for key, name in _RECORDS:
        if key not in headers:
            continue
        entries = sorted(_entries(headers[key]))
        if entries and (len(entries) > _MINIMAL or key.endswith("default")):
            yield name, _HEADER + b"".join(_ENTRY.pack(*entry) for entry in entries)


def _entries(text: str) -> Iterator[tuple[int, int, int]]:
    for line in text.replace(",", "\n").splitlines():
        entry = line.partition("#")[0].strip().removeprefix("default:")
        if not entry:
            continue
        kind, *fields = entry.split(":")
        if (
            kind not in _TAGS
            or len(fields) not in (2, 3)
            or len(fields[1]) != 3
            or set(fields[1]) - set(_BITS)
        ):
            raise ValueError(f"access control entry {entry!r}")
        name, permissions, *number = fields
        bits = sum(_BITS[letter] for letter in permissions)
        yield _TAGS[kind][bool(name)], bits, _number(kind, name, number) if name else _NO_ID


def _number(kind: str, name: str, number: list[str]) -> int:
    """`star` writes the number behind the permissions; GNU tar writes it for a name when that has none."""
    text = number[0] if number else name
    if text.isascii() and text.isdigit():
        found = int(text)
    else:
        try:
            found = pwd.getpwnam(name).pw_uid if kind == "user" else grp.getgrnam(name).gr_gid
        except KeyError:
            raise ValueError(f"access control entry of {kind} {name!r}, who is unknown here") from None
    if found >= _NO_ID:
        raise ValueError(f"access control entry of {kind} {found}")
    return found

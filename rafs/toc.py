"""The table of contents at the end of a blob, and the tar headers that follow each section."""

import enum
import struct
from dataclasses import dataclass
from typing import ClassVar, Self

from rafs.record import Buffer, FormatError, expect, take

TAR_HEADER_SIZE = 512
TOC_NAME = "rafs.blob.toc"
TAIL_MAX = 4096
"""How many bytes of a blob's end hold any table of contents."""
ENTRY_NAMES = ("image.blob", "blob.meta", "blob.meta.header", "blob.digest", "image.boot")


class TocFlags(enum.IntFlag, boundary=enum.KEEP):
    """How a section is stored."""

    NONE = 0x1
    ZSTD = 0x2
    LZ4_BLOCK = 0x4


@dataclass(frozen=True, slots=True)
class TocEntry:
    """One section of a blob. Offset and sizes in bytes, `digest` is SHA-256 of the decoded content."""

    flags: TocFlags
    name: str
    digest: bytes
    offset: int
    compressed_size: int
    uncompressed_size: int

    SIZE: ClassVar[int] = 128
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<II16s32sQQQ48s")

    def pack(self) -> bytes:
        """The 128 bytes."""
        return self.LAYOUT.pack(
            self.flags,
            0,
            self.name.encode(),
            self.digest,
            self.offset,
            self.compressed_size,
            self.uncompressed_size,
            bytes(48),
        )

    @classmethod
    def unpack(cls, raw: Buffer, offset_bytes: int) -> Self:
        """Reads the 128 bytes that stand at `offset_bytes`."""
        flags, _, name, digest, offset, csize, usize, _ = cls.LAYOUT.unpack(
            take(raw, 0, cls.SIZE, "ToC entry")
        )
        text = name.rstrip(b"\0").decode("ascii", "replace")
        expect(
            text in ENTRY_NAMES,
            "ToC entry",
            offset_bytes + 8,
            f"one of {', '.join(ENTRY_NAMES)}, found {text!r}",
        )
        return cls(TocFlags(flags), text, digest, offset, csize, usize)


assert TocEntry.LAYOUT.size == TocEntry.SIZE


def pack_tar_header(name: str, size_bytes: int) -> bytes:
    """The 512-byte GNU tar header that stands behind a section of that name and size."""
    head = bytearray(TAR_HEADER_SIZE)
    head[0 : len(name)] = name.encode()
    head[100:108] = head[108:116] = head[116:124] = b"0000000\0"
    head[124:136] = f"{size_bytes:011o}\0".encode()
    head[136:148] = b"00000000000\0"
    head[148:156] = b" " * 8
    head[156:157] = b"0"
    head[257:265] = b"ustar  \0"
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    return bytes(head)


def read_tar_header(raw: Buffer, offset_bytes: int) -> tuple[str, int]:
    """Name and size in bytes of the section before this header, which stands at `offset_bytes`."""
    record = "section header"
    head = bytes(take(raw, 0, TAR_HEADER_SIZE, record))
    try:
        size = int(head[124:136].split(b"\0")[0].strip() or b"0", 8)
        stored = int(head[148:156].split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise FormatError(record, offset_bytes, "a tar header with octal numbers") from None
    actual = sum(head[:148]) + 8 * 32 + sum(head[156:])
    expect(stored == actual, record, offset_bytes + 148, f"header checksum {actual:#o}, found {stored:#o}")
    return head[:100].split(b"\0")[0].decode("ascii", "replace"), size


def read_toc(tail: Buffer, tail_offset_bytes: int) -> tuple[TocEntry, ...]:
    """Entries of the table at the end of `tail`, the last 4096 bytes of a blob, from `tail_offset_bytes`."""
    at = len(tail) - TAR_HEADER_SIZE
    name, size = read_tar_header(take(tail, at, TAR_HEADER_SIZE, "ToC"), tail_offset_bytes + at)
    expect(name == TOC_NAME, "ToC", tail_offset_bytes + at, f"a section named {TOC_NAME}, found {name!r}")
    expect(
        size % TocEntry.SIZE == 0,
        "ToC",
        tail_offset_bytes + at + 124,
        f"whole 128-byte entries, found {size} bytes",
    )
    entries = take(tail, at - size, size, "ToC")
    start = tail_offset_bytes + at - size
    return tuple(
        TocEntry.unpack(entries[i : i + TocEntry.SIZE], start + i) for i in range(0, size, TocEntry.SIZE)
    )

"""Tables of contents: the bytes of the format page, and tails that hold none."""

import hashlib
import tarfile

import pytest

from rafs.record import FormatError
from rafs.toc import TocEntry, TocFlags, pack_tar_header, read_tar_header, read_toc
from tests.golden import golden

ENTRY = TocEntry(TocFlags.ZSTD, "image.boot", hashlib.sha256(b"boot").digest(), 7997, 501, 20480)


def test_entry_of_the_format_page() -> None:
    assert ENTRY.pack() == golden("toc-entry")
    assert TocEntry.unpack(golden("toc-entry"), 0) == ENTRY


def test_section_headers_are_those_of_tar() -> None:
    header = pack_tar_header("blob.meta.header", 4096)
    info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    assert (info.name, info.size, info.isreg()) == ("blob.meta.header", 4096, True)
    assert read_tar_header(header, 0) == ("blob.meta.header", 4096)


def test_table_at_the_end() -> None:
    tail = b"x" * 100 + ENTRY.pack() * 2 + pack_tar_header("rafs.blob.toc", 256)
    assert read_toc(tail, 5000) == (ENTRY, ENTRY)


@pytest.mark.parametrize(
    ("tail", "expectation"),
    [
        (b"", "needs 512 bytes"),
        (bytes(512), "header checksum"),
        (pack_tar_header("image.boot", 128), "section named rafs.blob.toc"),
        (pack_tar_header("rafs.blob.toc", 100), "whole 128-byte entries"),
        (pack_tar_header("rafs.blob.toc", 128), "needs 128 bytes"),
        (bytes(128) + pack_tar_header("rafs.blob.toc", 128), "one of image.blob"),
        (b"\xff" * 512, "octal"),
    ],
)
def test_tails_without_a_table(tail: bytes, expectation: str) -> None:
    with pytest.raises(FormatError, match=expectation):
        read_toc(tail, 0)

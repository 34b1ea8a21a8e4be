"""Reads a table of contents from the end of a blob."""

from rafs.toc import TocEntry, TocFlags, pack_tar_header, read_tar_header, read_toc
from tests.hostile import value_or_error


def _toc(*names: str) -> bytes:
    entries = b"".join(TocEntry(TocFlags.ZSTD, name, bytes(32), 0, 7, 9).pack() for name in names)
    return entries + pack_tar_header("rafs.blob.toc", len(entries))


SEEDS = (_toc(), _toc("image.blob"), _toc("image.blob", "blob.meta", "blob.meta.header", "image.boot"))


def exercise(data: bytes) -> None:
    """Only errors of this project may come up."""
    with value_or_error():
        for entry in read_toc(data, 0):
            assert TocEntry.unpack(entry.pack(), 0) == entry
    with value_or_error():
        _, size = read_tar_header(data, 0)
        assert size >= 0


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_toc")

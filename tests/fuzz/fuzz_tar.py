"""Reads a tar archive as a build does, with a sink in place of the pipeline that encodes its content.

The input is read as it is, and with the checksum of its first header put right.
"""

import gzip
import io
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import zstandard

from builder.pipeline import ChunkPipeline
from builder.prefetch_patterns import PrefetchPatterns
from builder.tar_tree import InvalidArchive, TarTree
from builder.tarball import TarSource
from tests.hostile import value_or_error

_CONTENT_MAX = 1 << 20
_CHECKSUM = slice(148, 156)


def _archive(tar_format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for name, kind in (("d/f", tarfile.REGTYPE), ("d", tarfile.DIRTYPE), ("l" * 120, tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "d/f" if kind == tarfile.SYMTYPE else ""
            member.size = 700 if kind == tarfile.REGTYPE else 0
            if tar_format == tarfile.PAX_FORMAT:
                member.pax_headers = {"SCHILY.xattr.user.a": "1", "mtime": "1.5"}
            archive.addfile(member, io.BytesIO(b"x" * 700))
    return buffer.getvalue()[: 512 * 16]


SEEDS = (
    _archive(tarfile.PAX_FORMAT),
    _archive(tarfile.GNU_FORMAT),
    gzip.compress(_archive(tarfile.GNU_FORMAT), mtime=0),
    zstandard.compress(_archive(tarfile.GNU_FORMAT)),
)


class _Sink:
    """What `TarSource` needs of a pipeline; content beyond a limit ends the archive: holes cost nothing."""

    def __init__(self) -> None:
        self._left = _CONTENT_MAX

    def reserve(self, size: int) -> int:
        return 0

    def ranges(self, size: int, first_address: int) -> Iterator[tuple[int, memoryview]]:
        for offset in range(0, size, 4096):
            self._left -= 4096
            if self._left < 0:
                raise InvalidArchive(archive="fuzz", why="more content than this test reads")
            yield offset, memoryview(bytearray(min(4096, size - offset)))


def exercise(data: bytes) -> None:
    """Only errors of this project may come up."""
    with tempfile.TemporaryDirectory() as folder:
        for content in (data, _with_checksum(data)):
            path = Path(folder) / "a.tar"
            path.write_bytes(content)
            source = TarSource(path, Path(folder) / "spool")
            with value_or_error(), TarTree("fuzz", Path(folder) / "tree") as tree:
                table, _ = source.read(cast(ChunkPipeline, _Sink()), tree, PrefetchPatterns(()))
                assert all(table.path(row).startswith(b"/") for row in range(len(table)))


def _with_checksum(data: bytes) -> bytes:
    """`data` with the checksum of its first header put right (summed with blanks in its place)."""
    header = bytearray(data[:512].ljust(512, b"\0"))
    header[_CHECKSUM] = b" " * 8
    header[_CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_tar")

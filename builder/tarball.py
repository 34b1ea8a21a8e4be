"""A tar stream as a source, packed or not, from a file or from standard input."""

import contextlib
import os
import shutil
import stat
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tarfile import (  # type: ignore[attr-defined]
    EmptyHeaderError,
    EOFHeaderError,
    HeaderError,
    ReadError,
)
from typing import IO, BinaryIO, Self, cast

import zstandard
from isal import isal_zlib

from backend.bounded_member import BoundedMember
from builder.content_digest import ContentDigest, DigestedStream
from builder.pipeline import ChunkPipeline
from builder.prefetch_patterns import PrefetchPatterns
from builder.tar_tree import InvalidArchive, TarTree
from builder.unpacked_stream import READ_AHEAD, open_unpacked
from builder.worker import SourceChanged, SourceUnreadable
from rafs.inode_table import InodeTable

STANDARD_INPUT = "-"
IsalError: type[Exception] = isal_zlib.error  # type: ignore[assignment]
_BROKEN: tuple[type[Exception], ...] = (
    tarfile.TarError,
    EOFError,
    zlib.error,
    IsalError,
    zstandard.ZstdError,
    OSError,
    # What the tarfile module lets through where a header's text is no number.
    ValueError,
    ArithmeticError,
    LookupError,
)
_BEHIND_MAX = 64 << 20
"""Bytes behind the end mark, where tar programs leave zeros up to the end of a record."""


class _StrictMember(BoundedMember):
    """A member of an archive that must be sound to its end mark.

    `TarFile.next` takes a broken or missing header behind the first one for the end of the archive, and half
    an archive would look complete.
    """

    _ends_anywhere = False

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except EmptyHeaderError as error:
            if cls._ends_anywhere:
                raise EOFHeaderError("the end, without a mark") from error
            raise ReadError("it ends without an end mark") from error
        except HeaderError as error:
            raise ReadError(str(error)) from error


class _LayerMember(_StrictMember):
    """A member of a layer, whose digest says whether it is whole: it may end behind any member.

    So containerd, umoci and docker read layers, by Go's archive/tar.
    """

    _ends_anywhere = True


def members_of(
    stream: IO[bytes], name: str, *, is_layer: bool = False
) -> Iterator[tuple[tarfile.TarFile, int, tarfile.TarInfo]]:
    """Every member of a tar stream with its number; whatever the archive raises becomes `InvalidArchive`.

    The stream is read to its end: for the checksum there, and so that a pipe is not cut. A layer of a
    container image needs no end mark.
    """
    kind = _LayerMember if is_layer else _StrictMember
    try:
        with tarfile.open(
            fileobj=stream, mode="r|", encoding="utf-8", errors="surrogateescape", tarinfo=kind
        ) as archive:
            number = 0
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # they would all be kept otherwise
                yield archive, number, member
                number += 1
            if cast("BinaryIO", archive.fileobj).read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise InvalidArchive(archive=name, why="only one block of zeros, and members behind it")
            left = _BEHIND_MAX
            while data := stream.read(READ_AHEAD):
                left -= len(data)
                if left < 0:
                    why = f"more than {_BEHIND_MAX} bytes behind its end mark"
                    raise InvalidArchive(archive=name, why=why)
    except _BROKEN as error:
        raise InvalidArchive(archive=name, why=f"not a readable tar archive ({error})") from error


@dataclass(slots=True)
class TarSource:
    """An archive, and where to keep a copy of standard input when it has to be read more than once.

    With `digest` it is a layer, and what is read of its tar goes there.
    """

    path: Path
    spool: Path
    label: str = ""
    digest: ContentDigest | None = None
    _is_kept: bool = False
    _stamp: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return self.label or ("standard input" if self._is_standard_input else str(self.path))

    def read(
        self, pipeline: ChunkPipeline, tree: TarTree, patterns: PrefetchPatterns
    ) -> tuple[InodeTable, list[int]]:
        """Feeds all content to the pipeline; returns the table of the tree and its rows to be prefetched.

        With patterns the archive is read three times: for the names, for hot content, for the rest, so that
        hot content comes first in the blob. Raises `InvalidArchive`, `SourceUnreadable`, `SourceChanged`.
        """
        if not patterns:
            for archive, _, member in self._members():
                tree.add(member, pipeline.reserve(0))
                if member.isreg():
                    _feed(pipeline, archive, member, self.name)
            return tree.table(), []
        self._keep_stream()
        for archive, _, member in self._members():
            tree.add(member)
            skip_content(archive, member, self.name)
        table = tree.table()
        hot = patterns.select(table)
        is_hot = bytearray(len(table))
        for row in hot:
            is_hot[row] = True
        for wanted in (True, False):
            for archive, number, member in self._members():
                row = tree.row_of_member(number)
                if member.isreg() and is_hot[row] == wanted:
                    first_address = _feed(pipeline, archive, member, self.name)
                    if row:
                        table.chunk_start[row] = first_address
                else:
                    skip_content(archive, member, self.name)
        self.spool.unlink(missing_ok=True)
        return table, hot

    @property
    def _is_standard_input(self) -> bool:
        return str(self.path) == STANDARD_INPUT

    def _keep_stream(self) -> None:
        """Copies what can be read only once: standard input, or a pipe that has a name."""
        if not self._is_standard_input and self.path.is_file():
            return
        with contextlib.ExitStack() as stack, self.spool.open("wb") as file:
            shutil.copyfileobj(self._open_raw(stack), file, READ_AHEAD)
        self._is_kept = True

    def _members(self) -> Iterator[tuple[tarfile.TarFile, int, tarfile.TarInfo]]:
        """Every member with its number. Raises `InvalidArchive`."""
        with contextlib.ExitStack() as stack:
            stream = open_unpacked(self._open_raw(stack), stack)
            if self.digest is not None:
                stream = cast("IO[bytes]", DigestedStream(stream, self.digest))
            yield from members_of(stream, self.name, is_layer=self.digest is not None)

    def _open_raw(self, stack: contextlib.ExitStack) -> BinaryIO:
        if self._is_standard_input and not self._is_kept:
            return sys.stdin.buffer
        path = self.spool if self._is_kept else self.path
        try:
            raw = stack.enter_context(path.open("rb", buffering=READ_AHEAD))
        except OSError as error:
            raise SourceUnreadable(path=path, why=error.strerror) from error
        self._expect_unchanged(os.fstat(raw.fileno()))
        stack.callback(lambda: self._expect_unchanged(os.fstat(raw.fileno())))
        return raw

    def _expect_unchanged(self, status: os.stat_result) -> None:
        """The archive is the same file before and behind each reading; raises `SourceChanged`."""
        stamp = (status.st_size, status.st_mtime_ns)
        if self._stamp is None and stat.S_ISREG(status.st_mode) and not self._is_kept:
            self._stamp = stamp
        if self._stamp not in (None, stamp):
            raise SourceChanged(path=self.path)


def _feed(pipeline: ChunkPipeline, archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> int:
    """Copies a member's content into the arena, piece by piece; returns the number of its first address."""
    first_address = pipeline.reserve(0)
    content = archive.extractfile(member)
    if content is None:
        return first_address
    for offset, view in pipeline.ranges(member.size, first_address):
        pipeline.reserve(len(view))  # bit by bit, because the size is what somebody wrote into a header
        try:
            filled = _read_into(content, view)
        except _BROKEN as error:
            raise InvalidArchive(archive=name, why=f"{member.name!r} cannot be read ({error})") from error
        if filled != len(view):
            raise InvalidArchive(
                archive=name, why=f"it ends inside {member.name!r} at byte {offset + filled}"
            )
    return first_address


def skip_content(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> None:
    """Reads over a member's content. Left to itself, tarfile goes on for as long as the header promises,
    also when the archive has ended.
    """
    stream = cast("BinaryIO", archive.fileobj)
    while (left := archive.offset - stream.tell()) > 0:
        try:
            data = stream.read(min(left, READ_AHEAD))
        except _BROKEN as error:
            raise InvalidArchive(archive=name, why=f"{member.name!r} cannot be read ({error})") from error
        if not data:
            raise InvalidArchive(archive=name, why=f"it ends inside {member.name!r}")


def _read_into(content: IO[bytes], view: memoryview) -> int:
    filled = 0
    while filled < len(view):
        data = content.read(min(len(view) - filled, READ_AHEAD))
        if not data:
            break
        view[filled : filled + len(data)] = data
        filled += len(data)
    return filled

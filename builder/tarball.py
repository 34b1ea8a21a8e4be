"""A tar stream as a source: plain, gzip or zstd, from a file or from standard input."""

import contextlib
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

import zstandard
from isal import igzip, isal_zlib

from builder.pipeline import ChunkPipeline
from builder.tar_tree import InvalidArchive, TarNode, TarTree
from builder.worker import SourceUnreadable

STANDARD_INPUT = "-"
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18")
_READ_AHEAD = 1 << 20
IsalError: type[Exception] = isal_zlib.error  # type: ignore[assignment]
_BROKEN: tuple[type[Exception], ...] = (
    tarfile.TarError,
    EOFError,
    zlib.error,
    IsalError,
    zstandard.ZstdError,
    OSError,
)


@dataclass(slots=True)
class TarSource:
    """An archive, and where to keep a copy of standard input when it has to be read more than once."""

    path: Path
    spool: Path

    @property
    def name(self) -> str:
        """For messages."""
        return "standard input" if self._is_stream else str(self.path)

    def read(self, pipeline: ChunkPipeline, is_hot: Callable[[bytes], bool] | None) -> TarTree:
        """Feeds all content to the pipeline and returns the tree.

        With `is_hot` (of absolute paths) the archive is read three times: for the names, for hot content, for
        the rest, so that hot content comes first in the blob. Raises `InvalidArchive`, `SourceUnreadable`.
        """
        tree = TarTree(self.name)
        if is_hot is None:
            for archive, _, member in self._members():
                node = tree.add(member)
                if member.isreg():
                    _feed(pipeline, archive, member, node, self.name)
            return tree
        if self._is_stream:
            self._keep_stream()
        nodes: dict[int, tuple[TarNode, bool]] = {}
        for _, number, member in self._members():
            node = tree.add(member)
            if member.isreg():
                path = b"/" + member.name.strip("/").removeprefix("./").encode("utf-8", "surrogateescape")
                nodes[number] = (node, is_hot(path))
        for wanted in (True, False):
            for archive, number, member in self._members():
                if number in nodes and nodes[number][1] is wanted:
                    _feed(pipeline, archive, member, nodes[number][0], self.name)
        return tree

    @property
    def _is_stream(self) -> bool:
        return str(self.path) == STANDARD_INPUT

    def _keep_stream(self) -> None:
        with self.spool.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, _READ_AHEAD)
        self.path = self.spool

    def _members(self) -> Iterator[tuple[tarfile.TarFile, int, tarfile.TarInfo]]:
        """Every member with its number. What the archive itself raises becomes `InvalidArchive`."""
        with contextlib.ExitStack() as stack:
            stream = self._open(stack)
            try:
                archive = stack.enter_context(
                    tarfile.open(fileobj=stream, mode="r|", encoding="utf-8", errors="surrogateescape")
                )
                number = 0
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # they would all be kept otherwise
                    yield archive, number, member
                    number += 1
            except _BROKEN as error:
                raise InvalidArchive(
                    archive=self.name, why=f"not a readable tar archive ({error})"
                ) from error

    def _open(self, stack: contextlib.ExitStack) -> IO[bytes]:
        raw: BinaryIO
        if self._is_stream:
            raw = sys.stdin.buffer
        else:
            try:
                raw = stack.enter_context(self.path.open("rb", buffering=_READ_AHEAD))
            except OSError as error:
                raise SourceUnreadable(path=self.path, why=error.strerror) from error
        magic = raw.peek(4)[:4]  # type: ignore[attr-defined]
        if magic.startswith(_GZIP_MAGIC):
            inflating = igzip.IGzipFile(fileobj=raw, mode="rb")  # type: ignore[no-untyped-call]
            stack.callback(inflating.close)
            return cast("IO[bytes]", inflating)
        if magic in _ZSTD_MAGICS:
            decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
            return stack.enter_context(
                decompressor.stream_reader(raw, read_size=_READ_AHEAD, read_across_frames=True, closefd=False)
            )
        return raw


def _feed(
    pipeline: ChunkPipeline, archive: tarfile.TarFile, member: tarfile.TarInfo, node: TarNode, name: str
) -> None:
    """Copies a member's content into the arena, piece by piece."""
    size = member.size
    node.first_address = pipeline.reserve(size)
    content = archive.extractfile(member)
    if content is None:
        return
    for offset, view in pipeline.ranges(size, node.first_address):
        try:
            filled = _read_into(content, view)
        except _BROKEN as error:
            raise InvalidArchive(archive=name, why=f"{member.name!r} cannot be read ({error})") from error
        if filled != len(view):
            raise InvalidArchive(
                archive=name, why=f"it ends inside {member.name!r} at byte {offset + filled}"
            )


def _read_into(content: IO[bytes], view: memoryview) -> int:
    filled = 0
    while filled < len(view):
        data = content.read(min(len(view) - filled, _READ_AHEAD))
        if not data:
            break
        view[filled : filled + len(data)] = data
        filled += len(data)
    return filled

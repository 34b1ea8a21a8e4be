"""A tree as the one layer of an ordinary container image: a tar stream, compressed into a file that grows.

Concurrency: bytes are taken in the trio thread and digested, compressed and written in another one, in
`settle`; what is waiting for that is bounded. The file can be read while it grows.
"""

import enum
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Protocol

import trio
import zstandard
from isal import isal_zlib

from backend.growing import GrowingFile
from backend.manifest import LAYER_GZIP, LAYER_TAR, LAYER_ZSTD
from backend.publishing import reporting_writes
from backend.upload import ContentIdentity
from builder.layer_marks import WHITEOUT_PREFIX, is_whiteout
from builder.unpack import CannotUnpack
from builder.unpack_tar import TarTarget
from rafs.inode import Inode

GZIP_LEVEL = 2
ZSTD_LEVEL = 3
PIECE_BYTES = 1 << 20
"""What the compressor gets at once: isal's output depends on how its input is cut."""
WAITING_BYTES_MAX = 32 << 20
"""More than one chunk of the largest size; reached by runs of members without content only."""
_GZIP_WRAPPER = 31


class LayerCompression(enum.StrEnum):
    """How a layer is packed."""

    GZIP = "gzip"
    ZSTD = "zstd"
    NONE = "none"

    @property
    def media_type(self) -> str:
        """That of a layer which is packed so."""
        return {self.GZIP: LAYER_GZIP, self.ZSTD: LAYER_ZSTD, self.NONE: LAYER_TAR}[self]


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _Plain:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def _compressor(compression: LayerCompression) -> _Compressor:
    """One whose output depends on the pieces of its input and the library's version alone."""
    if compression is LayerCompression.GZIP:
        gzip: _Compressor = isal_zlib.compressobj(GZIP_LEVEL, wbits=_GZIP_WRAPPER)
        return gzip
    if compression is LayerCompression.ZSTD:
        return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compressobj()
    return _Plain()


class LayerFile:
    """The file of a layer; plain bytes are written to it. `growing` gives its bytes while it grows."""

    def __init__(self, path: Path, compression: LayerCompression) -> None:
        """Makes the file. Raises `CannotWrite`."""
        self.growing = GrowingFile(path)
        self.size_bytes = self.plain_bytes = 0
        self._path = path
        self._compressor = _compressor(compression)
        self._plain, self._packed = hashlib.sha256(), hashlib.sha256()
        self._waiting = bytearray()
        with reporting_writes(path):
            self._file: IO[bytes] = path.open("xb", buffering=0)

    @property
    def diff_id(self) -> str:
        """The digest of the plain bytes."""
        return f"sha256:{self._plain.hexdigest()}"

    def write(self, data: bytes, /) -> None:
        """Takes plain bytes. Raises `CannotWrite`."""
        self._waiting += data
        if len(self._waiting) > WAITING_BYTES_MAX:
            self._pack_pieces()
            self.growing.advance(self.size_bytes)

    def flush(self) -> None:
        """Nothing to do: `settle` and `finish` hand on what waits."""

    async def settle(self) -> None:
        """Packs what waits, in a thread, but for the last part of a piece. Raises `CannotWrite`."""
        if len(self._waiting) >= PIECE_BYTES:
            await trio.to_thread.run_sync(self._pack_pieces)
            self.growing.advance(self.size_bytes)

    def finish(self) -> ContentIdentity:
        """Writes the end; what the file is now. Raises `CannotWrite`."""
        self._pack_pieces()
        self._pack(bytes(self._waiting))
        self._append(self._compressor.flush())
        self._file.close()
        identity = ContentIdentity(f"sha256:{self._packed.hexdigest()}", self.size_bytes)
        self.growing.finish(identity)
        return identity

    def close(self) -> None:
        """Closes the file. Twice is harmless."""
        self._file.close()

    def _pack_pieces(self) -> None:
        waiting, whole = self._waiting, len(self._waiting) // PIECE_BYTES * PIECE_BYTES
        with memoryview(waiting) as view:
            for at in range(0, whole, PIECE_BYTES):
                self._pack(bytes(view[at : at + PIECE_BYTES]))
        del waiting[:whole]

    def _pack(self, piece: bytes) -> None:
        self._plain.update(piece)
        self.plain_bytes += len(piece)
        self._append(self._compressor.compress(piece))

    def _append(self, packed: bytes) -> None:
        self._packed.update(packed)
        view = memoryview(packed)
        with reporting_writes(self._path):
            while view:
                view = view[self._file.write(view) :]
        self.size_bytes += len(packed)


class SettledChunks:
    """Passes chunks on; before each, what was made of those before it has been packed."""

    def __init__(self, chunks: AsyncIterator[bytes], layer: LayerFile) -> None:
        self._chunks = chunks
        self._layer = layer

    def __aiter__(self) -> "SettledChunks":
        return self

    async def __anext__(self) -> bytes:
        await self._layer.settle()
        return await anext(self._chunks)


class LayerTar(TarTarget):
    """A tar stream that is a layer: what would be a whiteout in it is refused."""

    def add(self, path: bytes, inode: Inode, xattrs: dict[bytes, bytes], symlink: bytes) -> None:
        """See `TarTarget`."""
        _expect_no_whiteout(path, inode)
        super().add(path, inode, xattrs, symlink)

    def add_link(self, path: bytes, inode: Inode, target: bytes) -> None:
        """See `TarTarget`."""
        _expect_no_whiteout(path, inode)
        super().add_link(path, inode, target)

    def begin_file(self, path: bytes, inode: Inode, xattrs: dict[bytes, bytes]) -> None:
        """See `TarTarget`."""
        _expect_no_whiteout(path, inode)
        super().begin_file(path, inode, xattrs)


def _expect_no_whiteout(path: bytes, inode: Inode) -> None:
    if path.rpartition(b"/")[2].startswith(WHITEOUT_PREFIX):
        why = "in a container image its name means that something is deleted"
        raise CannotUnpack(path=os.fsdecode(path), why=why)
    if is_whiteout(inode.mode, inode.rdev):
        why = "it is a whiteout of overlayfs; merge the image with those below it first"
        raise CannotUnpack(path=os.fsdecode(path), why=why)

"""A layer's way from a store through a process of its own: verified, and never on disk as it was.

Concurrency: one task reads the layer, digests it and writes it to the process, one waits for what the process
says. The build counts only when the layer's digest was right, and the process is gone when this returns.
"""

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar

import trio

from backend.contract import BlobReader
from backend.manifest import Descriptor
from backend.ocidigest import DigestMismatch
from backend.pieces import first_failure, pump
from builder.build import BuiltImage
from builder.layer_process import LayerTask
from builder.pipeline import PipelineCounters
from rafs.errors import NydusError

BOMB_FROM_BYTES = 1 << 30
BOMB_RATIO = 2000
"""deflate shrinks by 1032 at most, zstd hardly more in what anybody has a use for."""
_PIPE_BYTES = 1 << 20
_START = "import sys; from builder.layer_process import main; main(sys.argv[1:])"


class LayerProcessDied(NydusError):
    """The process that built a layer ended without an answer."""

    message = "{label}: its build ended with status {status}; was it killed for lack of memory?"
    exit_code: ClassVar[int] = 60


class DecompressionBomb(NydusError):
    """A layer that grows beyond all measure when it is decompressed."""

    message = "{label}: a decompression bomb: {size_bytes} bytes have become more than {grown_bytes}"
    exit_code: ClassVar[int] = 61


@dataclass(slots=True)
class _Child:
    """The process: `connection` is its socket, `pipe` its standard input."""

    process: "subprocess.Popen[bytes]"
    connection: Connection
    pipe: trio.lowlevel.FdStream


async def build_layer(
    task: LayerTask,
    layer: Descriptor,
    reader: BlobReader,
    on_blob: Callable[[Path], None],
    on_progress: Callable[[PipelineCounters], None],
) -> BuiltImage:
    """Builds the layer that `reader` has. `on_blob` gets the path of the blob's file, which grows.

    Raises what `Build.run` raises, what the reader raises, `DigestMismatch`, `DecompressionBomb`,
    `LayerProcessDied`. What is in the work directory afterwards makes the next try cheaper.
    """
    feed = _Feed(task.label, layer)
    failure: NydusError | None = None
    result: BuiltImage | None = None
    async with _child(task) as child:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(feed.run, reader, child.pipe)
                async for answer in _answers(task.label, child):
                    if isinstance(answer, PipelineCounters):
                        feed.expect_no_bomb(answer)
                        on_progress(answer)
                    elif isinstance(answer, Path):
                        on_blob(answer)
                    elif isinstance(answer, BuiltImage):
                        result = answer
                    else:
                        # What the process says of bytes that are not the layer's does not count: go on
                        # feeding, so that it is known whether they are.
                        failure = answer
        except BaseExceptionGroup as group:
            raise first_failure(group) from None
    if failure is not None:
        raise failure
    assert result is not None
    return result


class _Feed:
    """The layer's bytes on their way into the process."""

    def __init__(self, label: str, layer: Descriptor) -> None:
        self._label = label
        self._layer = layer
        self._digest = hashlib.sha256()
        self._sent_bytes = 0
        self._is_open = True

    async def run(self, reader: BlobReader, pipe: trio.lowlevel.FdStream) -> None:
        """Sends everything and closes the pipe; raises `DigestMismatch` for wrong bytes."""

        async def take(piece: bytes) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, self._digest.update, piece)
                if self._is_open:
                    await self._send(pipe, piece)

        async with pipe:
            await pump(reader, self._layer.size_bytes, take)
            found = f"sha256:{self._digest.hexdigest()}"
            if found != self._layer.digest:
                raise DigestMismatch(where=self._label, expected=self._layer.digest, got=found)

    async def _send(self, pipe: trio.lowlevel.FdStream, piece: bytes) -> None:
        try:
            await pipe.send_all(piece)
            self._sent_bytes += len(piece)
        except trio.BrokenResourceError:  # the process has failed, and says why
            self._is_open = False

    def expect_no_bomb(self, counters: PipelineCounters) -> None:
        """Raises `DecompressionBomb` when far more has come out than went in."""
        if counters.bytes_in > BOMB_FROM_BYTES + BOMB_RATIO * self._sent_bytes:
            raise DecompressionBomb(
                label=self._label, size_bytes=self._sent_bytes, grown_bytes=counters.bytes_in
            )


async def _answers(
    label: str, child: _Child
) -> AsyncIterator[Path | PipelineCounters | BuiltImage | NydusError]:
    """The path of the blob, counters, and at last the result or the error."""
    while True:
        try:
            answer = await trio.to_thread.run_sync(child.connection.recv, abandon_on_cancel=True)
        except (EOFError, OSError) as error:
            status = await trio.to_thread.run_sync(child.process.wait)
            raise LayerProcessDied(label=label, status=status) from error
        yield answer
        if not isinstance(answer, Path | PipelineCounters):
            return


@asynccontextmanager
async def _child(task: LayerTask) -> AsyncIterator[_Child]:
    ours, theirs = socket.socketpair()
    connection = Connection(ours.detach())
    try:
        with theirs:
            process = await trio.to_thread.run_sync(_start, theirs.fileno())
    except BaseException:
        connection.close()
        raise
    assert process.stdin is not None
    pipe = trio.lowlevel.FdStream(os.dup(process.stdin.fileno()))
    process.stdin.close()
    child = _Child(process, connection, pipe)
    try:
        with suppress(BrokenPipeError, ConnectionResetError):  # it has died: the first answer says so
            connection.send(task)
        yield child
    except BaseException:
        process.kill()
        raise
    finally:
        with trio.CancelScope(shield=True):
            await pipe.aclose()
            await trio.to_thread.run_sync(process.wait)
        connection.close()


def _start(socket_number: int) -> "subprocess.Popen[bytes]":
    # -P: the current directory belongs to the user, no modules come from there.
    command = [sys.executable, "-P", "-c", _START, str(socket_number)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, pass_fds=(socket_number,), env=environment, pipesize=_PIPE_BYTES
    )

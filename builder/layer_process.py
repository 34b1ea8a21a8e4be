"""Builds one layer of a container image: a program of its own, so that layers are built side by side.

`builder.layer_build` starts it with the number of a socket as its argument; the layer comes on standard
input. It answers with the path of the blob's file, with counters now and then, and at last with a
`BuiltImage` or an error. It ends when its parent does (end of file on standard input, or a broken socket).
"""

import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from builder.build import Build
from builder.chunk_dict import DictionaryImage
from builder.layer_tree import LayerTree
from builder.options import BuildOptions
from builder.pipeline import PipelineCounters
from builder.zran_build import index_stream
from rafs.errors import NydusError

PROGRESS_S = 0.1
"""Counters are sent no more often."""


@dataclass(frozen=True, slots=True)
class LayerTask:
    """What is to be built: `label` names the layer in messages, `work_dir` is for this layer alone.

    With `is_kept` the layer stays the blob that it is, and only an index of it is made.
    """

    label: str
    work_dir: Path
    options: BuildOptions
    dictionaries: tuple[DictionaryImage, ...] = ()
    is_kept: bool = False


def main(arguments: list[str]) -> None:
    """Entry of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair: it ends, and the socket says so
    connection = Connection(int(arguments[0]))
    try:
        task: LayerTask = connection.recv()
    except (EOFError, ConnectionResetError):
        return  # the parent has gone, and what it has to say it says itself
    last = 0.0

    def show(counters: PipelineCounters) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_S:
            last = time.monotonic()
            _tell(connection, counters)

    try:
        if task.is_kept:
            stream = sys.stdin.buffer
            answer: object = index_stream(stream, task.label, task.work_dir, task.options, show)
        else:
            with Build(task.work_dir, task.options, task.dictionaries, show, LayerTree) as build:
                _tell(connection, build.blob_path)
                answer = build.run_layer(task.label)
    except NydusError as error:
        answer = error
    _tell(connection, answer)


def _tell(connection: Connection, answer: object) -> None:
    """Sends something to the parent; ends the process when that has gone."""
    try:
        connection.send(answer)
    except (BrokenPipeError, ConnectionResetError):
        sys.exit()

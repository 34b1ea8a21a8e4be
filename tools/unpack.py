"""`nydus-py unpack`: all files of an image, as a directory or as a tar stream."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from builder.unpack import UnpackTarget, content_refs, unpack
from builder.unpack_directory import DirectoryTarget
from builder.unpack_tar import TarTarget
from tools.chunk_stream import chunk_stream
from tools.image import open_image
from tools.output import talk
from tools.progress import Bar, progress_bar
from tools.run_stream import ResultIterator
from tools.runtime import run_async
from tools.settings import Settings, settings_of


class CountingChunks:
    """Passes chunks on and shows their bytes on a bar."""

    def __init__(self, chunks: ResultIterator[bytes], bar: Bar) -> None:
        self._chunks = chunks
        self._bar = bar

    def __aiter__(self) -> "CountingChunks":
        return self

    async def __anext__(self) -> bytes:
        chunk = await anext(self._chunks)
        self._bar.advance(len(chunk))
        return chunk


def run(
    ctx: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="REF", help="The image.")],
    target: Annotated[
        str, typer.Argument(metavar="DIR", help="A new or empty directory; - for a tar stream.")
    ],
) -> None:
    """Write all files of an image into a directory, or with - as a tar stream to standard output.

    The directory appears when it is complete. As root, owners and devices are those of the image.
    """
    settings = settings_of(ctx)
    if target == "-":
        _to_standard_output(reference, settings)
        return
    with DirectoryTarget(Path(target)) as directory:
        run_async(lambda: _unpack(reference, directory, settings))


def _to_standard_output(reference: str, settings: Settings) -> None:
    if sys.stdout.isatty():
        raise typer.BadParameter(
            "a tar stream does not go to a terminal; use a pipe or a file", param_hint="DIR"
        )
    archive = TarTarget(sys.stdout.buffer)
    run_async(lambda: _unpack(reference, archive, settings))
    archive.finish()
    if archive.sockets:
        talk(f"{archive.sockets} sockets were left out: a tar stream cannot hold them")


async def _unpack(reference: str, target: UnpackTarget, settings: Settings) -> None:
    async with open_image(reference, settings) as image:
        with progress_bar("unpacking") as bar:
            bar.extend(sum(blob.uncompressed_size for blob in image.bootstrap.blobs))
            async with chunk_stream(image, content_refs(image.bootstrap)) as chunks:
                await unpack(image.bootstrap, CountingChunks(chunks, bar), target)

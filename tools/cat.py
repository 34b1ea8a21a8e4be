"""`nydus-py cat`: one file of an image."""

import os
from typing import Annotated, ClassVar

import trio
import typer

from rafs.errors import NydusError
from rafs.record import FormatError
from tools.chunk_stream import chunk_stream
from tools.image import open_image
from tools.output import write_bytes
from tools.runtime import run_async
from tools.settings import Settings, settings_of


class NotAFile(NydusError):
    """A path in an image that has no bytes to show."""

    message = "{path}: not a regular file in the image"
    exit_code: ClassVar[int] = 94


def run(
    ctx: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="REF", help="The image.")],
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A file in it; symbolic links are not followed.")
    ],
) -> None:
    """Write one file of an image to standard output; only its chunks travel."""
    settings = settings_of(ctx)
    run_async(lambda: _cat(reference, path, settings))


async def _cat(reference: str, path: str, settings: Settings) -> None:
    async with open_image(reference, settings) as image:
        inode = image.bootstrap.resolve(os.fsencode(path))
        if not inode.is_file:
            raise NotAFile(path=path)
        position = 0
        async with chunk_stream(image, image.bootstrap.chunk_refs(inode)) as chunks:
            async for chunk in chunks:
                if position + len(chunk) > inode.size:
                    raise _wrong_size(path, position, "its chunks go on", inode.size)
                await trio.to_thread.run_sync(write_bytes, chunk)
                position += len(chunk)
        if position != inode.size:
            raise _wrong_size(path, position, "its chunks end here", inode.size)


def _wrong_size(path: str, position: int, what: str, size: int) -> FormatError:
    """For a file whose chunks are not exactly as long as it is; sizes in bytes."""
    return FormatError(f"content of {path}", position, f"{what}, but the file has {size} bytes")

"""Sound inputs for the fuzz targets, made by the code under test."""

import functools
import tempfile
from pathlib import Path

from tests.posix_tree import posix_tree
from tests.rafs_image import ImageMaker, Link, MadeImage, Options, directory, file, symlink


def _make(maker: ImageMaker) -> MadeImage:
    with tempfile.TemporaryDirectory() as folder:
        return maker.make(Path(folder) / "image.boot")


@functools.cache
def small_image() -> MadeImage:
    """A handful of inodes of different types, 20 KiB."""
    tree = directory(
        {
            b"a": file(b"ab" * 2500, {b"user.k": b"v"}),
            b"d": directory({b"b": Link(b"/a"), b"c": file(b"c")}),
            b"l": symlink(b"a"),
        }
    )
    return _make(ImageMaker(tree, Options(prefetch=(b"/a",))))


@functools.cache
def rich_image() -> MadeImage:
    """Everything that the format can hold, with two blobs."""
    return _make(ImageMaker(posix_tree(), Options(blob_count=2, prefetch=(b"/files/secret", b"/names"))))


@functools.cache
def batched_image() -> MadeImage:
    """Small files in batches."""
    return _make(ImageMaker(posix_tree(), Options(batch=True, chunk_size=1 << 13)))

"""Any tree survives a build, from a directory and from an archive, whatever the options."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from builder.options import BuildOptions, CompressionPolicy
from builder.unpack_tar import TarTarget
from rafs.digest import Digester
from tests.builder_support import ImageReader, build, image_bytes, read_image, read_tree

# Not sorted by chance, and with characters on both sides of "." and "/".
_NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)
# Few different blocks in any order: equal chunks, zero chunks and odd tails come up often.
_BLOCKS = (bytes(4096), b"a" * 4096, bytes(range(256)) * 16, b"b" * 2048, b"c", b"")
_CONTENTS = st.lists(st.integers(0, 5).map(_BLOCKS.__getitem__), max_size=6).map(b"".join) | st.binary(
    max_size=300
)
_TREES = st.recursive(
    st.dictionaries(_NAMES, _CONTENTS, max_size=4),
    lambda inner: st.dictionaries(_NAMES, _CONTENTS | inner, max_size=4),
    max_leaves=12,
)
_TIMES = st.integers(-(1 << 33) * 10**9, (1 << 33) * 10**9)
_OPTIONS = st.builds(
    BuildOptions,
    chunk_size=st.sampled_from([4096, 8192]),
    batch_size=st.sampled_from([0, 1, 2, 1000, 4096]),
    compression=st.sampled_from(CompressionPolicy),
    digester=st.sampled_from(Digester),
    threads=st.just(1),
    prefetch=st.sampled_from([(), ("/",), ("/*a*",)]),
)


@contextmanager
def _directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _write(path: bytes, tree: dict[bytes, object], times: Iterator[int]) -> None:
    os.mkdir(path)
    for name, content in tree.items():
        below = path + b"/" + name
        if isinstance(content, dict):
            _write(below, content, times)
        else:
            assert isinstance(content, bytes)
            with open(below, "wb") as file:
                file.write(content)
        os.utime(below, ns=(0, next(times)))


@settings(max_examples=25)
@given(_TREES, st.lists(_TIMES, min_size=60, max_size=60), _OPTIONS)
def test_any_tree(tree: dict[bytes, object], times: list[int], options: BuildOptions) -> None:
    with _directory() as folder:
        source = folder / "src"
        _write(bytes(source), tree, iter(times))
        built = build(source, folder / "work", options)
        expected = read_tree(source)
        assert read_image(built) == expected
        archive = folder / "a.tar"
        _write_tar(ImageReader.open(built), archive)
        assert read_image(build(archive, folder / "again", options)) == expected
        repeated = build(source, folder / "work", options)
        assert image_bytes(repeated) == image_bytes(built)


def _write_tar(reader: ImageReader, path: Path) -> None:
    with path.open("wb") as out:
        target = TarTarget(out)
        for name, inode in reader.bootstrap.walk():
            if inode.is_file:
                target.begin_file(name, inode, {})
                for chunk in reader.content(inode):
                    target.write(chunk)
                target.end_file()
            else:
                target.add(name, inode, {}, b"")
        target.finish()

"""Bootstraps as wholes: any tree reads back, any damage is a value or an error, no lookup scans."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rafs.bootstrap import Bootstrap
from rafs.check import check_bootstrap_bytes
from rafs.errors import NydusError
from rafs.inode_table import Attributes
from tests.fuzz.fuzz_bootstrap import exercise
from tests.fuzz.seeds import small_image
from tests.rafs_image import ImageMaker, Link, Node, Options, directory, file, symlink, walk_nodes

NAMES = st.binary(min_size=1, max_size=40).filter(
    lambda name: not set(name) & {0, 0x2F} and name not in (b".", b"..")
)
XATTRS = st.dictionaries(
    st.binary(min_size=1, max_size=20).map(lambda suffix: b"user." + suffix),
    st.binary(max_size=50),
    max_size=3,
)
FILES = st.builds(
    file,
    st.binary(max_size=600).map(lambda part: part * 16),
    XATTRS,
    st.integers(0, 0o7777),
    uid=st.integers(0, 2**32 - 1),
    gid=st.integers(0, 2**32 - 1),
    mtime_s=st.integers(-(2**63), 2**63 - 1),
    mtime_ns=st.integers(0, 10**9 - 1),
)
SYMLINKS = st.binary(min_size=1, max_size=500).filter(lambda t: 0 not in t).map(lambda t: symlink(t * 8))
TREES = st.recursive(
    FILES | SYMLINKS,
    lambda inner: st.dictionaries(NAMES, inner, max_size=8).map(directory),
    max_leaves=25,
)


@given(
    root=st.dictionaries(NAMES, TREES, max_size=8),
    blobs=st.integers(1, 4),
    chunk_bits=st.integers(12, 20),
    batch=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60)
def test_any_tree_reads_back_and_is_sound(
    tmp_path: Path, root: dict[bytes, Node], blobs: int, chunk_bits: int, batch: bool
) -> None:
    tree = directory(root)
    full = sum(1 for _, node in walk_nodes(tree) if node.attributes.mode >> 12 == 8 and node.content)
    options = Options(chunk_size=1 << chunk_bits, blob_count=min(blobs, full), batch=batch)
    image = ImageMaker(tree, options).make(tmp_path / "image.boot")
    bootstrap = Bootstrap(image.bootstrap)
    for (path, inode), (wanted_path, node) in zip(bootstrap.walk(), walk_nodes(tree), strict=True):
        wanted = node.attributes
        assert path == wanted_path
        seen = Attributes(inode.mode, inode.uid, inode.gid, 0, inode.mtime_s, inode.mtime_ns)
        assert seen == wanted._replace(size=0)
        assert bootstrap.xattrs(inode) == node.xattrs
        assert bootstrap.resolve(path) == inode
    # Equal chunks are stored once, which may leave a blob without any: the one thing to be found then.
    faults = list(check_bootstrap_bytes(image.bootstrap, "image.boot"))
    empty = [entry.index for entry in image.entries if not entry.chunk_count]
    assert {fault.record for fault in faults} <= {
        f"{what} {index}" for index in empty for what in ("blob table entry", "device slot")
    }


def test_every_bit_that_is_set_may_flip() -> None:
    data = bytearray(small_image().bootstrap)
    for position in [index for index, byte in enumerate(data) if byte]:
        for bit in range(8):
            data[position] ^= 1 << bit
            exercise(bytes(data))
            data[position] ^= 1 << bit


def test_every_truncation_is_an_error_or_reads_what_is_left() -> None:
    data = small_image().bootstrap
    for length in [*range(0, 2048, 7), *range(2048, len(data), 509)]:
        exercise(data[:length])


def test_a_file_that_ends_in_the_superblocks_does_not_open() -> None:
    data = small_image().bootstrap
    for length in range(1408):
        with pytest.raises(NydusError):
            Bootstrap(data[:length])


class CountingBootstrap(Bootstrap):
    """Counts the blocks of directories that are looked at."""

    blocks_read = 0

    def _block(self, inode: object, index: int) -> tuple[memoryview, int]:
        self.blocks_read += 1
        return super()._block(inode, index)  # type: ignore[arg-type]


def test_a_lookup_touches_few_of_many_blocks(tmp_path: Path) -> None:
    names = [b"%07d" % number for number in range(200_000)]
    path = tmp_path / "image.boot"
    tree = directory(dict.fromkeys(names, Link(b"/0000000")) | {names[0]: file(b"")})
    ImageMaker(tree, Options(blob_count=0)).make(path)
    with CountingBootstrap.open(path) as bootstrap:
        root = bootstrap.root()
        blocks = -(-root.size // 4096)
        assert blocks > 900
        for name in (*names[::9973], b"0", b"zzz"):
            bootstrap.blocks_read = 0
            entry = bootstrap.lookup(root, name)
            assert (entry is not None) == (len(name) == 7)
            assert bootstrap.blocks_read <= blocks.bit_length() + 1


def test_opening_reads_no_inode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.boot"
    ImageMaker(directory({b"a": file(b"a")})).make(path)

    def unexpected(*arguments: object) -> None:
        raise AssertionError("an inode or a block is read")

    monkeypatch.setattr(Bootstrap, "inode", unexpected)
    monkeypatch.setattr(Bootstrap, "_block", unexpected)
    monkeypatch.setattr(Bootstrap, "_index_chunk_table", unexpected)
    with Bootstrap.open(path) as bootstrap:
        assert bootstrap.inode_count == 2

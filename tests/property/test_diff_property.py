"""For any two trees, what `diff` lists is what a comparison of the files themselves finds."""

import os
import stat
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from backend.extents import ExtentIndex
from builder.build import BuiltImage
from builder.diff import Aspect, Change, compare_trees
from builder.diff_fetch import chunks_to_fetch
from rafs.blobmeta import BlobMeta
from rafs.bootstrap import Bootstrap
from tests.builder_support import Tree, build, options, read_tree

# Few names, contents and modes, so that pairs of trees have much in common.
_NAMES = st.sampled_from([b"a", b"a.b", b"ab", b"b", b"\xff"])
_BLOCKS = (bytes(4096), b"x" * 4096, bytes(range(256)) * 16, b"short", b"")
_FILES = st.tuples(
    st.just("file"),
    st.lists(st.integers(0, 4).map(_BLOCKS.__getitem__), max_size=3).map(b"".join),
    st.sampled_from([0o644, 0o4755]),
    st.sampled_from([1, 10**9 + 1]),
)
_LINKS = st.tuples(st.just("link"), st.sampled_from([b"a", b"b/c"]), st.just(0), st.just(1))
_FIFOS = st.tuples(st.just("fifo"), st.just(b""), st.just(0o600), st.just(1))
_LEAVES = st.one_of(_FILES, _LINKS, _FIFOS)
_TREES = st.recursive(
    st.dictionaries(_NAMES, _LEAVES, max_size=4),
    lambda inner: st.dictionaries(_NAMES, _LEAVES | inner, max_size=4),
    max_leaves=10,
)


def _write(path: bytes, tree: dict[bytes, object]) -> None:
    os.mkdir(path)
    for name, node in tree.items():
        below = path + b"/" + name
        if isinstance(node, dict):
            _write(below, node)
            continue
        assert isinstance(node, tuple)
        kind, content, mode, mtime_ns = node
        if kind == "link":
            os.symlink(content, below)
        elif kind == "fifo":
            os.mkfifo(below)
        else:
            Path(os.fsdecode(below)).write_bytes(content)
        if kind != "link":
            os.chmod(below, mode)
        os.utime(below, ns=(0, mtime_ns), follow_symlinks=False)
    os.utime(path, ns=(0, 5))


def _expected(before: Tree, after: Tree) -> dict[bytes, tuple[Change, frozenset[Aspect]]]:
    found = {}
    for path in before.keys() | after.keys():
        if path not in after:
            found[path] = (Change.REMOVED, frozenset[Aspect]())
        elif path not in before:
            found[path] = (Change.ADDED, frozenset[Aspect]())
        else:
            old, new = before[path], after[path]
            differs = {
                Aspect.TYPE: stat.S_IFMT(old.mode) != stat.S_IFMT(new.mode),
                Aspect.MODE: stat.S_IMODE(old.mode) != stat.S_IMODE(new.mode),
                Aspect.MTIME: old.mtime_ns != new.mtime_ns,
                Aspect.OWNER: (old.uid, old.gid) != (new.uid, new.gid),
                Aspect.XATTRS: old.xattrs != new.xattrs,
            }
            if not differs[Aspect.TYPE]:
                differs[Aspect.CONTENT] = old.content != new.content
                differs[Aspect.TARGET] = old.symlink != new.symlink
            aspects = frozenset(aspect for aspect, is_so in differs.items() if is_so)
            if aspects:
                found[path] = (Change.CHANGED, aspects)
    return found


def _image(root: Path, number: int, tree: dict[bytes, object], batch_size: int) -> tuple[BuiltImage, Tree]:
    source = root / f"tree{number}"
    _write(bytes(source), tree)
    return build(source, root / f"work{number}", options(batch_size=batch_size)), read_tree(source)


def _chunks(tree: dict[bytes, object]) -> set[bytes]:
    found = set()
    for node in tree.values():
        if isinstance(node, dict):
            found |= _chunks(node)
        elif isinstance(node, tuple) and node[0] == "file":
            found |= {node[1][at : at + 4096] for at in range(0, len(node[1]), 4096)}
    return found


@settings(max_examples=40, deadline=None)
@given(_TREES, _TREES, st.sampled_from([0, 4096]))
def test_diff_lists_what_differs(
    first: dict[bytes, object], second: dict[bytes, object], batch_size: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        before, old_tree = _image(root, 0, first, batch_size)
        after, new_tree = _image(root, 1, second, batch_size)
        old = Bootstrap(before.files.bootstrap.read_bytes())
        new = Bootstrap(after.files.bootstrap.read_bytes())
        found = list(compare_trees(old, new))
        paths = [one.path for one in found]
        assert len(set(paths)) == len(paths)
        assert {one.path: (one.change, frozenset(one.aspects)) for one in found} == _expected(
            old_tree, new_tree
        )

        metas = {blob.blob_id: blob.meta for blob in after.files.blobs}
        needs = chunks_to_fetch(old, new, lambda blob_id: ExtentIndex(BlobMeta(metas[blob_id].read_bytes())))
        missing = _chunks(second) - _chunks(first)
        assert sum(need.chunks_missing for need in needs) == len(missing)
        assert sum(need.decoded_bytes for need in needs) == sum(map(len, missing))
        assert sum(need.encoded_bytes for need in needs) <= sum(blob.size_bytes for blob in after.files.blobs)

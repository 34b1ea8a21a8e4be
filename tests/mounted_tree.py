"""Compares a tree in memory with one on disk: extracted by another program, or mounted by the kernel."""

import os
import stat
from pathlib import Path

from rafs.inode_table import Attributes
from tests.rafs_image import Link, Node, walk_nodes


def on_disk(root: Path, path: bytes) -> bytes:
    """Where the absolute `path` of an image is under `root`."""
    return os.path.join(os.fsencode(root), path.lstrip(b"/"))


def names_below(root: Path) -> set[bytes]:
    """All absolute paths below `root`, as `walk_nodes` gives them."""
    top = os.fsencode(root)
    found = {b"/"}
    for folder, folders, files in os.walk(top):
        prefix = folder[len(top) :] + b"/"
        found.update(prefix + name for name in folders + files)
    return found


def assert_metadata(path: bytes, wanted: Attributes, node: Node) -> None:
    """Type, mode, owner, time, device number and size."""
    seen = os.lstat(path)
    assert seen.st_mode == wanted.mode, path
    assert (seen.st_uid, seen.st_gid) == (wanted.uid, wanted.gid), path
    assert seen.st_mtime_ns == wanted.mtime_s * 1_000_000_000 + wanted.mtime_ns, path
    assert seen.st_rdev == wanted.rdev, path
    if stat.S_ISREG(wanted.mode) or stat.S_ISLNK(wanted.mode):
        assert seen.st_size == len(node.content), path


def assert_content(path: bytes, node: Node) -> None:
    """A file's bytes or a symbolic link's target."""
    if stat.S_ISREG(node.attributes.mode):
        with open(path, "rb") as stream:
            assert stream.read() == node.content, path
    elif stat.S_ISLNK(node.attributes.mode):
        assert os.readlink(path) == node.content, path


def assert_xattrs(path: bytes, node: Node) -> None:
    """Extended attributes with their values."""
    names = os.listxattr(path, follow_symlinks=False)
    found = {os.fsencode(name): os.getxattr(path, name, follow_symlinks=False) for name in names}
    assert found == node.xattrs, path


def assert_links(root: Path, tree: Node) -> None:
    """Names of one file share an inode, and its link count is their number."""
    names: dict[bytes, list[bytes]] = {}
    pending: list[tuple[bytes, Node]] = [(b"", tree)]
    while pending:
        prefix, node = pending.pop()
        subdirectories = 0
        for name, child in node.children.items():
            where = prefix + b"/" + name
            if isinstance(child, Link):
                names.setdefault(child.to, [child.to]).append(where)
            elif stat.S_ISDIR(child.attributes.mode):
                subdirectories += 1
                pending.append((where, child))
        assert os.lstat(on_disk(root, prefix)).st_nlink == 2 + subdirectories
    for group in names.values():
        seen = [os.lstat(on_disk(root, name)) for name in group]
        assert len({info.st_ino for info in seen}) == 1
        assert {info.st_nlink for info in seen} == {len(group)}


def assert_tree(root: Path, tree: Node) -> None:
    """Everything: names, metadata, contents, extended attributes, link counts."""
    expected = dict(walk_nodes(tree))
    assert names_below(root) == set(expected)
    for path, node in expected.items():
        where = on_disk(root, path)
        assert_metadata(where, node.attributes, node)
        assert_content(where, node)
        assert_xattrs(where, node)
    assert_links(root, tree)

"""Opens a bootstrap, walks it, reads all that can be read, and checks it."""

from itertools import islice

from rafs.bootstrap import Bootstrap
from rafs.check import check_bootstrap_bytes
from rafs.inode import Inode
from tests.fuzz.seeds import rich_image, small_image
from tests.hostile import value_or_error

SEEDS = (small_image().bootstrap, rich_image().bootstrap)
_STEPS_MAX = 20_000
"""Directories may share their blocks, so a walk can be much longer than its bootstrap."""


def exercise(data: bytes) -> None:
    """Only errors of this project may come up, and out of the checker none."""
    with value_or_error():
        bootstrap = Bootstrap(data, "fuzz")
        _read_tables(bootstrap)
        _read_tree(bootstrap)
    for fault in islice(check_bootstrap_bytes(data, "fuzz"), _STEPS_MAX):
        assert str(fault)


def _read_tables(bootstrap: Bootstrap) -> None:
    with value_or_error():
        bootstrap.device_slots()
    with value_or_error():
        assert all(bootstrap.prefetch_nids)
    for blob in bootstrap.blobs:
        with value_or_error():
            digests = bootstrap.chunk_digests(blob.index)
            for index in range(min(len(digests), 50)):
                found = digests.find(index)
                assert found is None or found == digests[index] == digests.row(index).digest
    assert sum(1 for _ in bootstrap.chunk_rows()) * 80 == bootstrap.extended.chunk_table_size


def _read_tree(bootstrap: Bootstrap) -> None:
    for path, inode in islice(bootstrap.walk(), _STEPS_MAX):
        assert path.startswith(b"/")
        for read in (_read_directory, _read_link, _read_xattrs, _read_addresses):
            with value_or_error():
                read(bootstrap, inode)
        with value_or_error():
            bootstrap.resolve(path)


def _read_directory(bootstrap: Bootstrap, inode: Inode) -> None:
    if inode.is_dir:
        for entry in islice(bootstrap.readdir(inode), 200):
            bootstrap.lookup(inode, entry.name)
            bootstrap.lookup(inode, entry.name + b"x")


def _read_link(bootstrap: Bootstrap, inode: Inode) -> None:
    if inode.is_symlink:
        assert bootstrap.readlink(inode)


def _read_xattrs(bootstrap: Bootstrap, inode: Inode) -> None:
    assert bootstrap.xattrs(inode) is not None
    assert inode.rdev >= 0


def _read_addresses(bootstrap: Bootstrap, inode: Inode) -> None:
    if inode.is_file:
        for ref in islice(bootstrap.chunk_refs(inode), 1000):
            assert 0 <= ref.blob_index < len(bootstrap.blobs)


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_bootstrap")

"""Images written from a tree and read back: everything that POSIX knows, and nothing that a check finds."""

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from rafs.blob_table import DECODED_SIZE_MAX
from rafs.blobmeta import BlobMeta
from rafs.bootstrap import Bootstrap
from rafs.check import check_blob_meta, check_bootstrap, check_extent, extents_of
from rafs.chunk import pack_address
from rafs.codec import Compressor
from rafs.digest import Digester
from rafs.inode_table import Attributes, InodeTable
from rafs.superblock import RafsFlags
from rafs.writer import BootstrapContent, ImageTooLarge, write_bootstrap
from tests.posix_tree import posix_tree
from tests.rafs_image import (
    ImageMaker,
    Link,
    MadeImage,
    Node,
    Options,
    directory,
    file,
    symlink,
    walk_nodes,
)


def make(tmp_path: Path, root: Node, options: Options = Options()) -> MadeImage:  # noqa: B008 (immutable)
    return ImageMaker(root, options).make(tmp_path / "image.boot")


def read_file(image: MadeImage, bootstrap: Bootstrap, path: bytes) -> bytes:
    inode = bootstrap.resolve(path)
    parts = []
    left = inode.size
    for ref in bootstrap.chunk_refs(inode):
        size = min(left, bootstrap.chunk_size)
        start = ref.uncompressed_offset
        parts.append(bytes(image.blobs[ref.blob_index].decoded[start : start + size]))
        left -= size
    return b"".join(parts)


def assert_same(image: MadeImage, root: Node) -> None:
    """Reads an image back and compares every name and all that an inode says."""
    bootstrap = Bootstrap(image.bootstrap)
    expected = list(walk_nodes(root))
    found = list(bootstrap.walk())
    assert [path for path, _ in found] == [path for path, _ in expected]
    for (path, inode), (_, node) in zip(found, expected, strict=True):
        wanted = node.attributes
        seen = (inode.mode, inode.uid, inode.gid, inode.mtime_s, inode.mtime_ns, inode.rdev)
        assert seen == (
            wanted.mode,
            wanted.uid,
            wanted.gid,
            wanted.mtime_s,
            wanted.mtime_ns,
            wanted.rdev,
        ), path
        assert bootstrap.xattrs(inode) == node.xattrs, path
        if inode.is_symlink:
            assert bootstrap.readlink(inode) == node.content
        if inode.is_file:
            assert inode.size == len(node.content)
            assert read_file(image, bootstrap, path) == node.content, path
        assert bootstrap.resolve(path) == inode


def assert_sound(image: MadeImage) -> None:
    """The checker finds nothing, in the metadata, in each blob.meta and in each decoded chunk."""
    bootstrap = Bootstrap(image.bootstrap)
    assert list(check_bootstrap(bootstrap)) == []
    for entry, blob in zip(bootstrap.blobs, image.blobs, strict=True):
        meta = BlobMeta(blob.meta)
        digests = bootstrap.chunk_digests(entry.index)
        assert list(check_blob_meta(entry, meta, digests)) == []
        for chunks in extents_of(meta):
            extent = meta.extent(chunks[0])
            start = extent.compressed_offset
            encoded = blob.data[start : start + extent.compressed_size]
            assert list(check_extent(entry, meta, digests, chunks, encoded)) == []


@pytest.mark.parametrize("compressor", Compressor)
@pytest.mark.parametrize("digester", Digester)
def test_every_kind_of_file_reads_back(tmp_path: Path, compressor: Compressor, digester: Digester) -> None:
    tree = posix_tree()
    image = make(tmp_path, tree, Options(compressor=compressor, digester=digester))
    assert_same(image, tree)
    assert_sound(image)


@pytest.mark.parametrize("blob_count", [1, 2, 3, 5])
def test_chunks_of_several_blobs(tmp_path: Path, blob_count: int) -> None:
    tree = posix_tree()
    image = make(tmp_path, tree, Options(blob_count=blob_count))
    assert_same(image, tree)
    assert_sound(image)


def test_batches_of_small_files(tmp_path: Path) -> None:
    tree = posix_tree()
    image = make(tmp_path, tree, Options(batch=True, chunk_size=1 << 13))
    assert image.blobs[0].batches
    assert_same(image, tree)
    assert_sound(image)


def test_prefetch_table_holds_the_inodes_of_the_names(tmp_path: Path) -> None:
    tree = posix_tree()
    image = make(tmp_path, tree, Options(prefetch=(b"/files/two-chunks", b"/files", b"/empty-file")))
    bootstrap = Bootstrap(image.bootstrap)
    paths = (b"/files/two-chunks", b"/files", b"/empty-file")
    assert bootstrap.prefetch_nids == tuple(bootstrap.resolve(path).nid for path in paths)
    assert_sound(image)


def test_prefetch_table_without_blobs(tmp_path: Path) -> None:
    tree = directory({b"empty": file(b"")})
    image = make(tmp_path, tree, Options(blob_count=0, prefetch=(b"/empty",)))
    assert Bootstrap(image.bootstrap).prefetch_nids == (Bootstrap(image.bootstrap).resolve(b"/empty").nid,)
    assert_sound(image)


def test_metadata_only_image(tmp_path: Path) -> None:
    tree = directory({b"a": file(b""), b"b": symlink(b"a"), b"c": directory({})})
    image = make(tmp_path, tree, Options(blob_count=0))
    assert Bootstrap(image.bootstrap).superblock.meta_block == 0
    assert Bootstrap(image.bootstrap).root_nid == 128
    assert_same(image, tree)
    assert_sound(image)


def test_empty_root(tmp_path: Path) -> None:
    image = make(tmp_path, directory({}), Options(blob_count=0))
    bootstrap = Bootstrap(image.bootstrap)
    assert [entry.name for entry in bootstrap.readdir(bootstrap.root())] == [b".", b".."]
    assert bootstrap.root().nlink == 2
    assert_sound(image)


def test_hard_links_share_an_inode_and_count(tmp_path: Path) -> None:
    tree = directory({b"a": file(b"x" * 5000), b"b": Link(b"/a"), b"d": directory({b"c": Link(b"/a")})})
    bootstrap = Bootstrap(make(tmp_path, tree).bootstrap)
    inodes = {bootstrap.resolve(path) for path in (b"/a", b"/b", b"/d/c")}
    assert [inode.nlink for inode in inodes] == [3]
    assert bootstrap.inode_count == 3


def test_a_link_may_come_before_the_file_it_leads_to(tmp_path: Path) -> None:
    tree = directory({b"a": Link(b"/z/file"), b"z": directory({b"file": file(b"late")})})
    image = make(tmp_path, tree)
    assert_same(image, tree)
    assert_sound(image)


def test_equal_chunks_are_stored_once(tmp_path: Path) -> None:
    tree = directory({b"a": file(b"same" * 1024), b"b": file(b"same" * 1024 + b"tail")})
    image = make(tmp_path, tree)
    assert image.entries[0].chunk_count == 2
    assert_same(image, tree)


def test_directory_with_very_many_names(tmp_path: Path) -> None:
    names = [b"%06d" % number for number in range(100_000)]
    empty = file(b"")
    image = make(tmp_path, directory(dict.fromkeys(names, empty)), Options(blob_count=0))
    bootstrap = Bootstrap(image.bootstrap)
    root = bootstrap.root()
    assert [entry.name for entry in bootstrap.readdir(root)] == [b".", b"..", *names]
    for name in names[:: len(names) // 97]:
        entry = bootstrap.lookup(root, name)
        assert entry is not None
        assert entry.name == name
    for absent in (b"", b"!", b"000000x", b"05", b"099999~", b"zzz"):
        assert bootstrap.lookup(root, absent) is None
    assert_sound(image)


def test_name_lengths_around_a_block_of_a_directory(tmp_path: Path) -> None:
    for spare in range(14):
        # 4096 bytes less ".", ".." and fifteen names of 255 bytes.
        length = 4096 - (12 + 1) - (12 + 2) - 15 * (12 + 255) - 12 - spare
        names = [bytes([65 + number]) * 255 for number in range(15)] + [b"z" * length]
        tree = directory({name: file(b"") for name in names} | {b"~~": file(b"")})
        image = make(tmp_path, tree, Options(blob_count=0))
        assert_same(image, tree)
        assert_sound(image)


@pytest.mark.parametrize("length", [1, 59, 4000, 4031, 4032, 4033, 4095])
def test_long_symlinks(tmp_path: Path, length: int) -> None:
    tree = directory({b"%02d" % n: symlink(b"t" * (length - n)) for n in range(min(length, 3))})
    image = make(tmp_path, tree, Options(blob_count=0))
    assert_same(image, tree)
    assert_sound(image)


@pytest.mark.parametrize("size", [1, 3900, 4020, 4021, 4096, 30_000, 60_000])
def test_xattrs_that_fill_blocks(tmp_path: Path, size: int) -> None:
    value = bytes(range(256)) * (size // 256 + 1)
    xattrs = {b"user.big": value[:size], b"trusted.x": b""}
    tree = directory(
        {
            b"d": Node(Attributes(stat.S_IFDIR | 0o755), xattrs=xattrs, children={b"x": file(b"x", xattrs)}),
            b"l": Node(Attributes(stat.S_IFLNK | 0o777), b"target", xattrs),
        }
    )
    image = make(tmp_path, tree)
    assert_same(image, tree)
    assert_sound(image)
    assert Bootstrap(image.bootstrap).extended.flags & RafsFlags.HAS_XATTR


def test_same_tree_same_bytes(tmp_path: Path) -> None:
    first = make(tmp_path, posix_tree(), Options(blob_count=2)).bootstrap
    assert make(tmp_path, posix_tree(), Options(blob_count=2)).bootstrap == first


def test_writing_over_a_longer_file_leaves_nothing_of_it(tmp_path: Path) -> None:
    path = tmp_path / "image.boot"
    path.write_bytes(b"\xff" * 1_000_000)
    image = make(tmp_path, directory({}), Options(blob_count=0))
    assert image.bootstrap.count(0xFF) == 0
    assert_sound(image)


def test_too_many_blobs(tmp_path: Path) -> None:
    image = make(tmp_path, directory({b"a": file(b"a")}))
    content = BootstrapContent(
        InodeTable(Attributes(stat.S_IFDIR)),
        image.entries * 255,
        [],
        4096,
        Compressor.ZSTD,
        Digester.BLAKE3,
    )
    with pytest.raises(ImageTooLarge, match="255 blobs"):
        write_bootstrap(tmp_path / "other.boot", content)
    assert not (tmp_path / "other.boot").exists()


def test_files_in_a_row_are_one_piece_to_the_kernel(tmp_path: Path) -> None:
    content = os.urandom(4096 * 5 + 17)
    repeated = content[:4096] * 3
    tree = directory({b"a": file(content), b"b": file(repeated), b"c": file(b"c" * 4096)})
    image = make(tmp_path, tree)
    bootstrap = Bootstrap(image.bootstrap)
    assert bootstrap.resolve(b"/a").u == 0x20 | 3  # 2^15 bytes hold the file
    assert bootstrap.resolve(b"/b").u == 0x20
    assert bootstrap.resolve(b"/c").u == 0x20
    assert_same(image, tree)
    assert_sound(image)


def test_file_too_large_to_be_one_piece(tmp_path: Path) -> None:
    chunk_size, size = 1 << 24, (1 << 43) + 1
    table = InodeTable(Attributes(stat.S_IFDIR | 0o755))
    table.begin_children(0)
    row = table.add_child(0, b"huge", Attributes(stat.S_IFREG | 0o644, size=size))
    count = -(-size // chunk_size)
    start = table.place_chunks(row, count)
    for number in range(count):
        address = pack_address(0, number, number * (chunk_size // 4096))
        table.addresses[start + number] = int.from_bytes(address, "little")
    blob = replace(
        make(tmp_path, directory({b"a": file(b"a")})).entries[0],
        chunk_size=chunk_size,
        chunk_count=count,
        uncompressed_size=DECODED_SIZE_MAX,
    )
    path = tmp_path / "huge.boot"
    write_bootstrap(path, BootstrapContent(table, [blob], [], chunk_size, Compressor.ZSTD, Digester.BLAKE3))
    with Bootstrap.open(path) as bootstrap:
        assert bootstrap.resolve(b"/huge").u == 0x20 | 12

"""The checker names each kind of fault, with its record and place, and goes on behind it."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rafs.blob_table import BlobEntry, slot_offset
from rafs.blobmeta import BlobMeta
from rafs.bootstrap import Bootstrap
from rafs.check import Fault, check_blob_meta, check_bootstrap_bytes, check_extent, extents_of
from rafs.chunk import ROW_SIZE
from rafs.dirent import pack_directory
from rafs.superblock import ExtendedSuperblock, Superblock
from tests.posix_tree import posix_tree
from tests.rafs_image import ImageMaker, Link, MadeImage, Options, directory, file, special, symlink

EXTENDED = ExtendedSuperblock.OFFSET


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> MadeImage:
    tree = directory(
        {
            b"a": file(b"a" * 9000, {b"user.key": b"value"}),
            b"b": directory({b"x": file(b"x"), b"y": Link(b"/a"), b"z": directory({})}),
            b"l": symlink(b"target"),
            b"long": symlink(b"t" * 4095),
            b"null": special(0o020000, 0x103),
            b"pipe": special(0o010000),
        }
    )
    path = tmp_path_factory.mktemp("image") / "image.boot"
    return ImageMaker(tree, Options(blob_count=2, prefetch=(b"/a",))).make(path)


@dataclass(frozen=True, slots=True)
class Places:
    """Where things lie in the image above."""

    bootstrap: Bootstrap

    def inode(self, path: bytes) -> int:
        return self.bootstrap.resolve(path).offset_bytes

    def address(self, path: bytes) -> int:
        return self.bootstrap.resolve(path).index_offset

    def dirent(self, folder: bytes, index: int) -> int:
        inode = self.bootstrap.resolve(folder)
        return next(offset for _, offset in self.bootstrap.data_blocks(inode)) + 12 * index

    def row(self, index: int) -> int:
        return self.bootstrap.extended.chunk_table_offset + ROW_SIZE * index

    def blob(self, index: int) -> int:
        return self.bootstrap.extended.blob_table_offset + BlobEntry.SIZE * index

    def nid(self, path: bytes) -> int:
        return self.bootstrap.resolve(path).nid


Patch = Callable[[Places], tuple[int, bytes]]


def u16(value: int) -> bytes:
    return struct.pack("<H", value)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


# One wrong field each, what the fault must say, and which record it must name.
CASES: dict[str, tuple[Patch, str, str]] = {
    "magic": (lambda p: (1024, b"\0"), "magic", "EROFS superblock"),
    "root nid": (lambda p: (1024 + 14, u16(p.nid(b"/b"))), "root inode 128", "EROFS superblock"),
    "root is a file": (lambda p: (1024 + 14, u16(p.nid(b"/a"))), "a readable directory", "root inode"),
    "inos": (lambda p: (1024 + 16, u64(3)), "9 inodes, found 3", "EROFS superblock"),
    "blocks": (lambda p: (1024 + 36, u32(77)), "found 77", "EROFS superblock"),
    "chunk size of a blob": (lambda p: (p.blob(1) + 68, u32(8192)), "chunk size 4096", "blob table entry 1"),
    "no chunks": (lambda p: (p.blob(0) + 72, u32(0)), "at least one chunk", "blob table entry 0"),
    "digest of a blob": (lambda p: (p.blob(0) + 80, u32(1)), "found sha256", "blob table entry 0"),
    "decoded size": (lambda p: (p.blob(0) + 96, u64(0)), "a block for each", "blob table entry 0"),
    "chunk infos outside": (
        lambda p: (p.blob(0) + 112, u64(1 << 39)),
        "inside the blob",
        "blob table entry 0",
    ),
    "cipher": (lambda p: (p.blob(0) + 216, u32(3)), "cipher 0 or 1", "blob table entry 0"),
    "one blob twice": (
        lambda p: (p.blob(1), p.bootstrap.blobs[0].blob_id.encode()),
        "each blob once",
        "blob table entry 1",
    ),
    "slot tag": (lambda p: (slot_offset(1), b"0" * 64), "as in the blob table", "device slot 1"),
    "slot tag not hex": (lambda p: (slot_offset(1), b"Z"), "64 hexadecimal", "device slot 1"),
    "slot blocks": (lambda p: (slot_offset(0) + 64, u32(999)), "found 999", "device slot 0"),
    "slot mapping": (lambda p: (slot_offset(0) + 68, u32(129)), "multiple of 524288", "device slot 0"),
    "slot mapping behind": (lambda p: (slot_offset(1) + 68, u32(128)), "multiple of", "device slot 1"),
    "tables share": (
        lambda p: (EXTENDED + 40, u64(p.bootstrap.extended.blob_table_offset)),
        "tables apart",
        "RAFS superblock",
    ),
    "table on slots": (lambda p: (EXTENDED + 40, u64(1536)), "bytes of its own", "prefetch table"),
    "prefetch": (
        lambda p: (p.bootstrap.extended.prefetch_table_offset, u32(7)),
        "found 7",
        "prefetch table",
    ),
    "xattr flag": (lambda p: (EXTENDED, b"\x94\0"), "HAS_XATTR", "RAFS superblock"),
    "row order": (lambda p: (p.row(0), b"\xff" * 32), "order of their digests", "chunk table row 1"),
    "row blob": (lambda p: (p.row(0) + 32, u32(9)), "a blob below 2", "chunk table row 0"),
    "row flags": (lambda p: (p.row(0) + 36, u32(0x33)), "known flags", "chunk table row 0"),
    "row stored size": (
        lambda p: (p.row(0) + 36, u32(0x10) + u32(4000)),
        "not compressed",
        "chunk table row 0",
    ),
    "row decoded size": (lambda p: (p.row(0) + 44, u32(5000)), "1 to 4096", "chunk table row 0"),
    "row encoded end": (
        lambda p: (p.row(0) + 48, u64(1 << 30)),
        "encoded bytes before",
        "chunk table row 0",
    ),
    "row decoded offset": (lambda p: (p.row(0) + 56, u64(100)), "on a block", "chunk table row 0"),
    "row index": (lambda p: (p.row(0) + 72, u32(1 << 20)), "a chunk below", "chunk table row 0"),
    "row checksum": (lambda p: (p.row(0) + 36, u32(1)), "without its flag", "chunk table row 0"),
    "inode format": (lambda p: (p.inode(b"/a"), u16(0xFFF1)), "known inode format", "inode"),
    "inode layout": (lambda p: (p.inode(b"/a"), u16(1)), "data layout", "inode"),
    "inode type": (lambda p: (p.inode(b"/a") + 4, u16(0)), "known file type", "inode"),
    "type changed": (lambda p: (p.inode(b"/null") + 4, u16(0o060600)), "type 4", "entry b'null'"),
    "file size grows": (
        lambda p: (p.inode(b"/a") + 8, u64(1 << 40)),
        "inside the file",
        "inode",
    ),
    "file size shrinks": (lambda p: (p.inode(b"/a") + 8, u64(8193)), "chunk of 1 bytes", "chunk 2 of"),
    "chunk format": (lambda p: (p.inode(b"/a") + 16, u32(0x40)), "chunk format 0x20", "inode"),
    "chunk format bits": (lambda p: (p.inode(b"/b/x") + 16, u32(0x2F)), "chunks of 4096", "inode"),
    "file links": (lambda p: (p.inode(b"/a") + 44, u32(5)), "2 links", "inode"),
    "file link missing": (lambda p: (p.inode(b"/b/x") + 44, u32(0)), "1 links", "inode"),
    "directory links": (lambda p: (p.inode(b"/b") + 44, u32(2)), "3 links", "inode"),
    "symlink links": (lambda p: (p.inode(b"/l") + 44, u32(2)), "one link", "inode"),
    "symlink empty": (lambda p: (p.inode(b"/l") + 8, u64(0)), "a target of 1", "inode"),
    "symlink NUL": (lambda p: (p.inode(b"/l") + 64, b"\0"), "without NUL", "inode"),
    "symlink blocks": (lambda p: (p.inode(b"/long") + 16, u32(1 << 30)), "inside the file", "data of inode"),
    "fifo device": (lambda p: (p.inode(b"/pipe") + 16, u32(1)), "no device number", "inode"),
    "xattr prefix": (lambda p: (p.inode(b"/a") + 64 + 13, b"\x09"), "name prefix", "xattrs of inode"),
    "address hole": (lambda p: (p.address(b"/a") + 2, b"\0"), "a device from 1 to 2", "chunk 0 of"),
    "address blob": (lambda p: (p.address(b"/a") + 2, b"\3"), "a device from 1 to 2", "chunk 0 of"),
    "address chunk": (lambda p: (p.address(b"/a"), u16(99)), "a chunk below", "chunk 0 of"),
    "address block": (lambda p: (p.address(b"/a") + 4, u32(1)), "as in chunk table", "chunk 0 of"),
    "address outside": (lambda p: (p.address(b"/a") + 4, u32(99)), "decoded bytes before", "chunk 0 of"),
    "dirent nid": (lambda p: (p.dirent(b"/b", 2), u64(1 << 40)), "an inode below", "inode"),
    "dirent type": (lambda p: (p.dirent(b"/b", 2) + 10, b"\2"), "type 1", "entry b'x'"),
    "dirent reserved": (lambda p: (p.dirent(b"/b", 2) + 11, b"\1"), "byte 0", "entry b'x'"),
    "dirent name start": (lambda p: (p.dirent(b"/b", 4) + 8, u16(4)), "a name of 1", "entry 4 of"),
    "directory head": (lambda p: (p.dirent(b"/b", 0) + 8, u16(7)), "whole entries", "directory of"),
    "dot": (lambda p: (p.dirent(b"/b", 0), u64(128)), "found 128", "entry b'.'"),
    "dot dot": (lambda p: (p.dirent(b"/b", 1), u64(p.nid(b"/b"))), "inode 128", "entry b'..'"),
    "dot missing": (lambda p: (p.dirent(b"/b", 5), b"-"), "an entry b'.'", "directory of"),
    "dot type": (lambda p: (p.dirent(b"/b", 0) + 10, b"\1"), "(directory)", "entry b'.'"),
    "name unsorted": (lambda p: (p.dirent(b"/b", 5) + 3, b"~"), "sorted by its bytes", "entry b'y'"),
    "name twice": (lambda p: (p.dirent(b"/b", 5) + 3, b"y"), "each name once", "entry b'y'"),
    "name slash": (lambda p: (p.dirent(b"/b", 5) + 3, b"/"), "without slash", "entry b'/'"),
    "name NUL": (lambda p: (p.dirent(b"/b", 5) + 3, b"\0"), "without slash and NUL", "entry b'\\x00'"),
    "loop": (lambda p: (p.dirent(b"/b", 4), u64(128)), "under one name", "entry b'z'"),
    "itself": (lambda p: (p.dirent(b"/b", 4), u64(p.nid(b"/b"))), "under one name", "entry b'z'"),
    "second name of a symlink": (
        lambda p: (p.dirent(b"/b", 2), u64(p.nid(b"/l"))),
        "regular files only",
        "entry b'x'",
    ),
    "inside another inode": (
        lambda p: (p.dirent(b"/b", 2), u64(p.nid(b"/a") + 1)),
        "",
        "inode",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_fault_is_named(image: MadeImage, name: str) -> None:
    patch, expectation, record = CASES[name]
    offset, wrong = patch(Places(Bootstrap(image.bootstrap)))
    data = bytearray(image.bootstrap)
    data[offset : offset + len(wrong)] = wrong
    faults = list(check_bootstrap_bytes(data, "image.boot"))
    assert any(expectation in fault.expectation and record in fault.record for fault in faults), faults
    assert all(fault.offset_bytes >= 0 for fault in faults)


def test_nothing_is_found_in_a_sound_image(image: MadeImage) -> None:
    assert list(check_bootstrap_bytes(image.bootstrap, "image.boot")) == []


def test_check_goes_on_behind_a_fault(image: MadeImage) -> None:
    places = Places(Bootstrap(image.bootstrap))
    data = bytearray(image.bootstrap)
    for patch, _, _ in (CASES[name] for name in ("cipher", "row flags", "symlink NUL", "fifo device", "dot")):
        offset, wrong = patch(places)
        data[offset : offset + len(wrong)] = wrong
    assert len(list(check_bootstrap_bytes(data, "image.boot"))) == 5


def test_a_fault_is_one_line() -> None:
    assert str(Fault("inode 7", 4096, "one link, found 2")) == "inode 7 at offset 4096: one link, found 2"


def test_shared_directory_data_is_not_read_again(tmp_path: Path) -> None:
    tree = directory({b"%d" % n: directory({b"x" * 255: file(b"")}) for n in range(40)})
    data = bytearray(ImageMaker(tree, Options(blob_count=0)).make(tmp_path / "image.boot").bootstrap)
    bootstrap = Bootstrap(bytes(data))
    for number in range(40):
        inode = bootstrap.resolve(b"/%d" % number)
        block = bootstrap.size_bytes // 4096
        struct.pack_into("<HHHHQI", data, inode.offset_bytes, 1, 0, inode.mode, 0, 4096, block)
    data += pack_directory([b".", b".."], [128, 128], [2, 2]).ljust(4096, b"\0")
    faults = list(check_bootstrap_bytes(data, "image.boot"))
    assert sum("bytes of its own" in fault.expectation for fault in faults) == 39


@pytest.fixture(scope="module")
def batched(tmp_path_factory: pytest.TempPathFactory) -> MadeImage:
    path = tmp_path_factory.mktemp("batched") / "image.boot"
    return ImageMaker(posix_tree(), Options(batch=True, chunk_size=1 << 13)).make(path)


def meta_faults(image: MadeImage, offset: int, wrong: bytes) -> list[Fault]:
    bootstrap = Bootstrap(image.bootstrap)
    data = bytearray(image.blobs[0].meta)
    if offset < 0:
        offset += len(data)
    data[offset : offset + len(wrong)] = wrong
    return list(check_blob_meta(bootstrap.blobs[0], BlobMeta(data), bootstrap.chunk_digests(0)))


def first_plain(image: MadeImage) -> int:
    return next(i for i, info in enumerate(image.blobs[0].infos) if not info.is_batch)


META_CASES: dict[str, tuple[Callable[[MadeImage], tuple[int, bytes]], str]] = {
    "decoded offset": (lambda m: (24 * first_plain(m), u32(0xFFFF)), "decoded bytes before"),
    "shared decoded bytes": (
        lambda m: (24 * first_plain(m), u32(m.blobs[0].infos[0].uncompressed_offset // 4096)),
        "decoded bytes of its own",
    ),
    "encoded size": (lambda m: (24 * first_plain(m) + 13, b"\xff\xff\xff"), "encoded bytes before"),
    "flags": (lambda m: (24 * first_plain(m) + 7, b"\x10"), "not compressed"),
    "checksum": (lambda m: (24 * first_plain(m) + 16, u32(1)), "CRC-32C"),
    "encoded offset": (lambda m: (24 * first_plain(m) + 8, u32(3)), "encoded offset"),
    "batch number": (lambda m: (24 * m.blobs[0].batch[0] + 20, u32(7)), "a context below 1"),
    "batch offset": (lambda m: (24 * m.blobs[0].batch[0] + 16, u32(1 << 20)), "inside a batch"),
    "batch size": (lambda m: (24 * len(m.blobs[0].infos) + 4, u32(1 << 30)), "1 to 16777216 bytes"),
    "batch encoded": (lambda m: (24 * len(m.blobs[0].infos), u32(0)), "1 to 16777216 bytes"),
    "array offset": (lambda m: (-4096 + 16, u64(1)), "array offset"),
    "features": (lambda m: (-4096 + 4, u32(0x4000_0005)), "features"),
}


@pytest.mark.parametrize("name", META_CASES)
def test_each_fault_of_a_blob_meta_is_named(batched: MadeImage, name: str) -> None:
    patch, expectation = META_CASES[name]
    faults = meta_faults(batched, *patch(batched))
    assert any(expectation in fault.expectation for fault in faults), faults


def extent_faults(image: MadeImage, damage: Callable[[bytearray, range], object]) -> list[Fault]:
    bootstrap = Bootstrap(image.bootstrap)
    blob, made = bootstrap.blobs[0], image.blobs[0]
    meta = BlobMeta(made.meta)
    found = []
    for chunks in extents_of(meta):
        extent = meta.extent(chunks[0])
        start = extent.compressed_offset
        encoded = bytearray(made.data[start : start + extent.compressed_size])
        damage(encoded, chunks)
        found += list(check_extent(blob, meta, bootstrap.chunk_digests(0), chunks, encoded))
    return found


def test_extents_that_are_whole(batched: MadeImage) -> None:
    assert extent_faults(batched, lambda encoded, chunks: None) == []


def test_every_damaged_extent_is_found(batched: MadeImage) -> None:
    def damage(encoded: bytearray, chunks: range) -> None:
        encoded[len(encoded) // 2] ^= 1

    infos = batched.blobs[0].infos
    damaged = {fault.offset_bytes for fault in extent_faults(batched, damage)}
    assert damaged == {info.compressed_offset for info in infos}


def test_short_extents_are_found(batched: MadeImage) -> None:
    faults = extent_faults(batched, lambda encoded, chunks: encoded.pop())
    assert all("encoded bytes, found" in fault.expectation for fault in faults)
    assert len(faults) == len(list(extents_of(BlobMeta(batched.blobs[0].meta))))


def test_chunks_without_a_digest_are_decoded_and_summed(batched: MadeImage) -> None:
    blob, made = batched.entries[0], batched.blobs[0]
    meta = BlobMeta(made.meta)
    index = first_plain(batched)
    extent = meta.extent(index)
    start = extent.compressed_offset
    encoded = bytes(made.data[start : start + extent.compressed_size])
    assert list(check_extent(blob, meta, None, range(index, index + 1), encoded)) == []


def test_superblock_block_count_of_old_images(image: MadeImage) -> None:
    data = bytearray(image.bootstrap)
    struct.pack_into("<I", data, Superblock.OFFSET + 36, 4096)
    assert list(check_bootstrap_bytes(data, "old")) == []

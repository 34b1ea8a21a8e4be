"""Images made by other Nydus tools: everything in them that can be verified is, down to decoded contents."""

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from rafs.blob_table import BlobEntry, BlobFeatures
from rafs.blobmeta import HEADER_SIZE, BlobMeta, BlobMetaHeader, node_form
from rafs.blobmeta_header import check_against_blob
from rafs.bootstrap import Bootstrap
from rafs.check import check_blob_meta, check_bootstrap, check_extent, extents_of
from rafs.chunk import ChunkFlags
from rafs.codec import Compressor, decompress
from rafs.digest import Digester
from rafs.superblock import RafsFlags
from rafs.toc import TAIL_MAX, TAR_HEADER_SIZE, TocEntry, TocFlags, read_tar_header, read_toc
from tests.conftest import fixtures_dir

pytestmark = pytest.mark.needs_fixtures

PAIR_BLOB = "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef"
SELF_CONTAINED = "2fa78cad554b75ac91a4a125ed148d0ddeb25efa4aaa8bd80e5dc292690a4dca"
SELF_CONTAINED_BLOB = "d788a0eac4ff9779bc2eae3842117a918d847d90fddbea1503f7c5296a4a7de3"
ZRAN_META = "233c72f2b6b698c07021c4da367cfe2dff4f049efbaa885ca0ff760ea297865a.blob.meta"


@dataclass(frozen=True, slots=True)
class KnownFile:
    """What is known of one file: its chunk's place in both forms of the blob, and its digests."""

    size: int
    mtime_s: int
    compressed: tuple[int, int]
    uncompressed_offset: int
    blake3: str
    sha256: str


PAIR_FILES = {
    b"/lib.rs": KnownFile(
        16931,
        1676819553,
        (0, 4828),
        0,
        "f7e2735f1c6ae9cde91e537416b09d8bb71b306a421d19cc1012a51f93a7fe69",
        "1810eba864521293bb0d6b55a3c82318d4d89f294ed761c456d9088a17de0c69",
    ),
    b"/sync_io.rs": KnownFile(
        13400,
        1676819553,
        (4828, 2974),
        20480,
        "812465bcc9e88393598311dc5fc93abaeccef0185bcd99f9701d17ebdf9adc3f",
        "e629ab260ff0dc02a24648a3e0dd8c13a5daf233d535c330e3201925f5eeff96",
    ),
}
SELF_CONTAINED_FILES = {
    b"/error.rs": KnownFile(
        2816,
        1667882847,
        (0, 1211),
        0,
        "bf8f65fee2b536e614987f003484d42ff608f8cc41ca5308260193ddc48c9218",
        "b23741280bb7fbbd48b68da04f1ee8a4559a3191fd26e7bc332fe9a82205750b",
    ),
    b"/lib.rs": KnownFile(
        678,
        1667567839,
        (1211, 407),
        4096,
        "28f73b404339f55338edbdf54f1bf877af7a89dfc0c9a1e7d57168d110c7f951",
        "7628231c52136b04935025215115e29df7f16f223f66c7793e70721483896210",
    ),
    b"/logger.rs": KnownFile(
        3115,
        1667567839,
        (1618, 1211),
        8192,
        "9909d80bbb324c02d46c6a5b078b018b41e60b62ff49b1d3ed9ab1126ca2d3a0",
        "085f726e0b038b4121a0c9fa15a04e154f80e703be78b3d54c2dd445eae807bc",
    ),
}


def read(name: str) -> bytes:
    return (fixtures_dir() / name).read_bytes()


def toc_of(blob: bytes) -> dict[str, TocEntry]:
    tail = blob[-TAIL_MAX:]
    return {entry.name: entry for entry in read_toc(tail, len(blob) - len(tail))}


def section(blob: bytes, entry: TocEntry) -> bytes:
    return blob[entry.offset : entry.offset + entry.compressed_size]


def meta_of(blob: bytes, entry: BlobEntry) -> BlobMeta:
    """blob.meta as the node keeps it, from where the blob table says that its parts lie in the blob."""
    end = entry.ci_offset + entry.ci_compressed_size
    array = blob[entry.ci_offset : end]
    head_at = end
    header = BlobMetaHeader.unpack(blob[head_at : head_at + HEADER_SIZE], head_at)
    check_against_blob(header, entry)
    return BlobMeta(node_form(array, header))


def assert_files(bootstrap: Bootstrap, blob: bytes, files: dict[bytes, KnownFile]) -> None:
    """Metadata, places and contents of all files of an image of one blob."""
    meta = meta_of(blob, bootstrap.blobs[0])
    digests = bootstrap.chunk_digests(0)
    assert [path for path, _ in bootstrap.walk()] == [b"/", *files]
    for path, known in files.items():
        inode = bootstrap.resolve(path)
        seen = (inode.mode, inode.uid, inode.gid, inode.nlink, inode.size, inode.mtime_s)
        assert seen == (0o100644, 0, 0, 1, known.size, known.mtime_s)
        (ref,) = bootstrap.chunk_refs(inode)
        chunk, row = meta.chunk(ref.chunk_index), digests.row(ref.chunk_index)
        assert ref.uncompressed_offset == chunk.uncompressed_offset == known.uncompressed_offset
        assert (chunk.compressed_offset, chunk.compressed_size) == known.compressed
        assert (row.compressed_offset, row.compressed_size) == known.compressed
        assert row.flags == ChunkFlags.COMPRESSED
        start, size = known.compressed
        content = decompress(Compressor.ZSTD, blob[start : start + size], known.size)
        assert digests[ref.chunk_index] == bytes.fromhex(known.blake3)
        assert Digester.BLAKE3.digest(content).hex() == known.blake3
        assert hashlib.sha256(content).hexdigest() == known.sha256


def assert_nothing_found(bootstrap: Bootstrap, blob: bytes) -> None:
    entry = bootstrap.blobs[0]
    meta, digests = meta_of(blob, entry), bootstrap.chunk_digests(0)
    assert list(check_bootstrap(bootstrap)) == []
    assert list(check_blob_meta(entry, meta, digests)) == []
    for chunks in extents_of(meta):
        extent = meta.extent(chunks[0])
        start = extent.compressed_offset
        encoded = blob[start : start + extent.compressed_size]
        assert list(check_extent(entry, meta, digests, chunks, encoded)) == []


def test_bootstrap_of_the_pair() -> None:
    bootstrap = Bootstrap(read("rafs-v6-2.2.boot"))
    superblock, extended = bootstrap.superblock, bootstrap.extended
    assert (superblock.root_nid, superblock.inode_count, superblock.meta_block) == (128, 3, 2)
    assert superblock.device_count == 1
    assert extended.flags == (
        RafsFlags.COMPRESSION_ZSTD
        | RafsFlags.HASH_BLAKE3
        | RafsFlags.EXPLICIT_UID_GID
        | RafsFlags.INLINED_CHUNK_DIGEST
    )
    assert extended.chunk_size == 0x100000
    assert extended.chunk_table_size == 2 * 80
    assert bootstrap.prefetch_nids == ()
    root = bootstrap.root()
    # The link count at byte 44 of the record is 2: the directory has no sub-directories.
    assert (root.mode, root.size, root.nlink) == (0o40755, 67, 2)


def test_blob_table_entry_of_the_pair() -> None:
    (blob,) = Bootstrap(read("rafs-v6-2.2.boot")).blobs
    assert blob.blob_id == PAIR_BLOB
    assert blob.features == 0x70000021
    assert (blob.compressed_size, blob.uncompressed_size, blob.toc_size) == (14554, 36864, 1024)
    assert (blob.ci_offset, blob.ci_compressed_size, blob.ci_compressor) == (8314, 32, Compressor.NONE)
    assert blob.data_end == 7802


def test_contents_of_the_pair() -> None:
    assert_files(Bootstrap(read("rafs-v6-2.2.boot")), read(PAIR_BLOB), PAIR_FILES)


def test_nothing_is_found_in_the_pair() -> None:
    assert_nothing_found(Bootstrap(read("rafs-v6-2.2.boot")), read(PAIR_BLOB))


def test_table_of_contents_of_the_pair() -> None:
    blob = read(PAIR_BLOB)
    toc = toc_of(blob)
    places = {name: (entry.offset, entry.compressed_size) for name, entry in toc.items()}
    # The first offset is a slip of builders of that time: the data starts at 0.
    assert places == {
        "image.blob": (7802, 7802),
        "blob.meta": (8314, 32),
        "blob.meta.header": (8346, 4096),
        "blob.digest": (12954, 64),
    }
    for name in ("blob.meta", "blob.meta.header", "blob.digest"):
        assert hashlib.sha256(section(blob, toc[name])).digest() == toc[name].digest
    # That of the data is over the stored bytes with the tar header behind them.
    assert hashlib.sha256(blob[: 7802 + TAR_HEADER_SIZE]).digest() == toc["image.blob"].digest
    assert read_tar_header(blob[7802:8314], 7802) == ("image.blob", 7802)


def test_digest_of_the_table_of_contents_of_the_pair() -> None:
    (entry,) = Bootstrap(read("rafs-v6-2.2.boot")).blobs
    assert hashlib.sha256(read(PAIR_BLOB)[-entry.toc_size :]).digest() == entry.toc_digest


def test_digest_section_of_the_pair_holds_the_digests_in_chunk_order() -> None:
    section_bytes = section(read(PAIR_BLOB), toc_of(read(PAIR_BLOB))["blob.digest"])
    digests = Bootstrap(read("rafs-v6-2.2.boot")).chunk_digests(0)
    assert section_bytes == digests[0] + digests[1]


def test_blob_id_of_the_pair_leaves_the_digest_section_out() -> None:
    blob = read(PAIR_BLOB)
    assert hashlib.sha256(blob[:12954] + blob[12954 + 64 :]).hexdigest() == PAIR_BLOB
    whole = hashlib.sha256(blob).hexdigest()
    assert whole == "4b16fb83ae9f62d8263323b8569535e66ebf21171cf98fd94db9db27b59755ac"


def inner_bootstrap() -> Bootstrap:
    """The bootstrap inside the self-contained blob."""
    blob = read(SELF_CONTAINED)
    entry = toc_of(blob)["image.boot"]
    assert (entry.offset, entry.compressed_size, entry.uncompressed_size) == (7997, 501, 20480)
    assert entry.flags == TocFlags.ZSTD
    data = decompress(Compressor.ZSTD, section(blob, entry), entry.uncompressed_size)
    assert hashlib.sha256(data).digest() == entry.digest
    expected = "d85f1b77aab4849b34ffc447fee67a46ae9eb2af8533bf5faa62224df1796871"
    assert entry.digest.hex() == expected
    return Bootstrap(data, "image.boot")


def test_bootstrap_of_the_self_contained_blob() -> None:
    bootstrap = inner_bootstrap()
    assert bootstrap.extended.flags == 0x94
    assert (bootstrap.inode_count, bootstrap.root_nid) == (4, 128)
    (blob,) = bootstrap.blobs
    assert (blob.blob_id, blob.features) == (SELF_CONTAINED_BLOB, BlobFeatures.ALIGNED)
    assert (blob.compressed_size, blob.uncompressed_size, blob.toc_size) == (2829, 12288, 0)
    assert blob.data_end == 2829
    root = bootstrap.root()
    assert (root.mode, root.size, root.nlink) == (0o40755, 86, 2)


def test_contents_of_the_self_contained_blob() -> None:
    assert_files(inner_bootstrap(), read(SELF_CONTAINED), SELF_CONTAINED_FILES)


def test_nothing_is_found_in_the_self_contained_blob() -> None:
    assert_nothing_found(inner_bootstrap(), read(SELF_CONTAINED))


def test_table_of_contents_of_the_self_contained_blob() -> None:
    blob = read(SELF_CONTAINED)
    assert hashlib.sha256(blob).hexdigest() == SELF_CONTAINED
    toc = toc_of(blob)
    assert toc["image.blob"].offset == 2829
    assert (toc["blob.meta"].offset, toc["blob.meta"].compressed_size) == (3341, 48)
    assert (toc["blob.meta.header"].offset, toc["blob.meta.header"].compressed_size) == (3389, 4096)
    assert hashlib.sha256(blob[: 2829 + TAR_HEADER_SIZE]).digest() == toc["image.blob"].digest
    for name in ("blob.meta", "blob.meta.header"):
        assert hashlib.sha256(section(blob, toc[name])).digest() == toc[name].digest


def test_zran_metadata() -> None:
    data = read(ZRAN_META)
    meta = BlobMeta.open(fixtures_dir() / ZRAN_META)
    header = meta.header
    assert (meta.count, header.context_count) == (163, 21)
    assert header.features & BlobFeatures.ZRAN
    assert header.context_size == 21 * 40 + 655360
    assert data[-HEADER_SIZE:] == header.pack()
    contexts = [meta.zran_context(index) for index in range(header.context_count)]
    dictionaries = [meta.zran_dictionary(context) for context in contexts]
    # A stream starts without a window; every later restart point has the 32 KiB before it.
    assert sorted(len(dictionary) for dictionary in dictionaries) == [0] + [32768] * 20
    assert contexts[0].dict_size == 0
    for before, after in pairwise(contexts):
        # Each goes on to the end of the last chunk that starts in it, past the start of the next.
        assert before.out_offset < after.out_offset <= before.out_offset + before.out_len
        assert before.in_offset < after.in_offset <= before.in_offset + before.in_len
        assert after.ctx_bits < 8
    for index in range(meta.count):
        chunk = meta.chunk(index)
        assert chunk.uncompressed_offset % 4096 == 0
        assert 0 < chunk.uncompressed_size <= 1 << 20
    meta.close()


def test_zran_dictionaries_lie_one_behind_the_other() -> None:
    meta = BlobMeta.open(fixtures_dir() / ZRAN_META)
    places = [meta.zran_context(index) for index in range(meta.header.context_count)]
    position = 0
    for context in places:
        if context.dict_size:
            assert context.dict_offset == position
            position += context.dict_size
    assert position == 655360
    meta.close()


@pytest.mark.parametrize("name", ["rafs-v6-2.2.boot", PAIR_BLOB, SELF_CONTAINED, ZRAN_META])
def test_fixtures_are_those_of_the_list(name: str) -> None:
    """The list beside the files gives the SHA-256 of all but the last, whose size it gives."""
    listed = Path(fixtures_dir() / "README.md").read_text()
    data = read(name)
    assert hashlib.sha256(data).hexdigest() in listed or f"{len(data)} bytes" in listed

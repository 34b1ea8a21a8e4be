"""Areas without a fixed size: directories, extended attributes, tables of contents, codecs."""

import itertools

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from rafs.codec import Compressor, compress, decompress
from rafs.dirent import (
    DIRENT_SIZE,
    Dirent,
    directory_size,
    pack_directory,
    search_block,
    split_blocks,
    unpack_block,
)
from rafs.errors import NydusError
from rafs.record import BLOCK_SIZE
from rafs.toc import TocEntry, TocFlags, pack_tar_header, read_toc
from rafs.xattr import pack_xattrs, unpack_xattrs, xattr_icount
from tests.hostile import value_or_error

NAMES = st.binary(min_size=1, max_size=255).filter(lambda name: not set(name) & {0, 0x2F})
PREFIXES = (b"user.", b"trusted.", b"security.")
SUFFIXES = st.binary(min_size=1, max_size=255)
ATTRIBUTES = st.dictionaries(
    st.builds(lambda prefix, suffix: prefix + suffix, st.sampled_from(PREFIXES), SUFFIXES)
    | st.sampled_from([b"system.posix_acl_access", b"system.posix_acl_default"]),
    st.binary(max_size=300),
    max_size=6,
)


def blocks_of(data: bytes) -> list[tuple[bytes, int]]:
    return [(data[at : at + BLOCK_SIZE], at) for at in range(0, len(data), BLOCK_SIZE)]


@given(st.sets(NAMES, min_size=1, max_size=60), st.data())
def test_directories_read_back(names: set[bytes], data: st.DataObject) -> None:
    ordered = sorted(names)
    nids = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=len(names), max_size=len(names)))
    types = [nid % 7 + 1 for nid in nids]
    packed = pack_directory(ordered, nids, types)
    assert len(packed) == directory_size([len(name) for name in ordered])
    found = [entry for block, at in blocks_of(packed) for entry in unpack_block(block, at)]
    expected = [Dirent(*entry) for entry in zip(ordered, nids, types, strict=True)]
    assert found == expected
    for entry in expected:
        hits = [search_block(block, entry.name, at) for block, at in blocks_of(packed)]
        assert [hit for hit in hits if hit] == [entry]
    absent = data.draw(NAMES)
    assume(absent not in names)
    assert not any(search_block(block, absent, at) for block, at in blocks_of(packed))


@given(st.lists(st.integers(1, 255), min_size=1, max_size=200))
def test_no_block_is_too_full_or_could_take_one_more(lengths: list[int]) -> None:
    counts = split_blocks(lengths)
    assert sum(counts) == len(lengths)
    starts = [0, *itertools.accumulate(counts)]
    for start, end in itertools.pairwise(starts):
        used = DIRENT_SIZE * (end - start) + sum(lengths[start:end])
        assert 0 < used <= BLOCK_SIZE
        if end < len(lengths):
            assert used + DIRENT_SIZE + lengths[end] > BLOCK_SIZE


@given(st.binary(max_size=200), st.binary(max_size=3))
@example(b"\0" * 8 + b"\x0c\0" + b"\0" * 2 + b"a", b"a")
def test_any_bytes_are_entries_or_a_format_error(block: bytes, name: bytes) -> None:
    with value_or_error():
        for entry in unpack_block(block, 0):
            assert 1 <= len(entry.name) <= 255
        search_block(block, name, 0)


@given(ATTRIBUTES)
def test_xattrs_read_back(attributes: dict[bytes, bytes]) -> None:
    packed = pack_xattrs(attributes, "file")
    assert unpack_xattrs(packed, 0, len(packed)) == attributes
    assert pack_xattrs(unpack_xattrs(packed, 0, len(packed)), "file") == packed
    if packed:
        assert 12 + 4 * (xattr_icount(len(packed)) - 1) == len(packed)


@given(ATTRIBUTES.filter(bool), st.data())
def test_damaged_xattrs_are_values_or_a_format_error(
    attributes: dict[bytes, bytes], data: st.DataObject
) -> None:
    packed = bytearray(pack_xattrs(attributes, "file"))
    position = data.draw(st.integers(0, len(packed) - 1))
    packed[position] ^= 1 << data.draw(st.integers(0, 7))
    length = data.draw(st.integers(0, len(packed)))
    for size in (len(packed), length // 4 * 4):
        with value_or_error():
            unpack_xattrs(packed, 0, size)


@given(st.binary(max_size=100), st.integers(0, 60), st.integers(0, 120))
def test_any_bytes_are_xattrs_or_a_format_error(data: bytes, offset: int, size: int) -> None:
    with value_or_error():
        unpack_xattrs(data, offset, size)


ENTRIES = st.builds(
    TocEntry,
    st.sampled_from(TocFlags),
    st.sampled_from(["image.blob", "blob.meta", "blob.meta.header", "image.boot"]),
    st.binary(min_size=32, max_size=32),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
)


@given(st.lists(ENTRIES, max_size=5), st.data())
def test_tables_of_contents_read_back(entries: list[TocEntry], data: st.DataObject) -> None:
    raw = b"".join(entry.pack() for entry in entries)
    tail = bytearray(b"before" + raw + pack_tar_header("rafs.blob.toc", len(raw)))
    assert read_toc(tail, 0) == tuple(entries)
    tail[data.draw(st.integers(0, len(tail) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with value_or_error():
        read_toc(tail, 0)


@given(st.binary(max_size=1200))
def test_any_bytes_are_a_table_of_contents_or_a_format_error(tail: bytes) -> None:
    with value_or_error():
        read_toc(tail, 0)


@pytest.mark.parametrize("codec", Compressor)
@given(content=st.binary(max_size=3000), data=st.data())
def test_codecs_give_back_what_they_took(codec: Compressor, content: bytes, data: st.DataObject) -> None:
    encoded = compress(codec, content)
    assert decompress(codec, memoryview(encoded), len(content)) == content
    for wrong in (len(content) + 1, len(content) - 1, 0, 1 << 24):
        if wrong >= 0 and wrong != len(content):
            with pytest.raises(NydusError):
                decompress(codec, encoded, wrong)


@pytest.mark.parametrize("codec", Compressor)
@given(content=st.binary(min_size=1, max_size=400), data=st.data())
def test_damaged_data_decodes_to_the_promised_size_or_not_at_all(
    codec: Compressor, content: bytes, data: st.DataObject
) -> None:
    encoded = bytearray(compress(codec, content))
    position = data.draw(st.integers(0, len(encoded) - 1))
    if data.draw(st.booleans()):
        encoded[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del encoded[position:]
    with value_or_error():
        assert len(decompress(codec, encoded, len(content))) == len(content)


@pytest.mark.parametrize("codec", Compressor)
@given(noise=st.binary(max_size=300), size=st.integers(0, 1 << 20))
def test_noise_decodes_to_the_promised_size_or_not_at_all(codec: Compressor, noise: bytes, size: int) -> None:
    with value_or_error():
        assert len(decompress(codec, noise, size)) == size

"""Chunk dictionaries: which chunks they lend, and under which numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest

from builder.build import BuiltImage
from builder.chunk_dict import ChunkDictionary, DictionaryMismatch
from builder.options import CompressionPolicy
from rafs.bootstrap import Bootstrap
from rafs.digest import Digester
from tests.builder_support import (
    ImageReader,
    as_dictionary,
    blob_paths,
    build,
    options,
    put,
    read_image,
    read_tree,
    small_statistics,
)


def _source(root: Path, **files: bytes) -> Path:
    for name, content in files.items():
        put(root, name.encode(), content)
    return root


def _chunks(*letters: str) -> bytes:
    """One 4 KiB chunk for each letter."""
    return b"".join(letter.encode() * 4096 for letter in letters)


def test_chunks_of_another_image_are_not_stored_again(tmp_path: Path) -> None:
    base = build(_source(tmp_path / "base", file=_chunks(*"abcd")), tmp_path / "w0")
    source = _source(tmp_path / "new", file=_chunks(*"xbyd"), other=_chunks("x"))
    built = build(source, tmp_path / "w1", dictionaries=(as_dictionary(base, "reg/base:1"),))
    own, lent = built.files.blobs
    assert own.path is not None
    assert own.source is None
    assert lent.path is None
    assert lent.source == "reg/base:1"
    assert lent.blob_id == base.files.blobs[0].blob_id
    assert read_image(built, blob_paths(base)) == read_tree(source)
    with Bootstrap.open(built.files.bootstrap) as bootstrap:
        refs = list(bootstrap.chunk_refs(bootstrap.resolve(b"/file")))
        assert [ref.blob_index for ref in refs] == [0, 1, 0, 1]
        assert [blob.index for blob in bootstrap.blobs] == [0, 1]
        assert bootstrap.blobs[0].chunk_count == 2


def test_an_image_that_has_nothing_of_its_own(tmp_path: Path) -> None:
    """Then there is no blob 0: those of the dictionaries count from there."""
    first = build(_source(tmp_path / "one", file=_chunks(*"ab")), tmp_path / "w0")
    second = build(_source(tmp_path / "two", file=_chunks(*"cd")), tmp_path / "w1")
    source = _source(tmp_path / "new", x=_chunks(*"dcba"), y=_chunks(*"ab"), empty=b"")
    dictionaries = (as_dictionary(first, "one"), as_dictionary(second, "two"))
    built = build(source, tmp_path / "w2", dictionaries=dictionaries)
    assert [blob.source for blob in built.files.blobs] == ["two", "one"]
    assert read_image(built, blob_paths(first, second)) == read_tree(source)
    assert built.statistics.bytes_out == 0
    assert small_statistics(built) == (3, 6, 0)


def test_an_unused_dictionary_leaves_no_trace(tmp_path: Path) -> None:
    base = build(_source(tmp_path / "base", file=_chunks(*"ab")), tmp_path / "w0")
    source = _source(tmp_path / "new", file=_chunks(*"xy"))
    plain = build(source, tmp_path / "w1")
    built = build(source, tmp_path / "w2", dictionaries=(as_dictionary(base),))
    assert built.files.bootstrap.read_bytes() == plain.files.bootstrap.read_bytes()


def test_several_dictionaries_the_first_one_lends(tmp_path: Path) -> None:
    first = build(_source(tmp_path / "one", file=_chunks(*"ab")), tmp_path / "w0")
    second = build(_source(tmp_path / "two", file=_chunks(*"bc")), tmp_path / "w1")
    source = _source(tmp_path / "new", file=_chunks(*"cbax"))
    dictionaries = (as_dictionary(first, "one"), as_dictionary(second, "two"))
    built = build(source, tmp_path / "w2", dictionaries=dictionaries)
    reader = ImageReader.open(built, blob_paths(first, second))
    refs = list(reader.bootstrap.chunk_refs(reader.bootstrap.resolve(b"/file")))
    names = [built.files.blobs[ref.blob_index].source for ref in refs]
    assert names == ["two", "one", "one", None]
    assert reader.tree() == read_tree(source)


def test_a_dictionary_that_itself_borrowed(tmp_path: Path) -> None:
    """Its image holds two blobs; both can lend, and the blob's source is the image given."""
    base = build(_source(tmp_path / "base", file=_chunks(*"ab")), tmp_path / "w0")
    middle = build(
        _source(tmp_path / "middle", file=_chunks(*"abcd")),
        tmp_path / "w1",
        dictionaries=(as_dictionary(base, "base"),),
    )
    source = _source(tmp_path / "new", file=_chunks(*"acx"))
    built = build(source, tmp_path / "w2", dictionaries=(as_dictionary(middle, "middle"),))
    assert [blob.source for blob in built.files.blobs] == [None, "middle", "middle"]
    assert read_image(built, blob_paths(base, middle)) == read_tree(source)


def test_chunks_in_batches_are_lent_too(tmp_path: Path) -> None:
    batches = options(chunk_size=1 << 16, batch_size=1 << 16)
    small = {f"f{number}": b"%d" % number * 500 for number in range(100)}
    base = build(_source(tmp_path / "base", **small), tmp_path / "w0", batches)
    more = {f"g{number}": b"new %d" % number * 500 for number in range(100)}
    source = _source(tmp_path / "new", **small, **more)
    built = build(source, tmp_path / "w1", batches, (as_dictionary(base),))
    assert built.statistics.chunks_unique == 100
    assert read_image(built, blob_paths(base)) == read_tree(source)


def test_a_dictionary_with_another_compression_fits(tmp_path: Path) -> None:
    base = build(
        _source(tmp_path / "base", file=_chunks(*"ab")),
        tmp_path / "w0",
        options(compression=CompressionPolicy.LZ4),
    )
    source = _source(tmp_path / "new", file=_chunks(*"abx"))
    built = build(source, tmp_path / "w1", dictionaries=(as_dictionary(base),))
    assert built.statistics.chunks_unique == 1
    assert read_image(built, blob_paths(base)) == read_tree(source)


def test_unfit_dictionaries_are_refused(tmp_path: Path) -> None:
    base = build(_source(tmp_path / "base", file=b"x"), tmp_path / "w0")
    dictionary = (as_dictionary(base, "reg/base:1"),)
    with pytest.raises(DictionaryMismatch, match=r"reg/base:1: .* 4096-byte chunks with BLAKE3"):
        ChunkDictionary(dictionary, 8192, Digester.BLAKE3, tmp_path)
    with pytest.raises(DictionaryMismatch):
        ChunkDictionary(dictionary, 4096, Digester.SHA256, tmp_path)


def _rewrite_rows(built: BuiltImage, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """Puts changed rows into the chunk table of a built image."""
    with Bootstrap.open(built.files.bootstrap) as bootstrap:
        rows = [bytes(row) for row in bootstrap.chunk_rows()]
        offset = bootstrap.extended.chunk_table_offset
    with built.files.bootstrap.open("r+b") as file:
        file.seek(offset)
        file.write(b"".join(change(rows)))


def test_a_table_that_is_not_sorted(tmp_path: Path) -> None:
    base = build(_source(tmp_path / "base", file=_chunks(*"abcdefgh")), tmp_path / "w0")
    _rewrite_rows(base, lambda rows: rows[::-1])
    source = _source(tmp_path / "new", file=_chunks(*"hgfexabcd"))
    built = build(source, tmp_path / "w1", dictionaries=(as_dictionary(base),))
    assert built.statistics.chunks_unique == 1
    assert read_image(built, blob_paths(base)) == read_tree(source)


def test_rows_of_a_blob_that_is_not_there(tmp_path: Path) -> None:
    base = build(_source(tmp_path / "base", file=_chunks(*"ab")), tmp_path / "w0")
    _rewrite_rows(base, lambda rows: [row[:32] + b"\7" + row[33:] for row in rows])
    with pytest.raises(DictionaryMismatch, match="more than its 1 blobs"):
        build(tmp_path / "base", tmp_path / "w1", dictionaries=(as_dictionary(base),))
    build(tmp_path / "base", tmp_path / "w1")  # the work directory is free again

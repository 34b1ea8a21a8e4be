"""`diff` where chunks cannot be compared, where batches travel whole, and with bad directories."""

from collections.abc import Callable
from pathlib import Path

import pytest

from backend.extents import ExtentIndex
from builder.build import BuiltImage
from builder.diff import Aspect, Change, compare_trees
from builder.diff_fetch import chunks_to_fetch
from builder.options import CompressionPolicy
from rafs.blobmeta import BlobMeta
from rafs.bootstrap import Bootstrap
from rafs.digest import Digester
from rafs.record import FormatError
from tests.builder_support import as_dictionary, build, options


def _opened(built: BuiltImage) -> Bootstrap:
    return Bootstrap(built.files.bootstrap.read_bytes())


def _extents(*images: BuiltImage) -> Callable[[str], ExtentIndex]:
    metas = {blob.blob_id: blob.meta for image in images for blob in image.files.blobs}
    return lambda blob_id: ExtentIndex(BlobMeta(metas[blob_id].read_bytes()))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "big").write_bytes(bytes(range(256)) * 64)
    (root / "small").write_bytes(b"small")
    (root / "empty").touch()
    return root


def test_an_image_does_not_differ_from_itself(tmp_path: Path, tree: Path) -> None:
    built = build(tree, tmp_path / "work")
    image = _opened(built)
    assert list(compare_trees(image, _opened(built))) == []
    (need,) = chunks_to_fetch(image, image, _extents())
    assert (need.chunks_missing, need.decoded_bytes, need.encoded_bytes) == (0, 0, 0)
    assert need.chunks > 0


def test_other_digesters_say_so_and_everything_is_fetched(tmp_path: Path, tree: Path) -> None:
    before = build(tree, tmp_path / "one", options(digester=Digester.BLAKE3))
    after = build(tree, tmp_path / "two", options(digester=Digester.SHA256))
    found = {one.path: one.aspects for one in compare_trees(_opened(before), _opened(after))}
    assert found == {b"/big": (Aspect.UNKNOWN_CONTENT,), b"/small": (Aspect.UNKNOWN_CONTENT,)}
    (need,) = chunks_to_fetch(_opened(before), _opened(after), _extents(after))
    assert need.chunks_missing == need.chunks


def test_other_chunk_sizes_leave_files_of_one_chunk_comparable(tmp_path: Path, tree: Path) -> None:
    before = build(tree, tmp_path / "one", options(chunk_size=4096))
    (tree / "small").write_bytes(b"tiny!")
    after = build(tree, tmp_path / "two", options(chunk_size=8192))
    found = {one.path: one.aspects for one in compare_trees(_opened(before), _opened(after))}
    assert found[b"/big"] == (Aspect.UNKNOWN_CONTENT,)
    assert Aspect.CONTENT in found[b"/small"]
    assert b"/empty" not in found


def test_other_sizes_differ_whatever_the_digester(tmp_path: Path, tree: Path) -> None:
    before = build(tree, tmp_path / "one", options(digester=Digester.BLAKE3))
    (tree / "big").write_bytes(b"shorter")
    after = build(tree, tmp_path / "two", options(digester=Digester.SHA256))
    found = {one.path: one.aspects for one in compare_trees(_opened(before), _opened(after))}
    assert Aspect.CONTENT in found[b"/big"]


def test_a_batch_travels_whole_and_once(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    for number in range(8):
        (root / f"{number}").write_bytes(bytes([number]) * 200)
    chosen = options(batch_size=4096, compression=CompressionPolicy.NONE)
    before = build(root, tmp_path / "one", chosen)
    (root / "3").write_bytes(b"new" * 60)
    (root / "4").write_bytes(b"old" * 60)
    after = build(root, tmp_path / "two", chosen)
    (need,) = chunks_to_fetch(_opened(before), _opened(after), _extents(after))
    assert (need.chunks_missing, need.decoded_bytes) == (2, 360)
    assert need.encoded_bytes == 6 * 200 + 360


def test_chunks_of_a_dictionary_are_held_by_who_has_the_dictionary(tmp_path: Path, tree: Path) -> None:
    before = build(tree, tmp_path / "one")
    (tree / "more").write_bytes(b"more")
    after = build(tree, tmp_path / "two", dictionaries=(as_dictionary(before),))
    needs = chunks_to_fetch(_opened(before), _opened(after), _extents(after))
    assert sum(need.chunks_missing for need in needs) == 1
    assert sum(need.decoded_bytes for need in needs) == 4


def test_a_file_that_became_a_directory(tmp_path: Path, tree: Path) -> None:
    before = build(tree, tmp_path / "one")
    (tree / "small").unlink()
    (tree / "small").mkdir()
    (tree / "small" / "inner").write_bytes(b"inner")
    after = build(tree, tmp_path / "two")
    found = {one.path: one for one in compare_trees(_opened(before), _opened(after))}
    assert Aspect.TYPE in found[b"/small"].aspects
    assert found[b"/small/inner"].change is Change.ADDED
    assert not found[b"/small"].is_metadata_only


def test_names_that_do_not_ascend_are_refused(tmp_path: Path, tree: Path) -> None:
    data = build(tree, tmp_path / "one").files.bootstrap.read_bytes()
    assert data.count(b"bigemptysmall") == 1
    broken = Bootstrap(data.replace(b"bigemptysmall", b"zigemptysmall"))
    with pytest.raises(FormatError, match="ascending"):
        list(compare_trees(broken, broken))

"""Reading a bootstrap: paths, errors, and what a hostile one may not do."""

import struct
from pathlib import Path

import pytest

from rafs.blob_table import BlobEntry
from rafs.bootstrap import Bootstrap, NoSuchEntry, NotADirectoryInImage
from rafs.errors import NydusError
from rafs.record import FormatError
from tests.rafs_image import ImageMaker, MadeImage, Options, directory, file, symlink


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> MadeImage:
    tree = directory({b"d": directory({b"f": file(b"f" * 5000)}), b"l": symlink(b"d"), b"\xff": file(b"")})
    return ImageMaker(tree).make(tmp_path_factory.mktemp("image") / "image.boot")


def test_paths_lead_to_inodes(image: MadeImage) -> None:
    bootstrap = Bootstrap(image.bootstrap)
    wanted = bootstrap.resolve(b"/d/f")
    for path in (b"d/f", b"//d///f/", b"/./d/./f", b"/d/../d/f"):
        assert bootstrap.resolve(path) == wanted
    assert bootstrap.resolve(b"/") == bootstrap.resolve(b"") == bootstrap.root()
    assert bootstrap.resolve(b"/l").is_symlink


def test_paths_that_lead_nowhere(image: MadeImage) -> None:
    bootstrap = Bootstrap(image.bootstrap)
    with pytest.raises(NoSuchEntry, match="/d/missing: no such"):
        bootstrap.resolve(b"/d/missing")
    for path in (b"/d/f/x", b"/l/f"):
        with pytest.raises(NotADirectoryInImage):
            bootstrap.resolve(path)


def test_map_is_closed_with_the_bootstrap(image: MadeImage, tmp_path: Path) -> None:
    path = tmp_path / "image.boot"
    path.write_bytes(image.bootstrap)
    with Bootstrap.open(path) as bootstrap:
        assert bootstrap.chunk_digests(0)[0]
        assert bootstrap.size_bytes == len(image.bootstrap)
    with pytest.raises(ValueError):
        bootstrap.root()


@pytest.mark.parametrize("size", [0, 1, 1023, 4095])
def test_files_shorter_than_a_block(tmp_path: Path, size: int) -> None:
    path = tmp_path / "image.boot"
    path.write_bytes(bytes(size))
    with pytest.raises(FormatError, match="at least one block"):
        Bootstrap.open(path)


def test_loop_of_directories_ends_the_walk(image: MadeImage) -> None:
    data = bytearray(image.bootstrap)
    bootstrap = Bootstrap(image.bootstrap)
    folder = bootstrap.resolve(b"/d")
    (_, offset), *_ = bootstrap.data_blocks(folder)
    struct.pack_into("<Q", data, offset + 24, bootstrap.root_nid)
    with pytest.raises(FormatError, match="under one name"):
        list(Bootstrap(data).walk())


def test_number_of_chunks_alone_costs_no_memory(image: MadeImage) -> None:
    data = bytearray(image.bootstrap)
    at = Bootstrap(image.bootstrap).extended.blob_table_offset
    struct.pack_into("<I", data, at + 72, 1 << 24)
    digests = Bootstrap(data).chunk_digests(0)
    assert len(digests) == 1 << 24
    assert not hasattr(digests._offsets, "typecode")  # a mapping with a row for each row
    assert digests[0] == Bootstrap(image.bootstrap).chunk_digests(0)[0]


def test_more_blobs_than_devices(image: MadeImage) -> None:
    data = bytearray(image.bootstrap)
    struct.pack_into("<I", data, 1152 + 16, 2 * BlobEntry.SIZE)
    with pytest.raises(FormatError, match="as many blobs as devices"):
        Bootstrap(data)


def test_sizes_that_no_file_can_have_end_at_the_end_of_the_bootstrap(image: MadeImage) -> None:
    for path, read in (
        (b"/d/f", lambda b, i: list(b.chunk_refs(i))),
        (b"/d", lambda b, i: list(b.readdir(i))),
        (b"/d", lambda b, i: b.lookup(i, b"x")),
        (b"/l", lambda b, i: b.readlink(i)),
    ):
        data = bytearray(image.bootstrap)
        struct.pack_into("<Q", data, Bootstrap(data).resolve(path).offset_bytes + 8, (1 << 64) - 1)
        bootstrap = Bootstrap(data)
        with pytest.raises(NydusError):
            read(bootstrap, bootstrap.resolve(path))


def test_bootstrap_of_an_empty_directory_has_a_size_of_whole_blocks(tmp_path: Path) -> None:
    image = ImageMaker(directory({}), Options(blob_count=0)).make(tmp_path / "image.boot")
    assert len(image.bootstrap) % 4096 == 0


def test_an_error_inside_is_not_hidden_by_the_map(image: MadeImage, tmp_path: Path) -> None:
    """Its traceback holds views of the map, so that the map cannot be closed yet."""
    path = tmp_path / "image.boot"
    path.write_bytes(image.bootstrap)

    def stumble() -> None:
        with Bootstrap.open(path) as bootstrap:
            view = bootstrap.chunk_table
            raise FormatError("a record", len(view), "something else")

    with pytest.raises(FormatError):
        stumble()

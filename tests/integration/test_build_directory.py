"""A directory as a source: the image holds exactly the tree, whatever the options and the day."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import blake3
import pytest

from builder.build import Build
from builder.directory import DirectorySource, FileStamp
from builder.options import CompressionPolicy
from builder.worker import SourceChanged, SourceUnreadable
from rafs.bootstrap import Bootstrap
from rafs.chunk import ChunkRef
from rafs.digest import Digester
from rafs.inode_table import InodeTable
from rafs.xattr import XattrUnsupported
from tests.builder_support import (
    ImageReader,
    build,
    image_bytes,
    make_plain_tree,
    make_root_tree,
    options,
    put,
    read_image,
    read_tree,
)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    make_plain_tree(tmp_path / "src")
    return tmp_path / "src"


@pytest.mark.needs_root
@pytest.mark.parametrize("batch_size", [0, 4096])
def test_everything_that_posix_has(tmp_path: Path, batch_size: int) -> None:
    make_root_tree(tmp_path / "src")
    built = build(tmp_path / "src", tmp_path / "work", options(batch_size=batch_size))
    assert read_image(built) == read_tree(tmp_path / "src")


@pytest.mark.parametrize("batch_size", [0, 4096])
def test_same_tree_same_bytes(
    tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """Whatever the number of workers, the day and the place."""
    elsewhere = tmp_path / "a" / "copy"
    shutil.copytree(plain, elsewhere, symlinks=True, copy_function=_link, ignore=_no_specials)
    (plain / "fifo").unlink()
    os.utime(plain, ns=(0, 987_654_321_000_000_001))
    images = []
    for threads, source in ((1, plain), (2, plain), (4, elsewhere)):
        chosen = options(threads=threads, batch_size=batch_size)
        images.append(image_bytes(build(source, tmp_path / f"w{threads}", chosen)))
        monkeypatch.setattr("time.time", lambda: 4_000_000_000.0)
    assert images[0] == images[1] == images[2]


def _link(source: str, target: str) -> None:
    os.link(source, target, follow_symlinks=False)


def _no_specials(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "fifo"]


@pytest.mark.parametrize("policy", list(CompressionPolicy))
@pytest.mark.parametrize("batch_size", [0, 8192, 1 << 16])
def test_compression_and_batches(
    tmp_path: Path, plain: Path, policy: CompressionPolicy, batch_size: int
) -> None:
    chosen = options(chunk_size=1 << 16, batch_size=batch_size, compression=policy)
    built = build(plain, tmp_path / "work", chosen)
    reader = ImageReader.open(built)
    assert reader.tree() == read_tree(plain)
    assert reader.bootstrap.blobs[0].compressor is policy.codec
    stored_as_it_is = built.statistics.bytes_out > built.statistics.bytes_unique
    assert stored_as_it_is is (policy is CompressionPolicy.NONE)


@pytest.mark.parametrize("chunk_size", [4096, 1 << 20, 16 << 20])
@pytest.mark.parametrize("digester", list(Digester))
def test_chunk_sizes_and_digests(tmp_path: Path, plain: Path, chunk_size: int, digester: Digester) -> None:
    chosen = options(chunk_size=chunk_size, batch_size=4096, digester=digester)
    built = build(plain, tmp_path / "work", chosen)
    reader = ImageReader.open(built)
    assert reader.bootstrap.digester is digester
    assert reader.bootstrap.chunk_size == chunk_size
    assert reader.tree() == read_tree(plain)


@pytest.mark.parametrize("policy", list(CompressionPolicy))
def test_the_largest_chunk_stored_as_it_is(tmp_path: Path, policy: CompressionPolicy) -> None:
    """Its encoded size has one bit more than a chunk info has room for."""
    put(tmp_path / "src", b"noise", blake3.blake3(b"noise").digest((32 << 20) + 5))
    chosen = options(chunk_size=16 << 20, compression=policy)
    assert read_image(build(tmp_path / "src", tmp_path / "work", chosen)) == read_tree(tmp_path / "src")


def test_what_cannot_be_compressed_is_stored_as_it_is(tmp_path: Path) -> None:
    for name, size in ((b"large", 1 << 20), (b"small", 5000)):
        put(tmp_path / "src", name, blake3.blake3(name).digest(size))
    put(tmp_path / "src", b"text", b"many words " * 1000)
    built = build(tmp_path / "src", tmp_path / "work", options(chunk_size=1 << 20))
    reader = ImageReader.open(built)
    meta = reader.metas[0]
    assert [meta.chunk(number).is_compressed for number in range(3)] == [False, False, True]
    assert reader.tree() == read_tree(tmp_path / "src")


def test_prefetched_files_lie_first(tmp_path: Path, plain: Path) -> None:
    chosen = options(prefetch=("/zz-third-name", "/-dash", "/a"), batch_size=4096)
    built = build(plain, tmp_path / "work", chosen)
    reader = ImageReader.open(built)
    order = [b"/a/b/other-name", b"/-dash", b"/a/b/c/d/e/deep"]
    assert list(reader.bootstrap.prefetch_nids) == [reader.bootstrap.resolve(path).nid for path in order]
    offsets = [reader.first_blob_offset(path) for path in order]
    assert offsets == sorted(offsets)
    cold = [b"/!bang", b"/random", b"/sparse", b"/small/001"]
    assert min(map(reader.first_blob_offset, cold)) > offsets[0]
    assert reader.tree() == read_tree(plain)
    plainly = build(plain, tmp_path / "w1", options(batch_size=4096))
    assert read_image(plainly) == reader.tree()


def test_an_empty_tree(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir(mode=0o700)
    os.utime(tmp_path / "src", ns=(0, 1))
    built = build(tmp_path / "src", tmp_path / "work")
    assert built.files.blobs == ()
    assert read_image(built) == read_tree(tmp_path / "src")


def test_a_tree_of_empty_files(tmp_path: Path) -> None:
    for number in range(600):
        put(tmp_path / "src", b"%d" % number, b"")
    built = build(tmp_path / "src", tmp_path / "work")
    assert built.files.blobs == ()
    assert built.statistics.files == 600
    assert read_image(built) == read_tree(tmp_path / "src")


def test_a_sparse_file_past_4_gib(tmp_path: Path) -> None:
    size = (5 << 30) + 3
    with put(tmp_path / "src", b"sparse", b"start").open("r+b") as file:
        file.seek((4 << 30) + 12_345)
        file.write(b"behind 4 GiB")
        file.truncate(size)
    built = build(tmp_path / "src", tmp_path / "work", options(chunk_size=16 << 20, threads=2))
    assert built.statistics.chunks == 321
    assert built.statistics.chunks_unique == 4
    reader = ImageReader.open(built)
    inode = reader.bootstrap.resolve(b"/sparse")
    assert inode.size == size
    chunks: dict[ChunkRef, list[int]] = {}
    for number, ref in enumerate(reader.bootstrap.chunk_refs(inode)):
        chunks.setdefault(ref, []).append(number)
    assert sorted(map(len, chunks.values())) == [1, 1, 1, 318]
    decoded = {number: reader.chunk(ref) for ref, (number, *_) in chunks.items()}
    assert decoded[0] == b"start" + bytes((16 << 20) - 5)
    assert decoded[1] == bytes(16 << 20)
    assert decoded[256] == bytes(12_345) + b"behind 4 GiB" + bytes((16 << 20) - 12_345 - 12)
    assert decoded[320] == bytes(3)


def test_a_directory_of_100_000_entries(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    first = put(tmp_path / "src", b"000000", b"x")
    for number in range(1, 100_000):
        # Links, because a file system makes them faster; 50,000 to a file, for its own limit.
        if number == 50_000:
            first = put(tmp_path / "src", b"050000", b"y")
            continue
        os.link(first, tmp_path / "src" / f"{number:06}")
    built = build(tmp_path / "src", tmp_path / "work")
    with Bootstrap.open(built.files.bootstrap) as bootstrap:
        root = bootstrap.root()
        names = [entry.name for entry in bootstrap.readdir(root)]
        assert names == [b".", b"..", *(b"%06d" % number for number in range(100_000))]
        found = bootstrap.lookup(root, b"077777")
        assert found is not None
        assert bootstrap.inode(found.nid).nlink == 50_000


def test_a_path_close_to_the_limit_of_the_kernel(tmp_path: Path) -> None:
    root = tmp_path / "src"
    room = 4095 - len(bytes(root))
    parts = [b"d" * 250] * ((room - 10) // 251)
    name = b"/".join(parts) + b"/" + b"f" * (room - 251 * len(parts) - 1)
    path = put(root, name, b"deep")
    assert len(bytes(path)) == 4095
    built = build(root, tmp_path / "work")
    assert ImageReader.open(built).read(b"/" + name) == b"deep"


def test_a_tree_deeper_than_a_path_can_be(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    here = os.open(tmp_path / "src", os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=here)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    with pytest.raises(SourceUnreadable, match="File name too long"):
        build(tmp_path / "src", tmp_path / "work")


def test_modules_in_the_current_directory_are_left_alone(
    tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("blake3.py", "signal.py", "builder.py", "mmap.py"):
        put(tmp_path / "trap", name.encode(), b"raise SystemExit('not mine')")
    monkeypatch.chdir(tmp_path / "trap")
    assert read_image(build(plain, tmp_path / "work")) == read_tree(plain)


def test_a_second_build_in_the_directory_reuses_everything(tmp_path: Path, plain: Path) -> None:
    first = image_bytes(build(plain, tmp_path / "work"))
    again = build(plain, tmp_path / "work")
    assert image_bytes(again) == first
    assert again.statistics.extents_reused == again.statistics.chunks_unique


def test_discard_removes_everything(tmp_path: Path, plain: Path) -> None:
    with Build(tmp_path / "work", options()) as running:
        running.run(plain)
        running.discard()
    assert not (tmp_path / "work").exists()


# --- sources that change, or cannot be read


Change = Callable[[Path], object]


@pytest.fixture
def change_when_found(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Change], None]:
    """Has a file changed behind the scan's back, before anything reads it."""

    def install(victim: Path, change: Change) -> None:
        scan = DirectorySource.scan

        def changing(source: DirectorySource, table: InodeTable) -> Iterator[FileStamp]:
            for stamp in scan(source, table):
                if stamp.path == bytes(victim):
                    change(victim)
                yield stamp

        monkeypatch.setattr(DirectorySource, "scan", changing)

    return install


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    put(tmp_path / "src", b"other", b"not the one")
    return put(tmp_path / "src", b"zz/victim", b"12345678" * 1000)


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _rewrite(path: Path) -> None:
    path.write_bytes(b"87654321" * 1000)
    os.utime(path, ns=(5, 5))


def _replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _replace_by_other_file(path: Path) -> None:
    stamp = path.stat()
    path.unlink()
    path.write_bytes(b"87654321" * 1000)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def _replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def _shrink(path: Path) -> None:
    os.truncate(path, 10)


def _remove_directory(path: Path) -> None:
    shutil.rmtree(path.parent)


_CHANGES = [
    *((change, ()) for change in (_grow, _shrink, _rewrite, _replace_by_fifo, _replace_by_other_file)),
    # Here every file is looked at again before it is read, so that the last change would be no mixture.
    *((change, ("/zz",)) for change in (_grow, _shrink, _rewrite, _replace_by_fifo)),
    (_grow, ("/other",)),
]


@pytest.mark.parametrize(("change", "prefetch"), _CHANGES)
def test_a_file_that_changes_is_named(
    tmp_path: Path,
    victim: Path,
    change_when_found: Callable[[Path, Change], None],
    change: Change,
    prefetch: tuple[str, ...],
) -> None:
    change_when_found(victim, change)
    with pytest.raises(SourceChanged, match=r"/zz/victim: changed while it was read"):
        build(tmp_path / "src", tmp_path / "work", options(prefetch=prefetch))
    assert not (tmp_path / "work" / "image.boot").exists()


@pytest.mark.parametrize("prefetch", [(), ("/zz",)])
@pytest.mark.parametrize("change", [Path.unlink, _replace_by_link, _remove_directory])
def test_a_file_that_vanishes_is_named(
    tmp_path: Path,
    victim: Path,
    change_when_found: Callable[[Path, Change], None],
    change: Change,
    prefetch: tuple[str, ...],
) -> None:
    change_when_found(victim, change)
    with pytest.raises((SourceUnreadable, SourceChanged), match="/zz/victim: "):
        build(tmp_path / "src", tmp_path / "work", options(prefetch=prefetch))


def test_a_directory_that_vanishes_is_named(
    tmp_path: Path, victim: Path, change_when_found: Callable[[Path, Change], None]
) -> None:
    change_when_found(tmp_path / "src" / "other", lambda _: shutil.rmtree(victim.parent))
    with pytest.raises(SourceUnreadable, match="/zz: No such file"):
        build(tmp_path / "src", tmp_path / "work")


def test_a_large_file_that_changes_between_its_pieces(tmp_path: Path) -> None:
    path = put(tmp_path / "src", b"large", b"")
    os.truncate(path, 200 << 20)
    chosen = options(chunk_size=1 << 20)
    with (
        Build(tmp_path / "work", chosen, on_progress=lambda counters: os.utime(path, (1, 1))) as running,
        pytest.raises(SourceChanged, match="/large"),
    ):
        running.run(tmp_path / "src")


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceUnreadable, match="nothing: No such file"):
        build(tmp_path / "nothing", tmp_path / "work")


@pytest.mark.needs_root
def test_too_many_extended_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "src", b"marked", b"x")
    (tmp_path / "src" / "below").mkdir()
    os.setxattr(path.parent / "below", "user.big", b"v" * 100)
    monkeypatch.setattr("rafs.xattr.VALUE_MAX", 99)
    with pytest.raises(XattrUnsupported, match="/below"):
        build(tmp_path / "src", tmp_path / "work")

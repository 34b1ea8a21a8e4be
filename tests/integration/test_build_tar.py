"""Archives as a source: what GNU tar and Python's tarfile write gives the tree that it was made of."""

import gzip
import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import zstandard

from builder.build import Build
from builder.tar_tree import InvalidArchive
from builder.worker import SourceChanged, SourceUnreadable
from rafs.bootstrap import Bootstrap
from tests.builder_support import (
    ImageReader,
    Tree,
    build,
    image_bytes,
    make_plain_tree,
    make_root_tree,
    options,
    read_image,
    read_tree,
    small_statistics,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

FORMATS = ["gnu", "posix", "oldgnu"]
ALL_XATTRS = ("--xattrs", "--xattrs-include=*")


def _tar(source: Path, archive: Path, *flags: str) -> Path:
    subprocess.run(["tar", "-C", source, *flags, "-cf", archive, "."], check=True, capture_output=True)
    return archive


def _add(archive: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def _archive(path: Path, fill: Callable[[tarfile.TarFile], None], **open_options: object) -> Path:
    with tarfile.open(path, "w", **open_options) as archive:  # type: ignore[call-overload]
        fill(archive)
    return path


def _without(tree: Tree, *suffixes: bytes) -> Tree:
    return {name: entry for name, entry in tree.items() if not name.endswith(suffixes)}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    make_plain_tree(tmp_path / "src")
    return tmp_path / "src"


@pytest.mark.needs_root
@pytest.mark.parametrize("flags", [ALL_XATTRS, ("--acls", *ALL_XATTRS, "--xattrs-exclude=system.*")])
def test_everything_that_posix_tar_keeps(tmp_path: Path, flags: tuple[str, ...]) -> None:
    make_root_tree(tmp_path / "src")
    archive = _tar(tmp_path / "src", tmp_path / "a.tar", "--format=posix", *flags, "--sparse")
    expected = _without(read_tree(tmp_path / "src"), b"/socket")
    found = read_image(build(archive, tmp_path / "work"))
    assert found == expected


@pytest.mark.parametrize("tar_format", FORMATS)
@pytest.mark.parametrize("sparse", [(), ("--sparse",)])
def test_formats_of_gnu_tar(tmp_path: Path, plain: Path, tar_format: str, sparse: tuple[str, ...]) -> None:
    for directory, names, files in os.walk(plain):
        for name in (".", *names, *files):  # these formats keep whole seconds
            os.utime(os.path.join(directory, name), (0, 1_000_000_000), follow_symlinks=False)
    archive = _tar(plain, tmp_path / "a.tar", f"--format={tar_format}", *sparse)
    assert read_image(build(archive, tmp_path / "work")) == read_tree(plain)


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
def test_sparse_files_of_pax(tmp_path: Path, plain: Path, version: str) -> None:
    flags = ("--format=posix", "--sparse", f"--sparse-version={version}")
    archive = _tar(plain, tmp_path / "a.tar", *flags)
    assert archive.stat().st_size < 1_000_000
    assert read_image(build(archive, tmp_path / "work")) == read_tree(plain)


def test_an_archive_gives_the_image_of_its_directory(tmp_path: Path, plain: Path) -> None:
    """The same tree; chunks lie in the order of the archive."""
    archive = _tar(plain, tmp_path / "a.tar", "--format=posix")
    from_tar, from_directory = build(archive, tmp_path / "w0"), build(plain, tmp_path / "w1")
    assert read_image(from_tar) == read_image(from_directory)
    assert small_statistics(from_tar) == small_statistics(from_directory)


def test_the_image_does_not_depend_on_workers_or_compression(tmp_path: Path, plain: Path) -> None:
    archive = _tar(plain, tmp_path / "a.tar", "--format=posix")
    data = archive.read_bytes()
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(data, 1))
    images = [
        image_bytes(build(source, tmp_path / f"w{threads}", options(threads=threads, batch_size=4096)))
        for threads, source in ((1, archive), (2, archive), (4, packed))
    ]
    assert images[0] == images[1] == images[2]


def _zstd_frames(data: bytes) -> bytes:
    middle = len(data) // 2
    compressor = zstandard.ZstdCompressor()
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    return (
        skippable
        + compressor.compress(data[:middle])
        + skippable
        + zstandard.ZstdCompressor(write_content_size=False).compress(data[middle:])
    )


def _gzip_members(data: bytes) -> bytes:
    middle = len(data) // 3
    return gzip.compress(data[:middle]) + gzip.compress(b"") + gzip.compress(data[middle:])


@pytest.mark.parametrize("pack", [bytes, gzip.compress, _gzip_members, zstandard.compress, _zstd_frames])
@pytest.mark.parametrize("prefetch", [(), ("/small",)])
def test_compressed_archives_and_standard_input(
    tmp_path: Path,
    plain: Path,
    monkeypatch: pytest.MonkeyPatch,
    pack: Callable[[bytes], bytes],
    prefetch: tuple[str, ...],
) -> None:
    data = pack(_tar(plain, tmp_path / "a.tar", "--format=posix").read_bytes())
    source = tmp_path / "packed"
    source.write_bytes(data)
    chosen = options(prefetch=prefetch)
    from_file = build(source, tmp_path / "w0", chosen)
    with source.open("rb") as stream:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stream))
        from_stream = build(Path("-"), tmp_path / "w1", chosen)
        assert stream.read() == b""  # or the program at the other end of a pipe would die of it
    assert image_bytes(from_file) == image_bytes(from_stream)
    assert read_image(from_file) == read_tree(plain)
    assert not (tmp_path / "w1" / "stdin").exists()


def test_a_named_pipe_is_read_once(tmp_path: Path, plain: Path) -> None:
    archive = _tar(plain, tmp_path / "a.tar", "--format=posix")
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cp", archive, tmp_path / "pipe"]) as writer:
        built = build(tmp_path / "pipe", tmp_path / "work", options(prefetch=("/small",)))
        assert writer.wait() == 0
    assert read_image(built) == read_tree(plain)


def test_prefetched_content_comes_first(tmp_path: Path, plain: Path) -> None:
    archive = _tar(plain, tmp_path / "a.tar", "--format=posix")
    built = build(archive, tmp_path / "work", options(prefetch=("/zz-third-name", "/!bang")))
    reader = ImageReader.open(built)
    hot = [reader.bootstrap.resolve(path).nid for path in (b"/many/chunks", b"/!bang")]
    assert list(reader.bootstrap.prefetch_nids) == hot
    others = (path for path, inode in reader.bootstrap.walk() if inode.is_file and inode.nid not in hot)
    last_hot = max(map(reader.first_blob_offset, (b"/many/chunks", b"/!bang")))
    same = {b"/many/same-chunks", b"/empty", b"/small/000"}
    assert all(reader.first_blob_offset(path) > last_hot for path in others if path not in same)
    assert reader.tree() == read_tree(plain)


@pytest.mark.parametrize("pax", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_links(tmp_path: Path, pax: int) -> None:
    deep = "/".join(["d" * 200] * 18)
    target = "t" * 4000

    def fill(archive: tarfile.TarFile) -> None:
        _add(archive, deep + "/\udcff\udcfe", b"deep")
        _add(archive, "link", type=tarfile.SYMTYPE, linkname=target)
        _add(archive, "hard", type=tarfile.LNKTYPE, linkname=deep + "/\udcff\udcfe")

    source = _archive(tmp_path / "a.tar", fill, format=pax, errors="surrogateescape")
    tree = read_image(build(source, tmp_path / "work"))
    name = b"/" + os.fsencode(deep) + b"/\xff\xfe"
    assert tree[name].nlink == 2
    assert tree[name].size == 4
    assert tree[b"/link"].symlink == target.encode()


def test_duplicates_and_changes_of_type(tmp_path: Path) -> None:
    def fill(archive: tarfile.TarFile) -> None:
        _add(archive, "twice", b"first" * 2000)
        _add(archive, "file-then-directory", b"gone")
        _add(archive, "file-then-directory/inside", b"inside")
        _add(archive, "directory-then-file/inside", b"gone")
        _add(archive, "directory-then-file", b"a file")
        _add(archive, "twice", b"second")

    source = _archive(tmp_path / "a.tar", fill)
    reader = ImageReader.open(build(source, tmp_path / "work"))
    assert reader.read(b"/twice") == b"second"
    assert reader.read(b"/file-then-directory/inside") == b"inside"
    assert reader.read(b"/directory-then-file") == b"a file"


def test_no_clock_gets_in(tmp_path: Path) -> None:
    source = _archive(tmp_path / "a.tar", lambda archive: _add(archive, "no/parents/file", b"x"))
    with Bootstrap.open(build(source, tmp_path / "work").files.bootstrap) as bootstrap:
        assert {inode.mtime_s for _, inode in bootstrap.walk()} == {0}


# --- archives that are broken


def _cut_points(data: bytes) -> list[int]:
    return [0, 1, 511, 512, 1000, len(data) // 2, len(data) // 2 // 512 * 512]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_truncated_archives(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    def fill(archive: tarfile.TarFile) -> None:
        for number in range(20):
            _add(archive, f"file-{number}", os.urandom(1000))

    whole = _archive(tmp_path / "a.tar", fill).read_bytes()
    data = pack(whole)
    source = tmp_path / "cut.tar"
    ends = _cut_points(data)
    if pack is bytes:  # also on the border between members, where nothing but the end mark is missing
        ends += [1536 * 7, 1536 * 20]
    for end in ends:
        source.write_bytes(data[:end])
        with pytest.raises(InvalidArchive, match=r"cut\.tar: "):
            build(source, tmp_path / "work")


@pytest.mark.parametrize("skippable", [0, 7])
def test_a_zstd_stream_without_its_last_bytes(tmp_path: Path, plain: Path, skippable: int) -> None:
    """The archive inside is whole; only the end of the frame is missing."""
    data = _tar(plain, tmp_path / "a.tar").read_bytes()
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(data)
    packed = bytes([0x50 + skippable]) + b"\x2a\x4d\x18" + bytes(4) + packed
    (tmp_path / "whole").write_bytes(packed)
    assert read_image(build(tmp_path / "whole", tmp_path / "w0"))
    for missing in (1, 4, 5):
        (tmp_path / "cut").write_bytes(packed[:-missing])
        with pytest.raises(InvalidArchive, match="ends inside a zstd frame"):
            build(tmp_path / "cut", tmp_path / "w1")


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_a_pipe_that_gives_one_byte_at_first(
    tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]
) -> None:
    data = pack(_tar(plain, tmp_path / "a.tar", "--format=posix").read_bytes())

    class Pipe(io.BytesIO):
        def readinto(self, buffer: "WriteableBuffer") -> int:
            view = memoryview(buffer)
            return super().readinto(view[:1] if self.tell() < 8 else view)

    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BufferedReader(Pipe(data))))
    assert read_image(build(Path("-"), tmp_path / "work")) == read_tree(plain)


def test_a_wrong_checksum_at_the_end_of_a_gzip_stream(tmp_path: Path, plain: Path) -> None:
    data = bytearray(gzip.compress(_tar(plain, tmp_path / "a.tar").read_bytes()))
    data[-6] ^= 1
    (tmp_path / "bad.tar.gz").write_bytes(data)
    with pytest.raises(InvalidArchive, match="CRC check failed"):
        build(tmp_path / "bad.tar.gz", tmp_path / "work")


@pytest.mark.parametrize(
    "garbage", [b"x" * 2000, b"\x1f\x8b" + b"x" * 2000, b"\x28\xb5\x2f\xfd" + b"x" * 2000, b"BZh91AY&SY" * 9]
)
def test_garbage(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / "bad.tar").write_bytes(garbage)
    with pytest.raises(InvalidArchive, match=r"bad\.tar: not a readable tar archive"):
        build(tmp_path / "bad.tar", tmp_path / "work")


def test_garbage_between_members(tmp_path: Path) -> None:
    """`tarfile` alone takes this for the end of the archive."""

    def fill(archive: tarfile.TarFile) -> None:
        for number in range(5):
            _add(archive, f"file-{number}", b"x" * 512)

    data = bytearray(_archive(tmp_path / "a.tar", fill).read_bytes())
    data[2048:2060] = b"garbage here"
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(InvalidArchive, match="not a readable tar archive"):
        build(tmp_path / "bad.tar", tmp_path / "work")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"name": "../escape"}, "leads out of the tree"),
        ({"name": "a/../../escape"}, "leads out of the tree"),
        ({"name": "label", "type": b"V"}, "unknown type"),
        ({"name": "link", "type": tarfile.LNKTYPE, "linkname": "nowhere"}, "which is no file"),
        ({"name": "owner", "uid": 1 << 40}, "broken header"),
        ({"name": "huge", "size": 1 << 60}, "'huge' cannot be read"),
    ],
)
def test_members_that_cannot_be(tmp_path: Path, fields: dict[str, object], why: str) -> None:
    member = tarfile.TarInfo()
    for name, value in fields.items():
        setattr(member, name, value)
    raw = member.tobuf(tarfile.GNU_FORMAT) + bytes(10_240)
    (tmp_path / "bad.tar").write_bytes(raw)
    with pytest.raises(InvalidArchive, match=why):
        build(tmp_path / "bad.tar", tmp_path / "work")


def test_a_size_past_the_end_does_not_spin_in_the_pass_for_names(tmp_path: Path) -> None:
    member = tarfile.TarInfo("huge")
    member.size = 1 << 60
    (tmp_path / "bad.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    with pytest.raises(InvalidArchive, match=r"'huge' cannot be read|ends inside 'huge'"):
        build(tmp_path / "bad.tar", tmp_path / "work", options(prefetch=("/x",)))


def test_an_extended_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 1 << 40
    (tmp_path / "bad.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    with pytest.raises(InvalidArchive, match="an extended header of"):
        build(tmp_path / "bad.tar", tmp_path / "work")


def test_an_archive_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceUnreadable, match=r"none\.tar: No such file"):
        build(tmp_path / "none.tar", tmp_path / "work")


@pytest.mark.parametrize("prefetch", [(), ("/f1",)])
def test_an_archive_that_changes_while_it_is_read(tmp_path: Path, prefetch: tuple[str, ...]) -> None:
    def fill(archive: tarfile.TarFile) -> None:
        for number in range(8):
            _add(archive, f"f{number}", os.urandom(4 << 20))

    source = _archive(tmp_path / "a.tar", fill)
    chosen = options(chunk_size=1 << 20, prefetch=prefetch)
    with (
        Build(tmp_path / "work", chosen, on_progress=lambda counters: os.utime(source, (1, 1))) as running,
        pytest.raises(SourceChanged, match=r"a\.tar: changed while it was read"),
    ):
        running.run(source)


def test_an_empty_archive_is_an_empty_tree(tmp_path: Path) -> None:
    built = build(_archive(tmp_path / "a.tar", lambda archive: None), tmp_path / "work")
    assert list(read_image(built)) == [b"/"]
    assert built.files.blobs == ()

"""Unpacking gives the source back, and nothing where it fails."""

import contextlib
import io
import itertools
import os
import signal
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from backend.publishing import DiskFull
from builder.build import BuiltImage
from builder.unpack import CannotUnpack, UnpackTarget, content_refs, unpack
from builder.unpack_directory import DirectoryTarget
from builder.unpack_staging import UnpackStaging
from builder.unpack_tar import TarTarget
from rafs.bootstrap import Bootstrap
from rafs.record import FormatError
from tests.builder_support import (
    ImageReader,
    build,
    make_plain_tree,
    make_root_tree,
    options,
    put,
    read_image,
    read_tree,
)
from tests.rafs_image import ImageMaker, Node, directory, file, special, symlink


class Chunks:
    """Decoded chunks, one by one."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)

    def __aiter__(self) -> "Chunks":
        return self

    async def __anext__(self) -> bytes:
        return next(self._chunks)


def _contents(reader: ImageReader, fail_after: int = -1) -> Iterator[bytes]:
    for number, ref in enumerate(content_refs(reader.bootstrap)):
        if number == fail_after:
            raise OSError("the registry is gone")
        yield reader.chunk(ref)


async def _unpack(reader: ImageReader, target: UnpackTarget) -> None:
    await unpack(reader.bootstrap, Chunks(_contents(reader)), target)


async def _to_tar(built: BuiltImage, path: Path) -> TarTarget:
    with path.open("wb") as out:
        target = TarTarget(out)
        await _unpack(ImageReader.open(built), target)
        target.finish()
    return target


@pytest.fixture
def plain(tmp_path: Path) -> BuiltImage:
    make_plain_tree(tmp_path / "src")
    return build(tmp_path / "src", tmp_path / "work")


@pytest.fixture
def full(tmp_path: Path) -> BuiltImage:
    make_root_tree(tmp_path / "src")
    return build(tmp_path / "src", tmp_path / "work")


async def test_a_directory_is_the_source(tmp_path: Path, plain: BuiltImage) -> None:
    with DirectoryTarget(tmp_path / "new" / "out") as target:
        await _unpack(ImageReader.open(plain), target)
    assert read_tree(tmp_path / "new" / "out") == read_tree(tmp_path / "src")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


@pytest.mark.needs_root
async def test_a_directory_with_what_only_root_can_make(tmp_path: Path, full: BuiltImage) -> None:
    with DirectoryTarget(tmp_path / "out") as target:
        await _unpack(ImageReader.open(full), target)
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "src")


@pytest.mark.parametrize("chunk_size", [4096, 16 << 20])
async def test_zeros_become_holes(tmp_path: Path, chunk_size: int) -> None:
    with put(tmp_path / "src", b"big", b"start").open("r+b") as sparse:
        sparse.truncate(48 << 20)
    built = build(tmp_path / "src", tmp_path / "work", options(chunk_size=chunk_size))
    with DirectoryTarget(tmp_path / "out") as target:
        await _unpack(ImageReader.open(built), target)
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "src")
    assert (tmp_path / "out" / "big").stat().st_blocks * 512 <= 16 << 20


async def test_an_empty_directory_is_taken(tmp_path: Path, plain: BuiltImage) -> None:
    (tmp_path / "out").mkdir()
    with DirectoryTarget(tmp_path / "out") as target:
        await _unpack(ImageReader.open(plain), target)
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "src")


def test_targets_that_are_refused(tmp_path: Path) -> None:
    put(tmp_path, b"full/file", b"mine")
    for name in ("full", "full/file"):
        with pytest.raises(CannotUnpack, match="not an empty directory"):
            DirectoryTarget(tmp_path / name)
    with pytest.raises(CannotUnpack, match=r"File exists|Not a directory"):
        DirectoryTarget(tmp_path / "full" / "file" / "below")
    with pytest.raises(CannotUnpack, match=r"mount point|not an empty"):
        DirectoryTarget(Path("/proc"))
    assert (tmp_path / "full" / "file").read_bytes() == b"mine"


async def test_an_error_leaves_nothing(tmp_path: Path, plain: BuiltImage) -> None:
    reader = ImageReader.open(plain)
    with (
        pytest.raises(OSError, match="the registry is gone"),
        DirectoryTarget(tmp_path / "out" / "put") as target,
    ):
        await unpack(reader.bootstrap, Chunks(_contents(reader, fail_after=300)), target)
    assert list((tmp_path / "out").iterdir()) == []


async def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), DirectoryTarget(tmp_path / "out" / "put"):
        raise KeyboardInterrupt
    assert list((tmp_path / "out").iterdir()) == []


async def test_a_late_error_leaves_nothing(
    tmp_path: Path, plain: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When directories get their metadata, all content is there already."""
    reader = ImageReader.open(plain)

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    target = DirectoryTarget(tmp_path / "o" / "put").__enter__()
    await _unpack(reader, target)
    monkeypatch.setattr(os, "utime", fail)
    with pytest.raises(CannotUnpack, match="not permitted"):
        target.__exit__(None, None, None)
    assert list((tmp_path / "o").iterdir()) == []


async def test_chunks_too_short_for_the_file(tmp_path: Path, plain: BuiltImage) -> None:
    reader = ImageReader.open(plain)
    short = Chunks(chunk[:-1] for chunk in _contents(reader))
    with (
        pytest.raises(CannotUnpack, match="bytes too short"),
        DirectoryTarget(tmp_path / "out" / "put") as target,
    ):
        await unpack(reader.bootstrap, short, target)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", ["directory", "tar"])
async def test_chunks_too_long_for_the_file(tmp_path: Path, plain: BuiltImage, kind: str) -> None:
    reader = ImageReader.open(plain)
    long = Chunks(chunk + b"+" for chunk in _contents(reader))
    with contextlib.ExitStack() as stack:
        target: UnpackTarget = TarTarget(io.BytesIO())
        stack.enter_context(pytest.raises(CannotUnpack, match="chunks are 1 bytes too long"))
        if kind == "directory":
            target = stack.enter_context(DirectoryTarget(tmp_path / "out" / "put"))
        await unpack(reader.bootstrap, long, target)
    assert list(tmp_path.glob("out/*")) == []


# Begins to unpack, says so and waits to be killed.
_HANGING_UNPACK = """
import sys
from pathlib import Path
from builder.unpack_directory import DirectoryTarget

with DirectoryTarget(Path(sys.argv[1])) as target:
    (staging,) = Path(sys.argv[1]).parent.iterdir()
    for closed in ("inside", "inside/closed"):
        (staging / closed).mkdir()
    (staging / "inside" / "closed" / "file").write_bytes(b"half")
    (staging / "inside" / "closed").chmod(0)
    print(flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def _hanging_unpack(target: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _HANGING_UNPACK, str(target)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
async def test_the_next_one_removes_what_a_killed_one_left(
    tmp_path: Path, plain: BuiltImage, signal_number: signal.Signals
) -> None:
    with _hanging_unpack(tmp_path / "new" / "dead") as process:
        process.send_signal(signal_number)
        process.wait()
    (tmp_path / "new" / ".staging-of-somebody-else").mkdir()
    assert len(list((tmp_path / "new").iterdir())) == 2
    with DirectoryTarget(tmp_path / "new" / "out") as target:
        await _unpack(ImageReader.open(plain), target)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"out", ".staging-of-somebody-else"}


async def test_what_another_one_is_writing_stays(tmp_path: Path, plain: BuiltImage) -> None:
    with _hanging_unpack(tmp_path / "new" / "other") as process:
        with DirectoryTarget(tmp_path / "new" / "out") as target:
            await _unpack(ImageReader.open(plain), target)
        assert len(list((tmp_path / "new").iterdir())) == 2
        process.communicate("\n")
        assert process.returncode == 0
    assert (tmp_path / "new" / "other" / "inside").is_dir()
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"out", "other"}


async def test_a_tree_is_durable_before_it_has_its_name(
    tmp_path: Path, plain: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    syncfs, rename, fsync = UnpackStaging.sync_file_system, os.rename, os.fsync

    def note_syncfs(staging: UnpackStaging) -> None:
        events.append("syncfs")
        syncfs(staging)

    def note_rename(source: bytes, final: Path) -> None:
        events.append("rename")
        rename(source, final)

    def note_fsync(fd: int) -> None:
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{fd}')).name.partition('-')[0]}")
        fsync(fd)

    monkeypatch.setattr(UnpackStaging, "sync_file_system", note_syncfs)
    monkeypatch.setattr(os, "rename", note_rename)
    monkeypatch.setattr(os, "fsync", note_fsync)
    with DirectoryTarget(tmp_path / "new" / "out") as target:
        await _unpack(ImageReader.open(plain), target)
    assert events == ["syncfs", "fsync .nydus", "rename", "fsync new"]


@pytest.mark.needs_root
async def test_a_full_disk_is_one_line_with_its_place(tmp_path: Path, plain: BuiltImage) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], check=True)
    try:
        with (
            pytest.raises(DiskFull, match=r"disk/out/.*: cannot write: No space left"),
            DirectoryTarget(disk / "out") as target,
        ):
            await _unpack(ImageReader.open(plain), target)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# --- tar streams


@pytest.mark.needs_root
async def test_gnu_tar_extracts_the_source(tmp_path: Path, full: BuiltImage) -> None:
    target = await _to_tar(full, tmp_path / "out.tar")
    (tmp_path / "out").mkdir()
    flags = ("--xattrs", "--xattrs-include=*", "--numeric-owner", "--warning=no-timestamp")
    done = subprocess.run(
        ["tar", "-C", tmp_path / "out", *flags, "-xpf", tmp_path / "out.tar"], check=True, capture_output=True
    )
    assert done.stderr == b""
    expected = read_tree(tmp_path / "src")
    assert target.sockets == 1
    del expected[b"/socket"]
    assert read_tree(tmp_path / "out") == expected


async def test_a_stream_builds_the_same_image_again(tmp_path: Path, plain: BuiltImage) -> None:
    await _to_tar(plain, tmp_path / "out.tar")
    assert read_image(build(tmp_path / "out.tar", tmp_path / "again")) == read_image(plain)


@pytest.mark.needs_root
async def test_a_stream_with_everything_builds_the_same_image_again(tmp_path: Path, full: BuiltImage) -> None:
    await _to_tar(full, tmp_path / "out.tar")
    expected = read_image(full)
    del expected[b"/socket"]
    assert read_image(build(tmp_path / "out.tar", tmp_path / "again")) == expected


async def test_python_reads_the_stream(tmp_path: Path, plain: BuiltImage) -> None:
    await _to_tar(plain, tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar", errors="surrogateescape") as archive:
        names = {os.fsencode(member.name) for member in archive}
    assert names == {path.lstrip(b"/") or b"." for path in read_tree(tmp_path / "src")}


async def test_values_past_the_plain_header(tmp_path: Path) -> None:
    """Owners, times and names that need records of the extended header."""
    tree = directory(
        {
            b"d" * 99: directory({b"e" * 255: file(b"x", uid=4_000_000_000, gid=3_000_000_000)}),
            b"future": file(b"x", mtime_s=1 << 40),
            b"past": file(b"x", mtime_s=-(1 << 40), mtime_ns=5),
            b"x": file(b"x", {b"user." + b"\xff" * 5: b"\0\n=", b"user.99": b"v" * 86}),
        }
    )
    with Bootstrap(_bootstrap(tree, tmp_path)) as bootstrap:
        out = io.BytesIO()
        target = TarTarget(out)
        await unpack(bootstrap, Chunks(itertools.repeat(b"x")), target)
        target.finish()
        (tmp_path / "out.tar").write_bytes(out.getvalue())
        built = read_image(build(tmp_path / "out.tar", tmp_path / "work"))
        for path, inode in bootstrap.walk():
            entry = built[path]
            assert (entry.uid, entry.gid, entry.mode) == (inode.uid, inode.gid, inode.mode)
            assert entry.mtime_ns == inode.mtime_s * 1_000_000_000 + inode.mtime_ns
            assert entry.xattrs == bootstrap.xattrs(inode)


def test_more_bytes_than_the_header_says(tmp_path: Path, plain: BuiltImage) -> None:
    with Bootstrap.open(plain.files.bootstrap) as bootstrap:
        target = TarTarget(io.BytesIO())
        target.begin_file(b"/f", bootstrap.resolve(b"/-dash"), {})
        with pytest.raises(CannotUnpack, match="more than its header says"):
            target.write(bytes(100))


# --- hostile images


def _bootstrap(tree: Node, folder: Path) -> bytes:
    return ImageMaker(tree).make(folder / "made.boot").bootstrap


def _hostile(name: bytes, folder: Path) -> bytes:
    """A bootstrap in which a file's name was replaced by `name`, as long as the old one."""
    placeholder = b"@#" + b"@" * 100
    placeholder = placeholder[: len(name)]
    raw = _bootstrap(directory({placeholder: file(b"evil"), b"zz": file(b"evil")}), folder)
    return raw.replace(b".." + placeholder, b".." + name)


@pytest.mark.parametrize("name", [b"../../escape", b"a/b", b"/etc/escape", b"..//", b"x\0y", b"/"])
async def test_names_that_lead_elsewhere(tmp_path: Path, name: bytes) -> None:
    raw = _hostile(name, tmp_path)
    (tmp_path / "made.boot").unlink()
    assert name in raw
    with (
        Bootstrap(raw) as bootstrap,
        pytest.raises(FormatError, match="directory entry"),
        DirectoryTarget(tmp_path / "deep" / "er" / "out") as target,
    ):
        await unpack(bootstrap, Chunks(itertools.repeat(b"evil")), target)
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []
    assert list((tmp_path / "deep" / "er").iterdir()) == []


async def test_a_second_entry_cannot_go_through_a_link(tmp_path: Path) -> None:
    """A link and a directory of the same name: what is in the directory must not land behind the link."""
    (tmp_path / "outside").mkdir()
    away = os.fsencode(tmp_path / "outside")
    tree = directory({b"name-a": symlink(away), b"name-b": directory({b"escaped": special(stat.S_IFIFO)})})
    raw = _bootstrap(tree, tmp_path)
    assert raw.count(b"name-b") == 1
    with (
        Bootstrap(raw.replace(b"name-b", b"name-a")) as bootstrap,
        pytest.raises(CannotUnpack, match=r"name-a.*File exists"),
        DirectoryTarget(tmp_path / "out") as target,
    ):
        await unpack(bootstrap, Chunks(()), target)
    assert list((tmp_path / "outside").iterdir()) == []
    assert not (tmp_path / "out").exists()


async def test_a_link_target_with_a_nul_byte(tmp_path: Path) -> None:
    raw = _bootstrap(directory({b"link": symlink(b"@@target@@")}), tmp_path)
    with (
        Bootstrap(raw.replace(b"@@target@@", b"@@tar\0et@@")) as bootstrap,
        pytest.raises(CannotUnpack, match="/link"),
        DirectoryTarget(tmp_path / "out") as target,
    ):
        await unpack(bootstrap, Chunks(()), target)

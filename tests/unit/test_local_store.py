"""Images in bare directories, blob files, and how files are published."""

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

import backend.publishing as publishing
from backend.blobtail import BlobMetaBroken
from backend.contract import BackendError, BlobNotFound, BlobReader
from backend.fileblob import FileBlobReader, NotABlobFile, store_blob
from backend.local import NotAnImageDirectory
from backend.manifest import Descriptor
from backend.metadata_index import INDEX_NAME
from backend.ocidigest import DigestMismatch, digest_of
from backend.pieces import pump
from backend.publishing import CannotWrite, DiskFull, publish_directory, staging_directory
from backend.reference import DirReference
from backend.store import (
    BlobFile,
    BlobOutcome,
    CannotPublish,
    ImageFiles,
    ImageMetadata,
    NoChunkTable,
    NoProgress,
    PublishResult,
    open_store,
)
from rafs.blobmeta import BlobMeta
from rafs.errors import NydusError
from tests.conftest import fixtures_dir
from tests.sample_image import SampleBlob, make_blob, make_bootstrap, make_image, write_image


async def publish(image: ImageFiles, directory: Path) -> PublishResult:
    async with open_store(DirReference(directory)) as store:
        return await store.publish(image, NoProgress())


def leftovers(directory: Path) -> list[Path]:
    return list(directory.rglob(f"{publishing.STAGING_PREFIX}*"))


class Progress:
    """Remembers what it heard."""

    def __init__(self) -> None:
        self.outcomes: list[BlobOutcome] = []
        self.sent_bytes = 0
        self.started = 0

    def blob_started(self, digest: str, size_bytes: int) -> None:
        self.started += 1

    def bytes_sent(self, count: int) -> None:
        self.sent_bytes += count

    def blob_finished(self, digest: str, outcome: BlobOutcome) -> None:
        self.outcomes.append(outcome)


async def test_published_image_comes_back(tmp_path: Path) -> None:
    image = make_image(tmp_path / "build")
    progress = Progress()
    async with open_store(DirReference(tmp_path / "image")) as store:
        result = await store.publish(image, progress)
        metadata = await store.fetch_metadata(tmp_path / "images")
    sizes = sum(blob.size_bytes for blob in image.blobs)
    assert result == PublishResult(metadata.digest, 2, 0, sizes)
    assert (progress.outcomes, progress.sent_bytes) == ([BlobOutcome.UPLOADED] * 2, sizes)
    assert metadata.digest == digest_of(image.bootstrap.read_bytes())
    assert metadata.directory == tmp_path / "images" / metadata.digest.removeprefix("sha256:")
    assert metadata.bootstrap_path.read_bytes() == image.bootstrap.read_bytes()
    for blob in image.blobs:
        assert metadata.blob_meta_path(blob.blob_id).read_bytes() == blob.meta.read_bytes()
        assert (tmp_path / "image" / "blobs" / blob.blob_id).stat().st_size == blob.size_bytes
    assert not leftovers(tmp_path)


async def test_blobs_that_are_there_do_not_travel(tmp_path: Path) -> None:
    image = make_image(tmp_path / "build")
    await publish(image, tmp_path / "image")
    again = await publish(image, tmp_path / "image")
    assert (again.blobs_uploaded, again.blobs_skipped, again.bytes_uploaded) == (0, 2, 0)


async def test_altered_blob_in_the_target_is_replaced(tmp_path: Path) -> None:
    image = make_image(tmp_path / "build")
    await publish(image, tmp_path / "image")
    stored = tmp_path / "image" / "blobs" / image.blobs[1].blob_id
    with stored.open("r+b") as file:
        file.write(b"other")
    again = await publish(image, tmp_path / "image")
    assert (again.blobs_uploaded, again.blobs_skipped) == (1, 1)
    assert digest_of(stored.read_bytes()) == f"sha256:{stored.name}"


async def test_blob_that_is_given_away_is_linked(tmp_path: Path) -> None:
    image = make_image(tmp_path / "build")
    await publish(
        ImageFiles(image.bootstrap, image.blobs, gives_blobs_away=True),
        tmp_path / "image",
    )
    blob = image.blobs[0]
    assert blob.path is not None
    assert (tmp_path / "image" / "blobs" / blob.blob_id).samefile(blob.path)


async def test_metadata_is_used_again(tmp_path: Path) -> None:
    await publish(make_image(tmp_path / "build"), tmp_path / "image")
    async with open_store(DirReference(tmp_path / "image")) as store:
        first = await store.fetch_metadata(tmp_path / "images")
        inode = first.bootstrap_path.stat().st_ino
        assert await store.fetch_metadata(tmp_path / "images") == first
    assert first.bootstrap_path.stat().st_ino == inode
    with pytest.raises(NoChunkTable, match=str(first.directory)):
        first.blob_meta_path("0" * 64)


def _remove_a_table(directory: Path) -> None:
    next(directory.glob("*.blob.meta")).unlink()


def _truncate_a_table(directory: Path) -> None:
    os.truncate(next(directory.glob("*.blob.meta")), 4096)


def _alter_the_bootstrap(directory: Path) -> None:
    with (directory / "image.boot").open("r+b") as file:
        file.seek(4096)
        file.write(b"other")


def _empty_the_index(directory: Path) -> None:
    os.truncate(directory / INDEX_NAME, 0)


def _keep_the_bootstrap_alone(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name != "image.boot":
            path.unlink()


@pytest.mark.logs_warning
@pytest.mark.parametrize(
    "damage",
    [_remove_a_table, _truncate_a_table, _alter_the_bootstrap, _empty_the_index, _keep_the_bootstrap_alone],
)
async def test_damaged_metadata_is_fetched_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    image = make_image(tmp_path / "build")
    await publish(image, tmp_path / "image")
    async with open_store(DirReference(tmp_path / "image")) as store:
        first = await store.fetch_metadata(tmp_path / "images")
        damage(first.directory)
        results: list[ImageMetadata] = []

        async def fetch() -> None:
            results.append(await store.fetch_metadata(tmp_path / "images"))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(fetch)
    assert results == [first] * 4
    assert first.bootstrap_path.read_bytes() == image.bootstrap.read_bytes()
    for blob in image.blobs:
        assert first.blob_meta_path(blob.blob_id).read_bytes() == blob.meta.read_bytes()
    (record,) = caplog.records
    assert (record.levelname, str(first.directory) in record.getMessage()) == ("WARNING", True)
    assert not leftovers(tmp_path)


async def test_two_at_once_get_the_same(tmp_path: Path) -> None:
    await publish(make_image(tmp_path / "build"), tmp_path / "image")
    results = []

    async def fetch() -> None:
        async with open_store(DirReference(tmp_path / "image")) as store:
            results.append(await store.fetch_metadata(tmp_path / "images"))

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(fetch)
    assert len(set(results)) == 1
    assert not leftovers(tmp_path)


async def test_altered_blob_is_not_published(tmp_path: Path) -> None:
    image = make_image(tmp_path / "build")
    blob = image.blobs[1]
    assert blob.path is not None
    with blob.path.open("r+b") as file:
        file.write(b"other")
    with pytest.raises(DigestMismatch):
        await publish(image, tmp_path / "image")
    assert not (tmp_path / "image" / "image.boot").exists()
    assert not (tmp_path / "image" / "blobs" / blob.blob_id).exists()
    assert not leftovers(tmp_path)


async def test_blob_shorter_than_announced_is_not_published(tmp_path: Path) -> None:
    image = make_image(tmp_path / "build")
    blob = image.blobs[1]
    assert blob.path is not None
    os.truncate(blob.path, blob.size_bytes - 1)
    with pytest.raises(BackendError, match="asked for"):
        await publish(image, tmp_path / "image")
    assert not leftovers(tmp_path)


async def test_blob_of_another_image_is_fetched_from_there(tmp_path: Path) -> None:
    image = make_image(tmp_path / "build")
    await publish(image, tmp_path / "dictionary")
    blobs = tuple(
        BlobFile(blob.blob_id, blob.size_bytes, None, blob.meta, f"dir:{tmp_path / 'dictionary'}")
        for blob in image.blobs
    )
    result = await publish(ImageFiles(image.bootstrap, blobs), tmp_path / "image")
    assert result.blobs_uploaded == 2
    assert (tmp_path / "image" / "blobs" / blobs[1].blob_id).stat().st_size == blobs[1].size_bytes


async def test_blob_that_is_nowhere(tmp_path: Path) -> None:
    image = make_image(tmp_path / "build")
    blob = image.blobs[0]
    nowhere = ImageFiles(image.bootstrap, (BlobFile(blob.blob_id, blob.size_bytes, None, blob.meta),))
    with pytest.raises(CannotPublish, match="neither a file nor another image"):
        await publish(nowhere, tmp_path / "image")


async def fetch_fails(directory: Path, images_dir: Path) -> NydusError:
    async with open_store(DirReference(directory)) as store:
        with pytest.raises(NydusError) as caught:
            await store.fetch_metadata(images_dir)
    assert list(images_dir.iterdir()) == []
    return caught.value


async def test_directory_without_an_image(tmp_path: Path) -> None:
    error = await fetch_fails(tmp_path, tmp_path / "images")
    assert isinstance(error, NotAnImageDirectory)
    assert str(error) == f"{tmp_path}: no image in this directory: image.boot: No such file or directory"


async def test_bootstrap_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "image.boot").write_bytes(b"x" * 10_000)
    assert (await fetch_fails(tmp_path, tmp_path / "images")).exit_code == 10


async def test_missing_blob(tmp_path: Path) -> None:
    await publish(make_image(tmp_path / "build"), tmp_path / "image")
    for blob in (tmp_path / "image" / "blobs").iterdir():
        blob.unlink()
    assert isinstance(await fetch_fails(tmp_path / "image", tmp_path / "images"), BlobNotFound)


async def test_damaged_table_at_the_end_of_a_blob(tmp_path: Path) -> None:
    blob = make_blob(10_000)
    await publish(write_image(tmp_path / "build", [blob]), tmp_path / "image")
    with (tmp_path / "image" / "blobs" / blob.entry.blob_id).open("r+b") as file:
        file.seek(blob.entry.ci_offset + 4)
        file.write(b"\xff\xff\xff")
    error = await fetch_fails(tmp_path / "image", tmp_path / "images")
    assert isinstance(error, BlobMetaBroken)
    assert "\n" not in str(error)


async def test_bootstrap_that_does_not_name_its_blob(tmp_path: Path) -> None:
    blob = make_blob(10_000)
    nameless = SampleBlob(blob.data, dataclasses.replace(blob.entry, blob_id="x" * 64), blob.table)
    (tmp_path / "image.boot").write_bytes(make_bootstrap([nameless]))
    error = await fetch_fails(tmp_path, tmp_path / "images")
    assert isinstance(error, BlobMetaBroken)


@pytest.mark.needs_fixtures
async def test_image_of_nydus_image(tmp_path: Path) -> None:
    """Its chunk table is read from the blob's tail; its blob is named otherwise than by its digest."""
    blob_id = "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef"
    (tmp_path / "image" / "blobs").mkdir(parents=True)
    shutil.copyfile(fixtures_dir() / "rafs-v6-2.2.boot", tmp_path / "image" / "image.boot")
    shutil.copyfile(fixtures_dir() / blob_id, tmp_path / "image" / "blobs" / blob_id)
    async with open_store(DirReference(tmp_path / "image")) as store:
        metadata = await store.fetch_metadata(tmp_path / "images")
        reader = store.open_blob(blob_id, 14554)
        assert len(await reader.read_range(0, 4828)) == 4828
        await reader.aclose()
    table = BlobMeta.open(metadata.blob_meta_path(blob_id))
    assert [table.chunk(i).compressed_size for i in range(table.count)] == [4828, 2974]
    table.close()


async def test_fifo_in_place_of_a_blob_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "blob")
    reader = FileBlobReader(tmp_path / "blob", trio.CapacityLimiter(1))
    with pytest.raises(NotABlobFile):
        await reader.size()


async def test_reader_outlives_the_name_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"content")
    reader = FileBlobReader(tmp_path / "blob", trio.CapacityLimiter(1))
    assert await reader.size() == 7
    (tmp_path / "blob").unlink()
    assert await reader.read_range(0, 7) == b"content"
    await reader.aclose()


async def test_full_disk_while_a_blob_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="No space left on device; free some space"):
        await publish(make_image(tmp_path / "build"), tmp_path / "image")
    assert not leftovers(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.decode().strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.needs_root
async def test_really_full_disk(tmp_path: Path, small_disk: Path) -> None:
    image = make_image(tmp_path / "build", blob_sizes=(3_000_000,))
    with pytest.raises(DiskFull):
        await publish(image, small_disk / "image")
    assert not leftovers(small_disk)
    assert os.statvfs(small_disk).f_bfree * os.statvfs(small_disk).f_bsize > 900_000


async def test_cancelled_copy_leaves_nothing(tmp_path: Path) -> None:
    class Stalled:
        async def size(self) -> int:
            raise AssertionError

        async def read_range(self, offset: int, length: int) -> bytes:
            if offset:
                scope.cancel()
                await trio.sleep_forever()
            return bytes(length)

        async def aclose(self) -> None:
            raise AssertionError

    descriptor = Descriptor("x", "sha256:" + "0" * 64, 10 << 20)
    with trio.CancelScope() as scope:
        await store_blob(Stalled(), descriptor, tmp_path / "final", tmp_path, lambda count: None)
    assert scope.cancelled_caught
    assert list(tmp_path.iterdir()) == []


class Pattern:
    """A reader of `size` known bytes that fails at one offset."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at

    async def size(self) -> int:
        raise AssertionError

    async def read_range(self, offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        if offset == self.fails_at:
            raise BackendError(where="pattern", why="broken")
        return bytes((offset + i) % 251 for i in range(length))

    async def aclose(self) -> None:
        raise AssertionError


@pytest.mark.parametrize("size_bytes", [0, 1, 9, 10, 11, 100, 101])
async def test_pump_hands_over_every_byte_in_order(size_bytes: int) -> None:
    reader: BlobReader = Pattern()
    got = bytearray()

    async def consume(piece: bytes) -> None:
        got.extend(piece)

    await pump(reader, size_bytes, consume, piece_bytes=10)
    assert bytes(got) == bytes(i % 251 for i in range(size_bytes))


async def test_pump_raises_what_the_reader_raises() -> None:
    async def consume(piece: bytes) -> None:
        await trio.lowlevel.checkpoint()

    with pytest.raises(BackendError, match="broken"):
        await pump(Pattern(fails_at=50), 100, consume, piece_bytes=10)


async def test_pump_raises_what_the_consumer_raises() -> None:
    async def consume(piece: bytes) -> None:
        raise DiskFull(where="here", why="full")

    with pytest.raises(DiskFull):
        await pump(Pattern(), 100, consume, piece_bytes=10)


def test_staging_of_a_dead_process_is_removed_and_that_of_a_living_one_kept(tmp_path: Path) -> None:
    holder = (
        "import os, sys, pathlib\n"
        "from backend.publishing import staging_directory\n"
        "with staging_directory(pathlib.Path(sys.argv[1])) as path:\n"
        "    (path / 'half').write_bytes(b'x')\n"
        "    print(path, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            path = Path(process.stdout.readline().strip())
            with staging_directory(tmp_path):
                assert (path / "half").exists()
        finally:
            process.kill()
    assert (path / "half").exists()
    with staging_directory(tmp_path):
        assert not path.exists()


def test_directory_published_twice_stays_the_first(tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    assert publish_directory(tmp_path / "1", tmp_path / "final")
    assert not publish_directory(tmp_path / "2", tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "1"


def test_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match="Not a directory"), staging_directory(tmp_path / "file" / "below"):
        raise AssertionError

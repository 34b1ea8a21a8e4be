"""Images in archives of OCI layouts: read in place, written whole or not at all."""

import errno
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import trio

from backend.contract import BackendError, BlobNotFound, ShortRead
from backend.copy import copy_image
from backend.layout_index import LayoutBroken, NoSuchTag, SeveralImages
from backend.manifest import MANIFEST_SIZE_MAX_BYTES, OCI_MANIFEST, Descriptor
from backend.memory_blob import MemoryBlobReader
from backend.ocidigest import DigestMismatch, digest_of
from backend.publishing import STAGING_PREFIX, DiskFull
from backend.reference import OciArchiveReference, parse_reference
from backend.store import CannotPublish, ImageFiles, ImageMetadata, NoProgress, PublishResult, open_store
from backend.tar_index import ArchiveBroken
from tests.archives import Archive
from tests.oci_images import Layer, Layout
from tests.sample_image import make_image

MARKER = b'{"imageLayoutVersion":"1.0.0"}'


async def publish(image: ImageFiles, path: Path, tag: str | None = "v1") -> PublishResult:
    async with open_store(OciArchiveReference(path, tag)) as store:
        return await store.publish(image, NoProgress())


async def fetch(path: Path, images_dir: Path, tag: str | None = "v1") -> ImageMetadata:
    async with open_store(OciArchiveReference(path, tag)) as store:
        return await store.fetch_metadata(images_dir)


def nothing_left(directory: Path) -> bool:
    return not list(directory.rglob(f"{STAGING_PREFIX}*"))


async def test_published_image_comes_back(tmp_path: Path) -> None:
    image = make_image(tmp_path / "build")
    result = await publish(image, tmp_path / "a.tar")
    metadata = await fetch(tmp_path / "a.tar", tmp_path / "images")
    assert metadata.digest == result.digest
    assert metadata.bootstrap_path.read_bytes() == image.bootstrap.read_bytes()
    async with open_store(OciArchiveReference(tmp_path / "a.tar")) as store:
        for blob in image.blobs:
            reader = store.open_blob(blob.blob_id, blob.size_bytes)
            assert blob.path is not None
            assert await reader.read_range(10, 500) == blob.path.read_bytes()[10:510]
            await reader.aclose()
    assert nothing_left(tmp_path)


async def test_other_tools_find_a_layout_in_it(tmp_path: Path) -> None:
    result = await publish(make_image(tmp_path / "build"), tmp_path / "a.tar")
    (tmp_path / "layout").mkdir()
    subprocess.run(["tar", "-xf", tmp_path / "a.tar", "-C", tmp_path / "layout"], check=True)
    async with open_store(parse_reference(f"oci:{tmp_path / 'layout'}:v1")) as store:
        assert (await store.fetch_metadata(tmp_path / "images")).digest == result.digest
    assert json.loads((tmp_path / "layout/oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}


async def test_same_image_gives_the_same_file(tmp_path: Path) -> None:
    image = make_image(tmp_path / "build")
    for name in ("1", "2"):
        await publish(image, tmp_path / name)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


async def test_a_file_that_is_there_is_replaced_whole(tmp_path: Path) -> None:
    await publish(make_image(tmp_path / "1"), tmp_path / "a.tar", "v1")
    second = await publish(make_image(tmp_path / "2", seed=2), tmp_path / "a.tar", "v2")
    assert (await fetch(tmp_path / "a.tar", tmp_path / "images", None)).digest == second.digest
    with pytest.raises(NoSuchTag, match="it has v2"):
        await fetch(tmp_path / "a.tar", tmp_path / "images", "v1")


async def test_one_store_writes_reads_and_writes_again(tmp_path: Path) -> None:
    first, second = make_image(tmp_path / "1"), make_image(tmp_path / "2", seed=2)
    async with open_store(OciArchiveReference(tmp_path / "a.tar", "v1")) as store:
        digest = (await store.publish(first, NoProgress())).digest
        assert (await store.fetch_metadata(tmp_path / "images")).digest == digest
        blob = first.blobs[0]
        reader = store.open_blob(blob.blob_id, blob.size_bytes)
        start = await reader.read_range(0, 100)
        replaced = (await store.publish(second, NoProgress())).digest
        assert (await store.fetch_metadata(tmp_path / "images")).digest == replaced != digest
        assert await reader.read_range(0, 100) == start, "whoever reads in the old file goes on"
        await reader.aclose()


async def test_an_archive_copied_onto_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    result = await publish(make_image(tmp_path / "build"), path)
    before = path.read_bytes()
    async with (
        open_store(OciArchiveReference(path)) as source,
        open_store(OciArchiveReference(path, "v1")) as to,
    ):
        assert (await copy_image(source, to, NoProgress())).digest == result.digest
    assert path.read_bytes() == before


async def test_layouts_and_archives_of_several_images(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    for tag in ("v1", "v2"):
        layout.image([Layer().add(tag, b"x")], tag=tag)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(layout.path, ".")
    async with open_store(OciArchiveReference(tmp_path / "a.tar", "v2")) as store:
        assert (await store.get_manifest()).media_type == OCI_MANIFEST  # type: ignore[attr-defined]
    with pytest.raises(SeveralImages, match="say which image is meant; it has v1, v2"):
        await fetch(tmp_path / "a.tar", tmp_path, None)


class _Failing(MemoryBlobReader):
    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.script = self._fail

    def _fail(self, number: int, offset: int, data: bytes) -> bytes:
        if offset:
            raise ShortRead(where="memory", offset=offset, length=len(data), got=0)
        return data


async def test_a_blob_that_fails_leaves_no_trace_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    blob = os.urandom(9 << 20)
    good = Descriptor("x", digest_of(blob), len(blob))
    async with open_store(OciArchiveReference(path, "v1")) as store:
        put = store.put_stream  # type: ignore[attr-defined]
        await put(Descriptor("x", digest_of(b"1"), 1), MemoryBlobReader(b"1"), lambda count: None)
        with pytest.raises(ShortRead):
            await put(good, _Failing(blob), lambda count: None)
        with pytest.raises(DigestMismatch):
            await put(good, MemoryBlobReader(blob[:-1] + b"?"), lambda count: None)
        assert not path.exists()
        await put(Descriptor("x", digest_of(b"2"), 1), MemoryBlobReader(b"2"), lambda count: None)
        await store.put_manifest(OCI_MANIFEST, b"{}", as_reference=True)  # type: ignore[attr-defined]
    with tarfile.open(path) as archive:
        names = archive.getnames()
    assert [name.removeprefix("blobs/sha256/") for name in names] == [
        *(digest_of(data).removeprefix("sha256:") for data in (b"1", b"2", b"{}")),
        "index.json",
        "oci-layout",
    ]
    assert path.stat().st_size == (2 * len(names) + 2) * 512


async def test_blobs_that_come_at_once_stand_one_behind_the_other(tmp_path: Path) -> None:
    blobs = [os.urandom(5 << 20) for _ in range(3)]
    async with open_store(OciArchiveReference(tmp_path / "a.tar", "v1")) as store:
        async with trio.open_nursery() as nursery:
            for blob in [*blobs, blobs[0]]:
                descriptor = Descriptor("x", digest_of(blob), len(blob))
                nursery.start_soon(store.put_stream, descriptor, MemoryBlobReader(blob), lambda count: None)  # type: ignore[attr-defined]
        await store.put_manifest(OCI_MANIFEST, b"{}", as_reference=True)  # type: ignore[attr-defined]
        for blob in blobs:
            reader = store.open_blob(digest_of(blob).removeprefix("sha256:"), len(blob))
            assert await reader.read_range(0, len(blob)) == blob


async def test_what_is_given_up_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    old = await publish(make_image(tmp_path / "1"), path)
    with trio.move_on_after(5) as scope:
        async with open_store(OciArchiveReference(path, "v1")) as store:
            reader = MemoryBlobReader(b"x" * 100)
            reader.hold()
            descriptor = Descriptor("x", digest_of(reader.data), 100)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.put_stream, descriptor, reader, lambda count: None)  # type: ignore[attr-defined]
                await reader.wait_requests(1)
                scope.cancel()
    assert (await fetch(path, tmp_path / "images")).digest == old.digest
    assert nothing_left(tmp_path)


async def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tar"
    image = make_image(tmp_path / "2", seed=2)
    old = await publish(make_image(tmp_path / "1"), path)
    real, writes_left, fail_at = os.pwrite, 0, 0

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal writes_left
        if not writes_left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        writes_left -= 1
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    while True:
        writes_left = fail_at
        try:
            await publish(image, path)
            break
        except DiskFull:
            fail_at += 1
        assert (await fetch(path, tmp_path / "images")).digest == old.digest
        assert nothing_left(tmp_path)
    assert fail_at > 5
    assert (await fetch(path, tmp_path / "images")).digest != old.digest


async def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    left = tmp_path / f"{STAGING_PREFIX}killed"
    left.mkdir()
    (left / "archive").write_bytes(b"half")
    await publish(make_image(tmp_path / "build"), tmp_path / "a.tar")
    assert not left.exists()


async def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    image = make_image(tmp_path / "build")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    for name in ("fifo", "directory"):
        with pytest.raises(CannotPublish, match="no regular file"):
            await publish(image, tmp_path / name)
    (tmp_path / "link").symlink_to("elsewhere.tar")
    result = await publish(image, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (await fetch(tmp_path / "elsewhere.tar", tmp_path / "images")).digest == result.digest


def _with_index(index: object, *more: tuple[str, bytes]) -> Archive:
    archive = Archive().file("oci-layout", MARKER).document("index.json", index)
    for name, data in more:
        archive.file(name, data)
    return archive


def _entry(digest: str, size: int = 2) -> dict[str, object]:
    return {"schemaVersion": 2, "manifests": [{"mediaType": OCI_MANIFEST, "digest": digest, "size": size}]}


DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("archive", "kind", "why"),
    [
        (Archive().file("f", b""), LayoutBroken, "no oci-layout file in it"),
        (Archive().file("oci-layout", b"{"), LayoutBroken, "broken oci-layout"),
        (Archive().file("oci-layout", MARKER), NoSuchTag, "it has none"),
        (_with_index([]), LayoutBroken, "broken index.json"),
        (_with_index(_entry("../../etc/passwd")), LayoutBroken, "is not a sha256 digest"),
        (_with_index(_entry(DIGEST)), LayoutBroken, "is not in it"),
        (
            _with_index(_entry(DIGEST), ("blobs/sha256/" + "0" * 64, b"{}")),
            DigestMismatch,
            "the content is sha256:44136f",
        ),
        (
            _with_index(_entry(DIGEST), ("blobs/sha256/" + "0" * 64, bytes(MANIFEST_SIZE_MAX_BYTES + 1))),
            ArchiveBroken,
            "more than 4194304",
        ),
        (
            Archive().entry("oci-layout", tarfile.SYMTYPE, link="../../etc/hostname"),
            ArchiveBroken,
            "leads out of the archive",
        ),
    ],
)
async def test_bad_archives(tmp_path: Path, archive: Archive, kind: type[BackendError], why: str) -> None:
    archive.write(tmp_path / "a.tar")
    with pytest.raises(kind, match=why):
        await fetch(tmp_path / "a.tar", tmp_path / "images", None)


async def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(BlobNotFound):
        await fetch(tmp_path / "absent", tmp_path / "images")
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with trio.fail_after(20), pytest.raises(BackendError):
            await fetch(tmp_path / name, tmp_path / "images")

"""Where the members of a tar are, in honest archives and in hostile ones."""

import gzip
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from backend.tar_index import (
    EXTENSION_MAX_BYTES,
    MEMBERS_MAX,
    TAR_BLOCK_BYTES,
    ArchiveBroken,
    TarIndex,
    index_tar,
)
from tests.archives import Archive


async def index(path: Path) -> TarIndex:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return await trio.to_thread.run_sync(index_tar, descriptor, "a.tar")
    finally:
        os.close(descriptor)


def content(path: Path, found: TarIndex, name: str) -> bytes | None:
    member = found.find(name)
    if member is None:
        return None
    return path.read_bytes()[member.offset : member.offset + member.size_bytes]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
async def test_members_are_where_the_index_says(tmp_path: Path, format: int) -> None:
    archive = Archive(format).entry("d", tarfile.DIRTYPE).file("./d/a", b"aa").file("d/empty", b"")
    archive.entry("d/link", tarfile.SYMTYPE, link="../x/../d/a").entry("hard", tarfile.LNKTYPE, link="d/link")
    long = "l" * 90 + "/" + "n" * 90
    archive.file(long, b"long" * 300).entry("to-long", tarfile.SYMTYPE, link="hard").file("last", b"z")
    path = archive.write(tmp_path / "a.tar")
    found = await index(path)
    expected = {"d/a": b"aa", "d/empty": b"", "d/link": b"aa", "hard": b"aa", "to-long": b"aa"}
    expected |= {long: b"long" * 300, "last": b"z"}
    assert {name: content(path, found, name) for name in expected} == expected
    assert found.find("d") is found.find("nope") is None


async def test_very_long_names_and_a_size_in_a_pax_record(tmp_path: Path) -> None:
    name = "/".join(["x" * 100] * 5)
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = (
            Archive(format).file(name, b"1").entry("link", tarfile.SYMTYPE, link=name).write(tmp_path / "a")
        )
        found = await index(path)
        assert content(path, found, name) == content(path, found, "link") == b"1"
    path = Archive(tarfile.PAX_FORMAT).file("f", b"four", size="4").write(tmp_path / "b")
    assert content(path, await index(path), "f") == b"four"


async def test_a_member_of_more_than_8_gib_is_stepped_over(tmp_path: Path) -> None:
    size_bytes = 9 << 30
    member = tarfile.TarInfo("big")
    member.size = size_bytes
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.seek(size_bytes, os.SEEK_CUR)
        file.write(Archive().file("behind", b"b").data())
    found = (await index(path)).find("behind")
    assert found is not None
    assert found.offset == size_bytes + 2 * TAR_BLOCK_BYTES


async def test_an_archive_without_an_end_marker_is_whole(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(
        Archive().file("f", b"x" * TAR_BLOCK_BYTES).data()[: 2 * TAR_BLOCK_BYTES]
    )
    found = (await index(tmp_path / "a.tar")).find("f")
    assert found is not None
    assert found.size_bytes == TAR_BLOCK_BYTES


def _lying_size(archive: bytes, size: bytes) -> bytes:
    header = bytearray(archive[:TAR_BLOCK_BYTES])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + archive[TAR_BLOCK_BYTES:]


ONE = Archive().file("f", b"x" * 2000).data()
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "it is empty"),
    "zeros": (lambda: bytes(10_240), "it is empty"),
    "text": (lambda: b"hello", "no tar file"),
    "noise": (lambda: b"hello" * 1000, "no tar file"),
    "gzip": (lambda: gzip.compress(os.urandom(4096)), "compressed with gzip"),
    "within a header": (lambda: ONE[:300], "no tar file"),
    "within content": (lambda: ONE[:1500], "cut short: 1012 bytes of f are missing"),
    "within the second header": (lambda: ONE[:2560] + ONE[:100], "cut short"),
    "rubbish behind": (lambda: ONE[:2560] + b"rubbish!" * 64, "no header at byte 2560"),
    "a size beyond the file": (lambda: _lying_size(ONE, b"77777777777\0"), "bytes of f are missing"),
    "a huge size": (lambda: _lying_size(ONE, b"\x80" + b"\xff" * 11), "bytes of f are missing"),
    "a negative size": (lambda: _lying_size(ONE, b"\xff" * 12), "a size of -1 bytes"),
    "a parent": (lambda: Archive().file("../f", b"").data(), "leads out of the archive"),
    "a parent within": (lambda: Archive().file("a/../../f", b"").data(), "leads out of the archive"),
    "the root": (lambda: Archive().file("/etc/passwd", b"").data(), "leads out of the archive"),
    "a link out": (
        lambda: Archive().entry("l", tarfile.SYMTYPE, link="../f").data(),
        "leads out of the archive",
    ),
    "a link to the root": (
        lambda: Archive().entry("l", tarfile.SYMTYPE, link="/etc/passwd").data(),
        "leads out of the archive",
    ),
    "twice": (lambda: Archive().file("f", b"1").file("./f", b"2").data(), "f is in it twice"),
    "a pax size that lies": (
        lambda: Archive(tarfile.PAX_FORMAT).file("f", b"x", size="99999999").data(),
        "bytes of f are missing",
    ),
    "a pax size of letters": (
        lambda: Archive(tarfile.PAX_FORMAT).file("f", b"x", size="-1").data(),
        "a size of -1",
    ),
    "a sparse file": (
        lambda: Archive(tarfile.PAX_FORMAT).file("f", b"x", **{"GNU.sparse.major": "1"}).data(),
        "sparse",
    ),
    "a pax name": (
        lambda: Archive(tarfile.PAX_FORMAT).file("f", b"x", comment="c" * EXTENSION_MAX_BYTES).data(),
        "a header extension of",
    ),
    "a damaged pax record": (
        lambda: (
            Archive(tarfile.PAX_FORMAT).file("f", b"", comment="abc").data().replace(b"15 comm", b"99 comm")
        ),
        "a damaged header extension",
    ),
    "a name too long": (
        lambda: Archive(tarfile.PAX_FORMAT).file("n" * 2000, b"x").data(),
        "a name of 2000 bytes",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_archives_are_one_line_of_complaint(tmp_path: Path, name: str) -> None:
    make, why = HOSTILE[name]
    (tmp_path / "a.tar").write_bytes(make())
    with pytest.raises(ArchiveBroken, match=why) as caught:
        await index(tmp_path / "a.tar")
    assert str(caught.value).isprintable()


async def test_links_that_go_in_circles(tmp_path: Path) -> None:
    archive = Archive().entry("a", tarfile.SYMTYPE, link="b").entry("b", tarfile.SYMTYPE, link="a")
    found = await index(archive.write(tmp_path / "a.tar"))
    with pytest.raises(ArchiveBroken, match="more than 8 links"):
        found.find("a")


@pytest.mark.slow
async def test_the_number_of_members_and_the_memory_for_them_are_bounded(tmp_path: Path) -> None:
    member = tarfile.TarInfo()
    with (tmp_path / "a.tar").open("wb") as file:
        for number in range(MEMBERS_MAX + 1):
            member.name = f"{'n' * 90}{number:06}"
            file.write(member.tobuf(tarfile.USTAR_FORMAT))
    tracemalloc.start()
    try:
        with pytest.raises(ArchiveBroken, match=f"more than {MEMBERS_MAX} members"):
            await index(tmp_path / "a.tar")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 32 << 20


async def test_every_length_of_a_cut_archive_is_an_error_or_fewer_members(tmp_path: Path) -> None:
    data = Archive(tarfile.PAX_FORMAT).file("f" * 120, b"x" * 700).file("g", b"y").data()
    path = tmp_path / "a.tar"
    for length in range(0, 4096, 37):
        path.write_bytes(data[:length])
        try:
            found = await index(path)
        except ArchiveBroken:
            continue
        for name in ("f" * 120, "g"):
            member = found.find(name)
            assert member is None or member.offset + member.size_bytes <= length

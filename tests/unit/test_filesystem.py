"""The file system of an image, without a mount: names, attributes, listings and reads."""

import errno
import random
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from backend.contract import BackendError
from backend.decode import ChunkInvalid
from backend.origin_stage import FetchFailed
from backend.prefetch import prefetch
from backend.prefetch_mode import PrefetchMode
from fuse.errno_map import errno_of, is_fault
from fuse.filesystem import ReadTimeout, WrongFileType
from fuse.inodetable import ROOT_INO
from rafs.bootstrap import Bootstrap
from rafs.codec import Compressor
from rafs.record import FormatError
from tests.mount_rig import Served, make_store, served
from tests.posix_tree import posix_tree
from tests.rafs_image import Options, directory, file, symlink, walk_nodes


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize(
    "options",
    [Options(), Options(blob_count=3, compressor=Compressor.LZ4_BLOCK), Options(batch=True, chunk_size=8192)],
    ids=["plain", "three blobs", "batches"],
)
async def test_everything_in_a_tree(tmp_path: Path, options: Options) -> None:
    tree = posix_tree()
    async with served(tmp_path, make_store(tmp_path, tree, options)) as s:
        for path, node in walk_nodes(tree):
            ino = s.ino(path)
            found, wanted = s.filesystem.attributes(ino), node.attributes
            assert (found.mode, found.uid, found.gid) == (wanted.mode, wanted.uid, wanted.gid)
            assert found.mtime_ns == wanted.mtime_s * 1_000_000_000 + wanted.mtime_ns
            assert found.rdev == wanted.rdev
            if stat.S_ISREG(wanted.mode):
                assert found.size == len(node.content)
                assert await s.read(path) == node.content
            elif stat.S_ISLNK(wanted.mode):
                assert s.filesystem.readlink(ino) == node.content
            elif stat.S_ISDIR(wanted.mode):
                names = [name for name, _, _ in s.filesystem.open_directory(ino).list_from(0)]
                assert sorted(names) == sorted([b".", b"..", *node.children])
            assert {n: s.filesystem.get_xattr(ino, n) for n in s.filesystem.list_xattrs(ino)} == node.xattrs


async def test_lookup(tmp_path: Path) -> None:
    tree = directory({b"a": file(b"1"), b"d": directory({b"b": file(b"22")})})
    async with served(tmp_path, make_store(tmp_path, tree)) as s:
        found = s.filesystem.lookup(ROOT_INO, b"a")
        assert found is not None
        assert (found.ino, found.size) == (s.ino(b"/a"), 1)
        assert s.filesystem.lookup(ROOT_INO, b"b") is None
        assert s.filesystem.lookup(s.ino(b"/d"), b"b") == s.filesystem.attributes(s.ino(b"/d/b"))
        up = s.filesystem.lookup(s.ino(b"/d"), b"..")
        assert up is not None
        assert up.ino == ROOT_INO
        with pytest.raises(WrongFileType, match="not a directory"):
            s.filesystem.lookup(s.ino(b"/a"), b"b")


async def test_inode_numbers_are_nids_but_for_the_root(tmp_path: Path) -> None:
    async with served(tmp_path, make_store(tmp_path, posix_tree())) as s:
        inodes = s.filesystem.inodes
        assert inodes.ino_of(s.bootstrap.root_nid) == ROOT_INO
        for nid in (0, 1, 2, s.bootstrap.root_nid, 1 << 40):
            assert inodes.nid_of(inodes.ino_of(nid)) == nid
            assert inodes.ino_of(nid) > 0
        assert s.ino(b"/links/one") == s.ino(b"/files/two-chunks")


@pytest.mark.parametrize("step", [1, 7, 512])
async def test_listing_goes_on_anywhere(tmp_path: Path, step: int) -> None:
    tree = directory({b"%05d" % i: file(b"") for i in range(1500)})
    async with served(tmp_path, make_store(tmp_path, tree, Options(blob_count=0))) as s:
        whole = list(s.filesystem.open_directory(ROOT_INO).list_from(0))
        assert len(whole) == 1502
        place, names = 0, []
        while True:
            part = list(
                zip(range(step), s.filesystem.open_directory(ROOT_INO).list_from(place), strict=False)
            )
            if not part:
                break
            names += [name for _, (name, _, _) in part]
            place = part[-1][1][2]
        assert names == [name for name, _, _ in whole]
        assert all(found == s.filesystem.attributes(found.ino) for _, found, _ in whole)


@pytest.mark.parametrize("ino", [2, 3, 1 << 40, (1 << 62) + 1, (1 << 64) - 1])
async def test_inode_that_is_not_there(tmp_path: Path, ino: int) -> None:
    async with served(tmp_path, make_store(tmp_path, posix_tree())) as s:
        with pytest.raises(FormatError):
            s.filesystem.attributes(ino)


async def test_reads_at_every_border(tmp_path: Path) -> None:
    content = noise(3 * 4096 + 100)
    async with served(tmp_path, make_store(tmp_path, directory({b"f": file(content)}))) as s:
        for offset in (0, 1, 4095, 4096, 8191, 12287, 12288, 12387, 12388, 99999):
            for size in (0, 1, 2, 4096, 4097, 99999):
                assert await s.read(b"/f", offset, size) == content[offset : offset + size]


async def test_warm_read_across_chunks_is_one_view(tmp_path: Path) -> None:
    content = noise(5 * 4096)
    async with served(tmp_path, make_store(tmp_path, directory({b"f": file(content)}))) as s:
        handle = s.filesystem.open_file(s.ino(b"/f"))
        assert s.filesystem.read_ready(handle, 0, 10) is None
        await s.read(b"/f")
        data = s.filesystem.read_ready(handle, 100, 4 * 4096)
        assert isinstance(data, memoryview)
        assert data == content[100 : 100 + 4 * 4096]
        requests = len(s.store.readers[0].requests)
        assert await s.read(b"/f") == content
        assert len(s.store.readers[0].requests) == requests
        assert s.fetchers[0].statistics().hits >= 2
        del data


async def test_chunks_that_lie_apart_are_joined(tmp_path: Path) -> None:
    # The second and third chunk are those of the first file, which lies before.
    one, two = noise(4096, 1), noise(4096, 2)
    tree = directory({b"a": file(two + one), b"b": file(one + two + one)})
    async with served(tmp_path, make_store(tmp_path, tree)) as s:
        assert await s.read(b"/b") == one + two + one
        handle = s.filesystem.open_file(s.ino(b"/b"))
        assert s.filesystem.read_ready(handle, 10, 9000) == (one + two + one)[10:9010]


async def test_forgotten_chunks_are_fetched_again_by_an_open_file(tmp_path: Path) -> None:
    content = noise(3 * 4096)
    async with served(tmp_path, make_store(tmp_path, directory({b"f": file(content)}))) as s:
        handle = s.filesystem.open_file(s.ino(b"/f"))
        assert bytes(await s.filesystem.read(handle, 0, 1 << 20)) == content
        await s.fetchers[0].cached.forget([1])
        assert s.filesystem.read_ready(handle, 0, 1 << 20) is None
        assert bytes(await s.filesystem.read(handle, 0, 1 << 20)) == content


async def test_chunks_that_vanish_each_time_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path, make_store(tmp_path, directory({b"f": file(b"x")}))) as s:
        monkeypatch.setattr(s.fetchers[0].cached, "is_ready", lambda chunk: False)
        with pytest.raises(FetchFailed, match="vanish"):
            await s.read(b"/f")


@pytest.mark.logs_warning
async def test_full_disk_reads_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(offset: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    content = noise(3 * 4096)
    async with served(tmp_path, make_store(tmp_path, directory({b"f": file(content)}))) as s:
        monkeypatch.setattr(s.fetchers[0].cached, "store", full)
        assert await s.read(b"/f", 100, 9000) == content[100:9100]
        assert await s.read(b"/f") == content


async def test_read_has_a_time_limit(tmp_path: Path, autojump_clock: object) -> None:
    store = make_store(tmp_path, directory({b"f": file(b"x")}))
    async with served(tmp_path, store, read_timeout_s=5) as s:
        s.store.readers[0].hold()
        with pytest.raises(ReadTimeout) as caught:
            await s.read(b"/f")
        assert errno_of(caught.value) == errno.EIO


async def test_corrupt_chunk_fails_only_reads_that_need_it(tmp_path: Path) -> None:
    content = noise(3 * 4096)
    options = Options(compressor=Compressor.NONE)
    async with served(tmp_path, make_store(tmp_path, directory({b"f": file(content)}), options)) as s:
        damaged = bytearray(s.store.readers[0].data)
        damaged[5000] ^= 1
        s.store.readers[0].data = bytes(damaged)
        with pytest.raises(ChunkInvalid):
            await s.read(b"/f", 4096, 10)
        assert await s.read(b"/f", 0, 4096) == content[:4096]
        assert await s.read(b"/f", 8192, 4096) == content[8192:]
        with pytest.raises(ChunkInvalid):
            await s.read(b"/f", 4000, 200)


async def test_tables_that_disagree_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(tmp_path, make_store(tmp_path, directory({b"f": file(noise(5000))}))) as s:
        monkeypatch.setattr(s.fetchers[0], "span_of", lambda chunk: (4096 * (chunk + 1), 4096))
        with pytest.raises(FormatError, match="4096 bytes at 4096 as in"):
            await s.read(b"/f")


async def test_a_flipped_file_size_shows_no_other_files_bytes(tmp_path: Path) -> None:
    """i_size grew by one bit: the bytes behind the file's chunk are those of its neighbour."""
    store = make_store(tmp_path, directory({b"a": file(b"short"), b"b": file(noise(5000))}))
    with Bootstrap(store.image.bootstrap) as bootstrap:
        at = bootstrap.resolve(b"/a").offset_bytes + 8
    damaged = bytearray(store.image.bootstrap)
    damaged[at + 1] ^= 0x10
    store.image = replace(store.image, bootstrap=bytes(damaged))
    async with served(tmp_path, store) as s:
        assert await s.read(b"/b") == noise(5000)
        with pytest.raises(FormatError, match="as in blob"):
            await s.read(b"/a")


async def test_prefetch_of_a_directory_that_holds_itself_ends(tmp_path: Path) -> None:
    tree = directory({b"d": directory({b"sub": directory({}), b"f": file(noise(5000))})})
    store = make_store(tmp_path, tree, Options(prefetch=(b"/d",)))
    with Bootstrap(store.image.bootstrap) as bootstrap:
        inner, outer = bootstrap.resolve(b"/d/sub"), bootstrap.resolve(b"/d")
        block = bytes(next(bootstrap.data_blocks(outer))[0])
        start = store.image.bootstrap.index(block)
    entry = block.index(inner.nid.to_bytes(8, "little"))
    damaged = bytearray(store.image.bootstrap)
    damaged[start + entry : start + entry + 8] = outer.nid.to_bytes(8, "little")
    store.image = replace(store.image, bootstrap=bytes(damaged))
    async with served(tmp_path, store) as s:
        await prefetch(s.bootstrap, s.fetchers, PrefetchMode.HINTS)
        assert s.fetchers[0].cached.is_ready(0)


async def test_files_of_several_blobs(tmp_path: Path) -> None:
    tree = directory({b"f%d" % i: file(noise(5000, i)) for i in range(6)})
    async with served(tmp_path, make_store(tmp_path, tree, Options(blob_count=3))) as s:
        for i in range(6):
            assert await s.read(b"/f%d" % i) == noise(5000, i)
        assert all(reader.requests for reader in s.store.readers)


async def test_wrong_types(tmp_path: Path) -> None:
    tree = directory({b"f": file(b"x"), b"l": symlink(b"t")})
    async with served(tmp_path, make_store(tmp_path, tree)) as s:
        for path, call in (
            (b"/l", s.filesystem.open_file),
            (b"/", s.filesystem.open_file),
            (b"/f", s.filesystem.readlink),
            (b"/f", s.filesystem.open_directory),
        ):
            with pytest.raises(WrongFileType):
                call(s.ino(path))


async def test_size_and_xattr_flag(tmp_path: Path) -> None:
    async with served(tmp_path, make_store(tmp_path, directory({b"f": file(b"x" * 5000)}))) as s:
        size = s.filesystem.size()
        assert (size.block_size, size.files) == (4096, 2)
        assert size.blocks * 4096 >= 8192 + len(s.store.image.bootstrap)
        assert not s.filesystem.has_xattrs
    tree = directory({b"f": file(b"x", {b"user.a": b"1"})})
    async with served(tmp_path, make_store(tmp_path, tree)) as s:
        assert s.filesystem.has_xattrs


async def test_readers_of_one_file_at_once(tmp_path: Path) -> None:
    content = noise(20 * 4096)

    async def check(s: Served, offset: int) -> None:
        assert await s.read(b"/f", offset, 6000) == content[offset : offset + 6000]

    async with served(tmp_path, make_store(tmp_path, directory({b"f": file(content)}))) as s:
        async with trio.open_nursery() as nursery:
            for offset in range(0, len(content), 1000):
                nursery.start_soon(check, s, offset)
        assert s.fetchers[0].statistics().chunks_stored == 20


@pytest.mark.parametrize(
    ("error", "number", "fault"),
    [
        (BackendError(where="x", why="y"), errno.EIO, False),
        (WrongFileType(ino=1, wanted="file"), errno.EINVAL, False),
        (MemoryError(), errno.ENOMEM, False),
        (OSError(errno.EMFILE, ""), errno.EMFILE, False),
        (OSError(errno.ENOENT, ""), errno.EIO, False),
        (ZeroDivisionError(), errno.EIO, True),
    ],
)
def test_errno_of_an_exception(error: Exception, number: int, fault: bool) -> None:
    assert errno_of(error) == number
    assert is_fault(error) is fault

"""Images in memory, served without a mount or mounted for real, and everything taken down again."""

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from backend.cache import BlobCache, BlobShape
from backend.contract import BlobReader
from backend.fetch import ChunkFetcher
from backend.fetch_pool import FetchOptions, open_fetch_pool
from backend.memory_blob import MemoryBlobReader
from backend.prefetch_mode import PrefetchMode
from backend.reference import DirReference, Reference
from backend.store import BlobMetaFile, ImageFiles, ImageMetadata, PublishProgress, PublishResult
from fuse.filesystem import ImageFilesystem
from fuse.mountpoint import NothingMounted, unmount
from fuse.session import MountOptions, MountSession, open_mount
from rafs.blobmeta import BlobMeta
from rafs.bootstrap import Bootstrap
from tests.rafs_image import ImageMaker, MadeImage, Node, Options


class MemoryStore:
    """An `ImageStore` over a made image; `readers` holds the reader of each blob, by number."""

    def __init__(self, folder: Path, image: MadeImage) -> None:
        self.image = image
        self.readers = [MemoryBlobReader(bytes(blob.data)) for blob in image.blobs]
        self._folder = folder
        self._ids = [entry.blob_id for entry in image.entries]

    @property
    def reference(self) -> Reference:
        return DirReference(self._folder)

    async def fetch_metadata(self, images_dir: Path) -> ImageMetadata:
        await trio.lowlevel.checkpoint()
        images_dir.mkdir(exist_ok=True)
        bootstrap = images_dir / "image.boot"
        bootstrap.write_bytes(self.image.bootstrap)
        metas = []
        for entry, blob in zip(self.image.entries, self.image.blobs, strict=True):
            metas.append(BlobMetaFile(entry.blob_id, images_dir / f"{entry.blob_id}.blob.meta"))
            metas[-1].path.write_bytes(blob.meta)
        return ImageMetadata("sha256:" + "0" * 64, images_dir, bootstrap, tuple(metas))

    def open_blob(self, blob_id: str, size_bytes: int) -> BlobReader:
        return self.readers[self._ids.index(blob_id)]

    async def publish(self, image: ImageFiles, progress: PublishProgress) -> PublishResult:
        raise NotImplementedError


def make_store(folder: Path, tree: Node, options: Options | None = None) -> MemoryStore:
    """The tree as an image in memory; its bootstrap is written in `folder`."""
    folder.mkdir(exist_ok=True)
    return MemoryStore(folder, ImageMaker(tree, options or Options()).make(folder / "made.boot"))


@dataclass(frozen=True, slots=True)
class Served:
    """A file system without a mount."""

    filesystem: ImageFilesystem
    bootstrap: Bootstrap
    store: MemoryStore
    fetchers: dict[int, ChunkFetcher]

    def ino(self, path: bytes) -> int:
        """The inode number of an absolute path."""
        return self.filesystem.inodes.ino_of(self.bootstrap.resolve(path).nid)

    async def read(self, path: bytes, offset: int = 0, size: int = 1 << 30) -> bytes:
        """Bytes of a file."""
        return bytes(await self.filesystem.read(self.filesystem.open_file(self.ino(path)), offset, size))


@asynccontextmanager
async def served(tmp_path: Path, store: MemoryStore, read_timeout_s: float = 60.0) -> AsyncIterator[Served]:
    """The file system of an image with its cache in `tmp_path`."""
    image = store.image
    bootstrap = Bootstrap(image.bootstrap)
    with ExitStack() as files:
        async with open_fetch_pool(FetchOptions()) as pool:
            fetchers = {}
            for entry, blob, reader in zip(image.entries, image.blobs, store.readers, strict=True):
                cached = BlobCache(tmp_path / "cache").open(
                    BlobShape(entry.blob_id, entry.uncompressed_size, entry.chunk_count)
                )
                files.callback(cached.close)
                digests = bootstrap.chunk_digests(entry.index)
                meta = BlobMeta(blob.meta)
                fetchers[entry.index] = ChunkFetcher(entry, meta, digests, reader, cached, pool)
            filesystem = ImageFilesystem(bootstrap, fetchers, read_timeout_s)
            yield Served(filesystem, bootstrap, store, fetchers)


@asynccontextmanager
async def mounted(
    tmp_path: Path,
    store: MemoryStore,
    prefetch: PrefetchMode = PrefetchMode.NONE,
    read_timeout_s: float = 60.0,
) -> AsyncIterator[MountSession]:
    """The image, mounted at `tmp_path`/mnt by the product's own session."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir(exist_ok=True)
    metadata = await store.fetch_metadata(tmp_path / "images")
    options = MountOptions(
        mountpoint,
        tmp_path / "cache",
        prefetch,
        read_timeout_s=read_timeout_s,
        status_socket=tmp_path / "status.sock",
    )
    try:
        async with open_mount(store, metadata, options) as session:
            yield session
    finally:
        with suppress(NothingMounted):
            unmount(mountpoint, lazy=True)

"""One mount: image metadata, cache, fetchers, file system and driver put together, and taken apart again.

Concurrency: `open_mount` owns two nurseries. The outer one is the fetch pool's; in the inner one run the
driver, prefetch and, when asked for, the status server. Leaving the block first ends the inner one, which
unmounts, then the fetches, then flushes the cache, then closes the files.
"""

import datetime
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import trio

from backend.cache import BlobCache, BlobShape
from backend.contract import BlobReader
from backend.fetch import ChunkFetcher, FetchStatistics
from backend.fetch_pool import FetchOptions, FetchPool, open_fetch_pool
from backend.prefetch import PrefetchMode, prefetch
from backend.store import ImageMetadata, ImageStore
from fuse.filesystem import ImageFilesystem
from fuse.mountpoint import MountFailed, prepare_mountpoint, require_fuse
from fuse.pyfuse3_driver import DriverOptions, raise_readahead, serve
from fuse.status_server import serve_status
from rafs.blobmeta import BlobMeta
from rafs.bootstrap import Bootstrap
from rafs.errors import NydusError

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How to mount. `allow_other` lets every user in; `status_socket` is where to answer for status."""

    mountpoint: Path
    cache_dir: Path
    prefetch: PrefetchMode = PrefetchMode.HINTS
    allow_other: bool = field(default_factory=lambda: os.geteuid() == 0)
    readahead_kib: int = 1024
    read_timeout_s: float = 60.0
    status_socket: Path | None = None
    fetch: FetchOptions = field(default_factory=FetchOptions)


class SessionStatus(msgspec.Struct, frozen=True):
    """What a mount says of itself. Sizes in bytes: of the encoded blobs, decoded, and cached on the disk."""

    reference: str
    digest: str
    driver: str
    mountpoint: str
    pid: int
    since: datetime.datetime
    image_size_bytes: int
    decoded_size_bytes: int
    cached_bytes: int
    fetched: FetchStatistics


class MountSession:
    """A live mount."""

    def __init__(
        self, store: ImageStore, metadata: ImageMetadata, bootstrap: Bootstrap, mountpoint: Path
    ) -> None:
        """Use `open_mount`."""
        self.mountpoint = mountpoint
        self.fetchers: dict[int, ChunkFetcher] = {}
        self._reference = str(store.reference)
        self._digest = metadata.digest
        self._blobs = bootstrap.blobs
        self._since = datetime.datetime.now(datetime.UTC)
        self._unmounted = trio.Event()

    async def wait_unmounted(self) -> None:
        """Returns when somebody else has unmounted."""
        await self._unmounted.wait()

    def statistics(self) -> FetchStatistics:
        """What was fetched for all blobs."""
        return sum((fetcher.statistics() for fetcher in self.fetchers.values()), FetchStatistics())

    def status(self) -> SessionStatus:
        """The state at this moment."""
        return SessionStatus(
            reference=self._reference,
            digest=self._digest,
            driver="pyfuse3",
            mountpoint=os.fspath(self.mountpoint),
            pid=os.getpid(),
            since=self._since,
            image_size_bytes=sum(blob.compressed_size for blob in self._blobs),
            decoded_size_bytes=sum(blob.uncompressed_size for blob in self._blobs),
            cached_bytes=sum(fetcher.cached.usage_bytes() for fetcher in self.fetchers.values()),
            fetched=self.statistics(),
        )

    async def _serve(
        self, filesystem: ImageFilesystem, options: DriverOptions, *, task_status: trio.TaskStatus[None]
    ) -> None:
        try:
            await serve(filesystem, self.mountpoint, options, task_status=task_status)
        finally:
            self._unmounted.set()


@asynccontextmanager
async def open_mount(
    store: ImageStore,
    metadata: ImageMetadata,
    options: MountOptions,
    on_ready: Callable[[MountSession], None] = lambda session: None,
) -> AsyncIterator[MountSession]:
    """Mounts an image; the block begins when it is usable, and leaving it unmounts.

    `on_ready` is called once the mount point has answered. Raises what is wrong with the mount point, with
    the image or with the cache, before anything is mounted. Errors are never wrapped in groups.
    """
    await trio.to_thread.run_sync(require_fuse)
    mountpoint = await trio.to_thread.run_sync(prepare_mountpoint, options.mountpoint)
    async with _image(store, metadata, options, mountpoint) as (bootstrap, session):
        filesystem = ImageFilesystem(bootstrap, session.fetchers, options.read_timeout_s)
        failure: Exception | None = None
        try:
            async with trio.open_nursery() as nursery:
                try:
                    await _start(nursery, session, filesystem, options)
                    nursery.start_soon(prefetch, bootstrap, session.fetchers, options.prefetch)
                    on_ready(session)
                    yield session
                except Exception as error:
                    failure = error  # raised below: the nursery would wrap it in a group
                nursery.cancel_scope.cancel()
        except* NydusError as group:
            failure = failure or group.exceptions[0]
        if failure is not None:
            raise failure


async def _start(
    nursery: trio.Nursery, session: MountSession, filesystem: ImageFilesystem, options: MountOptions
) -> None:
    """Starts driver and status server; returns when the mount point answers."""
    driver = DriverOptions(source=session.status().reference, allow_other=options.allow_other)
    await nursery.start(session._serve, filesystem, driver)
    with trio.move_on_after(READY_TIMEOUT_S):
        await trio.to_thread.run_sync(
            raise_readahead, session.mountpoint, options.readahead_kib, abandon_on_cancel=True
        )
        if options.status_socket is not None:
            await nursery.start(serve_status, options.status_socket, session.status)
        return
    raise MountFailed(directory=session.mountpoint, why=f"no answer within {READY_TIMEOUT_S:g} s")


@asynccontextmanager
async def _image(
    store: ImageStore, metadata: ImageMetadata, options: MountOptions, mountpoint: Path
) -> AsyncIterator[tuple[Bootstrap, MountSession]]:
    """Bootstrap and fetchers, closed again in the order in which they depend on each other."""
    with ExitStack() as files:
        bootstrap = Bootstrap.open(metadata.bootstrap_path)
        files.callback(_close_bootstrap, bootstrap)
        session = MountSession(store, metadata, bootstrap, mountpoint)
        files.callback(session.fetchers.clear)
        async with AsyncExitStack() as readers, open_fetch_pool(options.fetch) as pool:
            cache = BlobCache(options.cache_dir)
            for blob in bootstrap.blobs:
                if blob.chunk_count == 0:
                    continue
                reader = store.open_blob(blob.blob_id, blob.compressed_size)
                readers.push_async_callback(_close_reader, reader)
                session.fetchers[blob.index] = await trio.to_thread.run_sync(
                    _open_fetcher, bootstrap, metadata, blob.index, reader, cache, pool, files
                )
            yield bootstrap, session


def _open_fetcher(
    bootstrap: Bootstrap,
    metadata: ImageMetadata,
    blob_index: int,
    reader: BlobReader,
    cache: BlobCache,
    pool: FetchPool,
    files: ExitStack,
) -> ChunkFetcher:
    """Opens what one blob needs; `files` closes it. Blocking: the chunk table is scanned."""
    blob = bootstrap.blobs[blob_index]
    meta = BlobMeta.open(metadata.blob_meta_path(blob.blob_id))
    files.callback(meta.close)
    cached = cache.open(BlobShape(blob.blob_id, blob.uncompressed_size, blob.chunk_count))
    files.callback(cached.close)
    return ChunkFetcher(blob, meta, bootstrap.chunk_digests(blob_index), reader, cached, pool)


async def _close_reader(reader: BlobReader) -> None:
    with trio.CancelScope(shield=True):
        await reader.aclose()


def _close_bootstrap(bootstrap: Bootstrap) -> None:
    # A view that an exception's traceback still holds keeps the mapping; the process is about to end.
    with suppress(BufferError):
        bootstrap.close()

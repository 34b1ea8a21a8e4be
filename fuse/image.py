"""An image that is ready to be mounted: its bootstrap, and a fetcher for each blob."""

import functools
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import trio

from backend.cache import BlobShape, CachedBlob
from backend.chunk_copy import LocalChunks, open_local_chunks
from backend.contract import BlobReader
from backend.encoded import EncodedBlob, encoded_shape
from backend.fetch import ChunkFetcher
from backend.fetch_metrics import FetchMetrics
from backend.fetch_pool import FetchOptions, FetchPool, open_fetch_pool
from backend.fetch_statistics import FetchStatistics
from backend.keep_mode import KeepEncoded
from backend.metadata import layers_of
from backend.peers.hub import PeerHub
from backend.peers.limits import HostLimits
from backend.peers.mirror import SharedImage
from backend.reference import RegistryReference
from backend.shelf import BlobShelf
from backend.store import ImageMetadata, ImageStore, OciStore
from rafs.blob_table import BlobEntry
from rafs.blobmeta import BlobMeta
from rafs.bootstrap import Bootstrap
from rafs.encoded_map import EncodedMap
from rafs.errors import NydusError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """An image's metadata, mapped, and the fetchers of its blobs that have chunks, by blob index."""

    reference: str
    metadata: ImageMetadata
    bootstrap: Bootstrap
    cache_dir: Path
    fetchers: dict[int, ChunkFetcher]

    @property
    def encoded_size(self) -> int:
        """Bytes of all blobs as they travel."""
        return sum(blob.compressed_size for blob in self.bootstrap.blobs)

    @property
    def decoded_size(self) -> int:
        """Bytes of all blobs, decoded."""
        return sum(blob.uncompressed_size for blob in self.bootstrap.blobs)

    def cached_bytes(self) -> int:
        """Disk space that the cache files take."""
        return sum(fetcher.cached.usage_bytes() for fetcher in self.fetchers.values())

    def is_complete(self) -> bool:
        """Whether nothing is left to fetch."""
        return all(fetcher.cached.is_complete() for fetcher in self.fetchers.values())

    def statistics(self) -> FetchStatistics:
        """What was fetched for all blobs."""
        return sum((fetcher.statistics() for fetcher in self.fetchers.values()), FetchStatistics())


@asynccontextmanager
async def open_image(
    store: ImageStore,
    metadata: ImageMetadata,
    cache_dir: Path,
    shelf: BlobShelf,
    options: FetchOptions,
    peers: PeerHub | None = None,
    limits: HostLimits | None = None,
    metrics: FetchMetrics | None = None,
) -> AsyncIterator[OpenedImage]:
    """Opens what reads of the image need, and closes it in the order in which it depends on each other.

    `peers` are asked for images of registries, which all hosts can read. `limits` and `metrics` are those of
    the host.

    Fetches end first; what has arrived is flushed before its files are closed. Raises `FormatError`,
    `CacheUnusable`, `BlobUnsupported`, `NoChunkTable`.
    """
    with ExitStack() as files:
        bootstrap = Bootstrap.open(metadata.bootstrap_path)
        files.callback(_close_bootstrap, bootstrap)
        fetchers: dict[int, ChunkFetcher] = {}
        files.callback(fetchers.clear)
        async with (
            AsyncExitStack() as readers,
            open_fetch_pool(options, limits, metrics) as pool,
            AsyncExitStack() as shared,
        ):
            local = files.enter_context(open_local_chunks(cache_dir, shelf))
            opener = _Opener(bootstrap, metadata, cache_dir, shelf, pool, files, local, [])
            for blob in bootstrap.blobs:
                if blob.chunk_count == 0:
                    continue
                reader = store.open_blob(blob.blob_id, blob.compressed_size)
                readers.push_async_callback(_close_reader, reader)
                fetcher = await trio.to_thread.run_sync(opener.open, blob.index, reader)
                fetchers[blob.index] = fetcher
                if peers is not None and (name := shared_name(store, metadata)):
                    encoded = await trio.to_thread.run_sync(opener.open_encoded, blob, fetcher, peers.keep)
                    if encoded is not None:
                        fetcher.origin.encoded = encoded
                        pool.register(encoded.cached)
                    access = peers.registered(name, metadata.blob_meta_path(blob.blob_id), fetcher)
                    fetcher.use_peers(await shared.enter_async_context(access))
            if peers is not None and shared_name(store, metadata):
                open_content = cast("OciStore", store).open_content
                by_id = {bootstrap.blobs[index].blob_id: fetcher for index, fetcher in fetchers.items()}
                image = SharedImage(metadata, cache_dir, open_content, by_id)
                shared.enter_context(peers.mirror.sharing(image))
            for restore in opener.restores:
                pool.nursery.start_soon(trio.to_thread.run_sync, restore)
            yield OpenedImage(str(store.reference), metadata, bootstrap, cache_dir, fetchers)


def shared_name(store: ImageStore, metadata: ImageMetadata) -> str:
    """What names exactly this image on every host; "" for one that only this host may be able to read."""
    reference = store.reference
    if not isinstance(reference, RegistryReference):
        return ""
    return f"{reference.host}/{reference.repository}@{metadata.digest}"


@dataclass(frozen=True, slots=True)
class _Opener:
    bootstrap: Bootstrap
    metadata: ImageMetadata
    cache_dir: Path
    shelf: BlobShelf
    pool: FetchPool
    files: ExitStack
    local: LocalChunks | None
    restores: list[Callable[[], None]]

    def open(self, blob_index: int, reader: BlobReader) -> ChunkFetcher:
        """Opens what one blob needs; `files` closes it. Blocking: the chunk table is scanned."""
        blob = self.bootstrap.blobs[blob_index]
        meta = BlobMeta.open(self.metadata.blob_meta_path(blob.blob_id))
        self.files.callback(meta.close)
        cached = self._open_cached(BlobShape(blob.blob_id, blob.uncompressed_size, blob.chunk_count))
        digests = self.bootstrap.chunk_digests(blob_index)
        copier = self.local.copier(blob, meta, digests.find) if self.local else None
        if copier is not None:
            self.restores.append(functools.partial(copier.restore, cached))
        return ChunkFetcher(blob, meta, digests, reader, cached, self.pool, copier)

    def open_encoded(self, blob: BlobEntry, fetcher: ChunkFetcher, keep: KeepEncoded) -> EncodedBlob | None:
        """The file for the encoded bytes of a blob, if they are to be kept; `files` closes it. Blocking.

        That it cannot be had keeps nobody from reading.
        """
        try:
            layers = layers_of(self.metadata)
            size_bytes = layers.sizes().get(blob.blob_id) if layers is not None else None
            if not size_bytes or not keep.keeps(size_bytes, blob.uncompressed_size):
                return None
            parts = EncodedMap.of_blob(fetcher.meta, size_bytes)
            return EncodedBlob(self._open_cached(encoded_shape(blob.blob_id, parts)), parts)
        except NydusError as error:
            log.warning("encoded bytes of blob %s are not kept: %s", blob.blob_id[:12], error)
            return None

    def _open_cached(self, shape: BlobShape) -> CachedBlob:
        cached = self.shelf.open(self.cache_dir, shape)
        self.files.callback(self.shelf.close, self.cache_dir, cached)
        return cached


async def _close_reader(reader: BlobReader) -> None:
    with trio.CancelScope(shield=True):
        await reader.aclose()


def _close_bootstrap(bootstrap: Bootstrap) -> None:
    # A view that an exception's traceback still holds keeps the mapping; the process is about to end.
    with suppress(BufferError):
        bootstrap.close()

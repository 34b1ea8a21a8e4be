"""A container image becomes a Nydus image: a blob for each layer, one bootstrap for all of them.

Concurrency: some layers are built at the same time, each by a task that waits for its process; blobs travel
to the target one at a time, as soon as they are ready. The manifest comes last. All decisions about content
are made by the builds and the merge, so the image does not depend on who was first.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import trio

from backend.contract import BackendError, BlobReader
from backend.growing import GrowingFile
from backend.image_config import NewLayer, converted_config
from backend.manifest import NYDUS_CONFIG, OCI_CONFIG, Descriptor, ManifestBroken, diff_ids_of, shown
from backend.pieces import first_failure
from backend.publish import ImageDescription, Transfer, send_image
from backend.publishing import reporting_writes, staging_directory
from backend.reference import ArchiveReference
from backend.source_image import SourceImage
from backend.store import BlobFile, ImageFiles, OciStore, OpenOrigin
from backend.upload import ContentIdentity
from builder.build import BuiltImage
from builder.build_cache import BuildCache
from builder.chunk_dict import DictionaryImage
from builder.journal import BuildRunning
from builder.layer_build import build_layer
from builder.layer_cache import OTHERS_PAUSE_S, ConvertedLayer, LayerCache
from builder.layer_process import LayerTask
from builder.merge import LayerMerge, MergedImage
from builder.options import BuildOptions
from builder.pipeline import PipelineCounters
from builder.prefetch_patterns import PrefetchPatterns
from rafs.errors import NydusError

log = logging.getLogger(__name__)


class ContentMismatch(NydusError):
    """A layer with the right digest that is packed from something else than the config says."""

    message = (
        "{where}: layer {layer} unpacks to {got}, and the config of the image says {expected}; "
        "one of them was changed since the image was built: build it again"
    )
    exit_code: ClassVar[int] = 62


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How images are converted. `parallel` layers are built at a time; `build` serves each of them.

    With `is_referrer` the new image names the old one as its subject. With `keeps_layers` gzip layers stay
    the blobs that they are, and only an index of them is made.
    """

    build: BuildOptions
    parallel: int
    dictionaries: tuple[DictionaryImage, ...] = ()
    is_one_of_two: bool = False
    is_referrer: bool = False
    keeps_layers: bool = False


@dataclass(frozen=True, slots=True)
class ConvertedImage:
    """An image whose content is in the target and whose manifest is not yet. Sizes in bytes."""

    manifest: bytes
    layers: int
    layers_converted: int
    inodes: int
    bytes_in: int


class ImageConverter:
    """Converts images of one store into one target."""

    def __init__(
        self,
        source: OciStore,
        target: OciStore,
        transfer: Transfer,
        open_origin: OpenOrigin,
        cache: LayerCache,
        options: ConvertOptions,
        build_cache: BuildCache | None = None,
        on_progress: Callable[[str, PipelineCounters], None] = lambda layer, counters: None,
    ) -> None:
        self._source = source
        self._target = target
        self._transfer = transfer
        self._open_origin = open_origin
        self._cache = cache
        self._options = options
        self._dictionary_digests = tuple(
            hashlib.sha256(image.bootstrap.read_bytes()).hexdigest() for image in options.dictionaries
        )
        self._build_cache = build_cache
        self.provided: dict[str, ConvertedLayer] = {}
        self.sources: dict[str, str] = {}
        self._on_progress = on_progress
        self._sending = trio.Lock()

    async def convert(self, image: SourceImage, work_dir: Path) -> ConvertedImage:
        """Brings everything over but the manifest. Raises what builds, stores and the merge raise."""
        with staging_directory(work_dir) as staging:
            layers, merged = await self._make(image, staging)
            files = ImageFiles(merged.bootstrap, _blob_files(merged, layers), image.platform)
            description = self._describe(image, layers)
            manifest = await send_image(self._transfer, files, description, self._open_origin)
        converted = sum(layer.is_new for layer in layers)
        return ConvertedImage(manifest, len(layers), converted, merged.inodes, merged.bytes_in)

    async def note_published(self) -> None:
        """To be called when the target's reference names the image: an archive has nothing before."""
        for key, layer in self.provided.items():
            async with self._cache.locked(key):
                layer.note_holder(str(self._target.reference))

    async def _make(self, image: SourceImage, staging: Path) -> tuple[list[ConvertedLayer], MergedImage]:
        """All layers, lowest first, and what they are together. Equal ones are built once.

        A layer is merged as soon as it and all below it are there. Raises `ContentMismatch`.
        """
        diff_ids = _diff_ids(image, str(self._source.reference))
        wanted = {layer.digest: layer for layer in image.manifest.layers}
        ready = {digest: trio.Event() for digest in wanted}
        found: dict[str, ConvertedLayer] = {}
        limit = trio.CapacityLimiter(self._options.parallel)

        async def provide(layer: Descriptor) -> None:
            async with limit:
                found[layer.digest] = await self._provide(layer)
            ready[layer.digest].set()

        try:
            with reporting_writes(staging), LayerMerge(staging) as merge:
                async with trio.open_nursery() as nursery:
                    for layer in wanted.values():
                        nursery.start_soon(provide, layer)
                    for layer, diff_id in zip(image.manifest.layers, diff_ids, strict=True):
                        await ready[layer.digest].wait()
                        self._expect_content(layer, diff_id, found[layer.digest].diff_id)
                        await trio.to_thread.run_sync(merge.add, found[layer.digest].bootstrap)
                patterns = PrefetchPatterns(self._options.build.prefetch)
                merged = await trio.to_thread.run_sync(merge.write, staging / "image.boot", patterns)
        except BaseExceptionGroup as group:
            raise first_failure(group) from None
        return [found[layer.digest] for layer in image.manifest.layers], merged

    def _expect_content(self, layer: Descriptor, expected: str, got: str) -> None:
        if expected != got:
            where = self._source.reference
            raise ContentMismatch(where=where, layer=layer.digest, got=got, expected=shown(expected))

    async def _provide(self, layer: Descriptor) -> ConvertedLayer:
        """A layer whose blobs are in the target."""
        options = self._options
        key = self._cache.key(
            layer.digest, options.build, self._dictionary_digests, is_kept=options.keeps_layers
        )
        async with self._cache.locked(key):
            while (known := await self._find(key)) is None:
                self._cache.forget(key)
                try:
                    known = await self._build(layer, key)
                    break
                except BuildRunning:  # by what a killed conversion has left, which ends by itself
                    await trio.sleep(OTHERS_PAUSE_S)
            async with self._sending:
                for blob in known.blobs:
                    await self._transfer.send_blob(known.blob_file(blob), self._open_origin, may_link=True)
            if not isinstance(self._target.reference, ArchiveReference):
                known.note_holder(str(self._target.reference))
        self.provided[key], self.sources[key] = known, layer.digest
        return known

    async def _find(self, key: str) -> ConvertedLayer | None:
        """A layer that was converted before, here or by who shares the build cache."""
        known = self._cache.find(key)
        if known is not None and await self._is_reachable(known):
            return known
        if self._build_cache is None:
            return None
        known = await self._build_cache.fetch(key, self._cache)
        return known if known is not None and await self._is_reachable(known) else None

    async def _is_reachable(self, layer: ConvertedLayer) -> bool:
        """Whether its blobs are here, in the target, or in an image that was made with it."""
        for blob in layer.blobs:
            digest = f"sha256:{blob.blob_id}"
            if layer.blob_file(blob).path or await self._target.has_blob(digest, blob.size_bytes):
                continue
            for holder in [blob.source] if blob.source else list(layer.holders):
                if await self._holds(holder, blob.blob_id, blob.size_bytes):
                    layer.prefer_holder(holder)
                    break
            else:
                return False
        return True

    async def _holds(self, reference: str, blob_id: str, size_bytes: int) -> bool:
        try:
            async with self._open_origin(reference) as store:
                reader = store.open_blob(blob_id, size_bytes)
                try:
                    return await reader.size() == size_bytes
                finally:
                    with trio.CancelScope(shield=True):
                        await reader.aclose()
        except BackendError as error:
            log.info("blob %s is not to be had from %s: %s", blob_id[:12], reference, error)
            return False

    async def _build(self, layer: Descriptor, key: str) -> ConvertedLayer:
        label = f"layer {layer.digest.removeprefix('sha256:')[:12]}"
        work_dir = self._cache.work_dir(key)
        options = self._options
        # Patterns are those of the whole image: they are for its table, not for the order in a layer's blob.
        build = replace(options.build, prefetch=())
        task = LayerTask(label, work_dir, build, options.dictionaries, options.keeps_layers)
        reader = self._source.open_content(layer.digest, layer.size_bytes)
        try:
            built = await self._build_and_send(task, layer, reader)
        except BaseExceptionGroup as group:
            raise first_failure(group) from None
        finally:
            with trio.CancelScope(shield=True):
                await reader.aclose()
        holders = (str(self._source.reference),) if options.keeps_layers else ()
        return await trio.to_thread.run_sync(self._cache.add, key, built, holders)

    async def _build_and_send(self, task: LayerTask, layer: Descriptor, reader: BlobReader) -> BuiltImage:
        """Builds a layer; its blob is on its way to the target meanwhile."""
        growing: GrowingFile | None = None
        async with trio.open_nursery() as nursery:

            def follow(path: Path) -> None:
                nonlocal growing
                growing = GrowingFile(path)
                nursery.start_soon(self._transfer.follow_blob, growing)

            def advance(counters: PipelineCounters) -> None:
                self._on_progress(layer.digest, counters)
                if growing is not None:
                    growing.advance(counters.bytes_out)

            built = await build_layer(task, layer, reader, follow, advance)
            own = [blob for blob in built.files.blobs if blob.path is not None]
            if own and growing is not None:
                growing.finish(ContentIdentity(f"sha256:{own[0].blob_id}", own[0].size_bytes))
            else:
                nursery.cancel_scope.cancel()
        return built

    def _describe(self, image: SourceImage, layers: Sequence[ConvertedLayer]) -> ImageDescription:
        where = str(self._source.reference)
        owner: dict[str, int] = {}
        for number, layer in enumerate(layers):
            for blob in layer.blobs:
                if not blob.source and not blob.table_of:
                    owner.setdefault(blob.blob_id, number)

        def make_config(blobs: Sequence[Descriptor], diff_id: str) -> bytes:
            made = [NewLayer(blob.digest, owner.get(blob.hex)) for blob in blobs]
            return converted_config(image.config, len(image.manifest.layers), made, diff_id, where)

        media_type = NYDUS_CONFIG if self._options.is_one_of_two else OCI_CONFIG
        subject = image.descriptor if self._options.is_referrer else None
        return ImageDescription(make_config, media_type, image.manifest.annotations, subject)


def _diff_ids(image: SourceImage, where: str) -> tuple[str, ...]:
    """What the config says of the content of each layer. Raises `ManifestBroken`."""
    diff_ids, count = diff_ids_of(image.config, where), len(image.manifest.layers)
    if len(diff_ids) != count:
        raise ManifestBroken(where=where, why=f"{count} layers, and {len(diff_ids)} diff IDs in the config")
    return diff_ids


def _blob_files(merged: MergedImage, layers: Sequence[ConvertedLayer]) -> tuple[BlobFile, ...]:
    """The blobs of the image, which are in the target already; a dictionary's have a source."""
    files: dict[str, BlobFile] = {}
    for layer in layers:
        for blob in layer.blobs:
            files[blob.blob_id] = replace(layer.blob_file(blob), path=None, source=blob.source or None)
    data = [entry.blob_id for entry in merged.blobs]
    tables = [file for file in files.values() if file.table_of in data]
    return *(files[blob_id] for blob_id in data), *tables

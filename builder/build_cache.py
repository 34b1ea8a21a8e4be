"""Converted layers in a registry, for hosts that keep nothing: `--build-cache REF`.

An artifact whose layers are, for each converted layer, a package of its bootstrap and chunk tables, and its
data blob. Its annotations on packages are those of Nydus's cache images where they mean the same.
"""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from backend.bootstrap_layer import LayerFile, pack_layer
from backend.contract import BackendError, BlobNotFound
from backend.manifest import (
    LAYER_GZIP,
    OCI_MANIFEST,
    Descriptor,
    ImageManifest,
    blob_descriptor,
    parse_document,
    shown,
)
from backend.metadata import unpack_bootstrap
from backend.ocidigest import digest_of
from backend.publish import Transfer
from backend.publishing import reporting_writes, staging_directory
from backend.store import NoProgress, OciStore, OpenOrigin
from builder.layer_cache import ConvertedLayer, LayerCache, LayerRecord

log = logging.getLogger(__name__)

ARTIFACT_TYPE = "application/vnd.nydus-py.build-cache.v1+json"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EMPTY = b"{}"
"""The config of artifacts that have none, from the OCI image specification 1.1."""
CACHE_ANNOTATION = "containerd.io/snapshot/nydus-cache"
SOURCE_ANNOTATION = "containerd.io/snapshot/nydus-source-digest"
KEY_ANNOTATION = "nydus-py/layer-key"
RECORD_ANNOTATION = "nydus-py/layer-record"
RECORDS_MAX = 200
"""Layers that are kept; the oldest go."""
SAVE_TRIES = 5
"""How often the artifact is replaced, as long as others take out what was put in."""


class BuildCacheBroken(BackendError):
    """A build cache that cannot be read."""

    message = "build cache {where}: {why}"
    exit_code = 63


@dataclass(frozen=True, slots=True)
class _Package:
    """A layer in the artifact: where its bootstrap and chunk tables are, and what is known of it."""

    descriptor: Descriptor
    record: LayerRecord


class BuildCache:
    """The artifact under one reference. `load` comes first. What cannot be used of it is left out."""

    def __init__(self, store: OciStore, open_origin: OpenOrigin) -> None:
        self._store = store
        self._open_origin = open_origin
        self._packages: dict[str, _Package] = {}

    async def load(self) -> None:
        """Reads what there is; nothing, where there is no such artifact yet. Raises `BuildCacheBroken`."""
        self._packages = await self._read()

    async def _read(self) -> dict[str, _Package]:
        where = str(self._store.reference)
        packages: dict[str, _Package] = {}
        try:
            stored = await self._store.get_manifest()
        except BlobNotFound:
            return packages
        document = parse_document(stored.data, where)
        if not isinstance(document, ImageManifest) or document.artifact_type != ARTIFACT_TYPE:
            raise BuildCacheBroken(where=where, why="something else has this name; choose another")
        for layer in document.layers:
            key = layer.annotations.get(KEY_ANNOTATION)
            if key is None:
                continue
            try:
                text = layer.annotations.get(RECORD_ANNOTATION, "")
                packages[key] = _Package(layer, msgspec.json.decode(text, type=LayerRecord))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                log.warning("build cache %s: layer %s is left out: %s", where, shown(key), error)
        return packages

    async def fetch(self, key: str, cache: LayerCache) -> ConvertedLayer | None:
        """Brings a layer's metadata into the cache of this host; None where it is not known or not to be had.

        A cache that cannot give what it names costs time, and a WARNING: the layer is converted again.
        """
        package = self._packages.get(key)
        if package is None:
            return None
        try:
            return await self._fetch(key, package, cache)
        except BackendError as error:
            log.warning("build cache: layer %s is converted again: %s", key, error)
            del self._packages[key]
            return None

    async def _fetch(self, key: str, package: _Package, cache: LayerCache) -> ConvertedLayer:
        with staging_directory(cache.directory) as staging:
            unpacked = staging / key
            with reporting_writes(unpacked):
                unpacked.mkdir()
            await unpack_bootstrap(self._store, package.descriptor, unpacked)
            return cache.adopt(key, unpacked, package.record)

    async def save(self, layers: dict[str, ConvertedLayer], sources: dict[str, str]) -> None:
        """Puts converted layers in, by key; `sources` are the digests that they were made from.

        The artifact is replaced as the last step. Others may do the same at that moment, and registries do
        not compare before they replace: it is read again before, for what is new, and behind. Raises what
        stores raise.
        """
        where = str(self._store.reference)
        transfer = Transfer(self._store, where, NoProgress())
        own: dict[str, _Package] = {}
        for key, layer in layers.items():
            for blob in layer.blobs:
                await transfer.send_blob(layer.blob_file(blob), self._open_origin)
            known = self._packages.get(key)
            own[key] = known or await self._send_package(key, layer, sources[key], transfer)
        there = await self._read()
        for _ in range(SAVE_TRIES):
            others = {key: package for key, package in there.items() if key not in own}
            kept = dict(list((others | own).items())[-RECORDS_MAX:])
            manifest = await self._manifest(kept, transfer)
            await self._store.put_manifest(OCI_MANIFEST, manifest, as_reference=True)
            there = await self._read()
            if kept.keys() & own.keys() <= there.keys():
                return
        log.warning("build cache %s: others replace it all the time; some layers may not be in it", where)

    async def _send_package(
        self, key: str, layer: ConvertedLayer, source: str, transfer: Transfer
    ) -> _Package:
        files = [LayerFile(path.name, path) for path in (layer.bootstrap, *layer.tables)]
        record = LayerRecord(layer.blobs, layer.bytes_in, layer.diff_id, (str(self._store.reference),))
        annotations = {
            CACHE_ANNOTATION: "true",
            SOURCE_ANNOTATION: source,
            KEY_ANNOTATION: key,
            RECORD_ANNOTATION: msgspec.json.encode(record).decode(),
        }
        with tempfile.TemporaryDirectory(prefix="nydus-py-") as name:
            path = Path(name) / "package"
            packed = await trio.to_thread.run_sync(pack_layer, files, path)
            descriptor = Descriptor(LAYER_GZIP, packed.digest, packed.size_bytes, annotations)
            await transfer.send_part(descriptor, path)
        return _Package(descriptor, record)

    async def _manifest(self, packages: dict[str, _Package], transfer: Transfer) -> bytes:
        layers: dict[str, Descriptor] = {}
        for package in packages.values():
            layers[package.descriptor.digest] = package.descriptor
            for blob in package.record.blobs:
                layers[blob.blob_id] = blob_descriptor(blob.blob_id, blob.size_bytes, blob.table_of)
        config = Descriptor(EMPTY_TYPE, digest_of(EMPTY), len(EMPTY))
        with tempfile.TemporaryDirectory(prefix="nydus-py-") as name:
            path = Path(name) / "config"
            path.write_bytes(EMPTY)
            await transfer.send_part(config, path)
        return msgspec.json.encode(
            ImageManifest(
                schema_version=2,
                media_type=OCI_MANIFEST,
                artifact_type=ARTIFACT_TYPE,
                config=config,
                layers=tuple(layers.values()),
            )
        )

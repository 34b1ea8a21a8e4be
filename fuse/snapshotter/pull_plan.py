"""What becomes of the layers of an image that is being pulled: which image is mounted for them, if one.

A chain ID says what layers unpack to, and containerd takes one that it has for any image that names it. So
what is answered here as "there already" must be that content: the diff IDs of a Nydus image have to be the
digests of its blobs and of its bootstrap's tar. An ordinary image's layers are not compared with those of its
Nydus variant: who may write to the repository is believed (docs/snapshotter.md, "Trust").
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import trio

from backend.bootstrap_layer import LAYER_SIZE_MAX_BYTES
from backend.inflate import GzipBroken, GzipInflater
from backend.manifest import (
    ImageIndex,
    ImageManifest,
    ManifestBroken,
    diff_ids_of,
    nydus_layers,
    parse_document,
)
from backend.metadata import bootstrap_diff_id
from backend.pieces import pump
from backend.registry import RegistryClient, RegistryOptions
from backend.source_image import CONFIG_SIZE_MAX_BYTES
from fuse.snapshotter.layer_labels import PulledImage
from fuse.snapshotter.records import SourceLayer
from fuse.snapshotter.variants import VariantPlaces, find_variant
from rafs.errors import NydusError


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """A layer: its chain ID and digest; `blob_id` for a Nydus blob, `source` for one that can be unpacked."""

    chain_id: str
    digest: str
    blob_id: str = ""
    source: SourceLayer | None = None


@dataclass(frozen=True, slots=True)
class PullPlan:
    """The layers, the lowest first. `image` is what to mount for them, "" for nothing.

    `is_nydus`: the layers themselves are those of a Nydus image, which nothing else can unpack.
    """

    layers: tuple[PlannedLayer, ...]
    image: str
    is_nydus: bool
    bootstrap_diff_id: str = ""


class LayersMismatch(NydusError):
    """A Nydus image whose config claims other content for its layers than they have."""

    message = "{where}: {why}; it was not made by a Nydus builder, or changed since"
    exit_code = 212


class PullPlanner:
    """Asks registries. Its methods are independent of each other and may run at the same time."""

    def __init__(self, options: RegistryOptions, images_dir: Path, places: VariantPlaces) -> None:
        """`images_dir` is where mounts leave metadata of images."""
        self._options = options
        self._images_dir = images_dir
        self._places = places

    async def plan(self, pulled: PulledImage, *, is_nydus: bool) -> PullPlan:
        """Looks the image up. Raises what a registry does, `ManifestBroken`, `LayersMismatch`."""
        where = str(pulled.exact)
        if not is_nydus and not self._places:
            await trio.lowlevel.checkpoint()
            return PullPlan((), "", is_nydus=False)
        async with RegistryClient(pulled.exact, self._options) as client:
            stored = await client.fetch_manifest(pulled.manifest_digest)
            manifest = parse_document(stored.data, where)
            if isinstance(manifest, ImageIndex):
                raise ManifestBroken(where=where, why="an index and should be a manifest")
            variant = "" if is_nydus else await find_variant(client, pulled, self._places)
            if not is_nydus and not variant:
                return PullPlan((), "", is_nydus=False)
            config = await client.fetch_blob(manifest.config.digest, CONFIG_SIZE_MAX_BYTES)
        diff_ids = diff_ids_of(config, where)
        if len(diff_ids) != len(manifest.layers):
            raise ManifestBroken(
                where=where, why=f"{len(manifest.layers)} layers and {len(diff_ids)} diff IDs"
            )
        if not is_nydus:
            return PullPlan(_ordinary_layers(manifest, diff_ids, where), variant, is_nydus=False)
        layers = _nydus_layers(manifest, diff_ids, where)
        return PullPlan(layers, where, is_nydus=True, bootstrap_diff_id=diff_ids[-1])

    async def verify_bootstrap(self, pulled: PulledImage, plan: PullPlan) -> None:
        """Makes sure that the bootstrap layer, whose files are local by now, has the diff ID in the config.

        Raises as `plan`.
        """
        where = str(pulled.exact)
        found = await trio.to_thread.run_sync(bootstrap_diff_id, self._images_dir, pulled.manifest_digest)
        if found is None:
            async with RegistryClient(pulled.exact, self._options) as client:
                stored = await client.fetch_manifest(pulled.manifest_digest)
                manifest = parse_document(stored.data, where)
                assert isinstance(manifest, ImageManifest)
                found = await _unpacked_digest(client, manifest, where)
        if found != plan.bootstrap_diff_id:
            why = f"its bootstrap layer unpacks to {found}, and its config says {plan.bootstrap_diff_id}"
            raise LayersMismatch(where=where, why=why)


def chain_ids(diff_ids: tuple[str, ...]) -> list[str]:
    """The name of each layer together with all below it (OCI image specification, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        both = f"{chain[-1]} {diff_id}".encode() if chain else b""
        chain.append(f"sha256:{hashlib.sha256(both).hexdigest()}" if chain else diff_id)
    return chain


def _ordinary_layers(
    manifest: ImageManifest, diff_ids: tuple[str, ...], where: str
) -> tuple[PlannedLayer, ...]:
    found = []
    for layer, diff_id, chain_id in zip(manifest.layers, diff_ids, chain_ids(diff_ids), strict=True):
        source = SourceLayer(where, layer.digest, layer.size_bytes, diff_id)
        found.append(PlannedLayer(chain_id, layer.digest, source=source))
    return tuple(found)


def _nydus_layers(manifest: ImageManifest, diff_ids: tuple[str, ...], where: str) -> tuple[PlannedLayer, ...]:
    layers = nydus_layers(manifest, where)
    if manifest.layers[-1] != layers.bootstrap:
        raise LayersMismatch(where=where, why="its bootstrap layer is not the last one")
    found = []
    for layer, diff_id, chain_id in zip(manifest.layers, diff_ids, chain_ids(diff_ids), strict=True):
        is_bootstrap = layer == layers.bootstrap
        if not is_bootstrap and diff_id != layer.digest:
            why = f"its config says that layer {layer.digest} unpacks to {diff_id}"
            raise LayersMismatch(where=where, why=why)
        found.append(PlannedLayer(chain_id, layer.digest, "" if is_bootstrap else layer.hex))
    return tuple(found)


async def _unpacked_digest(client: RegistryClient, manifest: ImageManifest, where: str) -> str:
    """The diff ID of a bootstrap layer that was fetched before anybody kept its digest."""
    layer = manifest.layers[-1]
    inflater, packed, plain = GzipInflater(LAYER_SIZE_MAX_BYTES), hashlib.sha256(), hashlib.sha256()

    def feed(piece: bytes) -> None:
        packed.update(piece)
        for part in inflater.feed(piece):
            plain.update(part)

    async def take(piece: bytes) -> None:
        await trio.to_thread.run_sync(feed, piece)

    reader = client.open_blob(layer.digest, layer.size_bytes)
    try:
        await pump(reader, layer.size_bytes, take)
    except GzipBroken as error:
        raise ManifestBroken(where=where, why=f"bootstrap layer: {error}") from error
    finally:
        with trio.CancelScope(shield=True):
            await reader.aclose()
    if f"sha256:{packed.hexdigest()}" != layer.digest:
        raise ManifestBroken(where=where, why="the bootstrap layer was altered on the way")
    return f"sha256:{plain.hexdigest()}"

"""The Nydus image that stands beside an ordinary one: in the same index, or among its referrers."""

import enum
import logging

from backend.contract import BackendError
from backend.manifest import (
    BOOTSTRAP_ANNOTATION,
    NYDUS_ARTIFACT,
    Descriptor,
    ImageIndex,
    ImageManifest,
    is_nydus_entry,
    parse_document,
)
from backend.referrers import find_referrers
from backend.registry import RegistryClient
from fuse.snapshotter.layer_labels import PulledImage

log = logging.getLogger(__name__)

CANDIDATES_MAX = 4


class VariantPlaces(enum.Flag):
    """Where a Nydus variant is looked for."""

    NOWHERE = 0
    INDEX = enum.auto()
    REFERRERS = enum.auto()


async def find_variant(client: RegistryClient, pulled: PulledImage, places: VariantPlaces) -> str:
    """The variant of the image whose manifest is being pulled, by its digest; "" where there is none.

    `client` is that of its repository. An index counts when the name that is pulled is the index's and the
    manifest is in it. Raises what a registry does, and `ManifestBroken`.
    """
    if VariantPlaces.INDEX in places:
        for entry in await _in_index(client, pulled):
            if await _is_variant(client, entry, pulled, subject=None):
                return str(pulled.at(entry.digest))
    if VariantPlaces.REFERRERS in places:
        for entry in (await find_referrers(client, pulled.manifest_digest))[-CANDIDATES_MAX:][::-1]:
            is_candidate = entry.artifact_type == NYDUS_ARTIFACT
            if is_candidate and await _is_variant(client, entry, pulled, subject=pulled.manifest_digest):
                return str(pulled.at(entry.digest))
    return ""


async def _in_index(client: RegistryClient, pulled: PulledImage) -> list[Descriptor]:
    key = pulled.name.manifest_key
    if key == pulled.manifest_digest:
        return []
    try:
        stored = await client.fetch_manifest(key)
        document = parse_document(stored.data, str(pulled.name))
    except BackendError as error:
        # The tag may be gone while the manifest is still pulled by its digest.
        log.info("%s: no index to look for a variant in: %s", pulled.name, error)
        return []
    if not isinstance(document, ImageIndex):
        return []
    own = next((entry for entry in document.manifests if entry.digest == pulled.manifest_digest), None)
    if own is None:
        return []
    return [entry for entry in document.manifests if is_nydus_entry(entry) and _is_for_same(own, entry)][
        :CANDIDATES_MAX
    ]


def _is_for_same(own: Descriptor, entry: Descriptor) -> bool:
    if own.platform is None or entry.platform is None:
        return own.platform is entry.platform
    return own.platform.is_same(entry.platform)


async def _is_variant(
    client: RegistryClient, entry: Descriptor, pulled: PulledImage, subject: str | None
) -> bool:
    stored = await client.fetch_manifest(entry.digest)
    document = parse_document(stored.data, str(pulled.at(entry.digest)))
    if not isinstance(document, ImageManifest):
        return False
    if subject is not None and (document.subject is None or document.subject.digest != subject):
        return False
    return any(layer.is_marked(BOOTSTRAP_ANNOTATION) for layer in document.layers)

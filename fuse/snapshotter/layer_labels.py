"""What the labels of a Prepare say of the layer that is to be unpacked.

containerd adds those named `cri.` when it pulls for Kubernetes (unless disable_snapshot_annotations is set),
and hands on annotations of the layer's descriptor that start with `containerd.io/snapshot/`. A value has at
most 4096 bytes, so the list of layers is cut in large images; the digest of the manifest is whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from backend.manifest import BLOB_ANNOTATION, BOOTSTRAP_ANNOTATION
from backend.ocidigest import is_digest
from backend.reference import InvalidReference, RegistryReference, parse_reference

IMAGE_LABEL = "containerd.io/snapshot/cri.image-ref"
MANIFEST_LABEL = "containerd.io/snapshot/cri.manifest-digest"
LAYER_LABEL = "containerd.io/snapshot/cri.layer-digest"


@dataclass(frozen=True, slots=True)
class PulledImage:
    """An image that is being pulled: the name it is pulled by, and the digest of its manifest."""

    name: RegistryReference
    manifest_digest: str

    @property
    def exact(self) -> RegistryReference:
        """The image by its digest, without a tag that may name another one tomorrow."""
        return self.at(self.manifest_digest)

    def at(self, digest: str) -> RegistryReference:
        """Another manifest of the same repository."""
        return replace(self.name, tag=None, digest=digest)


@dataclass(frozen=True, slots=True)
class LayerLabels:
    """A layer: the image it is pulled for, its digest. `is_nydus`: it is marked as part of a Nydus image."""

    image: PulledImage | None
    layer_digest: str
    is_nydus: bool


def read_labels(labels: Mapping[str, str]) -> LayerLabels:
    """What the labels say; `image` is None where they do not name it, or not so that it can be asked for."""
    is_nydus = any(labels.get(mark) == "true" for mark in (BLOB_ANNOTATION, BOOTSTRAP_ANNOTATION))
    digest = labels.get(MANIFEST_LABEL, "")
    image = None
    if is_digest(digest) and (name := _registry_name(labels.get(IMAGE_LABEL, ""))):
        image = PulledImage(name, digest)
    return LayerLabels(image, labels.get(LAYER_LABEL, ""), is_nydus)


def _registry_name(text: str) -> RegistryReference | None:
    try:
        found = parse_reference(text)
    except InvalidReference:
        return None
    return found if isinstance(found, RegistryReference) else None

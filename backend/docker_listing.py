"""`manifest.json` of a file of `docker save`: config, layers and names of each image in it, by path.

As in moby, docs/image/spec/v1.2.md, "Combined Image JSON + Filesystem Changeset Format".
"""

import msgspec

from backend.layout_index import NoSuchTag, SeveralImages
from backend.manifest import LAYERS_MAX, shown
from backend.reference import DockerArchiveReference, normal_name
from backend.tar_index import ArchiveBroken

LISTING_NAME = "manifest.json"
IMAGES_MAX = 1024


class SavedImage(msgspec.Struct, frozen=True):
    """An image in the file; `names` are complete ones ("docker.io/library/app:v1") or short ("app:v1")."""

    config: str = msgspec.field(name="Config")
    names: tuple[str, ...] | None = msgspec.field(default=None, name="RepoTags")
    layers: tuple[str, ...] = msgspec.field(default=(), name="Layers")


def parse_listing(data: bytes, reference: DockerArchiveReference) -> SavedImage:
    """The image that `reference` names. Raises `ArchiveBroken`, `NoSuchTag` and `SeveralImages`."""
    try:
        images = msgspec.json.decode(data, type=tuple[SavedImage, ...])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArchiveBroken(where=reference, why=f"{LISTING_NAME}: {error}") from error
    if len(images) > IMAGES_MAX:
        raise ArchiveBroken(where=reference, why=f"{len(images)} images, more than {IMAGES_MAX}")
    image = _choose(images, reference)
    if len(image.layers) > LAYERS_MAX:
        why = f"an image of {len(image.layers)} layers, more than {LAYERS_MAX}"
        raise ArchiveBroken(where=reference, why=why)
    return image


def _choose(images: tuple[SavedImage, ...], reference: DockerArchiveReference) -> SavedImage:
    wanted = reference.name
    if wanted is None and len(images) == 1:
        return images[0]
    if wanted is not None and wanted.startswith("@") and int(wanted[1:]) < len(images):
        return images[int(wanted[1:])]
    if wanted is not None:
        for image in images:
            if normal_name(wanted) in map(normal_name, image.names or ()):
                return image
    found = [", ".join(image.names or (f"@{number}",)) for number, image in enumerate(images)]
    kind = SeveralImages if wanted is None and images else NoSuchTag
    raise kind(where=reference, found=shown(", ".join(found)) or "none")

"""What is known of a snapshot and of an image, as the ledger keeps it."""

import enum
from dataclasses import dataclass, field

import msgspec


class Kind(enum.IntEnum):
    """What a snapshot is; the numbers are those of the protocol."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


class SourceLayer(msgspec.Struct, frozen=True):
    """A layer that was not unpacked: where its bytes are, and the digest of what they unpack to."""

    reference: str
    digest: str
    size_bytes: int
    diff_id: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot. Its files are in `snapshots/<id>/fs`.

    `blob_id`: the layer is a data blob of a Nydus image and has no files. `source`: its files were left out,
    and are fetched should somebody want them. `image_id`: the files of it and of all below it are those of
    a mounted image. Times are nanoseconds since 1970, sizes bytes.
    """

    id: int
    name: str
    kind: Kind
    parent: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    created_ns: int = 0
    updated_ns: int = 0
    size_bytes: int = 0
    inodes: int = 0
    blob_id: str = ""
    source: SourceLayer | None = None
    image_id: int | None = None


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image to mount at `snapshots/<id>/fs`; `reference` names it by the digest of its manifest."""

    id: int
    reference: str

    @property
    def digest(self) -> str:
        """Of its manifest, "sha256:<hex>"."""
        return self.reference.partition("@")[2]

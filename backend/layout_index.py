"""What says which images an OCI layout holds, in a directory or in a tar: `oci-layout` and `index.json`.

The rules are those of the OCI image specification, image-layout.md.
"""

from collections.abc import Sequence
from typing import ClassVar

import msgspec

from backend.contract import BackendError, BlobNotFound
from backend.manifest import OCI_INDEX, REF_NAME_ANNOTATION, Descriptor, artifact_type_of, shown
from backend.ocidigest import digest_of, is_digest, require_digest
from backend.raw_index import RawIndex
from backend.reference import Reference

MARKER_NAME = "oci-layout"
INDEX_NAME = "index.json"
MARKER = b'{"imageLayoutVersion":"1.0.0"}'


class LayoutBroken(BackendError):
    """Something that is no OCI layout, or one that lacks what it names."""

    message = "{where}: {why}"
    exit_code: ClassVar[int] = 49


class NoSuchTag(BlobNotFound):
    """There are other images only."""

    message = "{where}: no such image in it; it has {found}"
    exit_code = 117


class SeveralImages(NoSuchTag):
    """Nothing says which of several images is meant."""

    message = "{where}: say which image is meant; it has {found}"
    exit_code = 126


EMPTY_INDEX = RawIndex(schema_version=2, media_type=OCI_INDEX, manifests=())


class _Marker(msgspec.Struct, frozen=True):
    version: str = msgspec.field(name="imageLayoutVersion")


def blob_name(digest: str) -> str:
    """Where a blob is in a layout. Raises `ValueError` for what is no digest."""
    return "blobs/sha256/" + require_digest(digest).removeprefix("sha256:")


def check_marker(data: bytes, where: Reference) -> None:
    """Raises `LayoutBroken` unless `data` is that of the marker file of a version that is known."""
    try:
        marker = msgspec.json.decode(data, type=_Marker)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LayoutBroken(where=where, why=f"broken {MARKER_NAME} file: {error}") from error
    if not marker.version.startswith("1."):
        raise LayoutBroken(where=where, why=f"layout version {shown(marker.version)}, not 1.x")


def parse_index(data: bytes, where: Reference) -> RawIndex:
    """Reads `index.json`; its entries are not looked at. Raises `LayoutBroken`."""
    try:
        return msgspec.json.decode(data, type=RawIndex)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LayoutBroken(where=where, why=f"broken {INDEX_NAME}: {error}") from error


def named_entry(index: RawIndex, tag: str | None, where: Reference) -> Descriptor:
    """The entry with that tag; without one the only entry. Raises `NoSuchTag` and `LayoutBroken`."""
    entries = [_entry(raw, where) for raw in index.manifests]
    if tag is None and len(entries) == 1:
        return entries[0]
    for entry in entries:
        if entry.annotations.get(REF_NAME_ANNOTATION) == tag:
            return entry
    found = ", ".join(entry.annotations.get(REF_NAME_ANNOTATION, entry.digest) for entry in entries)
    kind = SeveralImages if tag is None and entries else NoSuchTag
    raise kind(where=where, found=shown(found) or "none")


def new_entry(media_type: str, data: bytes, tag: str | None) -> Descriptor:
    """The entry of a manifest or an index under a tag, or without one."""
    names = {REF_NAME_ANNOTATION: tag} if tag else {}
    return Descriptor(media_type, digest_of(data), len(data), names, artifact_type=artifact_type_of(data))


def with_entry(index: RawIndex, entry: Descriptor, where: Reference) -> bytes:
    """`index.json` with that entry instead of the one that had its tag. Raises `LayoutBroken`."""
    name = entry.annotations.get(REF_NAME_ANNOTATION)
    kept = [raw for raw in index.manifests if _entry(raw, where).annotations.get(REF_NAME_ANNOTATION) != name]
    entries: Sequence[msgspec.Raw] = (*kept, msgspec.Raw(msgspec.json.encode(entry)))
    return msgspec.json.encode(msgspec.structs.replace(index, manifests=tuple(entries)))


def _entry(raw: msgspec.Raw, where: Reference) -> Descriptor:
    try:
        entry = msgspec.json.decode(raw, type=Descriptor)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LayoutBroken(where=where, why=f"broken {INDEX_NAME}: {error}") from error
    if not is_digest(entry.digest):
        raise LayoutBroken(where=where, why=f"{INDEX_NAME}: '{shown(entry.digest)}' is not a sha256 digest")
    return entry

"""Manifests that name another one as their subject, in registries that do not list such themselves.

Where the answer to a push does not say that the registry knows of referrers (header `OCI-Subject`), the
client keeps an index of them under the tag `sha256-<hex of the subject>` (OCI distribution spec, "Referrers
Tag Schema"). It is read, changed and written; entries of others stay as they are. A registry has no lock for
that: it is read again afterwards, but what another client read before and writes after it is the last word.
"""

import msgspec

from backend.contract import BlobNotFound
from backend.manifest import MANIFEST_SIZE_MAX_BYTES, OCI_INDEX, Descriptor, ManifestBroken
from backend.ocidigest import digest_of, is_digest
from backend.raw_index import RawIndex
from backend.registry import RegistryClient
from backend.store import CannotPublish

WRITES_MAX = 5
REFERRERS_MAX = 1024


class _Referring(msgspec.Struct, frozen=True):
    subject: Descriptor | None = None
    artifact_type: str = msgspec.field(default="", name="artifactType")
    config: Descriptor | None = None
    annotations: dict[str, str] = {}


class Referral(msgspec.Struct, frozen=True):
    """That a manifest refers to another: digest of that one, and the entry in the list of its referrers."""

    subject_digest: str
    entry: Descriptor


def referral_of(media_type: str, data: bytes, where: str) -> Referral | None:
    """What a manifest says of its subject; None for one that has none. Raises `ManifestBroken`."""
    try:
        read = msgspec.json.decode(data, type=_Referring)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ManifestBroken(where=where, why=str(error)) from error
    if read.subject is None:
        return None
    if not is_digest(read.subject.digest):
        raise ManifestBroken(where=where, why="its subject has no sha256 digest")
    kind = read.artifact_type or (read.config.media_type if read.config else "")
    entry = Descriptor(media_type, digest_of(data), len(data), read.annotations, artifact_type=kind)
    return Referral(read.subject.digest, entry)


async def find_referrers(client: RegistryClient, digest: str) -> list[Descriptor]:
    """What refers to the manifest with that digest, by the registry's own list or by the tag that stands in.

    An entry that cannot be read is left out. Raises what a registry does, and `ManifestBroken`.
    """
    data = await client.fetch_referrers(digest)
    where = f"{client.reference.host}/{client.reference.repository}"
    tag = referrers_tag(digest)
    index = await _read(client, tag, where) if data is None else _index_of(data, where, "the referrers API")
    found = []
    for raw in index.manifests[:REFERRERS_MAX]:
        try:
            found.append(msgspec.json.decode(raw, type=Descriptor))
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            continue
    return [entry for entry in found if is_digest(entry.digest)]


def referrers_tag(digest: str) -> str:
    """The tag of the list of referrers of the manifest with that digest."""
    return digest.replace(":", "-")


async def list_referral(client: RegistryClient, referral: Referral, where: str) -> None:
    """Has the list of the subject's referrers hold the entry.

    Raises `ManifestBroken` where the tag names something else, and `CannotPublish` where it has no room or
    others overwrite it again and again.
    """
    tag = referrers_tag(referral.subject_digest)
    for _ in range(WRITES_MAX):
        index = await _read(client, tag, where)
        if any(_digest(raw, where, tag) == referral.entry.digest for raw in index.manifests):
            return
        entries = (*index.manifests, msgspec.Raw(msgspec.json.encode(referral.entry)))
        data = msgspec.json.encode(msgspec.structs.replace(index, manifests=entries))
        if len(data) > MANIFEST_SIZE_MAX_BYTES:
            raise CannotPublish(where=where, why=f"the list of referrers under tag {tag} is full")
        await client.push_manifest(tag, OCI_INDEX, data)
    raise CannotPublish(where=where, why=f"others overwrite the list of referrers under tag {tag}")


async def _read(client: RegistryClient, tag: str, where: str) -> RawIndex:
    try:
        stored = await client.fetch_manifest(tag)
    except BlobNotFound:
        return RawIndex(schema_version=2, media_type=OCI_INDEX, manifests=())
    return _index_of(stored.data, where, f"tag {tag}")


def _index_of(data: bytes, where: str, what: str) -> RawIndex:
    try:
        return msgspec.json.decode(data, type=RawIndex)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ManifestBroken(where=where, why=f"{what} is no list of referrers: {error}") from error


def _digest(raw: msgspec.Raw, where: str, tag: str) -> str:
    try:
        return msgspec.json.decode(raw, type=Descriptor).digest
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ManifestBroken(where=where, why=f"tag {tag} is no list of referrers: {error}") from error

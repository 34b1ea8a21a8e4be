"""What the agent and the process that serves other hosts say to each other, in packets of a channel.

From the agent: `terms` first and whenever they change, `blob` (with the descriptors of a cache file),
`document` (with that of a small file), `drop`, `done` and `failed` (answers, by number).

From the server: `open`, `mirror` and `fetch` (questions, by number), `traffic` when it has changed.
"""

import msgspec

from backend.peers.limit_settings import LimitSettings


class ServedBlob(msgspec.Struct, frozen=True):
    """A blob that can be served from now on. The descriptors are those of `CachedBlob.descriptors`."""

    blob_id: str
    size_bytes: int
    meta_path: str
    is_encoded: bool = False


class ServedDocument(msgspec.Struct, frozen=True):
    """A small file that was asked for with `mirror`. Its descriptor comes with it."""

    number: int
    media_type: str


class MirrorRequest(msgspec.Struct, frozen=True):
    """A client of registries asks for a manifest, or for what is no data blob, by its digest."""

    number: int
    digest: str
    is_manifest: bool


class OpenRequest(msgspec.Struct, frozen=True):
    """Another host asks, as if this one were an owner, for a blob of an image that nobody here has opened.

    `peer` is its address, or its name with TLS.
    """

    number: int
    blob_id: str
    image: str
    peer: str


class FetchRequest(msgspec.Struct, frozen=True):
    """Another host waits for bytes `offset` to `end` of a file; the first of them are enough.

    All of an encoded file has to be whole. `may_fetch`: it believes that this host is an owner; otherwise
    only what is on its way is waited for.
    """

    number: int
    blob_id: str
    offset: int
    end: int
    fetch_class: int
    may_fetch: bool
    is_encoded: bool = False


class UploadTerms(msgspec.Struct, frozen=True):
    """How fast may be served: the limits of the host, and what serving yields to at the moment.

    `scope`: see `PeerHub`; it counts with TLS only.
    """

    settings: LimitSettings
    yielded_bps: float | None = None
    scope: str | None = None


class Failure(msgspec.Struct, frozen=True):
    """Why a request came to nothing."""

    number: int
    why: str


class UploadTraffic(msgspec.Struct, frozen=True):
    """What was served since the process started, and how many bodies are being sent."""

    sent_bytes: int
    active: int
    refused: dict[str, int]
    requests: int = 0

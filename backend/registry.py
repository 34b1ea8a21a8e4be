"""One repository of an OCI registry: manifests, blobs, uploads.

Concurrency: a `RegistryClient` serves many tasks; it owns connections and tokens, no tasks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from backend.challenge import push_scope
from backend.contract import BlobNotFound, BlobReader
from backend.credentials import AuthFiles, CredentialSource
from backend.http import HttpClient, HttpOptions, HttpStatistics, HttpTimeouts
from backend.ocidigest import check_digest, digest_of, is_digest, require_digest
from backend.reference import RegistryReference, is_tag
from backend.registry_blob import RegistryBlobReader, head_blob
from backend.registry_session import RegistrySession
from backend.retry import RetryPolicy
from backend.status import raise_for_status
from backend.upload import (
    BlobUpload,
    ContentIdentity,
    FileSource,
    KnownContent,
    ReadRange,
    UploadSource,
    mount_blob,
)

MANIFEST_LIMIT_BYTES = (
    4 << 20
)  # OCI distribution spec, "Pushing manifests": registries take at least this much
_MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)


def _count_nothing(count: int) -> None:
    """For uploads that nobody watches."""


@dataclass(frozen=True, slots=True)
class RegistryOptions:
    """How to talk to a registry.

    `plain_http`: None is TLS, with plain HTTP accepted from this machine alone; True is plain HTTP;
    False is TLS always. `ca_file` (PEM) is trusted beside the system's certificates. `connections`
    is the most that are open at once.
    """

    plain_http: bool | None = None
    ca_file: Path | None = None
    insecure_skip_verify: bool = False
    timeouts: HttpTimeouts = field(default_factory=HttpTimeouts)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    credentials: CredentialSource = field(default_factory=AuthFiles)
    connections: int = 16


@dataclass(frozen=True, slots=True)
class FetchedManifest:
    """A manifest or index, as the registry keeps it; `digest` was computed from `data`."""

    media_type: str
    digest: str
    data: bytes


class RegistryClient:
    """The repository that `reference` names. Use as an async context manager.

    Digests are in the form "sha256:<hex>"; a malformed one is a `ValueError`. Every method may raise
    the `BackendError`s of backend.http and backend.status; temporary ones were retried before.
    """

    def __init__(self, reference: RegistryReference, options: RegistryOptions | None = None) -> None:
        options = options or RegistryOptions()
        self.reference = reference
        self._retry = options.retry
        self._http = HttpClient(
            HttpOptions(options.ca_file, options.insecure_skip_verify, options.timeouts, options.connections)
        )
        self._session = RegistrySession(self._http, reference, options.credentials, options.plain_http)

    def __repr__(self) -> str:
        return f"<RegistryClient {self.reference}>"

    def statistics(self) -> HttpStatistics:
        """Requests and bytes so far, of everything that this client did."""
        return self._http.statistics()

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def fetch_manifest(self, key: str) -> FetchedManifest:
        """The manifest under a tag or digest, its digest verified. `BlobNotFound` when there is none."""
        return await self._retry.run(partial(self._fetch_manifest, _require_key(key)))

    async def _fetch_manifest(self, key: str) -> FetchedManifest:
        url = await self._session.url(f"manifests/{key}")
        headers = [("Accept", ", ".join(_MANIFEST_TYPES))]
        async with self._session.send("GET", url, headers=headers) as response:
            self._check_found(response.status, f"{self._name()}:{key}")
            await raise_for_status(response, 200, host=self._session.host)
            data = await response.read(MANIFEST_LIMIT_BYTES)
        expected = key if is_digest(key) else response.header("Docker-Content-Digest") or ""
        if is_digest(expected):
            check_digest(data, expected, f"manifest {self._name()}:{key}")
        media_type = (response.header("Content-Type") or "").partition(";")[0].strip()
        return FetchedManifest(media_type, digest_of(data), data)

    async def fetch_referrers(self, digest: str) -> bytes | None:
        """The registry's own list (an index) of what refers to a manifest; None where it keeps none."""
        return await self._retry.run(partial(self._fetch_referrers, require_digest(digest)))

    async def _fetch_referrers(self, digest: str) -> bytes | None:
        url = await self._session.url(f"referrers/{digest}")
        headers = [("Accept", "application/vnd.oci.image.index.v1+json")]
        async with self._session.send("GET", url, headers=headers) as response:
            # What does not know the API says 404, 405 or, behind some proxies, gives a page.
            kind = (response.header("Content-Type") or "").partition(";")[0].strip()
            if response.status in (404, 405) or (response.status == 200 and not kind.endswith("json")):
                await response.drain()
                return None
            await raise_for_status(response, 200, host=self._session.host)
            return await response.read(MANIFEST_LIMIT_BYTES)

    async def push_manifest(self, key: str, media_type: str, data: bytes) -> str:
        """Stores `data` under a tag or its own digest, and returns the digest."""
        if is_digest(key):
            check_digest(data, key, "the manifest to push")
        await self._retry.run(partial(self._push_manifest, _require_key(key), media_type, data))
        return digest_of(data)

    async def push_referrer(self, media_type: str, data: bytes) -> bool:
        """Stores a manifest that has a subject under its digest; whether the registry lists it there."""
        key = digest_of(data)
        return await self._retry.run(partial(self._push_manifest, key, media_type, data)) is not None

    async def _push_manifest(self, key: str, media_type: str, data: bytes) -> str | None:
        """The subject that the registry says it has taken notice of."""
        url = await self._session.url(f"manifests/{key}")
        scopes = (push_scope(self._session.repository),)
        headers = [("Content-Type", media_type)]
        async with self._session.send("PUT", url, scopes=scopes, headers=headers, body=data) as response:
            await raise_for_status(response, 201, 200, host=self._session.host)
            await response.drain()
        stored = response.header("Docker-Content-Digest") or ""
        if is_digest(stored):
            check_digest(data, stored, f"manifest {self._name()}:{key} as stored")
        return response.header("OCI-Subject")

    async def blob_size(self, digest: str) -> int | None:
        """Length in bytes of a blob; None when the repository has none such."""
        return await self._retry.run(partial(head_blob, self._session, require_digest(digest)))

    async def fetch_blob(self, digest: str, limit_bytes: int) -> bytes:
        """A whole blob of at most `limit_bytes`, verified. Large blobs are read in ranges instead."""
        return await self._retry.run(partial(self._fetch_blob, require_digest(digest), limit_bytes))

    async def _fetch_blob(self, digest: str, limit_bytes: int) -> bytes:
        where = f"{self._name()}@{digest}"
        async with self._session.send("GET", await self._session.url(f"blobs/{digest}")) as response:
            self._check_found(response.status, where)
            await raise_for_status(response, 200, host=self._session.host)
            data = await response.read(limit_bytes)
        check_digest(data, digest, where)
        return data

    def open_blob(self, digest: str, size_bytes: int | None = None) -> BlobReader:
        """A reader of ranges. `size_bytes`, when known from a manifest, spares a request."""
        return RegistryBlobReader(self._session, self._retry, require_digest(digest), size_bytes)

    async def upload_blob(
        self, path: Path, digest: str, size_bytes: int, on_bytes: Callable[[int], None] = _count_nothing
    ) -> None:
        """Uploads a file, going on where a broken connection left off.

        `on_bytes` gets counts that add up to the size. Whether the blob is there already is the caller's
        question. Raises `DigestMismatch` when the file is not `digest`.
        """
        await self.upload(_known(FileSource(path).read_range, digest, size_bytes), on_bytes)

    async def upload_from(
        self,
        source: BlobReader,
        digest: str,
        size_bytes: int,
        on_bytes: Callable[[int], None] = _count_nothing,
    ) -> None:
        """Like `upload_blob`, from another source than a file; one chunk of it is in memory at a time."""
        await self.upload(_known(source.read_range, digest, size_bytes), on_bytes)

    async def upload(self, source: UploadSource, on_bytes: Callable[[int], None] = _count_nothing) -> None:
        """Like `upload_blob`, also from a source whose end has not come yet."""
        await BlobUpload(self._session, self._retry, source, on_bytes).run()

    async def mount_blob(self, digest: str, from_repository: str) -> bool:
        """Whether the registry took the blob over from another of its repositories; if not, upload it."""
        return await self._retry.run(
            partial(mount_blob, self._session, require_digest(digest), from_repository)
        )

    def _check_found(self, status: int, where: str) -> None:
        if status == 404:
            raise BlobNotFound(where=where)

    def _name(self) -> str:
        return f"{self._session.host}/{self._session.repository}"


def _require_key(key: str) -> str:
    if not is_tag(key) and not is_digest(key):
        raise ValueError(f"neither a tag nor a digest: {key!r}")
    return key


def _known(read_range: ReadRange, digest: str, size_bytes: int) -> KnownContent:
    return KnownContent(read_range, ContentIdentity(require_digest(digest), size_bytes))

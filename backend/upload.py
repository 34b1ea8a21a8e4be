"""Uploading one blob (OCI distribution spec, "Pushing blobs"): in chunks, going on after a broken connection.

Concurrency: an upload belongs to one task. At most one chunk of the file is in memory.
"""

import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlencode, urlsplit, urlunsplit

import trio

from backend.challenge import pull_scope, push_scope
from backend.contract import BackendError
from backend.http import HttpResponse, RegistryProtocolError
from backend.registry_blob import head_blob
from backend.registry_session import RegistrySession, absolute_location
from backend.retry import Attempts, RetryPolicy
from backend.status import Forbidden, ServerFailed, Unauthorized, fail, raise_for_status

CHUNK_BYTES = 8 << 20
_LARGEST_CHUNK_BYTES = 64 << 20  # a registry that wants more at once is not served
_CANCEL_S = 2.0
_RANGE = re.compile(r"(?:bytes[= ])?0-(\d{1,19})")
_OCTETS = ("Content-Type", "application/octet-stream")

logger = logging.getLogger(__name__)


ReadRange = Callable[[int, int], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class ContentIdentity:
    """What content is once it is complete: its digest ("sha256:<hex>") and its size in bytes."""

    digest: str
    size_bytes: int


class UploadSource(Protocol):
    """Content to upload, which may still be growing. Any part of it may be read again."""

    async def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from byte `offset`, waiting for them; fewer only at the end."""

    async def identity(self) -> ContentIdentity:
        """What the content is; waits until it is complete."""

    def is_end(self, offset: int) -> bool:
        """Whether it is known that there is nothing from byte `offset` on."""


@dataclass(frozen=True, slots=True)
class KnownContent:
    """An `UploadSource` of which everything is known."""

    read_range: ReadRange
    known: ContentIdentity

    async def read(self, offset: int, length: int) -> bytes:
        """See `UploadSource`."""
        return await self.read_range(offset, min(length, self.known.size_bytes - offset))

    async def identity(self) -> ContentIdentity:
        """See `UploadSource`."""
        await trio.lowlevel.checkpoint()
        return self.known

    def is_end(self, offset: int) -> bool:
        """See `UploadSource`."""
        return offset >= self.known.size_bytes


class BlobUpload:
    """Sends what `source` gives as a blob; `on_bytes` is told of each run of bytes once."""

    def __init__(
        self,
        session: RegistrySession,
        retry: RetryPolicy,
        source: UploadSource,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._session = session
        self._retry = retry
        self._source = source
        self._sent_end = 0
        self._on_bytes = on_bytes
        self._scopes = (push_scope(session.repository),)
        self._location: str | None = None
        self._offset = 0
        self._reported = 0
        self._chunk_bytes = CHUNK_BYTES

    async def run(self) -> None:
        """Returns when the registry has the blob. Raises `DigestMismatch` when the file is another one."""
        attempts = Attempts(self._retry)
        try:
            while not await self._finished(attempts):
                pass
        except BaseException:  # cancelled too: nobody else knows of it
            if self._location is not None:
                await abandon_upload(self._session, self._location)
            raise

    async def _finished(self, attempts: Attempts) -> bool:
        """One try from where the last one came to; False to try again."""
        try:
            if self._location is None:
                await self._start()
            elif attempts.failed and await self._recovered():
                return True
            await self._send_rest(attempts)
        except BackendError as error:
            await attempts.pause(error)
            return False
        return True

    async def _start(self) -> None:
        url = await self._session.url("blobs/uploads/")
        async with self._session.send("POST", url, scopes=self._scopes) as response:
            await raise_for_status(response, 202, host=self._session.host)
            self._chunk_bytes = _chunk_bytes(response)
            self._follow(response)
        self._offset = 0

    async def _recovered(self) -> bool:
        """Learns how far the registry got; True when it has the whole blob already."""
        assert self._location is not None
        async with self._session.send("GET", self._location, scopes=self._scopes) as response:
            known = response.status == 204
            if known:
                self._follow(response)
                self._offset = self._received(response) or 0
                await response.drain()
            elif response.status >= 500 or response.status in (401, 403, 429):
                await fail(response, host=self._session.host)
            else:
                await response.drain()
        if known and self._offset > 0:
            return False
        if known:
            # "0-0" is nothing or one byte: begin again instead of guessing.
            await abandon_upload(self._session, self._location)
        # The upload is gone: finished just before the connection broke, or forgotten.
        self._location = None
        if self._source.is_end(self._sent_end):
            identity = await self._source.identity()
            if await head_blob(self._session, identity.digest) == identity.size_bytes:
                self._report(identity.size_bytes)
                return True
        await self._start()
        return False

    async def _send_rest(self, attempts: Attempts) -> None:
        while not self._source.is_end(self._offset):
            chunk = await self._source.read(self._offset, self._chunk_bytes)
            self._sent_end = max(self._sent_end, self._offset + len(chunk))
            if self._offset == 0 and self._source.is_end(len(chunk)):
                await self._put(chunk)
                return
            if not chunk:
                continue  # it has ended where the last chunk did
            before = self._reported
            await self._patch(chunk)
            if self._reported > before:  # a registry that forgets uploads gives no progress for ever
                attempts.progressed()
        await self._put(b"")

    async def _patch(self, chunk: bytes) -> None:
        assert self._location is not None
        end = self._offset + len(chunk)
        headers = [_OCTETS, ("Content-Range", f"{self._offset}-{end - 1}")]
        async with self._session.send(
            "PATCH", self._location, scopes=self._scopes, headers=headers, body=chunk
        ) as response:
            await self._raise_for_upload(response, 202)
            self._follow(response)
            received = self._received(response)
        if received is not None and not self._offset < received <= end:
            raise RegistryProtocolError(
                where=response.where,
                why=f"has {received} bytes after being sent bytes {self._offset}-{end - 1}",
            )
        self._offset = end if received is None else received
        self._report(self._offset)

    async def _put(self, rest: bytes) -> None:
        assert self._location is not None
        identity = await self._source.identity()
        url = _with_query(self._location, "digest", identity.digest)
        async with self._session.send(
            "PUT", url, scopes=self._scopes, headers=[_OCTETS], body=rest
        ) as response:
            await self._raise_for_upload(response, 201)
            await response.drain()
        self._location = None
        self._report(identity.size_bytes)

    async def _raise_for_upload(self, response: HttpResponse, expected: int) -> None:
        if response.status == 416 or response.status == 404:
            # Out of step, or forgotten: `_recovered` finds out where to go on.
            raise ServerFailed(
                where=response.where, status=response.status, why=" (the upload is out of step)"
            )
        await raise_for_status(response, expected, host=self._session.host)

    def _follow(self, response: HttpResponse) -> None:
        location = response.header("Location")
        if location is not None:  # its query (docker-registry's _state) is part of it
            self._location = absolute_location(response, location)
        elif self._location is None:
            raise RegistryProtocolError(where=response.where, why="does not say where to upload to")

    def _received(self, response: HttpResponse) -> int | None:
        """How many bytes the registry says that it has; None when it does not say.

        Nothing at all is "0-0" in docker-registry, which one byte would be too; it counts as nothing.
        """
        last = parse_last_byte(response.header("Range") or "")
        if last is None:
            return None
        if last >= max(self._sent_end, 1):  # "0-0" is what one byte would be
            raise RegistryProtocolError(
                where=response.where, why=f"has more than the {self._sent_end} bytes sent"
            )
        return last + 1 if last else 0

    def _report(self, offset: int) -> None:
        if offset > self._reported:  # what is sent a second time is not reported again
            self._on_bytes(offset - self._reported)
            self._reported = offset


class FileSource:
    """Ranges of a file, read in a thread; a `BackendError` says that a range is not there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._limiter = trio.CapacityLimiter(1)

    async def read_range(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `offset`."""
        return await trio.to_thread.run_sync(self._read, offset, length, limiter=self._limiter)

    def _read(self, offset: int, length: int) -> bytes:
        try:
            with self._path.open("rb") as file:
                file.seek(offset)
                data = file.read(length)
        except OSError as error:
            why = (error.strerror or "unreadable").lower()
            raise BackendError(where=self._path, why=f"cannot be read for upload: {why}") from error
        if len(data) != length:
            raise BackendError(where=self._path, why=f"shorter than the {offset + length} bytes to upload")
        return data


async def mount_blob(session: RegistrySession, digest: str, from_repository: str) -> bool:
    """Whether the registry took the blob over from another of its repositories; if not, upload it."""
    scopes = (push_scope(session.repository), pull_scope(from_repository))
    query = urlencode({"mount": digest, "from": from_repository})
    url = f"{await session.url('blobs/uploads/')}?{query}"
    try:
        async with session.send("POST", url, scopes=scopes) as response:
            if response.status in (401, 403, 404, 405):
                await response.drain()
                return False  # no right to the other repository, or no mounting here
            await raise_for_status(response, 201, 202, host=session.host)
            await response.drain()
    except (Unauthorized, Forbidden):
        return False
    location = response.header("Location")
    if response.status == 202 and location is not None:  # an ordinary upload was begun instead
        await abandon_upload(session, absolute_location(response, location))
    return response.status == 201


async def abandon_upload(session: RegistrySession, location: str) -> None:
    """Asks the registry to forget an upload. Best effort, and short: registries also forget by themselves."""
    with trio.move_on_after(_CANCEL_S, shield=True):
        try:
            async with session.send("DELETE", location, scopes=(push_scope(session.repository),)) as response:
                await response.drain()
        except BackendError as error:
            logger.debug("could not abandon an upload: %s", error)


def parse_last_byte(text: str) -> int | None:
    """The last byte that an upload's Range header names; None when it names none."""
    match = _RANGE.fullmatch(text)
    return int(match[1]) if match else None


def _chunk_bytes(response: HttpResponse) -> int:
    """The chunk size to use: ours, or the least that the registry takes when that is more."""
    text = response.header("OCI-Chunk-Min-Length") or ""
    least = int(text) if text.isascii() and text.isdigit() and len(text) < 12 else 0
    if least > _LARGEST_CHUNK_BYTES:
        raise RegistryProtocolError(
            where=response.where, why=f"wants upload chunks of at least {least} bytes"
        )
    return max(CHUNK_BYTES, least)


def _with_query(url: str, name: str, value: str) -> str:
    """`url` with one more parameter; those that it has stay as they are."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query="&".join(filter(None, (parts.query, urlencode({name: value}))))))

"""Ranges of one blob in a registry.

Concurrency: a reader serves many tasks. They share the size, asked for once, and the address that the
registry redirected to (a presigned URL, say): it is used until it fails, then the registry is asked again.
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from backend.contract import BackendError, BlobNotFound, Pace, ShortRead
from backend.http import HttpResponse, RegistryProtocolError
from backend.registry_session import RegistrySession
from backend.retry import RetryPolicy
from backend.status import fail

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_MOST_SKIPPED_BYTES = 16 << 20  # from a server without ranges: more would be a download per read
# Statuses of a remembered address that mean "this address has expired" and not "this blob is gone".
_STALE_STATUSES = frozenset({400, 401, 403, 404, 410})


class RegistryBlobReader:
    """A `BlobReader` over a registry's blob. `digest` is "sha256:..."; `size_bytes` spares a request."""

    def __init__(
        self, session: RegistrySession, retry: RetryPolicy, digest: str, size_bytes: int | None
    ) -> None:
        self._session = session
        self._retry = retry
        self._digest = digest
        self._size_bytes = size_bytes
        self._where = f"{session.host}/{session.repository}@{digest}"
        self._redirected: str | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<RegistryBlobReader {self._where} {self._size_bytes} bytes>"

    async def size(self) -> int:
        """Length of the blob in bytes, from the descriptor or by a HEAD request."""
        self._check_open()
        if self._size_bytes is None:
            size_bytes = await self._retry.run(partial(head_blob, self._session, self._digest))
            if size_bytes is None:
                raise BlobNotFound(where=self._where)
            self._size_bytes = size_bytes
        else:
            await trio.lowlevel.checkpoint()
        return self._size_bytes

    async def read_range(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`, resumed where a broken connection left off."""
        return await self._read(offset, length, None)

    async def read_paced(self, offset: int, length: int, pace: Pace) -> bytes:
        """See `PacedReader`."""
        return await self._read(offset, length, pace)

    async def _read(self, offset: int, length: int, pace: Pace | None) -> bytes:
        if offset < 0 or length < 0:
            raise ValueError(f"negative range: offset {offset}, length {length}")
        if length == 0:
            self._check_open()
            await trio.lowlevel.checkpoint()
            return b""
        size_bytes = await self.size()  # past the end docker-registry 2.8 answers what cannot be parsed
        if offset + length > size_bytes:
            raise self._short(offset, length, max(0, size_bytes - offset))
        received = bytearray()
        await self._retry.run(partial(self._attempt, offset, length, received, pace))
        if len(received) != length:
            raise self._short(offset, length, len(received))
        return bytes(received)

    async def aclose(self) -> None:
        """Reads afterwards raise `BackendError`. The connections belong to the client."""
        self._closed = True
        self._redirected = None
        await trio.lowlevel.checkpoint()

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError(where=self._where, why="the reader has been closed")

    def _short(self, offset: int, length: int, got: int) -> ShortRead:
        return ShortRead(where=self._where, offset=offset, length=length, got=got)

    async def _attempt(self, offset: int, length: int, received: bytearray, pace: Pace | None) -> None:
        """Fetches what is still missing in `received`; leaves it short when the blob ends there."""
        first, last = offset + len(received), offset + length - 1
        async with self._answer(first, last) as response:
            if response.status == 416:
                return
            if response.status == 206:
                skip = self._check_content_range(response, first, last)
            elif response.status == 200:
                skip = self._skip_of_whole(response, first)
            else:
                await fail(response, host=self._session.host)
            goes_on = response.status == 200 and last + 1 != self._size_bytes
            await response.consume(_Collector(received, skip, length, goes_on).take, pace)
        if len(received) < length:
            raise self._short(offset, length, len(received))

    @asynccontextmanager
    async def _answer(self, first: int, last: int) -> AsyncIterator[HttpResponse]:
        self._check_open()
        headers = [("Range", f"bytes={first}-{last}")]
        own_url = await self._session.url(f"blobs/{self._digest}")
        remembered = self._redirected
        if remembered is not None:
            try:
                async with self._session.send("GET", remembered, headers=headers) as response:
                    if response.status not in _STALE_STATUSES:
                        yield response
                        return
            except BackendError:
                self._forget(remembered)
                raise
            self._forget(remembered)
        async with self._session.send("GET", own_url, headers=headers) as response:
            if response.status in (200, 206) and not await self._session.is_own(response.url):
                self._redirected = response.url
            yield response

    def _forget(self, address: str) -> None:
        if self._redirected == address:  # else another task has already found a newer one
            self._redirected = None

    def _check_content_range(self, response: HttpResponse, first: int, last: int) -> int:
        found = parse_content_range(response.header("Content-Range") or "")
        if found is None:
            raise RegistryProtocolError(where=response.where, why="answered a part without saying which")
        got_first, got_last, size_bytes = found
        if got_first != first or not first <= got_last <= last:
            raise RegistryProtocolError(
                where=response.where, why=f"asked for bytes {first}-{last}, got {got_first}-{got_last}"
            )
        if size_bytes is not None and size_bytes != self._size_bytes:
            raise RegistryProtocolError(
                where=response.where, why=f"the blob has {size_bytes} bytes, not {self._size_bytes}"
            )
        return 0

    def _skip_of_whole(self, response: HttpResponse, first: int) -> int:
        if first > _MOST_SKIPPED_BYTES:
            raise RegistryProtocolError(
                where=response.where, why="the server ignores ranges, so the image cannot be read lazily"
            )
        return first


def parse_content_range(text: str) -> tuple[int, int, int | None] | None:
    """First and last byte, and the size when it is told (RFC 9110, 14.4); None for anything else."""
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None:
        return None
    return int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])


class _Collector:
    """Takes the wanted part of a body that starts `skip` bytes before it and may go on behind it."""

    __slots__ = ("_goes_on", "_length", "_received", "_skip")

    def __init__(self, received: bytearray, skip: int, length: int, goes_on: bool) -> None:
        self._received = received
        self._skip = skip
        self._length = length
        self._goes_on = goes_on

    def take(self, piece: bytes) -> bool:
        dropped = min(self._skip, len(piece))
        self._skip -= dropped
        room = self._length - len(self._received)
        self._received += memoryview(piece)[dropped : dropped + room]
        # A body that ends with the range is read to its end, so that the connection can be used again.
        return len(self._received) < self._length or not self._goes_on


async def head_blob(session: RegistrySession, digest: str) -> int | None:
    """Length in bytes of a blob, or None when the repository has none such. One HEAD request."""
    async with session.send("HEAD", await session.url(f"blobs/{digest}")) as response:
        if response.status == 404:
            return None
        if response.status != 200:
            await fail(response, host=session.host)
        size_bytes = response.content_length
    if size_bytes is None:
        raise RegistryProtocolError(where=response.where, why="does not say how long the blob is")
    return size_bytes

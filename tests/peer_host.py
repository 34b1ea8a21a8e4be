"""A host that serves peers as a test tells it: files that fill, admissions that refuse, a raw client."""

import os
import socket
import ssl
import struct
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from backend.peers.ranges import CONTENT_TYPE
from backend.peers.served import Admission, Admit, BlobRequest, Decision, NotAvailable, ServedFile
from backend.peers.server import serve_peers
from backend.peers.server_counters import ServerCounters
from backend.peers.server_options import ServerOptions

BLOB_ID = "ab" * 32
DECODED = f"/v1/blobs/{BLOB_ID}/decoded"
ENCODED = f"/v2/library/app/blobs/sha256:{BLOB_ID}"
RESET = struct.pack("ii", 1, 0)


class FillingFile:
    """A `ServedFile` of which a test says what is there, what is on its way and what will never come."""

    media_type = CONTENT_TYPE

    def __init__(self, path: Path, content: bytes, *, whole: bool = True) -> None:
        path.write_bytes(content)
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self.size_bytes = len(content)
        self.ready = [(0, len(content))] if whole else []
        self.arriving: list[tuple[int, int]] = []
        self.waits = 0
        self._dead = False
        self._changed = trio.Event()

    def land(self, offset: int, end: int) -> None:
        """[offset, end) is there now."""
        self.ready.append((offset, end))
        self._wake()

    def lose(self) -> None:
        """Nothing is there any more."""
        self.ready.clear()

    def die(self) -> None:
        """Nothing more will come."""
        self._dead = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def ready_until(self, offset: int, end: int) -> int:
        """As in `ServedFile`."""
        return _covered(self.ready, offset, end)

    def is_arriving(self, offset: int, end: int) -> bool:
        """As in `ServedFile`."""
        return _covered(self.ready + self.arriving, offset, end) == end

    async def wait_ready(self, offset: int, end: int) -> int:
        """As in `ServedFile`."""
        self.waits += 1
        while (ready := self.ready_until(offset, end)) == offset:
            if self._dead:
                raise NotAvailable(blob_id=BLOB_ID, offset=offset, end=end, why="a test says so")
            await self._changed.wait()
        return ready


def _covered(ranges: list[tuple[int, int]], offset: int, end: int) -> int:
    for first, last in sorted(ranges):
        if first <= offset < last:
            offset = last
    return min(offset, end)


@dataclass(slots=True)
class TestShelf:
    """Files by kind and id, and who asked for what."""

    __test__ = False

    files: Mapping[tuple[str, str], ServedFile]
    asked: list[BlobRequest] = field(default_factory=list)

    async def open(self, request: BlobRequest) -> ServedFile | None:
        """As in `Shelf`."""
        await trio.lowlevel.checkpoint()
        self.asked.append(request)
        return self.files.get((request.kind, request.blob_id))


@dataclass(slots=True)
class TestAdmission:
    """Answers as told; notes what was asked and what is over."""

    __test__ = False

    answer: Decision = field(default_factory=Admit)
    asked: list[tuple[int, int]] = field(default_factory=list)
    over: list[tuple[int, int, int]] = field(default_factory=list)
    ended: trio.Event = field(default_factory=trio.Event)

    def admit(self, request: BlobRequest, offset: int, end: int) -> Decision:
        """As in `Admission`."""
        self.asked.append((offset, end))
        return self.answer

    def done(self, request: BlobRequest, offset: int, end: int, sent_bytes: int) -> None:
        """As in `Admission`."""
        self.over.append((offset, end, sent_bytes))
        self.ended.set()


@dataclass(slots=True)
class Serving:
    """A server that runs."""

    port: int
    counters: ServerCounters
    shelf: TestShelf
    paced: list[int]

    def url(self, target: str, scheme: str = "http") -> str:
        """The address of a target."""
        return f"{scheme}://127.0.0.1:{self.port}{target}"

    @property
    def refused(self) -> dict[str, int]:
        """Refusals by reason."""
        return self.counters.snapshot().refused


@asynccontextmanager
async def serving(
    decoded: ServedFile,
    *,
    encoded: ServedFile | None = None,
    encoded_id: str = BLOB_ID,
    admission: Admission | None = None,
    pace: Callable[[], Awaitable[None]] | None = None,
    options: ServerOptions | None = None,
    ssl_context: ssl.SSLContext | None = None,
    send_buffer_bytes: int | None = None,
) -> AsyncIterator[Serving]:
    """Runs a server on a free port of loopback until the block ends."""
    shelf = TestShelf({("decoded", BLOB_ID): decoded, ("encoded", encoded_id): encoded or decoded})
    paced: list[int] = []

    async def note(size_bytes: int, request: BlobRequest) -> None:
        paced.append(size_bytes)
        if pace is not None:
            await pace()

    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        if send_buffer_bytes is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        state = Serving(listener.getsockname()[1], ServerCounters(), shelf, paced)
        async with trio.open_nursery() as nursery:

            async def run(task_status: trio.TaskStatus[None]) -> None:
                await serve_peers(
                    listener,
                    shelf,
                    admission or TestAdmission(),
                    note,
                    options or ServerOptions(),
                    state.counters,
                    ssl_context=ssl_context,
                    task_status=task_status,
                )

            await nursery.start(run)
            yield state
            nursery.cancel_scope.cancel()


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as a client reads it; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """A client that sends what it is given, byte for byte."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._buffer = bytearray()

    async def send(self, data: bytes) -> None:
        """Sends `data`."""
        await self.stream.send_all(data)

    async def get(self, target: str, *headers: str, method: str = "GET") -> Reply:
        """One request and its answer."""
        await self.send(request(target, *headers, method=method))
        return await self.reply(has_body=method != "HEAD")

    async def reply(self, *, has_body: bool = True) -> Reply:
        """Reads one answer."""
        status, headers = await self.head()
        length = int(headers.get("content-length", 0)) if has_body else 0
        while len(self._buffer) < length:
            await self._more()
        body = bytes(self._buffer[:length])
        del self._buffer[:length]
        return Reply(status, headers, body)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Reads the head of an answer."""
        while b"\r\n\r\n" not in self._buffer:
            await self._more()
        head, _, _ = bytes(self._buffer).partition(b"\r\n\r\n")
        del self._buffer[: len(head) + 4]
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}

    async def take(self, count: int) -> bytes:
        """Exactly so many bytes of a body."""
        while len(self._buffer) < count:
            await self._more()
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    async def rest(self) -> bytes:
        """All bytes until the server closes. Raises `trio.BrokenResourceError` when it resets."""
        while data := await self.stream.receive_some(65536):
            self._buffer += data
        return bytes(self._buffer)

    async def _more(self) -> None:
        data = await self.stream.receive_some(65536)
        if not data:
            raise EOFError
        self._buffer += data

    def reset(self) -> None:
        """Goes away without a word."""
        assert isinstance(self.stream, trio.SocketStream)
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.stream.socket.close()


@asynccontextmanager
async def client_of(server: Serving, *, receive_buffer_bytes: int | None = None) -> AsyncIterator[Client]:
    """A connection to the server."""
    sock = trio.socket.socket()
    if receive_buffer_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    await sock.connect(("127.0.0.1", server.port))
    async with trio.SocketStream(sock) as stream:
        yield Client(stream)


def request(target: str, *headers: str, method: str = "GET") -> bytes:
    """A request without a body."""
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: peer", *headers, "", ""]).encode()


def random_file(path: Path, size_bytes: int, *, whole: bool = True) -> tuple[FillingFile, bytes]:
    """A file of random bytes, and these."""
    content = os.urandom(size_bytes)
    return FillingFile(path, content, whole=whole), content

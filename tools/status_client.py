"""Asks a mount how it is, on its unix socket: `GET /api/v1/status` over HTTP, see fuse/status_server.py."""

import contextlib
import http.client
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec

TIMEOUT_S = 5.0
STATUS_TARGET = "/api/v1/status"


class Fetched(msgspec.Struct, frozen=True):
    """What a mount has fetched: encoded bytes, requests, and errors on the way."""

    bytes_fetched: int = 0
    requests: int = 0
    errors: int = 0


class Answer(msgspec.Struct, frozen=True):
    """What a mount says of itself, as far as it is shown. Sizes in bytes."""

    mountpoint: str
    reference: str
    digest: str
    driver: str
    pid: int
    since: str = ""
    image_size_bytes: int = 0
    decoded_size_bytes: int = 0
    cached_bytes: int = 0
    fetched: Fetched = Fetched()


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """Connects to the socket instead of a host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        with _short(self._path) as address:
            self.sock.connect(address)


def ask(path: Path) -> Answer:
    """What the mount behind the socket `path` says.

    Raises `TimeoutError` when it hangs, another `OSError` when nobody is there or it makes no sense.
    """
    with contextlib.closing(_UnixConnection(path)) as connection:
        try:
            connection.request("GET", STATUS_TARGET)
            response = connection.getresponse()
            return msgspec.json.decode(response.read(), type=Answer)
        except (http.client.HTTPException, msgspec.DecodeError) as error:
            raise ConnectionError(f"{path}: not an answer: {error}") from error


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """`path` by way of a descriptor: the address of a unix socket has room for 107 bytes only."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)

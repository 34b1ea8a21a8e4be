"""Asks an agent, or a single mount's process, on its unix socket: JSON over HTTP, see backend/json_api.py."""

import contextlib
import http.client
import socket
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from fuse.supervisor.listener import is_served, short_address
from rafs.errors import NydusError

MOUNT_TIMEOUT_S = 300.0
"""For a large bootstrap over a slow link."""

T = TypeVar("T")


class AgentRefused(NydusError):
    """What the agent says; the exit code is the one of its error."""

    message = "{why}"
    exit_code = 203


class _Refusal(msgspec.Struct, frozen=True):
    error: str
    exit_code: int = 0


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connects to the socket instead of a host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        with short_address(self._path) as address:
            self.sock.connect(address)


def call(
    path: Path,
    method: str,
    target: str,
    answer: type[T],
    body: msgspec.Struct | None = None,
    timeout_s: float = MOUNT_TIMEOUT_S,
) -> T:
    """One request.

    Raises `AgentRefused`, `TimeoutError` when the answer takes too long, another `OSError` when nobody is
    there or the answer makes no sense.
    """
    with contextlib.closing(_UnixConnection(path, timeout_s)) as connection:
        try:
            connection.request(method, target, msgspec.json.encode(body) if body is not None else None)
            response = connection.getresponse()
            data = response.read()
            if response.status != http.HTTPStatus.OK:
                raise _refusal(msgspec.json.decode(data, type=_Refusal))
            return msgspec.json.decode(data, type=answer)
        except (http.client.HTTPException, msgspec.DecodeError) as error:
            raise ConnectionError(f"{path}: not an answer: {error}") from error


def wait_for(path: Path, timeout_s: float) -> bool:
    """Waits until somebody listens at `path`; False after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not is_served(path):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.005)
    return True


def _refusal(refusal: _Refusal) -> AgentRefused:
    error = AgentRefused(why=refusal.error)
    if refusal.exit_code:
        error.exit_code = refusal.exit_code  # type: ignore[misc] # that of the error's class in the agent
    return error

"""The heads of requests and answers on one connection; bodies pass by.

h11 reads the requests, a parser for each. It does not write the answers: that would cost as much again, and
nothing in them is hostile. Whether a connection may go on is what the parser makes of the request.

Concurrency: one task. Requests that a client sends before it has its answers wait in the parser (what one
receive has brought) and in the kernel, so they are answered in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

import h11
import trio

from backend.peers.refusal import Dropped, Refusal, Refused
from backend.peers.transport import Transport

Header = tuple[bytes, bytes]
CLOSE = (b"connection", b"close")
STATUS_LINES = {
    status.value: b"HTTP/1.1 %d %s" % (status, status.phrase.encode("ascii")) for status in HTTPStatus
}


@dataclass(frozen=True, slots=True)
class Asked:
    """The head of a request without a body; header names are in lower case."""

    method: str
    path: str
    query: str
    headers: dict[bytes, bytes]


class Heads:
    """The server's side of HTTP on one connection."""

    def __init__(self, head_max_bytes: int, head_timeout_s: float, idle_timeout_s: float) -> None:
        self._head_max_bytes = head_max_bytes
        self._head_timeout_s = head_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._first = True
        self._parser = self._new_parser()

    def _new_parser(self) -> h11.Connection:
        return h11.Connection(h11.SERVER, max_incomplete_event_size=self._head_max_bytes)

    @property
    def reusable(self) -> bool:
        """Whether another request may follow on this connection."""
        return self._parser.their_state is h11.DONE

    @property
    def pipelined(self) -> bool:
        """Whether the client has sent more than what was read."""
        return bool(self._parser.trailing_data[0])

    async def next_request(self, transport: Transport) -> Asked | None:
        """The next request, None when the client has closed. Raises `Dropped` for none, or one too slow."""
        started = self._first or self.pipelined
        if not self._first:
            data, closed = self._parser.trailing_data
            self._parser = self._new_parser()
            for part in (data, b"") if closed else (data,) if data else ():
                self._parser.receive_data(part)
        try:
            request = await self._read_head(transport, started)
        except h11.RemoteProtocolError as error:
            raise _not_http(error) from error
        except OSError:
            return None
        self._first = False
        return request

    async def _read_head(self, transport: Transport, started: bool) -> Asked | None:
        timeout_s = self._head_timeout_s if started else self._idle_timeout_s
        deadline = trio.current_time() + timeout_s
        while (event := self._parser.next_event()) is h11.NEED_DATA:
            with trio.CancelScope(deadline=deadline) as reading:
                data = await transport.receive()
            if reading.cancelled_caught:
                raise Dropped(Refusal.HEAD_TIMEOUT) if started else Dropped(Refusal.IDLE)
            self._parser.receive_data(data)
            if not started:
                started, deadline = True, trio.current_time() + self._head_timeout_s
        if not isinstance(event, h11.Request):
            return None
        asked = _asked(event)
        if not isinstance(self._parser.next_event(), h11.EndOfMessage):
            raise Dropped(Refusal.BODY, Refused(413, Refusal.BODY, "no request here has a body"))
        return asked

    def answer(self, status: int, headers: Sequence[Header]) -> bytes:
        """The head of the answer; it ends the connection when no other request may follow."""
        return render_answer(status, headers if self.reusable else (*headers, CLOSE))


def render_answer(status: int, headers: Sequence[Header]) -> bytes:
    """The head of an answer. Raises `ValueError` for a header with a line break in it."""
    lines = [b"%s: %s" % header for header in headers]
    text = b"\r\n".join([STATUS_LINES[status], *lines, b"", b""])
    if text.count(b"\n") != len(lines) + 2 or text.count(b"\r") != len(lines) + 2:
        raise ValueError("a line break in a header")
    return text


def _asked(event: h11.Request) -> Asked:
    path, _, query = event.target.decode("latin-1").partition("?")
    return Asked(event.method.decode("ascii"), path, query, dict(event.headers))


def _not_http(error: h11.RemoteProtocolError) -> Dropped:
    status = error.error_status_hint
    if status == 431:
        return Dropped(
            Refusal.HEAD_TOO_LARGE, Refused(status, Refusal.HEAD_TOO_LARGE, "the head is too large")
        )
    return Dropped(Refusal.NOT_HTTP, Refused(400, Refusal.NOT_HTTP, "not an HTTP/1.1 request"))

"""The heads of requests and answers on one connection: h11 reads and writes them, bodies pass it by.

Concurrency: one task. Requests that a client sends before it has its answers wait in h11 (what one receive
has brought) and in the kernel, so they are answered in order.
"""

from dataclasses import dataclass
from typing import cast

import h11
import trio

from backend.peers.refusal import Dropped, Refusal, Refused
from backend.peers.transport import Transport

Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Asked:
    """The head of a request without a body; header names are in lower case."""

    method: str
    path: str
    query: str
    headers: dict[bytes, bytes]


class _Passed:
    """Stands for the bytes of a body: h11 counts them and hands them back."""

    __slots__ = ("_length",)

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


class Heads:
    """The server's side of HTTP on one connection."""

    def __init__(self, head_max_bytes: int, head_timeout_s: float, idle_timeout_s: float) -> None:
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=head_max_bytes)
        self._head_timeout_s = head_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._first = True

    @property
    def reusable(self) -> bool:
        """Whether another request may follow on this connection."""
        return self._connection.our_state is h11.DONE and self._connection.their_state is h11.DONE

    @property
    def pipelined(self) -> bool:
        """Whether the client has sent more than what was read."""
        return bool(self._connection.trailing_data[0])

    async def next_request(self, transport: Transport) -> Asked | None:
        """The next request, None when the client has closed. Raises `Dropped` for none, or one too slow."""
        if not self._first:
            self._connection.start_next_cycle()
        try:
            request = await self._read_head(transport)
        except h11.RemoteProtocolError as error:
            raise _not_http(error) from error
        except OSError:
            return None
        self._first = False
        return request

    async def _read_head(self, transport: Transport) -> Asked | None:
        started = self._first or self.pipelined
        timeout_s = self._head_timeout_s if started else self._idle_timeout_s
        deadline = trio.current_time() + timeout_s
        while (event := self._connection.next_event()) is h11.NEED_DATA:
            with trio.CancelScope(deadline=deadline) as reading:
                data = await transport.receive()
            if reading.cancelled_caught:
                raise Dropped(Refusal.HEAD_TIMEOUT) if started else Dropped(Refusal.IDLE)
            self._connection.receive_data(data)
            if not started:
                started, deadline = True, trio.current_time() + self._head_timeout_s
        if not isinstance(event, h11.Request):
            return None
        asked = _asked(event)
        if not isinstance(self._connection.next_event(), h11.EndOfMessage):
            raise Dropped(Refusal.BODY, Refused(413, Refusal.BODY, "no request here has a body"))
        return asked

    def answer(self, status: int, headers: list[Header], body_length: int) -> bytes:
        """The head of the answer. The caller sends it, and `body_length` bytes unless the method is HEAD."""
        head = self._connection.send(h11.Response(status_code=status, headers=headers))
        if body_length:
            self._connection.send_with_data_passthrough(h11.Data(data=cast(bytes, _Passed(body_length))))
        self._connection.send(h11.EndOfMessage())
        return head or b""


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

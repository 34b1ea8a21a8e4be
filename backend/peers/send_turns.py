"""Lets few bodies be sent at a time, the most urgent first, the others one after the other.

A link that is shared by many answers ends them all late; one after the other, half of them are there in half
the time, and whoever has got one passes it on meanwhile.

Concurrency: for one loop; what is no coroutine has no checkpoint.
"""

import trio

from backend.peers.served import BlobRequest
from backend.priority import FetchClass, Ticket

TURNS = 4
"""Enough to keep a link busy while one of them waits for its client or its disk."""


class SendTurns:
    """The turns of one upload server, by request."""

    def __init__(self, turns: int = TURNS) -> None:
        self._free = turns
        self._sending: set[int] = set()
        self._waiting: dict[int, Ticket] = {}
        self._given: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def expect(self, request: BlobRequest, given: int) -> None:
        """A request has begun; what was `given` to fewer hosts before goes first, within its class."""
        self._given[id(request)] = given

    async def take(self, request: BlobRequest) -> None:
        """Waits for the turn of a request that has none yet. A checkpoint."""
        key = id(request)
        if key in self._sending:
            await trio.lowlevel.checkpoint()
            return
        ticket = self._waiting[key] = Ticket(request.fetch_class)
        self._admit()
        try:
            await ticket.admitted.wait()
        except trio.Cancelled:
            self.end(request)
            raise

    def end(self, request: BlobRequest) -> None:
        """The request is over, whether it had a turn or not."""
        key = id(request)
        self._waiting.pop(key, None)
        self._given.pop(key, None)
        if key in self._sending:
            self._sending.remove(key)
            self._free += 1
        self._admit()

    def _admit(self) -> None:
        while self._free and self._waiting:
            key = min(self._waiting, key=self._order)
            ticket = self._waiting.pop(key)
            self._sending.add(key)
            self._free -= 1
            ticket.admitted.set()

    def _order(self, key: int) -> tuple[FetchClass, int, tuple[FetchClass, int]]:
        ticket = self._waiting[key]
        return ticket.fetch_class, self._given.get(key, 0), ticket.rank

"""Lets few bodies be sent at a time, the most urgent first, the others one after the other.

A link that is shared by many answers ends them all late; one after the other, half of them are there in half
the time, and whoever has got one passes it on meanwhile. Of what is equally urgent, that goes first which was
given to the fewest.

Concurrency: for one loop; what is no coroutine has no checkpoint.
"""

from collections.abc import Callable

import trio

from backend.peers.served import BlobRequest
from backend.priority import FetchClass, Ticket

TURNS = 4
"""Enough to keep a link busy while one of them waits for its client or its disk."""
STALLED_S = 1.0
"""A client that has not taken a slice within this keeps nobody from being sent to: it may be gone."""


class SendTurns:
    """The turns of one upload server, by request."""

    def __init__(self, turns: int = TURNS, clock: Callable[[], float] = trio.current_time) -> None:
        self._turns = turns
        self._clock = clock
        # When each was last given leave to send a slice.
        self._sending: dict[int, float] = {}
        self._waiting: dict[int, Ticket] = {}
        self._given: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def expect(self, request: BlobRequest, given: int) -> None:
        """A request has begun; what was `given` to fewer hosts before goes first, within its class."""
        self._given[id(request)] = given

    async def take(self, request: BlobRequest) -> None:
        """Waits until a request may send its next slice: for its turn, if it has none. A checkpoint."""
        key = id(request)
        if key in self._sending:
            self._sending[key] = self._clock()
            await trio.lowlevel.checkpoint()
            return
        ticket = self._waiting[key] = Ticket(request.fetch_class)
        try:
            while not ticket.admitted.is_set():
                self._admit()
                with trio.move_on_after(STALLED_S / 2):
                    await ticket.admitted.wait()
        except trio.Cancelled:
            self.end(request)
            raise

    def end(self, request: BlobRequest) -> None:
        """The request is over, whether it had a turn or not."""
        key = id(request)
        for table in (self._waiting, self._given, self._sending):
            table.pop(key, None)
        self._admit()

    def _admit(self) -> None:
        now = self._clock()
        active = sum(now - since < STALLED_S for since in self._sending.values())
        while active < self._turns and self._waiting:
            key = min(self._waiting, key=self._order)
            ticket = self._waiting.pop(key)
            self._sending[key] = now
            active += 1
            ticket.admitted.set()

    def _order(self, key: int) -> tuple[FetchClass, int, tuple[FetchClass, int]]:
        ticket = self._waiting[key]
        return ticket.fetch_class, self._given.get(key, 0), ticket.rank

"""How many others are served at a time, and where the rest is sent. No I/O: the time is given.

A hot piece grows a tree: whoever was given it is named to those who come while this host is busy.
"""

import random
from collections import OrderedDict, deque
from collections.abc import Callable

from backend.peers.piece import piece_bytes_of
from backend.peers.served import Admit, BlobRequest, Busy, Redirect

SLOTS = 64
"""Answers that are under way, most of them waiting for their turn or for the origin."""
QUEUE_LONG = 2
"""So many waiting for their turn: who asks for what somebody else has been given is sent there."""
RETRY_AFTER_S = 0.1
GIVEN_PIECES_MAX = 8192
GIVEN_HOSTS_MAX = 8
GIVEN_S = 60.0

_Key = tuple[str, str, int]
"""Kind of the bytes, blob, and which part of it."""


def _is_shared(request: BlobRequest) -> bool:
    """Whether it is of what hosts give to each other, and not asked for by a client of registries."""
    return request.kind == "decoded" or (request.kind == "encoded" and bool(request.peer_url))


class UploadSlots:
    """An `Admission`."""

    def __init__(
        self,
        size_of: Callable[[str], int],
        clock: Callable[[], float],
        waiting: Callable[[], int] = lambda: 0,
        slots: int = SLOTS,
        chance: random.Random | None = None,
        kept: int = GIVEN_PIECES_MAX,
    ) -> None:
        """`size_of` gives the decoded size of a blob that is served, `waiting` who waits to be sent to.

        `kept`: of how many pieces it is remembered who was given them.
        """
        self.active = 0
        self.slots = slots
        self._size_of = size_of
        self._queue = waiting
        self._clock = clock
        self._chance = chance or random.Random()
        self._kept = kept
        self._given: OrderedDict[_Key, deque[tuple[float, str]]] = OrderedDict()

    def given(self, request: BlobRequest, offset: int) -> int:
        """To how many hosts the part of a blob that begins at `offset` was given."""
        if not _is_shared(request):
            return 0
        return len(self._given.get(self._keys(request, offset, offset + 1)[0], ()))

    def admit(self, request: BlobRequest, offset: int, end: int) -> Admit | Redirect | Busy:
        """See `Admission`."""
        is_full = self.active >= self.slots
        if _is_shared(request) and (is_full or self._queue() >= QUEUE_LONG):
            others = self._holders(request, offset, end)
            if others:
                return Redirect(self._chance.choice(others))
        if not is_full:
            self.active += 1
            return Admit()
        return Busy(RETRY_AFTER_S * self._chance.uniform(0.5, 1.5))

    def done(self, request: BlobRequest, offset: int, end: int, sent_bytes: int) -> None:
        """See `Admission`."""
        self.active -= 1
        if not _is_shared(request) or sent_bytes < end - offset or not request.peer_url:
            return
        now = self._clock()
        for key in self._keys(request, offset, end):
            given = self._given.setdefault(key, deque(maxlen=GIVEN_HOSTS_MAX))
            given.append((now, request.peer_url))
            self._given.move_to_end(key)
        while len(self._given) > self._kept:
            self._given.popitem(last=False)

    def _holders(self, request: BlobRequest, offset: int, end: int) -> list[str]:
        """Who was given the first part of the range; all of it they have to have, or be getting."""
        now = self._clock()
        key = self._keys(request, offset, end)[0]
        recent = [url for at, url in self._given.get(key, ()) if now - at < GIVEN_S]
        return [url for url in recent if url != request.peer_url]

    def _keys(self, request: BlobRequest, offset: int, end: int) -> list[_Key]:
        """A key for each range that is small enough to be asked for at once.

        Where pieces lie in the encoded bytes nobody knows here: a range is told by where it begins.
        """
        if request.kind == "encoded":
            return [(request.kind, request.blob_id, offset)]
        piece_bytes = piece_bytes_of(self._size_of(request.blob_id))
        pieces = range(offset // piece_bytes, max(offset, end - 1) // piece_bytes + 1)
        return [(request.kind, request.blob_id, piece) for piece in pieces]

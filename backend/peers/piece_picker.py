"""Which piece of a blob a host begins next, of all that it lacks and nobody waits for. No I/O.

What it is to bring from the origin for all comes first, as fast as the origin gives: everybody waits for it.
Then the rarest of what can be had from others now, without which all hosts would draw on the same full links
for what is everywhere soon, and at the end everybody would wait for the few that have the rest (Legout et
al., "Rarest first and choke algorithms are enough", 2006). Then, if nobody offers anything, an owner is
reminded of what it has not brought yet.

It is decided as late as possible, when something can be asked for: an order made beforehand was 1.5 times as
slow among 8 hosts, as a host then waits for what is not there yet, and leaves what is.
"""

import random
from collections.abc import Callable

from backend.peers.piece import PieceSet
from backend.peers.piece_queue import PieceQueue
from backend.peers.swarm import ERRANDS_MAX, Swarm


class PiecePicker:
    """See above. `have`: what the host has of the blob. Every piece is begun once, and ended with `end`."""

    def __init__(
        self,
        swarm: Swarm,
        queue: PieceQueue,
        blob_id: str,
        have: PieceSet,
        chance: random.Random,
        clock: Callable[[], float],
    ) -> None:
        self._swarm = swarm
        self._queue = queue
        self._blob_id = blob_id
        self._have = have
        self._chance = chance
        self._clock = clock
        self._begun = PieceSet(have.count)
        self._own_begun: set[int] = set()
        self._errands: set[int] = set()

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to begin."""
        return not self._have.lacking & ~self._begun.mask

    def end(self, piece: int) -> None:
        """A piece has come, or what can be had of it: an image need not name all chunks of its blobs."""
        self._own_begun.discard(piece)
        self._errands.discard(piece)

    def begin(self, own_max: int) -> int | None:
        """The piece to bring next, now; None when it is better to wait. At most `own_max` of this host's own
        are on their way from the origin at a time."""
        lacking = self._have.lacking & ~self._begun.mask
        if not lacking:
            return None
        piece = self._own(lacking) if len(self._own_begun) < own_max else None
        if piece is None and self._queue.has_room:
            piece = self._offered(lacking)
        if piece is None and len(self._errands) < ERRANDS_MAX:
            piece = self._errand(lacking)
        if piece is not None:
            self._begun.add(piece)
        return piece

    def _own(self, lacking: int) -> int | None:
        piece = self._one_of(lacking & self._swarm.own_pieces(self._blob_id, self._have.count).mask)
        if piece is not None:
            self._own_begun.add(piece)
        return piece

    def _offered(self, lacking: int) -> int | None:
        """The rarest that is offered by a host that may be asked for more now."""
        mask = self._swarm.offer(self._blob_id, lacking, self._clock())
        if mask:
            for common in self._swarm.commonness(self._blob_id)[1:]:
                if mask & ~common:
                    return self._one_of(mask & ~common)
        return self._one_of(mask)

    def _errand(self, lacking: int) -> int | None:
        """Something that no other host has, as far as known."""
        piece = self._one_of(lacking & ~self._swarm.commonness(self._blob_id)[0])
        if piece is not None:
            self._errands.add(piece)
        return piece

    def _one_of(self, mask: int) -> int | None:
        return self._have.some_of(mask, self._chance.random()) if mask else None

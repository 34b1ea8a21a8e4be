"""In which order a host fetches the pieces of a blob that nobody waits for. No I/O.

While the origin is still sending, each host can only get what is somewhere already, and has to get all of
that: a fixed order would fill what it has on its way with pieces that nobody can give yet. So what to fetch
next is decided when there is room for it: a few of the pieces that this host owns, which only it brings; else
one that somebody offers, by chance, so that hosts have different ones to give; else a few of the others,
whose owners learn in this way that they are wanted.
"""

import random
from collections.abc import Callable

from backend.peers.piece import PieceSet

OWNED_AT_ONCE = 2
NOT_OFFERED_AT_ONCE = 4
"""As many as `Swarm.choose` lets go to owners at a time."""


class PieceOrder:
    """The pieces that are still to be asked for. `is_owned` tells what this host is to bring."""

    def __init__(self, count: int, is_owned: Callable[[int], bool], chance: random.Random) -> None:
        owned = [piece for piece in range(count) if is_owned(piece)]
        chance.shuffle(owned)
        self._owned = owned
        self._count = count
        self._bits = (count + 7) // 8 * 8
        self._left = (1 << count) - 1 << self._bits - count
        self._chance = chance
        self._own_under_way: list[int] = []
        self._sent_for: list[int] = []

    def next(self, have: PieceSet, offered: int) -> int | None:
        """The piece to ask for; None when there is none for now, or no more.

        `have` is what this host has, `offered` what others could give at once (`Swarm.offered`).
        """
        self._own_under_way = [piece for piece in self._own_under_way if piece not in have]
        if len(self._own_under_way) < OWNED_AT_ONCE:
            while self._owned:
                piece = self._owned.pop()
                if self.take(piece):
                    self._own_under_way.append(piece)
                    return piece
        if offered & self._left:
            return self._by_chance(offered & self._left)
        self._sent_for = [piece for piece in self._sent_for if piece not in have]
        if len(self._sent_for) < NOT_OFFERED_AT_ONCE and self._left:
            piece = self._by_chance(self._left)
            self._sent_for.append(piece)
            return piece
        return None

    def take(self, piece: int) -> bool:
        """The piece is asked for, or has come by itself; whether it was still to be asked for."""
        bit = self._bit(piece)
        was_left = bool(self._left & bit)
        self._left &= ~bit
        return was_left

    def _bit(self, piece: int) -> int:
        return 1 << self._bits - 1 - piece

    def _by_chance(self, among: int) -> int:
        """Of the pieces at or after a place, the first; from the start when there is none."""
        piece_limit = self._bits - int(self._chance.random() * self._count)
        after = among & (1 << piece_limit) - 1
        piece = self._bits - (after or among).bit_length()
        self.take(piece)
        return piece

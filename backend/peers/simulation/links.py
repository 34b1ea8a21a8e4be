"""The links of a simulation: who sends how fast to whom.

Between hosts: a sender has a few turns (`SendTurns`), each a fixed part of its link; a transfer begins when
its sender has a turn free and its receiver room for it. So no link ever carries more than it can, and none
idles while there is something that both ends could move. What a real link does better: one transfer alone
has all of it. At the origin: all streams share evenly, which is exact, as there are few.
"""

import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING

from backend.peers.send_turns import TURNS
from backend.peers.simulation.events import Events

if TYPE_CHECKING:
    from backend.peers.simulation.host import SimHost

ROOM_PART = 0.5
"""A transfer begins when its receiver has room for this part of what its sender would give it."""


class Transfer:
    """One piece on its way from one host to another."""

    __slots__ = ("began_at", "is_errand", "is_open", "others", "piece", "rate", "receiver", "sender", "size")

    def __init__(
        self, sender: "SimHost", receiver: "SimHost", piece: int, size: int, is_errand: bool, now: float
    ) -> None:
        self.sender = sender
        self.receiver = receiver
        self.piece = piece
        self.size = size
        self.is_errand = is_errand
        self.began_at = now
        self.others = 0
        self.rate = 0.0
        """Bytes per second; 0 while it waits."""
        self.is_open = True


class HostLink:
    """The two directions of one host's link, and who waits for either."""

    __slots__ = ("room", "sending", "to_receive", "to_send", "turn_bps", "turns")

    def __init__(self, up_bps: float, down_bps: float) -> None:
        self.turns = TURNS
        self.turn_bps = up_bps / TURNS
        self.room = down_bps
        """Bytes per second that are left to receive."""
        self.to_send: list[Transfer] = []
        self.to_receive: list[Transfer] = []
        self.sending: list[Transfer] = []


class Links:
    """Starts and ends transfers between hosts."""

    def __init__(self, events: Events, near_s: float, far_s: float) -> None:
        self._events = events
        self._near_s = near_s
        self._far_s = far_s

    def enter(self, transfer: Transfer) -> None:
        """The sender has what is asked for: the transfer begins as soon as both links let it."""
        if not self._began(transfer):
            transfer.sender.link.to_send.append(transfer)
            transfer.receiver.link.to_receive.append(transfer)

    def leave(self, transfer: Transfer) -> None:
        """A transfer is given up, whether it has begun or not."""
        transfer.is_open = False
        sender, receiver = transfer.sender.link, transfer.receiver.link
        if transfer.rate:
            self._free(transfer)
        elif transfer in sender.to_send:
            sender.to_send.remove(transfer)
            receiver.to_receive.remove(transfer)

    def _began(self, transfer: Transfer) -> bool:
        sender, receiver = transfer.sender.link, transfer.receiver.link
        room = receiver.room
        enough = ROOM_PART * min(sender.turn_bps, transfer.receiver.shape.down_bps / TURNS)
        if not sender.turns or room < enough:
            return False
        transfer.rate = min(sender.turn_bps, room)
        sender.turns -= 1
        receiver.room -= transfer.rate
        sender.sending.append(transfer)
        is_near = transfer.sender.shape.zone == transfer.receiver.shape.zone
        delay_s = transfer.size / transfer.rate + (self._near_s if is_near else self._far_s)
        self._events.after(delay_s, self._end, transfer)
        return True

    def _end(self, transfer: Transfer) -> None:
        if not transfer.is_open:
            return
        transfer.is_open = False
        self._free(transfer)
        transfer.sender.sent(transfer)
        transfer.receiver.received(transfer)

    def _free(self, transfer: Transfer) -> None:
        sender, receiver = transfer.sender.link, transfer.receiver.link
        sender.turns += 1
        sender.sending.remove(transfer)
        receiver.room += transfer.rate
        for waiting in list(sender.to_send):
            if not sender.turns:
                break
            self._start(waiting)
        least = ROOM_PART * transfer.receiver.shape.down_bps / TURNS
        for waiting in list(receiver.to_receive):
            if receiver.room < min(least, ROOM_PART * waiting.sender.link.turn_bps):
                continue
            self._start(waiting)

    def _start(self, transfer: Transfer) -> None:
        if self._began(transfer):
            transfer.sender.link.to_send.remove(transfer)
            transfer.receiver.link.to_receive.remove(transfer)


class OriginLink:
    """The origin: `sent_bytes` so far. Streams share its rate evenly, none gets more than its own end takes.

    Of an even share all streams get the same, so one number tells how far they are: what each has received
    since the start, and a stream ends when that number reaches its own.
    """

    def __init__(self, events: Events, rate_bps: float, stream_max_bps: float, latency_s: float) -> None:
        self.sent_bytes = 0.0
        self.by_piece: dict[int, int] = {}
        self._events = events
        self._rate = rate_bps
        self._stream_max = stream_max_bps
        self._latency_s = latency_s
        self._level = self._at = 0.0
        self._streams: list[tuple[float, int, float, Callable[[], object]]] = []
        self._number = self._planned = 0

    def request(self, piece: int, size: float, down_bps: float, done: Callable[[], object]) -> None:
        """Calls `done` when `size` bytes have arrived at a host that takes at most `down_bps`."""
        self.by_piece[piece] = self.by_piece.get(piece, 0) + 1
        self.sent_bytes += size
        self._advance()
        self._number += 1
        earliest = self._events.now + size / down_bps
        heapq.heappush(self._streams, (self._level + size, self._number, earliest, done))
        self._plan()

    def _speed(self) -> float:
        return min(self._stream_max, self._rate / len(self._streams)) if self._streams else 0.0

    def _advance(self) -> None:
        now = self._events.now
        self._level += (now - self._at) * self._speed()
        self._at = now

    def _plan(self) -> None:
        if self._streams:
            self._number += 1
            delay_s = max(0.0, (self._streams[0][0] - self._level) / self._speed())
            self._planned = self._number
            self._events.after(delay_s, self._end_first, self._number)

    def _end_first(self, planned: int) -> None:
        if planned != self._planned:
            return  # something has changed since
        self._advance()
        _, _, earliest, done = heapq.heappop(self._streams)
        self._plan()
        self._events.after(max(0.0, earliest - self._events.now) + self._latency_s, done)

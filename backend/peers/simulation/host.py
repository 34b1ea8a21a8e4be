"""A host of a simulation: it wants all pieces of one blob, and serves what it has.

It decides with the code of the agent: `Swarm`, `PeerHealth`, `UploadSlots`, `OriginWindow`, `LimitTree` and
`PieceQueue`. What is written again here is what `PeerStage`, `PeerHub` and the upload server do with trio:
asking, waiting and taking. Other than there, a request is for a whole piece, and a piece that is still
arriving is not passed on before it is whole.
"""

import math
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from backend.peers.health import PeerHealth
from backend.peers.limit_settings import LimitSettings
from backend.peers.limit_tree import LimitTree
from backend.peers.origin_window import OriginWindow
from backend.peers.piece import PieceSet
from backend.peers.piece_picker import PiecePicker
from backend.peers.piece_queue import PieceQueue, Wanted
from backend.peers.served import Admit, BlobRequest, Redirect
from backend.peers.simulation.links import HostLink, Transfer
from backend.peers.simulation.topology import HostShape
from backend.peers.swarm import AskPeer, Choice, Swarm
from backend.peers.upload_slots import UploadSlots
from backend.peers.wire import HostInfo
from backend.priority import FetchClass

if TYPE_CHECKING:
    from backend.peers.simulation.cluster import Cluster

PAUSE_S = 1.0
"""`PeerStage` looks so often again at least."""
DEAD_FOUND_S = 0.9
"""When a host that has died is noticed: `backend.peers.reach`."""
GIVEN_KEPT = 64
"""Of how many pieces a host remembers to whom it gave them; of all, 10,000 hosts would need 10 GB."""


class SimHost:
    """See above."""

    def __init__(self, cluster: "Cluster", shape: HostShape, swarm: Swarm) -> None:
        self.cluster = cluster
        self.shape = shape
        self.info = HostInfo(shape.name, f"http://{shape.name}:8771", shape.zone)
        self.swarm = swarm
        self.link = HostLink(shape.up_bps, shape.down_bps)
        self.limits = LimitTree(LimitSettings(host_up_bps=shape.up_limit_bps), 0.0)
        self.pieces = PieceSet(cluster.piece_count)
        self.fresh: list[int] = []
        """Pieces that have come since the last announcement."""
        self.pumps_at = math.inf
        """When the limits may let more through."""
        self.is_alive = True
        self.ended_at: float | None = None
        self.received_bytes = self.sent_bytes = 0
        self.queue = PieceQueue(swarm, cluster.chance, cluster.clock)
        self._picker = PiecePicker(
            swarm, self.queue, cluster.blob_id, self.pieces, cluster.chance, cluster.clock
        )
        self._wanted: dict[int, Wanted] = {}
        self._tried: dict[int, set[str]] = {}
        self._asking: dict[int, tuple[Transfer, AskPeer, PeerHealth]] = {}
        self._left = cluster.piece_count
        self._window = OriginWindow()
        self._owned: deque[int] = deque()
        self._wanted_of_origin: set[int] = set()
        self._fetching = 0
        self._errands: dict[int, list[Transfer]] = {}
        self._is_pausing = False
        self._slots = UploadSlots(
            cluster.size_of, cluster.clock, self._waiting_for_turn, chance=cluster.chance, kept=GIVEN_KEPT
        )
        self._request = BlobRequest(
            "decoded", cluster.blob_id, "", None, True, FetchClass.PREFETCH, "", peer_url=self.info.url
        )

    # -- wanting

    def look(self, *, has_news: bool = False) -> None:
        """Asks for what can be had now, and looks again later for the rest."""
        if not self.is_alive or self.ended_at is not None:
            return
        self.queue.dispatch(anew=has_news)
        while (piece := self._picker.begin(self._window.slots + 1)) is not None:
            self._want(piece)
            self.queue.dispatch()
        if not self._is_pausing:
            self._is_pausing = True
            self.cluster.events.after(PAUSE_S, self._end_pause)

    def _want(self, piece: int) -> None:
        if piece in self.pieces or piece in self._asking or piece in self._wanted_of_origin:
            return  # others have made this host bring it
        tried = self._tried.setdefault(piece, set())
        decided = partial(self._decided, piece)
        wanted = Wanted(self.cluster.blob_id, piece, round(self.cluster.piece_bytes), tried, decided)
        self._wanted[piece] = wanted
        self.queue.add(wanted)

    def _decided(self, piece: int, choice: Choice) -> None:
        del self._wanted[piece]
        if isinstance(choice, AskPeer):
            self._ask(choice, piece)
        else:
            self._want_of_origin(piece)

    def _end_pause(self) -> None:
        self._is_pausing = False
        self.look()

    def _ask(self, choice: AskPeer, piece: int) -> None:
        cluster, health = self.cluster, self.swarm.health_of(choice.host.id)
        sender = cluster.hosts[choice.host.id]
        transfer = Transfer(sender, self, piece, cluster.piece_bytes, choice.is_owner, cluster.events.now)
        transfer.others = health.in_flight
        health.in_flight += cluster.piece_bytes
        self._asking[piece] = (transfer, choice, health)
        if not sender.is_alive:
            cluster.events.after(DEAD_FOUND_S, self._note_dead, transfer)
            return
        answer = sender.serve(transfer)
        if answer is not None:
            cluster.events.after(cluster.topology.near_s, self._turned_away, transfer, answer)

    def _end_asking(self, transfer: Transfer) -> PeerHealth:
        _, choice, health = self._asking.pop(transfer.piece)
        health.in_flight -= self.cluster.piece_bytes
        self.queue.release(choice)
        return health

    def received(self, transfer: Transfer) -> None:
        """A piece has come from another host."""
        if not self.is_alive:
            return
        now = self.cluster.events.now
        health = self._end_asking(transfer)
        if not transfer.is_errand:
            health.note_done(self.cluster.piece_bytes, now - transfer.began_at, transfer.others)
        self.received_bytes += transfer.size
        self._take(transfer.piece)

    def _turned_away(self, transfer: Transfer, answer: float | str) -> None:
        """Busy for so many seconds, or the name of another host to ask."""
        if not self.is_alive:
            return
        health = self._end_asking(transfer)
        self._want(transfer.piece)
        now = self.cluster.events.now
        if isinstance(answer, float):
            health.note_busy(now, answer)
        else:
            blob_id, piece = self.cluster.blob_id, transfer.piece
            if answer in self._tried.get(piece, ()):
                health.note_busy(now, 0.02)
            else:
                count = self.cluster.piece_count
                self.swarm.note_moved(blob_id, transfer.sender.info.id, answer, piece, count)
        self.look()

    def _note_dead(self, transfer: Transfer) -> None:
        if not self.is_alive:
            return
        transfer.is_open = False
        self._end_asking(transfer).note_dead(self.cluster.events.now)
        self._tried.setdefault(transfer.piece, set()).add(transfer.sender.info.id)
        self._want(transfer.piece)
        self.look()

    def _take(self, piece: int) -> None:
        self.cluster.note_arrival(self, piece)
        self.pieces.add(piece)
        self.fresh.append(piece)
        self._picker.end(piece)
        self._tried.pop(piece, None)
        self._left -= 1
        for transfer in self._errands.pop(piece, ()):
            if transfer.is_open:
                self._send(transfer)
        if self._left == 0:
            self.ended_at = self.cluster.events.now
            self.cluster.note_end(self)
        self.look()

    # -- the origin

    def _want_of_origin(self, piece: int) -> None:
        if piece not in self._wanted_of_origin and piece not in self.pieces:
            self._wanted_of_origin.add(piece)
            self._owned.append(piece)
            self._fetch_some()

    def _fetch_some(self) -> None:
        while self._owned and self._fetching < self._window.slots:
            self._fetching += 1
            piece = self._owned.popleft()
            self.limits.origin_request(FetchClass.PREFETCH, notify=partial(self._fetch, piece))
        self.limits.queue.pump(self.cluster.events.now)

    def _fetch(self, piece: int) -> None:
        cluster = self.cluster
        began_at = cluster.events.now

        def done() -> None:
            now = cluster.events.now
            self.limits.end_request(now)
            self._fetching -= 1
            self._wanted_of_origin.discard(piece)
            if self.is_alive:
                self._window.note(round(cluster.piece_bytes), now - began_at)
                self._fetch_some()
                self._take(piece)

        cluster.origin.request(piece, cluster.piece_bytes, self.shape.down_bps, done)

    def note_lease(self) -> None:
        """The lease of the origin has changed."""
        self._fetch_some()

    # -- serving

    def serve(self, transfer: Transfer) -> float | str | None:
        """Takes a request; else how long to leave this host alone, or which other host to ask."""
        cluster = self.cluster
        offset = transfer.piece * cluster.grid_bytes
        answer = self._slots.admit(transfer.receiver._request, offset, offset + cluster.grid_bytes)
        if isinstance(answer, Redirect):
            return cluster.name_at(answer.url)
        if not isinstance(answer, Admit):
            return answer.retry_after_s
        if transfer.piece in self.pieces:
            self._send(transfer)
            return None
        self._errands.setdefault(transfer.piece, []).append(transfer)
        wanted = self._wanted.pop(transfer.piece, None)
        if wanted is not None:
            self.queue.withdraw(wanted)
        if transfer.piece not in self._asking:
            self._want_of_origin(transfer.piece)
        return None

    def _send(self, transfer: Transfer) -> None:
        if self.shape.up_limit_bps is None:
            self.cluster.links.enter(transfer)
            return
        self.limits.upload(
            transfer.size,
            FetchClass.PREFETCH,
            self.cluster.blob_id,
            self.cluster.events.now,
            notify=lambda: self.cluster.links.enter(transfer),
        )
        self.cluster.pump(self)

    def sent(self, transfer: Transfer) -> None:
        """A piece has gone to another host."""
        self.sent_bytes += transfer.size
        offset = transfer.piece * self.cluster.grid_bytes
        size = self.cluster.grid_bytes
        self._slots.done(transfer.receiver._request, offset, offset + size, size)

    def _waiting_for_turn(self) -> int:
        return len(self.link.to_send)

    def die(self) -> None:
        """Everything that it was sending or receiving ends."""
        self.is_alive = False
        links, events = self.cluster.links, self.cluster.events
        for transfer, _, _ in list(self._asking.values()):
            links.leave(transfer)
        waiting = [transfer for errands in self._errands.values() for transfer in errands]
        for transfer in [*self.link.sending, *self.link.to_send, *waiting]:
            links.leave(transfer)
            events.after(DEAD_FOUND_S, transfer.receiver._note_dead, transfer)

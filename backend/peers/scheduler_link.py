"""One host and one of its schedulers: what each has told the other. No I/O.

A host announces itself to all its schedulers, so that each of them knows it: one link for each. All are told
what the host has, as changes since the last announcement that was answered there; one of them, the chosen
one, is asked for members and holders as well.
"""

import math

from backend.peers.hub import PeerHub
from backend.peers.leases import HostLease, OriginShare
from backend.peers.membership import digest_of
from backend.peers.piece import PieceSet
from backend.peers.wire import Announce, Answer, BadPeer, Holding

BAD_PEERS_MAX = 256
FAIL_BACK_S = 5.0
"""An earlier one in the list is chosen again when it has answered for so long: after a restart it has heard
the others by then."""
RETRY_MIN_S, RETRY_MAX_S = 0.3, 2.0
RETRY_GROWTH = 1.5


class SchedulerLink:
    """See above. `is_chosen` is set by the owner of all links."""

    def __init__(self, url: str, hub: PeerHub) -> None:
        self.url = url.rstrip("/")
        self.lease = HostLease()
        self.is_chosen = False
        self.answering_since = math.inf
        """When it began to answer; `inf` while it does not."""
        self.complaints: set[str] = set()
        """Why it does not answer, as was said already; empty while it does."""
        self.bad_peers: list[BadPeer] = []
        """To be reported."""
        self._hub = hub
        self._epoch, self._sequence, self._members_version = "", 0, -1
        self._told: dict[str, int] = {}
        self._telling: dict[str, int] = {}
        self._must_tell_everything = True
        self._failures = 0

    @property
    def is_answering(self) -> bool:
        """Whether the last announcement was answered."""
        return self.answering_since != math.inf

    def choose(self, *, is_chosen: bool) -> None:
        """It is the one to learn from, or not any more. What it tells counts from nothing on."""
        self.is_chosen = is_chosen
        self._members_version = -1

    def compose(self, wants: OriginShare) -> Announce:
        """The next announcement; `wants` of the origin."""
        hub, everything = self._hub, self._must_tell_everything
        asks_all = self.is_chosen and self._members_version < 0
        self._telling = {blob_id: blob.presence.pieces.mask for blob_id, blob in hub.blobs.items()}
        return Announce(
            host=hub.own,
            epoch=self._epoch,
            sequence=self._sequence,
            members_version=self._members_version,
            members_digest=digest_of(hub.swarm.members.values()) if asks_all and hub.swarm.members else "",
            is_standby=not self.is_chosen,
            is_everything=everything,
            holdings=[
                holding
                for blob_id in hub.blobs
                if (holding := self._holding(blob_id, everything)) is not None
            ],
            dropped=[blob_id for blob_id in self._told if blob_id not in hub.blobs],
            wanted=[blob_id for blob_id, blob in hub.blobs.items() if not blob.presence.is_whole()],
            traffic=hub.counters.traffic(),
            uploads=hub.uploads,
            bad_peers=self.bad_peers[:BAD_PEERS_MAX],
            origin_wants=wants,
            lease_seen=self.lease.seen,
        )

    def answered(self, announce: Announce, answer: Answer, asked_at: float, now: float) -> bool:
        """An answer has arrived; whether the scheduler is in another life than before."""
        is_new = answer.epoch != self._epoch
        self.answering_since = min(self.answering_since, now)
        if is_new and self._epoch:
            self.answering_since = now
        self._failures = 0
        self.complaints.clear()
        self._epoch, self._sequence = answer.epoch, answer.sequence
        if announce.is_standby != self.is_chosen:
            self._members_version = answer.members.version
        self._must_tell_everything = answer.wants_everything
        self._told = self._telling
        del self.bad_peers[: len(announce.bad_peers)]
        if answer.lease is not None:
            self.lease.renew(answer.lease, asked_at)
        return is_new

    def failed(self, chance: float) -> float:
        """No answer; how long to wait, `chance` being 0 to 1: never all hosts at once."""
        self._failures += 1
        self.answering_since = math.inf
        self._must_tell_everything, self._members_version = True, -1
        pause_s = min(RETRY_MAX_S, RETRY_MIN_S * RETRY_GROWTH ** min(self._failures - 1, 16))
        return pause_s * (0.5 + chance)

    def goodbye(self) -> Announce:
        """The host leaves."""
        return Announce(self._hub.own, self._epoch, is_leaving=True)

    def _holding(self, blob_id: str, everything: bool) -> Holding | None:
        pieces = self._hub.blobs[blob_id].presence.pieces
        told, mask = self._told.get(blob_id), self._telling[blob_id]
        if everything or told is None or told & ~mask:
            return Holding(blob_id, pieces.count, bytes(pieces))
        if mask == told:
            return None
        fresh = PieceSet(pieces.count)
        fresh.mask = mask & ~told
        return Holding(blob_id, pieces.count, added=list(fresh))


def chosen_of(links: list[SchedulerLink], now: float) -> SchedulerLink | None:
    """The first that has answered for a while; before, the one that is chosen already, or any at all."""
    answering = [link for link in links if link.is_answering]
    proven = [link for link in answering if now - link.answering_since >= FAIL_BACK_S or link.is_chosen]
    return next(iter(proven or answering), None)


def summed_leases(leases: list[HostLease], now: float) -> OriginShare | None:
    """What a host may ask of the origin: each scheduler lends of its own part of the limit.

    None while no scheduler has ever said anything. One that names no limit adds none and takes none away. A
    lease that is over leaves its floor, so that a part of the limit whose scheduler has gone is still used;
    but a single request at once, which may have been rounded up, only when no lease is left.
    """
    shares = [(share, lease.is_live(now)) for lease in leases if (share := lease.share(now)) is not None]
    if not shares:
        return None
    any_live = any(is_live for _, is_live in shares)
    places = [
        share.concurrency
        for share, is_live in shares
        if share.concurrency is not None and (is_live or share.concurrency > 1)
    ]
    if not places and any(share.concurrency is not None for share, _ in shares):
        places = [0 if any_live else max(share.concurrency or 0 for share, _ in shares)]
    bps = [share.bps for share, _ in shares if share.bps is not None]
    rps = [share.rps for share, _ in shares if share.rps is not None]
    return OriginShare(sum(bps) if bps else None, sum(rps) if rps else None, sum(places) if places else None)

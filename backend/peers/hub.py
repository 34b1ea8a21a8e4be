"""What all mounts of a host share towards its peers: whom it knows, what it has, what it has moved.

Concurrency: for the trio thread. Blobs are registered by each image that has them; the first registration
starts counting pieces, the last one ends it.
"""

import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from backend.keep_mode import KeepEncoded
from backend.peers.client import PeerClient
from backend.peers.mirror import Mirror
from backend.peers.piece import PieceGrid
from backend.peers.piece_queue import PieceQueue
from backend.peers.presence import PiecePresence
from backend.peers.swarm import Choice, Swarm
from backend.peers.wire import BadPeer, HostInfo, Traffic

if TYPE_CHECKING:
    from backend.fetch import ChunkFetcher

BAD_PEERS_MAX = 256


@dataclass(slots=True)
class PeerCounters:
    """Bytes, decoded but for `*_encoded_bytes`, and how often something went another way.

    `peer_encoded_bytes`: what came encoded from other hosts, `peer_encoded_worth` the decoded size of that,
    which is in `peer_bytes`.

    `degraded`: runs of chunks that came from the origin because those before this host did not bring them.
    """

    origin_bytes: int = 0
    origin_encoded_bytes: int = 0
    peer_bytes: int = 0
    peer_encoded_bytes: int = 0
    peer_encoded_worth: int = 0
    served_bytes: int = 0
    degraded: int = 0
    hedges: int = 0
    dead_peers: int = 0
    wrong_bytes: int = 0
    busy_answers: int = 0
    upload_requests: int = 0
    by_peer: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    refused: dict[str, int] = field(default_factory=dict)

    @property
    def peer_plain_bytes(self) -> int:
        """Bytes that came decoded from other hosts."""
        return self.peer_bytes - self.peer_encoded_worth

    def traffic(self) -> Traffic:
        """What the scheduler is told."""
        return Traffic(
            self.origin_bytes,
            self.origin_encoded_bytes,
            self.peer_bytes,
            self.served_bytes,
            self.peer_encoded_bytes,
        )


@dataclass(slots=True)
class PeerBlob:
    """A blob of this host; `fetchers` of the images that use it. `image`: where owners can read it from."""

    blob_id: str
    image: str
    meta_path: Path
    presence: PiecePresence
    fetchers: list["ChunkFetcher"] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PeerAccess:
    """A blob, and the way to those who may have it."""

    hub: "PeerHub"
    blob: PeerBlob


class PeerHub:
    """See above. `own`: this host, and where its upload server is."""

    def __init__(
        self,
        own: HostInfo,
        client: PeerClient,
        swarm: Swarm | None = None,
        keep: KeepEncoded = KeepEncoded.NEVER,
    ) -> None:
        """`keep`: of which blobs the encoded bytes are kept."""
        self.own = own
        self.keep = keep
        self.mirror = Mirror()
        self.client = client
        self.swarm = swarm or Swarm(own.id, own.zone)
        self.counters = PeerCounters()
        self.chance = random.Random()
        self.queue = PieceQueue(self.swarm, self.chance, trio.current_time)
        self.blobs: dict[str, PeerBlob] = {}
        self.bad_peers: list[BadPeer] = []
        self.uploads = 0
        self.on_blob: list[Callable[[PeerBlob, bool], None]] = []
        """Called with a blob that is there now (True) or has gone."""
        self.scope: str | None = None
        """What certificates of those that are served must be for; None while no scheduler has said it."""
        self.on_scope: list[Callable[[], None]] = []
        """Called when that has changed."""
        self.known = trio.Event()
        """A scheduler has answered for the first time."""
        self.has_changed = trio.lowlevel.ParkingLot()
        """Waits for what may let this host ask for more: others have got something, a request has ended."""
        self.has_news = trio.Event()
        """Somebody has come to want a blob: an announcement is due at once."""

    @asynccontextmanager
    async def registered(
        self, image: str, meta_path: Path, fetcher: "ChunkFetcher"
    ) -> AsyncIterator[PeerAccess]:
        """This host has, or fetches, a blob for the time of the block.

        `image` names where it can be read, `meta_path` its chunk table.
        """
        cached = fetcher.cached
        blob_id = cached.shape.blob_id
        blob = self.blobs.get(blob_id)
        if blob is None or blob.presence.cached is not cached:
            grid = PieceGrid(cached.shape.size_bytes)
            presence = await trio.to_thread.run_sync(PiecePresence, fetcher.meta, cached, grid)
            blob = self.blobs.get(blob_id)
            if blob is None or blob.presence.cached is not cached:
                blob = self.blobs[blob_id] = PeerBlob(blob_id, image, meta_path, presence)
                presence.watch()
                self.swarm.note_blob(blob_id, grid.count)
        blob.fetchers.append(fetcher)
        if len(blob.fetchers) == 1:
            self.has_news.set()
            self._tell(blob, is_there=True)
        try:
            yield PeerAccess(self, blob)
        finally:
            blob.fetchers.remove(fetcher)
            if not blob.fetchers:
                self._unregister(blob)

    def _unregister(self, blob: PeerBlob) -> None:
        blob.presence.unwatch()
        if self.blobs.get(blob.blob_id) is blob:
            del self.blobs[blob.blob_id]
            self.swarm.forget_blob(blob.blob_id)
            self._tell(blob, is_there=False)

    def _tell(self, blob: PeerBlob, *, is_there: bool) -> None:
        for told in self.on_blob:
            told(blob, is_there)

    def encoded_bytes(self) -> int:
        """Disk space of the encoded bytes that are kept of open blobs."""
        kept = (blob.fetchers[0].origin.encoded for blob in self.blobs.values() if blob.fetchers)
        return sum(each.cached.usage_bytes() for each in kept if each is not None)

    async def wait_known(self, timeout_s: float) -> None:
        """Waits for a moment for the first answer of a scheduler, so that the others are known."""
        with trio.move_on_after(timeout_s):
            await self.known.wait()

    def release(self, choice: Choice) -> None:
        """A request that the queue had decided has ended."""
        self.queue.release(choice)
        self.has_changed.unpark_all()

    def note_news(self) -> None:
        """Others have told what they have."""
        self.queue.dispatch(anew=True)
        self.has_changed.unpark_all()

    def note_wrong(self, host: HostInfo, blob_id: str) -> None:
        """A host has sent wrong bytes: it is left alone, and reported."""
        self.counters.wrong_bytes += 1
        self.swarm.health_of(host.id).note_wrong(trio.current_time())
        if len(self.bad_peers) < BAD_PEERS_MAX:
            self.bad_peers.append(BadPeer(host.id, blob_id))

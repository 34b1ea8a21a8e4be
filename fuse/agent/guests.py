"""Images that nobody on this host has mounted: opened because this host owns pieces of them for others.

An image is opened for hosts of the same scope only: with TLS their certificate says so, and the upload
server has looked at it; without, their address has to be one that a scheduler has named. One host may have
few opened in a minute, and all together `GUESTS_MAX` at a time.

Concurrency: one task for each open image. It opens the image, waits until nobody has asked for long, and
closes it. Whoever asks meanwhile waits for the same task.
"""

import logging
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

import trio

from backend.fetch_metrics import FetchMetrics
from backend.fetch_pool import FetchOptions
from backend.peers.hub import PeerHub
from backend.peers.identity import host_of, normal_address
from backend.peers.limits import HostLimits
from backend.reference import RegistryReference, parse_reference
from backend.registry import RegistryOptions
from backend.shelf import BlobShelf
from backend.store import open_store
from fuse.image import open_image
from rafs.errors import NydusError

log = logging.getLogger(__name__)

GUESTS_MAX = 64
IDLE_S = 600.0
OPENINGS_MAX = 16
OPENINGS_S = 60.0
"""One host has no more than `OPENINGS_MAX` images opened here in this time."""
KNOWN_WITHIN_S = 2.0
"""A host that has just joined may ask before this one has heard of it: two rounds of announcements."""


class GuestRefused(NydusError):
    """Another host asks for an image that is not opened for it."""

    message = "image {image}: {why}"
    exit_code = 201


@dataclass(slots=True)
class _Guest:
    opened: trio.Event = field(default_factory=trio.Event)
    asked_at: float = 0.0
    failure: Exception | None = None

    async def idle(self) -> None:
        """Returns when nobody has asked for `IDLE_S`."""
        due = self.asked_at + IDLE_S
        while trio.current_time() < due:
            await trio.sleep_until(due)
            due = self.asked_at + IDLE_S


class GuestImages:
    """See above."""

    def __init__(
        self,
        hub: PeerHub,
        cache_dir: Path,
        shelf: BlobShelf,
        options: RegistryOptions,
        limits: HostLimits,
        metrics: FetchMetrics | None = None,
        *,
        has_certificates: bool = False,
    ) -> None:
        """`has_certificates`: who asks was seen to belong to the scope."""
        self._has_certificates = has_certificates
        self._openings: dict[str, deque[float]] = {}
        self._limits = limits
        self._metrics = metrics
        self._hub = hub
        self._cache_dir = cache_dir
        self._shelf = shelf
        self._options = options
        self._guests: dict[str, _Guest] = {}
        self._nursery: trio.Nursery | None = None
        self.refused: Counter[str] = Counter()
        """How often, by reason."""

    def __len__(self) -> int:
        return len(self._guests)

    async def run(self) -> None:
        """Holds the images until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await trio.sleep_forever()

    async def open(self, image: str, blob_id: str, peer: str) -> None:
        """Returns when the image is open and `blob_id` with it, for `peer`. Raises `NydusError`."""
        reference = parse_reference(image)
        if not isinstance(reference, RegistryReference) or not reference.digest or self._nursery is None:
            raise self._refusal(image, "no exact name", "not the exact name of an image in a registry")
        await self._wait_known(image, peer)
        guest = self._guests.get(image)
        if guest is None:
            self._note_opening(image, peer)
            guest = self._guests[image] = _Guest()
            self._nursery.start_soon(self._hold, image, reference, guest)
        guest.asked_at = trio.current_time()
        await guest.opened.wait()
        if guest.failure is not None:
            raise guest.failure
        if blob_id not in self._hub.blobs:
            raise GuestRefused(image=image[:128], why=f"it has no blob {blob_id[:12]}")

    async def _wait_known(self, image: str, peer: str) -> None:
        """Returns when the peer is known to be of the same scope. Raises `GuestRefused`."""
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(KNOWN_WITHIN_S):
            while not self._is_known(peer):
                await self._hub.has_changed.park()
            return
        raise self._refusal(image, "unknown host", f"no scheduler has named a host at {peer[:64]}")

    def _is_known(self, peer: str) -> bool:
        if self._has_certificates:
            return True
        address = normal_address(peer)
        members = self._hub.swarm.members.values()
        return any(normal_address(host_of(member.url)) == address for member in members)

    def _note_opening(self, image: str, peer: str) -> None:
        """Counts one that is about to be opened. Raises `GuestRefused`."""
        if len(self._guests) >= GUESTS_MAX:
            raise self._refusal(image, "too many", f"{GUESTS_MAX} images are open for others")
        now = trio.current_time()
        for name in [name for name, times in self._openings.items() if now - times[-1] > OPENINGS_S]:
            del self._openings[name]
        times = self._openings.setdefault(peer, deque(maxlen=OPENINGS_MAX))
        if len(times) == OPENINGS_MAX and now - times[0] < OPENINGS_S:
            why = f"{peer[:64]} has had {OPENINGS_MAX} images opened within {OPENINGS_S:g} s"
            raise self._refusal(image, "too often", why)
        times.append(now)

    def _refusal(self, image: str, reason: str, why: str) -> GuestRefused:
        self.refused[reason] += 1
        return GuestRefused(image=image[:128], why=why)

    async def _hold(self, image: str, reference: RegistryReference, guest: _Guest) -> None:
        try:
            async with open_store(reference, self._options) as store:
                metadata = await store.fetch_metadata(self._cache_dir / "images")
                opened = open_image(
                    store,
                    metadata,
                    self._cache_dir,
                    self._shelf,
                    FetchOptions(),
                    self._hub,
                    self._limits,
                    self._metrics,
                )
                async with opened:
                    guest.opened.set()
                    await guest.idle()
        except NydusError as error:
            log.info("image %s is not opened for others: %s", image, error)
            guest.failure = error
        except Exception as error:
            log.exception("image %s is not opened for others", image)
            guest.failure = error
        finally:
            guest.opened.set()
            if self._guests.get(image) is guest:
                del self._guests[image]

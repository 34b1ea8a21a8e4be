"""Tells the schedulers what this host has, and takes in what they answer.

Concurrency: one task. Nothing waits for it but a mount that begins, for a moment, for the first answer. When
a scheduler does not answer the next one is asked, and told everything; until one does, the host goes on with
what it knew.
"""

import logging
from collections.abc import Sequence

import msgspec
import trio

from backend.contract import BackendError
from backend.http import HttpClient, HttpRequest, TlsFailed
from backend.peers.hub import PeerHub
from backend.peers.leases import HostLease
from backend.peers.limit_control import LimitControl
from backend.peers.tls_failure import tls_failure
from backend.peers.wire import ANNOUNCE_TARGET, Announce, Answer, Holding

log = logging.getLogger(__name__)

TIMEOUT_S = 2.0
RETRY_PAUSE_S = 0.3
NEWS_PAUSE_S = 0.02
"""Mounts of many blobs register them one by one."""
ANSWER_MAX_BYTES = 64 << 20


class SchedulerRefused(BackendError):
    """A scheduler does not take an announcement."""

    message = "scheduler {where}: {why}"
    exit_code = 156


class Announcer:
    """See above. `urls` of the schedulers, the preferred one first."""

    def __init__(self, hub: PeerHub, urls: Sequence[str], http: HttpClient, control: LimitControl) -> None:
        self._control = control
        self._lease = HostLease()
        self._complaint = ""
        self.scheduler = ""
        """The one that answered last; "" while none does."""
        self._hub = hub
        self._urls = [url.rstrip("/") for url in urls]
        self._http = http
        self._at = 0
        self._epoch, self._sequence, self._members_version = "", 0, -1
        self._told: set[str] = set()
        self._must_tell_everything = True

    async def run(self) -> None:
        """Announces until cancelled, and then that the host leaves."""
        try:
            while True:
                pause_s = await self._announce_once()
                with trio.move_on_after(pause_s):
                    await self._hub.has_news.wait()
                    await trio.sleep(NEWS_PAUSE_S)
                self._hub.has_news = trio.Event()
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(0.5):
                await self._leave()

    async def _announce_once(self) -> float:
        """One announcement; how long to wait until the next one."""
        url = self._urls[self._at]
        asked_at = trio.current_time()
        announce = self._composed()
        try:
            answer = await self._send(url, announce)
        except BackendError as error:
            if self.scheduler or self._at == len(self._urls) - 1:
                log.info("%s; going on with %d known hosts", error, len(self._hub.swarm.members))
            self._complain(error, url)
            self.scheduler = ""
            self._must_tell_everything = True
            self._hub.bad_peers += announce.bad_peers
            self._control.limits.lease_origin(self._lease.share(trio.current_time()))
            self._at = (self._at + 1) % len(self._urls)
            return RETRY_PAUSE_S
        self.scheduler = url
        if answer.epoch != self._epoch:
            self._hub.swarm.forget_all()
        self._epoch, self._sequence = answer.epoch, answer.sequence
        self._members_version = answer.members.version
        self._must_tell_everything = answer.wants_everything
        self._hub.swarm.take(answer)
        self._take_terms(answer, asked_at)
        self._hub.note_news()
        self._hub.known.set()
        return 0.0 if answer.wants_everything else min(max(answer.interval_s, 0.05), 10.0)

    def _complain(self, error: BackendError, url: str) -> None:
        """Once of each thing that does not pass by itself, as a certificate that is over."""
        if isinstance(error, TlsFailed):
            error = tls_failure(error, url)
        elif not isinstance(error, SchedulerRefused) or not error.fields.get("status"):
            return
        if str(error) != self._complaint:
            self._complaint = str(error)
            log.warning("%s", error)

    def _take_terms(self, answer: Answer, asked_at: float) -> None:
        if answer.scope != self._hub.scope:
            self._hub.scope = answer.scope
            for told in self._hub.on_scope:
                told()
        self._control.set_cluster(answer.limits)
        if answer.lease is not None:
            self._lease.renew(answer.lease, asked_at)
        self._control.limits.lease_origin(self._lease.share(trio.current_time()))

    def _composed(self) -> Announce:
        hub, everything = self._hub, self._must_tell_everything
        holdings: list[Holding] = []
        for blob_id, blob in hub.blobs.items():
            presence = blob.presence
            if everything or presence.lost or blob_id not in self._told:
                holdings.append(Holding(blob_id, presence.grid.count, bytes(presence.pieces)))
            elif presence.fresh:
                holdings.append(Holding(blob_id, presence.grid.count, added=list(presence.fresh)))
            presence.fresh.clear()
            presence.lost = False
        dropped, hub.dropped = hub.dropped, []
        bad_peers, hub.bad_peers = hub.bad_peers, []
        self._told = set(hub.blobs)
        return Announce(
            host=hub.own,
            epoch=self._epoch,
            sequence=self._sequence,
            members_version=self._members_version,
            is_everything=everything,
            holdings=holdings,
            dropped=[blob_id for blob_id in dropped if blob_id not in hub.blobs],
            wanted=[blob_id for blob_id, blob in hub.blobs.items() if not blob.presence.is_whole()],
            traffic=hub.counters.traffic(),
            uploads=hub.uploads,
            bad_peers=bad_peers,
            origin_wants=self._control.limits.origin_demand(),
            lease_seen=self._lease.seen,
        )

    async def _leave(self) -> None:
        if self.scheduler:
            announce = Announce(self._hub.own, self._epoch, is_leaving=True)
            try:
                await self._send(self.scheduler, announce)
            except BackendError as error:
                log.info("%s", error)

    async def _send(self, url: str, announce: Announce) -> Answer:
        headers = [("Content-Type", "application/json")]
        body = msgspec.json.encode(announce)
        request = HttpRequest("POST", url + ANNOUNCE_TARGET, headers, body, connect_s=TIMEOUT_S)
        try:
            with trio.fail_after(TIMEOUT_S):
                async with self._http.exchange(request) as response:
                    data = await response.read(ANSWER_MAX_BYTES)
                    if response.status != 200:
                        why = data.decode(errors="replace")[:256]
                        raise SchedulerRefused(where=url, why=why, status=response.status)
            return msgspec.json.decode(data, type=Answer)
        except (trio.TooSlowError, msgspec.DecodeError) as error:
            why = str(error) or f"no answer within {TIMEOUT_S:g} s"
            raise SchedulerRefused(where=url, why=why) from error

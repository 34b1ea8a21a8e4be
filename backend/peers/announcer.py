"""Tells the schedulers what this host has, and takes in what they answer.

Concurrency: two tasks for each scheduler. One announces: to all of them, so that each could take over at
any moment; one hears of limits and of the switch. What the chosen scheduler says counts, and another one is
chosen as soon as that one does not answer. Nothing waits for all this but a mount that begins, for a moment,
for the first answer. While no scheduler answers the host goes on with what it knew. State changes between
checkpoints.
"""

import logging
import ssl
from collections.abc import Sequence

import msgspec
import trio

from backend.contract import BackendError
from backend.http import HttpClient, HttpRequest, TlsFailed
from backend.peers.hub import PeerHub
from backend.peers.limit_control import LimitControl
from backend.peers.scheduler_link import BAD_PEERS_MAX, SchedulerLink, chosen_of, summed_leases
from backend.peers.terms_follower import follow_terms
from backend.peers.tls_failure import tls_failure
from backend.peers.wire import ANNOUNCE_TARGET, Announce, Answer, Terms, refusal_text

log = logging.getLogger(__name__)

TIMEOUT_S = 2.0
COMPLAINTS_MAX = 16
NEWS_PAUSE_S = 0.02
"""Mounts of many blobs register them one by one."""
ANSWER_MAX_BYTES = 64 << 20


class SchedulerRefused(BackendError):
    """A scheduler does not take an announcement."""

    message = "scheduler {where}: {why}"
    exit_code = 156


class Announcer:
    """See above. `urls` of the schedulers, the preferred one first; `context` for those with certificates."""

    def __init__(
        self,
        hub: PeerHub,
        urls: Sequence[str],
        http: HttpClient,
        control: LimitControl,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._control, self._hub, self._http, self._context = control, hub, http, context
        self._links = [SchedulerLink(url, hub) for url in dict.fromkeys(urls)]
        self._links[0].choose(is_chosen=True)

    @property
    def scheduler(self) -> str:
        """The one that is learnt from; "" while it does not answer."""
        return next((link.url for link in self._links if link.is_chosen and link.is_answering), "")

    @property
    def schedulers(self) -> list[str]:
        """All that answer."""
        return [link.url for link in self._links if link.is_answering]

    async def run(self) -> None:
        """Announces until cancelled, and then that the host leaves."""
        try:
            async with trio.open_nursery() as nursery:
                for link in self._links:
                    nursery.start_soon(self._announce, link)
                    nursery.start_soon(self._follow, link)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(0.5):
                async with trio.open_nursery() as nursery:
                    for link in self._links:
                        nursery.start_soon(self._leave, link)

    async def _announce(self, link: SchedulerLink) -> None:
        while True:
            news = self._hub.has_news
            pause_s = await self._announce_once(link)
            with trio.move_on_after(pause_s):
                await news.wait()
                await trio.sleep(NEWS_PAUSE_S)
            if self._hub.has_news is news and news.is_set():
                self._hub.has_news = trio.Event()

    async def _announce_once(self, link: SchedulerLink) -> float:
        """One announcement; how long to wait until the next one."""
        asked_at = trio.current_time()
        self._hand_out_reports()
        announce = link.compose(self._control.limits.origin_demand())
        try:
            answer = await self._send(link.url, announce)
        except BackendError as error:
            self._complain(error, link)
            pause_s = link.failed(self._hub.chance.random())
            self._choose()
            self._lend()
            return pause_s
        is_new = link.answered(announce, answer, asked_at, trio.current_time())
        if link.is_chosen and not announce.is_standby:
            self._learn(answer, is_new=is_new)
        self._choose()
        self._lend()
        asks_again = answer.wants_everything or link.is_chosen == announce.is_standby
        return 0.0 if asks_again else min(max(answer.interval_s, 0.05), 10.0)

    def _learn(self, answer: Answer, *, is_new: bool) -> None:
        if is_new:
            self._hub.swarm.forget_all()
        self._hub.swarm.take(answer)
        if answer.scope != self._hub.scope:
            self._hub.scope = answer.scope
            for told in self._hub.on_scope:
                told()
        self._control.set_cluster(answer.limits)
        self._hub.note_news()
        self._hub.known.set()

    async def _follow(self, link: SchedulerLink) -> None:
        def take(terms: Terms) -> None:
            if link.is_chosen:
                self._hub.swarm.enabled = terms.peers_enabled
                self._control.set_cluster(terms.limits.hosts)
                self._hub.note_news()

        await follow_terms(link.url, self._context, take, self._hub.chance)

    def _choose(self) -> None:
        chosen = chosen_of(self._links, trio.current_time())
        if chosen is None or chosen.is_chosen:
            return
        for link in self._links:
            link.choose(is_chosen=link is chosen)
        self._hub.swarm.forget_all()
        self._hub.has_news.set()
        log.info("scheduler %s is asked from now on", chosen.url)

    def _lend(self) -> None:
        leases = [link.lease for link in self._links]
        self._control.limits.lease_origin(summed_leases(leases, trio.current_time()))

    def _hand_out_reports(self) -> None:
        fresh, self._hub.bad_peers = self._hub.bad_peers, []
        for link in self._links:
            link.bad_peers = (link.bad_peers + fresh)[:BAD_PEERS_MAX]

    def _complain(self, error: BackendError, link: SchedulerLink) -> None:
        """Each reason once until it answers: somebody has to mend it, or to know that peers are missing."""
        if isinstance(error, TlsFailed):
            error = tls_failure(error, link.url)
        said = str(error) if link.url in str(error) else f"scheduler {link.url}: {error}"
        if said not in link.complaints and len(link.complaints) < COMPLAINTS_MAX:
            link.complaints.add(said)
            log.warning("%s; going on with %d known hosts", said, len(self._hub.swarm.members))

    async def _leave(self, link: SchedulerLink) -> None:
        if link.is_answering:
            try:
                await self._send(link.url, link.goodbye())
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
                        why = refusal_text(data)
                        raise SchedulerRefused(where=url, why=why, status=response.status)
            return msgspec.json.decode(data, type=Answer)
        except (trio.TooSlowError, msgspec.DecodeError) as error:
            why = str(error) or f"no answer within {TIMEOUT_S:g} s"
            raise SchedulerRefused(where=url, why=why) from error

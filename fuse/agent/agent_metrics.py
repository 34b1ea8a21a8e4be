"""The metrics of an agent: what its mounts have read, fetched, and moved from and to other hosts.

Concurrency: for the trio thread. Counters only grow as long as the process lives; a scraper knows by
`process_start_time_seconds` that another one has begun.
"""

import os
import time
from collections import Counter
from collections.abc import Collection, Iterable

from backend.fetch_metrics import FetchMetrics
from backend.fetch_statistics import FetchStatistics
from backend.metrics import Exposition, Labels, label_of
from backend.peers.limit_control import LimitControl
from fuse.agent.peering import Peering
from fuse.mount_status import SessionStatus


class AgentMetrics:
    """See above. `fetch` is for all mounts to count in."""

    def __init__(self, version: str, restarts: int) -> None:
        self.fetch = FetchMetrics()
        self._version = version
        self._restarts = restarts
        self._began_at = time.time()
        self._ended = FetchStatistics()

    def note_ended(self, fetched: FetchStatistics) -> None:
        """A mount has ended, and had fetched so much."""
        self._ended += fetched

    def render(
        self, mounts: Collection[SessionStatus], control: LimitControl, peering: Peering | None
    ) -> str:
        """The text to answer with."""
        out = Exposition()
        self._expose_agent(out, mounts)
        self._expose_reads(out, mounts)
        self.fetch.expose(out)
        _expose_limits(out, control)
        if peering is not None:
            _expose_peers(out, peering)
            _expose_uploads(out, peering)
        return out.render()

    def _expose_agent(self, out: Exposition, mounts: Collection[SessionStatus]) -> None:
        out.gauges(
            "agent_info", "The agent; always 1.", [({"version": self._version, "pid": str(os.getpid())}, 1)]
        )
        out.gauge("agent_start_time_seconds", "When this process began, in Unix time.", self._began_at)
        out.counter("agent_restarts", "Agents before this one, under the same supervisor.", self._restarts)
        drivers = Counter((status.driver, status.state) for status in mounts)
        samples = [({"driver": driver, "state": state}, count) for (driver, state), count in drivers.items()]
        out.gauges("mounts", "Mounts, by driver and state.", samples)
        decoded = sum(status.decoded_size_bytes for status in mounts)
        out.gauge("image_bytes", "Decoded size of all mounted images.", decoded)
        out.gauge("cached_bytes", "Disk space of decoded files.", sum(s.cached_bytes for s in mounts))

    def _expose_reads(self, out: Exposition, mounts: Iterable[SessionStatus]) -> None:
        done = sum((status.fetched for status in mounts), self._ended)
        results = {"hit": done.hits, "miss": done.misses, "wait": done.waits}
        out.counters(
            "reads",
            "Reads that came to the agent: answered from the cache, after a fetch, or after one under way.",
            [({"result": result}, count) for result, count in results.items()],
        )
        out.counter("fetch_errors", "Faults of sources, wrong bytes among them.", done.errors)
        out.counter("chunks_stored", "Chunks that were verified and stored.", done.chunks_stored)
        out.counter("origin_requests", "Requests to registries for blobs.", done.requests)
        out.counter("origin_received_bytes", "Encoded bytes of blobs from registries.", done.bytes_fetched)


def _expose_limits(out: Exposition, control: LimitControl) -> None:
    status = control.status()
    limits = {name: getattr(status.effective, name) for name in status.effective.__struct_fields__}
    samples: list[tuple[Labels, float]] = [
        ({"limit": name}, value) for name, value in limits.items() if value is not None
    ]
    out.gauges(
        "limit", "Limits that are set: bytes or requests a second, or requests at once; 0 is paused.", samples
    )
    passed = status.statistics
    out.gauge("limit_waiting", "Parts of downloads and requests that wait for a limit.", passed.waiting)
    # Uploads wait in the process that sends them.
    waits = {each: wait for each, wait in control.limits.waits.items() if each != "upload"}
    out.counters(
        "limit_waits", "Parts that had to wait.", [({"for": each}, w.count) for each, w in waits.items()]
    )
    out.counters(
        "limit_wait_seconds",
        "Time that parts have waited.",
        [({"for": each}, wait.total_s) for each, wait in waits.items()],
    )


def _expose_peers(out: Exposition, peering: Peering) -> None:
    hub, counters = peering.hub, peering.hub.counters
    out.gauge("peers_enabled", "Whether other hosts are used.", int(hub.swarm.enabled))
    out.gauge("peer_members", "Hosts known in the scope, this one among them.", len(hub.swarm.members))
    out.gauge(
        "peer_scheduler_up",
        "Whether a scheduler has answered the last announcement.",
        int(peering.has_scheduler),
    )
    out.gauge("peer_blobs", "Blobs that this host takes part in.", len(hub.blobs))
    out.gauge("peer_encoded_bytes", "Disk space of encoded bytes that are kept.", hub.encoded_bytes())
    out.counters(
        "peer_received_bytes",
        "Bytes from other hosts, as they travelled.",
        [
            ({"form": "decoded"}, counters.peer_plain_bytes),
            ({"form": "encoded"}, counters.peer_encoded_bytes),
        ],
    )
    out.counter(
        "peer_origin_fallbacks",
        "Runs of chunks that came from the registry because those before this host did not bring them.",
        counters.degraded,
    )
    out.counter("peer_hedges", "Second requests for what a host was slow to give.", counters.hedges)
    out.counter("peer_dead", "Requests that a host did not answer.", counters.dead_peers)
    out.counter("peer_bans", "Times that a host was left alone for wrong bytes.", counters.wrong_bytes)
    out.counter("peer_busy", "Requests that a host was too busy for.", counters.busy_answers)
    out.counter(
        "peer_late_verdicts", "Hosts not taken for dead, because this one was late.", hub.client.late_verdicts
    )
    out.gauge("guest_images", "Images that are open for other hosts only.", peering.guest_count)
    refusals = peering.guest_refusals
    samples = [({"reason": label_of(reason)}, count) for reason, count in refusals.items()]
    out.counters("guest_refusals", "Images that were not opened for other hosts.", samples)


def _expose_uploads(out: Exposition, peering: Peering) -> None:
    counters = peering.hub.counters
    out.gauge("uploads", "Answers to other hosts under way.", peering.hub.uploads)
    out.counter("upload_bytes", "Bytes of blobs sent to other hosts and clients.", counters.served_bytes)
    out.counter("upload_requests", "Requests to the upload server.", counters.upload_requests)
    restarts = peering.uploads.restarts if peering.uploads else 0
    out.counter("upload_restarts", "Upload servers that have died.", restarts)
    samples = [({"reason": label_of(reason)}, count) for reason, count in counters.refused.items()]
    out.counters("upload_refusals", "Requests and connections not answered as asked.", samples)

"""The metrics of a scheduler: the cluster as it knows it at the moment."""

from collections import Counter

from backend.metrics import Exposition
from backend.peers.scheduler_state import SchedulerState


def scheduler_metrics(state: SchedulerState, announcements: int, now: float) -> str:
    """The text to answer a scraper with; `announcements` were answered so far."""
    out = Exposition()
    out.counter("scheduler_announcements", "Announcements of hosts that were answered.", announcements)
    out.counter(
        "scheduler_refused", "Announcements that could not be true, or were not allowed.", state.refused
    )
    out.gauge("scheduler_peers_enabled", "Whether hosts use each other.", int(state.terms.peers_enabled))
    out.gauge("scheduler_interval_seconds", "How often each host announces itself.", state.interval_s)
    scopes = Counter(host.group for host in state.hosts.values())
    out.gauges(
        "scheduler_hosts", "Live hosts, by scope.", [({"scope": each}, n) for each, n in scopes.items()]
    )
    out.gauge("scheduler_banned_hosts", "Hosts that several others have caught.", state.banned_count(now))
    swarms = list(state.swarms())
    out.gauge("scheduler_blobs", "Blobs that hosts take part in, by scope and blob.", len(swarms))
    out.gauge("scheduler_pieces", "Pieces of these blobs.", sum(swarm[3] for swarm in swarms))
    out.gauge("scheduler_pieces_held", "Pieces that some host has.", sum(swarm[4] for swarm in swarms))
    traffic = state.traffic()
    out.counters(
        "scheduler_traffic_bytes",
        "Bytes of all hosts, those that have gone too: as they tell it.",
        [
            ({"kind": "origin"}, traffic.origin_bytes),
            ({"kind": "origin_encoded"}, traffic.origin_encoded_bytes),
            ({"kind": "peer"}, traffic.peer_bytes),
            ({"kind": "peer_encoded"}, traffic.peer_encoded_bytes),
            ({"kind": "served"}, traffic.served_bytes),
        ],
    )
    granted = state.granted(now)
    lent = {
        "bytes_per_second": granted.bps,
        "requests_per_second": granted.rps,
        "requests": granted.concurrency,
    }
    out.gauges(
        "scheduler_origin_lent",
        "What all hosts together may ask of the registry now.",
        [({"unit": unit}, value) for unit, value in lent.items() if value is not None],
    )
    return out.render()

"""The metrics of an upload server, which it answers at its own address."""

from backend.metrics import Exposition, label_of
from backend.peers.server_counters import ServerCounters


def server_metrics(counters: ServerCounters) -> str:
    """The text to answer a scraper with. They begin anew with each process."""
    now = counters.snapshot()
    out = Exposition()
    out.counter("server_sent_bytes", "Bytes of blobs.", now.bytes_sent)
    out.counter("server_requests", "Requests, refused ones too.", now.requests)
    out.gauge("server_connections", "Connections that are open.", now.connections)
    out.counter("server_connections_accepted", "Connections that were accepted.", now.connections_made)
    out.counter("server_cold_reads", "Times that the disk had to be read first.", now.cold_reads)
    samples = [({"reason": label_of(reason)}, count) for reason, count in now.refused.items()]
    out.counters("server_refusals", "Requests and connections not answered as asked.", samples)
    return out.render()

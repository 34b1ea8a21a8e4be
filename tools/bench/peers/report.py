"""Outcomes as lines for people, and as JSON."""

from collections.abc import Iterator, Sequence

import msgspec

from tools.bench.peers.bed import Shape
from tools.bench.peers.outcome import Outcome
from tools.bench.table import NOTHING, aligned
from tools.sizes import format_size

HEAD = (
    "",
    "hosts",
    "makespan",
    "bound",
    "ratio",
    "payload",
    "origin",
    "/unique",
    "moved/size",
    "link",
    "peers",
    "link",
    "CPU",
    "share",
    "sched.",
    "wrong",
)


def json_line(outcome: Outcome, shape: Shape) -> str:
    """One measurement with what it was measured under."""
    return msgspec.json.encode({"suite": "peers", "shape": shape, "outcome": outcome}).decode()


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """All measurements, then what went wrong."""
    yield from aligned([HEAD, *(_row(outcome) for outcome in outcomes)])
    for outcome in outcomes:
        if outcome.direct_s is not None:
            ratio = outcome.makespan_s / outcome.direct_s
            yield f"{_name(outcome)}: direct download {outcome.direct_s:.2f} s, this / direct {ratio:.3f}"
        if outcome.trouble is not None and any(msgspec.to_builtins(outcome.trouble).values()):
            yield f"{_name(outcome)}, {outcome.hosts} hosts: {outcome.trouble}"
        for failure in outcome.failures:
            yield f"{_name(outcome)}, {outcome.hosts} hosts: FAILED {failure}"


def explanation(shape: Shape) -> Iterator[str]:
    """What the columns mean."""
    yield (
        f"links {shape.host_rate.bits_per_s / 1e6:g} Mbit/s, registry {shape.origin_rate.bits_per_s / 1e6:g} "
        "Mbit/s, both directions. ratio: makespan / bound of the links; payload: their headers left out."
    )
    yield (
        "origin, peers: payload of blobs that they sent; links count headers, acknowledgements and "
        "manifests. CPU: agents, servers and mount commands of all hosts, in s and of this machine."
    )


def _row(outcome: Outcome) -> tuple[str, ...]:
    return (
        _name(outcome),
        str(outcome.hosts),
        f"{outcome.makespan_s:.2f} s",
        f"{outcome.bound_s:.2f} s",
        f"{outcome.ratio:.3f}",
        f"{outcome.payload_ratio:.3f}",
        format_size(outcome.origin_blob_bytes),
        f"{outcome.origin_ratio:.3f}",
        f"{outcome.moved_ratio:.3f}",
        format_size(outcome.origin_link_bytes),
        NOTHING if outcome.peer_bytes is None else format_size(outcome.peer_bytes),
        format_size(outcome.hosts_sent_link_bytes),
        f"{outcome.cpu_s:.2f}",
        f"{outcome.cpu_share:.0%}",
        f"{outcome.scheduler_cpu_s:.2f}" if outcome.peers else NOTHING,
        str(outcome.wrong_bytes),
    )


def _name(outcome: Outcome) -> str:
    return f"{outcome.scenario}, {'peers' if outcome.peers else 'no peers'}"

"""The text that scrapers get, read with the parser of the Prometheus client."""

import math
import random
import re
from collections.abc import Iterable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from backend.fetch_metrics import FetchMetrics, Source
from backend.metrics import Exposition, Histogram
from backend.peers.refusal import Refusal
from backend.peers.scheduler_metrics import scheduler_metrics
from backend.peers.scheduler_state import SchedulerState
from backend.peers.server_counters import ServerCounters
from backend.peers.server_metrics import server_metrics
from backend.peers.wire import Announce, Holding, HostInfo, Traffic
from backend.priority import FetchClass

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(text: str) -> Samples:
    """Every sample by its name and its labels."""
    return {
        (sample.name.removeprefix("nydus_py_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def test_each_kind_of_metric_and_odd_labels() -> None:
    out = Exposition()
    out.counter("things", 'Things, "quoted" and \\ with\na break.', 7)
    out.gauges(
        "shares", "Shares.", [({"of": 'a "b"\\\n', "to": "c"}, 0.25), ({"of": "d", "to": "e"}, math.inf)]
    )
    histogram = Histogram((0.1, 1.0))
    for each in (0.05, 0.1, 0.5, 3.0):
        histogram.observe(each)
    out.histograms("times_seconds", "Times.", [({"kind": "x"}, histogram)])
    families = {family.name: family for family in text_string_to_metric_families(out.render())}
    assert {name: family.type for name, family in families.items()} == {
        "nydus_py_things": "counter",
        "nydus_py_shares": "gauge",
        "nydus_py_times_seconds": "histogram",
    }
    assert families["nydus_py_things"].documentation == 'Things, "quoted" and \\ with\na break.'
    samples = parsed(out.render())
    assert value(samples, "things_total") == 7
    assert value(samples, "shares", of='a "b"\\\n', to="c") == 0.25
    assert value(samples, "times_seconds_bucket", kind="x", le="0.1") == 2
    assert value(samples, "times_seconds_bucket", kind="x", le="1") == 3
    assert value(samples, "times_seconds_bucket", kind="x", le="+Inf") == 4
    assert value(samples, "times_seconds_count", kind="x") == 4
    assert value(samples, "times_seconds_sum", kind="x") == 3.65


def test_what_fetchers_count() -> None:
    metrics = FetchMetrics()
    metrics.note_bytes(Source.PEER, FetchClass.PREFETCH, 1000)
    metrics.note_bytes(Source.PEER, FetchClass.PREFETCH, 24)
    metrics.note_bytes(Source.ORIGIN, FetchClass.ON_DEMAND, 5)
    metrics.note_request(Source.ORIGIN, 0.3)
    metrics.note_wait(FetchClass.ON_DEMAND, 100.0)
    out = Exposition()
    metrics.expose(out)
    samples = parsed(out.render())
    assert value(samples, "fetched_bytes_total", **{"source": "peer", "class": "prefetch"}) == 1024
    assert value(samples, "fetched_bytes_total", **{"source": "origin", "class": "on_demand"}) == 5
    assert value(samples, "fetched_bytes_total", **{"source": "cache", "class": "on_demand"}) == 0
    assert value(samples, "fetch_duration_seconds_bucket", source="origin", le="0.25") == 0
    assert value(samples, "fetch_duration_seconds_bucket", source="origin", le="0.5") == 1
    assert value(samples, "wait_duration_seconds_bucket", **{"class": "on_demand", "le": "30"}) == 0
    assert value(samples, "wait_duration_seconds_sum", **{"class": "on_demand"}) == 100


def test_what_an_upload_server_counts() -> None:
    counters = ServerCounters(bytes_sent=10, requests=3, connections=1, connections_made=2)
    counters.refuse(Refusal.CONNECTIONS_OF_PEER)
    samples = parsed(server_metrics(counters))
    assert value(samples, "server_sent_bytes_total") == 10
    assert value(samples, "server_refusals_total", reason="too_many_connections_of_one_peer") == 1


def test_what_a_scheduler_knows() -> None:
    state = SchedulerState("epoch", chance=random.Random(1))
    for number in range(3):
        host = HostInfo(f"host{number}", f"http://10.0.0.{number}:1")
        holding = Holding("b" * 64, 8, bytes([0b1100_0000 >> number]))
        announce = Announce(
            host, is_everything=True, holdings=[holding], traffic=Traffic(peer_bytes=5, origin_bytes=1)
        )
        state.announce(announce, "10.0.0.1", 0.0)
    samples = parsed(scheduler_metrics(state, 3, 0.0))
    assert value(samples, "scheduler_hosts", scope="cluster") == 3
    assert value(samples, "scheduler_announcements_total") == 3
    assert value(samples, "scheduler_pieces") == 8
    assert value(samples, "scheduler_pieces_held") == 4
    assert value(samples, "scheduler_traffic_bytes_total", kind="peer") == 15
    assert value(samples, "scheduler_peers_enabled") == 1


def names_of(texts: Iterable[str]) -> set[str]:
    return {family.name for text in texts for family in text_string_to_metric_families(text)}


def test_names_are_those_that_prometheus_recommends() -> None:
    out = Exposition()
    FetchMetrics().expose(out)
    texts = [out.render(), server_metrics(ServerCounters()), scheduler_metrics(SchedulerState("e"), 0, 0.0)]
    for text in texts:
        for family in text_string_to_metric_families(text):
            assert family.documentation.endswith(".")
            assert family.name.startswith("nydus_py_")
            assert not family.name.endswith(("_ms", "_kb", "_mib"))
    assert len(names_of(texts)) == sum(len(names_of([text])) for text in texts)


def test_the_page_lists_every_metric() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/metrics.md").read_text()
    listed = set(re.findall(r"`([a-z_]+?)(?:_total)?(?:\{[a-z,]+\})?`", page))
    out = Exposition()
    FetchMetrics().expose(out)
    for prefix, text in (
        ("nydus_py_", out.render()),
        ("nydus_py_server_", server_metrics(ServerCounters())),
        ("nydus_py_scheduler_", scheduler_metrics(SchedulerState("e"), 0, 0.0)),
    ):
        names = {name.removeprefix(prefix) for name in names_of([text])}
        assert names <= listed, names - listed

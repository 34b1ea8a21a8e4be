"""The simulation keeps its own laws, and the code that decides does what is promised in it."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest

from backend.peers.simulation.cluster import Cluster
from backend.peers.simulation.events import Events
from backend.peers.simulation.links import OriginLink
from backend.peers.simulation.topology import (
    Topology,
    TopologyInvalid,
    parse_bit_rate,
    read_topology,
    uniform,
)
from tools.main import run as run_command
from tools.simulate import CannotDraw

GBIT = parse_bit_rate("10gbit")
SIZE = 10 << 30
PIECES = 100


def simulated(topology: Topology, **options: object) -> Cluster:
    cluster = Cluster(topology, SIZE, pieces=PIECES, seed=3, **options)  # type: ignore[arg-type]
    cluster.run()
    return cluster


def outcome(cluster: Cluster) -> tuple[object, ...]:
    found = dataclasses.asdict(cluster.run())
    return tuple(value for name, value in found.items() if name != "wall_s")


@pytest.mark.parametrize("full_exchange", [True, False])
def test_the_same_seed_gives_the_same_run_and_another_one_another(full_exchange: bool) -> None:
    runs = [
        outcome(Cluster(uniform(12, GBIT, GBIT), SIZE, pieces=PIECES, seed=seed, full_exchange=full_exchange))
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("full_exchange", [True, False])
def test_every_host_gets_every_piece_once_and_the_origin_sends_each_once(full_exchange: bool) -> None:
    cluster = simulated(uniform(12, GBIT, GBIT, origin_concurrency=8), full_exchange=full_exchange)
    assert all(len(host.pieces) == PIECES and host.ended_at is not None for host in cluster.hosts.values())
    assert cluster.arrivals == 12 * PIECES
    assert cluster.origin.by_piece == dict.fromkeys(range(PIECES), 1)
    sent = sum(host.sent_bytes for host in cluster.hosts.values())
    assert sent == sum(host.received_bytes for host in cluster.hosts.values())
    assert sent + cluster.origin.sent_bytes == 12 * PIECES * cluster.piece_bytes


def test_no_link_carries_more_than_it_can() -> None:
    cluster = simulated(uniform(6, GBIT, GBIT))
    for host in cluster.hosts.values():
        assert host.ended_at is not None
        assert host.received_bytes <= GBIT * host.ended_at
        assert host.link.room == pytest.approx(GBIT)
        assert not host.link.to_send
        assert not host.link.to_receive


@pytest.mark.slow
def test_the_two_ways_to_exchange_give_about_the_same() -> None:
    # One run is off by a tenth by chance alone: the means of three are compared.
    full, shared = (
        sum(
            Cluster(
                uniform(32, GBIT, GBIT, origin_concurrency=8),
                SIZE,
                pieces=PIECES,
                seed=seed,
                full_exchange=is_full,
            )
            .run()
            .makespan_s
            for seed in range(3)
        )
        for is_full in (True, False)
    )
    assert shared == pytest.approx(full, rel=0.15)


def test_one_host_needs_the_time_of_a_download() -> None:
    assert Cluster(uniform(1, GBIT, GBIT), SIZE, pieces=PIECES).run().ratio < 1.02


@pytest.mark.parametrize("full_exchange", [True, False])
def test_when_an_owner_dies_the_others_finish(full_exchange: bool) -> None:
    alive = uniform(8, GBIT, GBIT)
    hosts = [dataclasses.replace(alive.hosts[0], dies_s=2.0), *alive.hosts[1:]]
    cluster = Cluster(Topology(hosts, GBIT), SIZE, pieces=PIECES, full_exchange=full_exchange)
    found = cluster.run()
    assert found.unfinished == 0
    assert found.origin_ratio <= 1.10
    assert len(cluster.hosts["host-0"].pieces) < PIECES


def test_a_host_with_a_tenth_of_the_bandwidth_sends_few_bytes() -> None:
    hosts = uniform(8, GBIT, GBIT).hosts
    slow = dataclasses.replace(hosts[0], up_bps=GBIT / 10)
    found = Cluster(Topology([slow, *hosts[1:]], GBIT), SIZE, pieces=PIECES).run()
    assert found.unfinished == 0
    assert 0 < found.slow_share < 0.10


def test_a_limit_of_uploads_is_kept() -> None:
    limit = int(GBIT // 4)
    hosts = [dataclasses.replace(host, up_limit_bps=limit) for host in uniform(4, GBIT, GBIT).hosts]
    cluster = simulated(Topology(hosts, GBIT))
    for host in cluster.hosts.values():
        assert host.ended_at is not None
        assert 0 < host.sent_bytes <= limit * (cluster.events.now + 0.2) + cluster.piece_bytes


def test_streams_of_the_origin_share_its_link_evenly() -> None:
    events, ended = Events(), list[tuple[str, float]]()
    origin = OriginLink(events, 100.0, math.inf, 0.0)
    origin.request(0, 100.0, math.inf, lambda: ended.append(("first", events.now)))
    events.after(0.5, origin.request, 1, 100.0, math.inf, lambda: ended.append(("second", events.now)))
    events.run(lambda: False, 100.0)
    assert [name for name, _ in ended] == ["first", "second"]
    assert [at for _, at in ended] == pytest.approx([1.5, 2.0])


def test_a_topology_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    path.write_text(
        'origin = "1gbit"\norigin_concurrency = 4\n'
        '[[hosts]]\ncount = 2\nup = "10gbit"\nzone = "a"\n[[hosts]]\ndown = "50mbit"\nstarts_s = 3\n'
    )
    found = read_topology(path)
    assert [host.name for host in found.hosts] == ["host-0-0", "host-0-1", "host-1-0"]
    assert (found.origin_bps, found.hosts[2].up_bps, found.hosts[2].starts_s) == (1.25e8, 6.25e6, 3.0)
    for text in (
        "hosts = 3",
        '[[hosts]]\nup = "fast"',
        "[[hosts]]\ndies_s = 1.0",
        '[[hosts]]\nspeed = "1"',
        "[",
    ):
        path.write_text(text)
        with pytest.raises(TopologyInvalid):
            read_topology(path)


@pytest.mark.parametrize("text", ["10", "gbit", "-1gbit", "0gbit", "infgbit", "nanbit", "10GB"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match="not a rate"):
        parse_bit_rate(text)


def test_the_verb_reports(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert run_command(["simulate", "--hosts", "2", "--size", "1GB", "--pieces", "20"]) == 0
    assert b"2 hosts, 1.0 GiB" in capfdbinary.readouterr().out
    assert run_command(["simulate", "--hosts", "0"]) == 2
    assert run_command(["simulate", "--rate", "fast"]) == 2
    assert run_command(["simulate", "--hosts", "2", "--size", "0"]) == 2


def test_the_curve_is_drawn_or_it_is_said_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "curve.png"
    code = run_command(
        ["simulate", "--hosts", "1,2,4", "--size", "1GB", "--pieces", "20", "--plot", str(picture)]
    )
    if importlib.util.find_spec("matplotlib") is None:
        assert code == CannotDraw.exit_code
        assert "nydus-py[bench]" in capsys.readouterr().err
    else:
        assert code == 0
        assert picture.read_bytes().startswith(b"\x89PNG")

"""The parts of the bench of peers that need no network: bounds, rates, plans, the host that lies."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.bench.peers.__main__ import parse, planned
from tools.bench.peers.bounds import bound_s, bound_without_peers_s
from tools.bench.peers.liar import flipped, lying
from tools.bench.peers.model import CHUNK_BYTES, damage, write_model, write_next_version
from tools.bench.peers.network import MOST_HOSTS, host_address
from tools.bench.peers.rate import Rate, parse_rate
from tools.bench.peers.reader import Job, differing, read_pages, read_whole

RATE = Rate(50_000_000)
FASTER = Rate(400_000_000)
SIZE = 64 << 20
ALONE_S = SIZE / 6_250_000


def test_with_peers_the_bound_does_not_depend_on_the_number_of_hosts() -> None:
    for hosts in (1, 2, 8):
        assert bound_s(SIZE, [SIZE] * hosts, RATE, RATE) == pytest.approx(ALONE_S)
        assert bound_without_peers_s([SIZE] * hosts, RATE, RATE) == pytest.approx(hosts * ALONE_S)


def test_each_term_of_the_bound_counts_where_it_is_the_largest() -> None:
    assert bound_s(SIZE, [SIZE] * 8, RATE, FASTER) == pytest.approx(ALONE_S)
    assert bound_s(SIZE, [SIZE], FASTER, RATE) == pytest.approx(ALONE_S)
    # Two hosts want different halves: the registry has to send all of it, each receives one half.
    assert bound_s(SIZE, [SIZE / 2, SIZE / 2], RATE, RATE) == pytest.approx(ALONE_S)
    # Nothing new for the registry: what hosts receive, hosts and the registry have sent.
    assert bound_s(0, [SIZE] * 2, Rate(8), FASTER) == pytest.approx(SIZE / FASTER.bytes_per_s)


def test_rates_are_written_as_tc_takes_them() -> None:
    assert parse_rate("50mbit") == RATE
    assert parse_rate("1Gbit").bytes_per_s == 125_000_000
    assert str(RATE) == "50000000bit"
    assert RATE.burst_bytes >= 64 << 10
    for wrong in ("", "50", "0mbit", "50 mbit/s", "-1mbit"):
        with pytest.raises(ValueError, match="not a rate"):
            parse_rate(wrong)


def test_addresses_stay_inside_the_network() -> None:
    assert host_address(1) == "10.77.0.11"
    assert host_address(MOST_HOSTS) == "10.77.0.210"
    for wrong in (0, MOST_HOSTS + 1):
        with pytest.raises(ValueError, match="no host"):
            host_address(wrong)


def test_scenarios_are_planned_where_they_make_sense(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--hosts", "1,2", "--only", "baseline", "--scenario", "start", "corrupt", "lies"]
    assert list(planned(parse(arguments))) == [
        ("start", 1, False),
        ("start", 2, False),
        ("corrupt", 2, False),
    ]
    for wrong in (["--hosts", "0"], ["--hosts", "x"], ["--rate", "50"], ["--scenario", "nothing"]):
        with pytest.raises(SystemExit):
            parse(wrong)
    capsys.readouterr()


def test_the_next_version_has_one_chunk_changed(tmp_path: Path) -> None:
    size = 3 * CHUNK_BYTES + 5
    first = write_model(tmp_path / "v1", size, seed=1)
    assert write_next_version(tmp_path / "v2", first, share=0.01, seed=1) == 1
    old, new = first.read_bytes(), (tmp_path / "v2" / first.name).read_bytes()
    assert len(old) == len(new) == size
    chunks = [slice(start, start + CHUNK_BYTES) for start in range(0, size, CHUNK_BYTES)]
    assert sum(old[chunk] != new[chunk] for chunk in chunks) == 1


def test_damage_reaches_every_chunk(tmp_path: Path) -> None:
    path = write_model(tmp_path / "v1", 2 * CHUNK_BYTES, seed=1)
    before = path.read_bytes()
    assert damage(path) == 8
    after = path.read_bytes()
    assert differing(after[:CHUNK_BYTES], before[:CHUNK_BYTES]) == 4
    assert differing(after, before) == 8


def test_a_reader_counts_wrong_and_missing_bytes(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", 2 * CHUNK_BYTES, seed=1)
    found = tmp_path / "found"
    found.write_bytes(source.read_bytes()[:-7])
    job = Job(mount=[], file=str(found), source=str(source), readers=2, reads=5, seed="1")
    assert read_whole(job) == (2 * CHUNK_BYTES - 7, 7)
    damage(found)
    assert read_whole(job) == (2 * CHUNK_BYTES - 7, 15)
    read, _, touched = read_pages(job)
    assert read == 2 * 5 * 4096
    assert touched <= {0, 1}


def in_pieces(data: bytes, size: int) -> Iterator[bytes]:
    yield from (data[start : start + size] for start in range(0, len(data), size))


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_the_liar_changes_blobs_only(size: int) -> None:
    blob, listing = bytes(5000), b'{"hosts": []}'
    head = b"HTTP/1.1 206 Yes\r\nContent-Type: application/octet-stream\r\nContent-Length: 5000\r\n\r\n"
    other = b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\ncontent-type: application/json\r\n\r\n"
    nothing = b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5000\r\n\r\n"
    stream = head + blob + nothing + other + listing + head + blob
    said = b"".join(lying(in_pieces(stream, size)))
    assert len(said) == len(stream)
    assert nothing + other + listing in said
    assert said.startswith(head)
    assert differing(said, stream) >= 2
    assert flipped(blob) != blob


def test_the_liar_gives_up_on_what_is_not_http() -> None:
    with pytest.raises(ValueError, match="not an HTTP answer"):
        list(lying(in_pieces(bytes(1 << 20), 4096)))

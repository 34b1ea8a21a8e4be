"""Leases of the origin: never more than the limit, nearly all of it, and safe when hosts fall silent."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.peers.lease_book import FORGET_S, LEVEL_S, LeaseBook
from backend.peers.leases import LEASE_S, HostLease, Lease, OriginShare

MIB = 1 << 20
ANNOUNCE_S = 0.5
LIMIT = OriginShare(bps=100 * MIB, rps=50.0, concurrency=12)
ALL = OriginShare()
NOTHING = OriginShare(bps=0, rps=0.0, concurrency=0)


def is_within(share: OriginShare, limit: OriginShare) -> bool:
    pairs = [
        (share.bps, limit.bps),
        (share.rps, limit.rps),
        (share.concurrency, limit.concurrency),
    ]
    return all(most is None or (amount is not None and amount <= most * (1 + 1e-9)) for amount, most in pairs)


def total(shares: list[OriginShare]) -> OriginShare:
    return OriginShare(
        bps=sum(each.bps or 0 for each in shares),
        rps=sum(each.rps or 0.0 for each in shares),
        concurrency=sum(each.concurrency or 0 for each in shares),
    )


class Cluster:
    """A book and hosts that announce to it every half second; some answers get lost."""

    def __init__(self, limit: OriginShare = LIMIT, start: float = 0.0) -> None:
        self.book = LeaseBook(limit, start)
        self.now = start + LEASE_S  # past the time in which a new book lends floors only
        self.hosts: dict[str, HostLease] = {}
        self.wants: dict[str, OriginShare] = {}

    def add(self, count: int, wants: OriginShare) -> None:
        for _ in range(count):
            name = f"host{len(self.hosts)}"
            self.hosts[name], self.wants[name] = HostLease(), wants

    def announce(self, name: str, *, is_lost: bool = False) -> Lease:
        lease = self.book.ask(name, self.wants[name], self.hosts[name].seen, self.now)
        if not is_lost:
            self.hosts[name].renew(lease, self.now)
        return lease

    def run(self, duration_s: float, silent: frozenset[str] = frozenset()) -> None:
        end = self.now + duration_s
        while self.now < end:
            for name in self.hosts.keys() - silent:
                self.announce(name)
            self.now += ANNOUNCE_S

    def shares(self) -> list[OriginShare]:
        """What hosts allow themselves at this moment."""
        return [share for host in self.hosts.values() if (share := host.share(self.now)) is not None]


steps = st.lists(
    st.tuples(
        st.integers(0, 11),  # who
        st.one_of(st.none(), st.integers(0, 200 * MIB)),  # bytes per second
        st.integers(0, 100),  # requests per second
        st.integers(0, 20),  # requests at once
        st.floats(0.0, 2.0),  # seconds until the next step
        st.sampled_from(["heard", "heard", "heard", "lost", "leaves"]),
    ),
    max_size=120,
)


@given(steps=steps, start=st.floats(0, 1e6))
def test_live_leases_never_exceed_the_limit(
    steps: list[tuple[int, int | None, int, int, float, str]], start: float
) -> None:
    cluster = Cluster(start=start)
    cluster.now = start
    cluster.add(12, NOTHING)
    for number, bps, rps, places, pause_s, what in steps:
        name = f"host{number}"
        cluster.wants[name] = OriginShare(bps, float(rps), places)
        if what == "leaves":
            cluster.book.leave(name)
            cluster.hosts[name] = HostLease()
        else:
            cluster.announce(name, is_lost=what == "lost")
        cluster.now += pause_s
        assert is_within(cluster.book.granted(cluster.now), LIMIT)
        live = [
            host._lease.share
            for host in cluster.hosts.values()
            if host._lease is not None and cluster.now < host._expires_at
        ]
        assert is_within(total(live), LIMIT)


@pytest.mark.parametrize("hosts", [1, 2, 5, 13, 40])
def test_hosts_that_want_everything_share_everything(hosts: int) -> None:
    cluster = Cluster()
    cluster.add(hosts, ALL)
    cluster.run(5)
    granted = total(cluster.shares())
    assert granted.bps == pytest.approx(100 * MIB, rel=0.01)
    assert granted.rps == pytest.approx(50, rel=0.01)
    assert granted.concurrency == 12
    rates = [share.bps for share in cluster.shares() if share.bps is not None]
    assert max(rates) - min(rates) <= 0.01 * MIB


def test_who_wants_little_gets_it_and_the_others_share_the_rest() -> None:
    cluster = Cluster()
    cluster.add(2, OriginShare(bps=10 * MIB, rps=1.0, concurrency=1))
    cluster.add(2, ALL)
    cluster.run(5)
    rates = [share.bps for share in cluster.shares()]
    assert rates == pytest.approx([10 * MIB, 10 * MIB, 40 * MIB, 40 * MIB], rel=0.01)
    assert [share.concurrency for share in cluster.shares()] == [1, 1, 5, 5]


def test_hosts_without_work_hold_little_and_can_start_at_once() -> None:
    cluster = Cluster()
    cluster.add(99, NOTHING)
    cluster.add(1, ALL)
    cluster.run(5)
    *idle, busy = cluster.shares()
    assert busy.bps is not None
    assert busy.bps >= 0.95 * 100 * MIB
    assert all(share.bps is not None and share.bps > 0 for share in idle)


def test_places_go_round_when_there_are_fewer_than_hosts() -> None:
    cluster = Cluster(OriginShare(concurrency=3))
    cluster.add(10, OriginShare(concurrency=1))
    turns = dict.fromkeys(cluster.hosts, 0)
    for _ in range(100):
        cluster.run(ANNOUNCE_S)
        held = [share.concurrency or 0 for share in cluster.shares()]
        assert sum(held) <= 3
        for name, places in zip(cluster.hosts, held, strict=True):
            turns[name] += places
    assert min(turns.values()) >= 10  # 30 would be an even share
    assert sum(turns.values()) >= 0.7 * 3 * 100


def test_a_silent_host_loses_its_share_when_that_expires_and_not_before() -> None:
    cluster = Cluster()
    cluster.add(2, ALL)
    cluster.run(5)
    silent_at = cluster.now
    while cluster.now < silent_at + LEASE_S - 2 * ANNOUNCE_S:
        cluster.run(ANNOUNCE_S, silent=frozenset(["host0"]))
        share = cluster.hosts["host1"].share(cluster.now)
        assert share is not None
        assert share.bps == pytest.approx(50 * MIB, rel=0.01)
    cluster.run(LEASE_S, silent=frozenset(["host0"]))
    silent, alive = cluster.shares()
    assert silent.bps == pytest.approx(100 * MIB / 8, rel=0.01)
    assert alive.bps == pytest.approx(100 * MIB * 7 / 8, rel=0.01)
    cluster.run(FORGET_S + 2, silent=frozenset(["host0"]))
    assert cluster.shares()[1].bps == pytest.approx(100 * MIB, rel=0.01)
    assert cluster.book.known_hosts == 1


def test_without_a_scheduler_all_together_keep_to_the_limit() -> None:
    cluster = Cluster()
    cluster.add(20, NOTHING)
    cluster.run(5)
    cluster.now += LEASE_S
    together = total(cluster.shares())
    assert together.bps is not None
    assert 0.95 * 100 * MIB <= together.bps <= 100 * MIB
    assert all(share.concurrency for share in cluster.shares())


def test_who_says_goodbye_frees_its_share_at_once() -> None:
    cluster = Cluster()
    cluster.add(2, ALL)
    cluster.run(5)
    cluster.book.leave("host0")
    cluster.book.leave("host0")
    cluster.now += LEVEL_S
    assert cluster.announce("host1").share.bps == pytest.approx(100 * MIB, rel=0.01)


def test_a_lost_answer_keeps_the_share_before_reserved() -> None:
    cluster = Cluster()
    cluster.add(2, ALL)
    cluster.announce("host0")
    cluster.now += LEVEL_S
    cluster.wants["host0"] = NOTHING
    cluster.announce("host0", is_lost=True)
    assert cluster.announce("host1").share.bps == 0
    cluster.now += LEVEL_S
    cluster.announce("host0")
    assert cluster.announce("host1").share.bps == 0  # host0 has it, but has not said so
    cluster.now += LEVEL_S
    cluster.announce("host0")
    assert cluster.announce("host1").share.bps == pytest.approx(98 * MIB, rel=0.01)


def test_a_new_book_lends_floors_only_at_first() -> None:
    book = LeaseBook(LIMIT, 0.0)
    assert book.ask("host", ALL, 0, 0.0).share.bps == 100 * MIB // 8
    assert book.ask("host", ALL, 1, LEASE_S).share.bps == 100 * MIB


def test_a_limit_can_be_changed_and_holds_after_one_lease() -> None:
    cluster = Cluster()
    cluster.add(5, ALL)
    cluster.run(5)
    lower = OriginShare(bps=MIB, rps=None, concurrency=0)
    cluster.book.change(lower)
    cluster.run(LEASE_S)
    assert is_within(total(cluster.shares()), lower)
    assert all(share.rps is None for share in cluster.shares())
    cluster.book.change(OriginShare())
    cluster.run(LEASE_S)
    assert cluster.shares() == [OriginShare()] * 5


def test_absurd_wishes_are_cut() -> None:
    cluster = Cluster()
    cluster.add(1, OriginShare(bps=-(10**30), rps=float("inf"), concurrency=10**18))
    cluster.run(1)
    assert is_within(total(cluster.shares()), LIMIT)
    assert is_within(OriginShare(0, 0.0, 0), cluster.shares()[0])


def test_a_host_drops_an_older_answer_that_comes_late() -> None:
    host = HostLease()
    assert host.share(0.0) is None
    floor = OriginShare(bps=1)
    host.renew(Lease(7, OriginShare(bps=70), floor, LEASE_S), 1.0)
    host.renew(Lease(6, OriginShare(bps=60), floor, LEASE_S), 0.5)
    assert host.share(1.0) == OriginShare(bps=70)
    assert host.share(1.0 + LEASE_S) == floor
    host.renew(Lease(2, OriginShare(bps=20), floor, LEASE_S), 9.0)  # another scheduler after a failure
    assert host.share(9.0) == OriginShare(bps=20)


def test_an_announce_of_one_of_5000_hosts_is_cheap() -> None:
    """Work is counted, not timed: the level is computed once in a quarter of a second."""
    book, rng = LeaseBook(LIMIT, 0.0), random.Random(1)
    levels = 0
    level = book._level

    def counted(now: float) -> None:
        nonlocal levels
        levels += 1
        level(now)

    book._level = counted  # type: ignore[method-assign]
    for number in range(5000):
        wants = OriginShare(rng.randrange(MIB), 1.0, 1)
        book.ask(f"host{number}", wants, 0, 5.0 + number / 5000)
    assert levels <= 1 / LEVEL_S + 1

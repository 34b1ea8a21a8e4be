"""A host with several schedulers: whom it learns from, and what it may ask of the origin."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from backend.peers.hub import PeerCounters, PeerHub
from backend.peers.lease_book import LeaseBook
from backend.peers.leases import LEASE_S, HostLease, OriginShare, split_share
from backend.peers.limit_settings import LimitInvalid
from backend.peers.membership import Membership, digest_of
from backend.peers.pace import IDLE_MAX_S, INTERVAL_MAX_S, INTERVAL_MIN_S, Pace
from backend.peers.piece import PieceSet
from backend.peers.scheduler_link import FAIL_BACK_S, SchedulerLink, chosen_of, summed_leases
from backend.peers.scheduler_state import SETTLE_S, SchedulerState
from backend.peers.wire import HostInfo

WANTS = OriginShare(1 << 40, 1e6, 1000)


def hub_of(name: str, *pieces: int) -> PeerHub:
    held = PieceSet(16)
    held.update(pieces)
    blob = SimpleNamespace(presence=SimpleNamespace(pieces=held, is_whole=lambda: False))
    swarm = SimpleNamespace(members={})
    own = HostInfo(name, f"http://{name}:1")
    made = SimpleNamespace(own=own, blobs={"b": blob}, swarm=swarm, counters=PeerCounters(), uploads=0)
    return cast("PeerHub", made)


def exchange(link: SchedulerLink, state: SchedulerState, now: float) -> Any:
    announce = link.compose(WANTS)
    answer = state.announce(announce, "10.0.0.1", now)
    link.answered(announce, answer, now, now)
    return answer


def test_every_scheduler_knows_all_that_a_host_has_and_one_is_learnt_from() -> None:
    hub = hub_of("one", 1, 2)
    states = [SchedulerState("a"), SchedulerState("b")]
    links = [SchedulerLink(name, hub) for name in "ab"]
    links[0].choose(is_chosen=True)
    presence = hub.blobs["b"].presence
    for now, change in enumerate((None, presence.pieces.add, presence.pieces.discard)):
        if change is not None:
            change(5)
        for link, state in zip(links, states, strict=True):
            answer = exchange(link, state, float(now))
            assert set(state.hosts["one"].holdings["b"].pieces) == set(presence.pieces)
            assert bool(answer.members.joined) == (now == 0 and link is links[0])


def test_the_next_one_is_chosen_at_once_and_the_first_again_once_it_has_proven_itself() -> None:
    hub = hub_of("one")
    first, second = SchedulerLink("a", hub), SchedulerLink("b", hub)
    first.choose(is_chosen=True)
    states = [SchedulerState("a"), SchedulerState("b")]
    for link, state in zip((first, second), states, strict=True):
        exchange(link, state, 1.0)
    assert chosen_of([first, second], 2.0) is first
    pauses = {first.failed(chance) for chance in (0.0, 0.5, 0.99)}
    assert len(pauses) == 3
    assert chosen_of([first, second], 2.0) is second
    first.choose(is_chosen=False)
    second.choose(is_chosen=True)
    assert exchange(second, states[1], 2.0).members.joined
    exchange(first, SchedulerState("a2"), 3.0)
    assert chosen_of([first, second], 3.5) is second
    exchange(first, states[0], 3.0 + FAIL_BACK_S)
    assert chosen_of([first, second], 3.0 + 2 * FAIL_BACK_S) is first


@pytest.mark.parametrize("dead_from", [1000.0, 6.0])
def test_two_books_never_lend_more_than_the_limit_and_its_half_is_used_when_one_dies(
    dead_from: float,
) -> None:
    limit = OriginShare(1_000_000, 100.0, 64)
    books = [LeaseBook(split_share(limit, 2), 0.0, first_number=1) for _ in range(2)]
    hosts = [[HostLease(), HostLease()] for _ in range(10)]
    for step in range(60):
        now = step * 0.25
        for number, leases in enumerate(hosts):
            for book, lease in zip(books, leases, strict=True):
                if book is books[1] or now < dead_from:
                    lease.renew(book.ask(f"h{number}", WANTS, lease.seen, now), now)
        shares = [summed_leases(leases, now) for leases in hosts]
        assert sum(share.bps or 0 for share in shares if share) <= 1_000_000
        assert sum(share.rps or 0 for share in shares if share) <= 100.0 + 1e-6
        assert sum(share.concurrency or 0 for share in shares if share) <= 64
    assert sum(share.bps or 0 for share in shares if share) > 900_000


def test_a_scheduler_that_knows_no_limit_does_not_lift_that_of_another() -> None:
    limited, unlimited = HostLease(), HostLease()
    limited.renew(LeaseBook(OriginShare(800), -LEASE_S).ask("h", WANTS, 0, 0.0), 0.0)
    unlimited.renew(LeaseBook(OriginShare(), -LEASE_S).ask("h", WANTS, 0, 0.0), 0.0)
    share = summed_leases([unlimited, limited], 1.0)
    assert share is not None
    assert share.bps is not None
    assert share.bps <= 800
    assert summed_leases([HostLease()], 0.0) is None


def test_what_cannot_be_split_is_refused() -> None:
    assert split_share(OriginShare(7, 3.0, 5), 2) == OriginShare(3, 1.5, 2)
    with pytest.raises(LimitInvalid, match="2 schedulers"):
        split_share(OriginShare(concurrency=1), 2)


def test_a_new_scheduler_tells_nobody_what_he_knows() -> None:
    names = [HostInfo(f"h{n}", f"http://h{n}:1") for n in range(30)]
    state = SchedulerState("new", settled_at=SETTLE_S)
    links = [SchedulerLink("s", hub_of(host.id)) for host in names]
    for link in links:
        link._hub.swarm.members = {host.id: host for host in names}
        link.choose(is_chosen=True)
    answers = [exchange(link, state, 1.0) for link in links] + [exchange(link, state, 2.0) for link in links]
    assert not any(answer.members.full or answer.members.joined for answer in answers)
    late = SchedulerLink("s", hub_of("late"))
    late.choose(is_chosen=True)
    assert len(exchange(late, state, 2.5).members.joined) >= len(names)
    assert [host.id for host in exchange(links[0], state, 3.0).members.joined] == ["late"]


def test_lists_that_are_kept_for_many_lose_nobody() -> None:
    membership, known, version = Membership(), dict[str, HostInfo](), -1
    for number in range(200):
        membership.put(HostInfo(f"h{number}", f"http://h{number}:1"))
        if number % 3 == 0:
            membership.remove(f"h{number // 2}")
        membership.since(number - 3, number / 100)
        membership.since(-1, number / 100)
    for now in (1.99, 3.0):
        change = membership.since(version, now)
        version = change.version
        known = {} if change.full else known
        known.update((host.id, host) for host in change.joined)
        for name in change.left:
            known.pop(name, None)
    assert known == membership.hosts
    assert digest_of(known.values()) == membership.digest


def test_the_interval_grows_with_hosts_and_lateness_and_shrinks_again() -> None:
    pace = Pace()
    assert pace.interval_s(10) == INTERVAL_MIN_S
    before = pace.interval_s(2000)
    for _ in range(5):
        pace.note(1.0)
    assert before < pace.interval_s(2000) <= INTERVAL_MAX_S
    assert pace.idle_interval_s(100_000, has_leases=False) == IDLE_MAX_S
    assert pace.idle_interval_s(100_000, has_leases=True) == INTERVAL_MAX_S < LEASE_S
    for _ in range(100):
        pace.note(0.1)
    assert pace.interval_s(2000) == before

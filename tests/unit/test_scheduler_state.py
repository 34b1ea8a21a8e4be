"""What a scheduler knows and answers, without a network."""

import random
from collections import Counter

import pytest

from backend.peers.known_hosts import SILENT_INTERVALS
from backend.peers.piece import PieceSet
from backend.peers.scheduler_state import (
    BAN_S,
    NEIGHBOURS_MAX,
    AnnounceRefused,
    SchedulerState,
)
from backend.peers.scope import ScopeInvalid, ScopeRule
from backend.peers.wire import Announce, Answer, BadPeer, Holding, HostInfo, Traffic

BLOB = "b" * 64


class Teller:
    """A host that keeps the protocol."""

    def __init__(self, state: SchedulerState, name: str, address: str = "10.0.0.1", zone: str = "") -> None:
        self.state = state
        self.info = HostInfo(name, f"http://{address}:8771", zone)
        self.address = address
        self.epoch, self.sequence, self.version = "", 0, -1
        self.members: dict[str, HostInfo] = {}
        self.known: dict[str, set[int]] = {}

    def tell(self, *holdings: Holding, now: float = 0.0, **more: object) -> Answer:
        announce = Announce(
            self.info,
            self.epoch,
            self.sequence,
            self.version,
            holdings=list(holdings),
            **{"wanted": [BLOB], **more},  # type: ignore[arg-type]
        )
        answer = self.state.announce(announce, self.address, now)
        self.epoch, self.sequence, self.version = answer.epoch, answer.sequence, answer.members.version
        if answer.members.full:
            self.members.clear()
        self.members.update((host.id, host) for host in answer.members.joined)
        for gone in answer.members.left:
            self.members.pop(gone, None)
        for change in answer.holders:
            pieces = self.known.setdefault(change.host_id, set())
            if change.have is not None:
                pieces.clear()
                pieces.update(PieceSet(change.pieces, change.have))
            pieces.update(change.added)
        return answer


def everything(*pieces: int, count: int = 16) -> Holding:
    held = PieceSet(count)
    held.update(pieces)
    return Holding(BLOB, count, bytes(held))


def state(**options: object) -> SchedulerState:
    return SchedulerState("now", chance=random.Random(1), **options)  # type: ignore[arg-type]


def test_hosts_learn_of_each_other_and_then_only_what_is_new() -> None:
    scheduler = state()
    one, two = Teller(scheduler, "one"), Teller(scheduler, "two", "10.0.0.2")
    assert one.tell(everything(1, 2), is_everything=True).members.full
    two.tell(everything(), is_everything=True)
    assert two.members.keys() == {"one", "two"}
    assert two.known == {"one": {1, 2}}
    answer = one.tell(Holding(BLOB, 16, added=[5]))
    assert not answer.members.full
    assert one.members.keys() == {"one", "two"}
    (change,) = two.tell().holders
    assert (change.have, change.added) == (None, [5])
    assert two.tell().holders == []


def test_who_missed_an_answer_is_told_again() -> None:
    scheduler = state()
    one, two = Teller(scheduler, "one"), Teller(scheduler, "two")
    one.tell(everything(1), is_everything=True)
    two.tell(everything(), is_everything=True)
    one.tell(Holding(BLOB, 16, added=[2]))
    before = two.sequence
    two.tell()
    two.sequence, two.known = before, {"one": {1}}
    assert two.tell().wants_everything
    two.tell(everything(), is_everything=True)
    assert two.known["one"] == {1, 2}


def test_a_new_scheduler_knows_everything_after_one_round() -> None:
    first, second = state(), SchedulerState("later")
    one = Teller(first, "one")
    one.tell(everything(1, 2), is_everything=True)
    one.state = second
    assert one.tell(Holding(BLOB, 16, added=[3])).wants_everything
    assert not one.tell(everything(1, 2, 3), is_everything=True).wants_everything
    assert [swarm[1:] for swarm in second.swarms()] == [(BLOB, 1, 16, 3)]


def test_a_lost_piece_is_taken_back() -> None:
    scheduler = state()
    one, two = Teller(scheduler, "one"), Teller(scheduler, "two")
    one.tell(everything(1, 2), is_everything=True)
    two.tell(everything(), is_everything=True)
    one.tell(everything(2))
    two.tell()
    assert two.known["one"] == {2}
    one.tell(dropped=[BLOB])
    assert [swarm[2] for swarm in scheduler.swarms()] == [1]


def test_silent_hosts_are_forgotten_and_their_traffic_is_not() -> None:
    scheduler = state()
    one, two = Teller(scheduler, "one"), Teller(scheduler, "two")
    one.tell(everything(1), is_everything=True)
    two.tell(is_everything=True, now=0.0)
    two.tell(now=10.0)
    scheduler.expire(10.0 + SILENT_INTERVALS * scheduler.interval_s)
    two.tell(now=11.0)
    assert two.members.keys() == {"two"}
    assert list(scheduler.swarms()) == []


def test_leaving_is_told_at_once() -> None:
    scheduler = state()
    one, two = Teller(scheduler, "one"), Teller(scheduler, "two")
    one.tell(is_everything=True)
    two.tell(is_everything=True)
    one.tell(is_leaving=True)
    two.tell()
    assert two.members.keys() == {"two"}


def test_neighbours_are_few_and_mostly_near() -> None:
    scheduler = state()
    tellers = [Teller(scheduler, f"h{n}", zone=f"az{n % 2}") for n in range(400)]
    for teller in tellers:
        teller.tell(everything(1), is_everything=True)
    asking = Teller(scheduler, "asking", zone="az1")
    asking.tell(everything(), is_everything=True)
    asking.tell(now=1.0)  # the members since the list that was kept for many
    assert asking.members.keys() == scheduler.hosts.keys()
    assert len(asking.known) == NEIGHBOURS_MAX
    near = [name for name in asking.known if asking.members[name].zone == "az1"]
    assert NEIGHBOURS_MAX // 2 < len(near) < NEIGHBOURS_MAX
    leaned_on = Counter(name for teller in [*tellers, asking] for name in teller.known)
    assert max(leaned_on.values()) < 3 * NEIGHBOURS_MAX


def test_who_has_gone_leans_on_nobody() -> None:
    scheduler = state()
    tellers = [Teller(scheduler, f"h{n}") for n in range(3)]
    for teller in tellers:
        teller.tell(everything(1), is_everything=True)
    for teller in tellers:
        teller.tell()
    (swarm,) = scheduler._swarms.values()
    assert swarm.known_by == {"h0": 2, "h1": 2, "h2": 2}
    tellers[0].tell(is_leaving=True)
    tellers[1].tell(wanted=[])
    assert swarm.known_by == {"h1": 1, "h2": 0}


def test_scopes_keep_hosts_apart() -> None:
    scheduler = state(scope=ScopeRule("zone"))
    one, two = Teller(scheduler, "one", zone="a"), Teller(scheduler, "two", zone="b")
    one.tell(everything(1), is_everything=True)
    two.tell(everything(), is_everything=True)
    assert two.members.keys() == {"two"}
    assert two.known == {}


@pytest.mark.parametrize(
    ("rule", "group"),
    [
        ("cluster", "cluster"),
        ("zone", "zone az1"),
        ("label:rack", "rack r7"),
        ("label:none", "none "),
        ("cidr:24", "10.1.2.0/24"),
        ("list:gpu=host,other;cpu=third", "list gpu"),
        ("list:cpu=third", "alone host"),
    ],
)
def test_groups(rule: str, group: str) -> None:
    host = HostInfo("host", "http://10.1.2.3:1", "az1", {"rack": "r7"})
    assert ScopeRule(rule).group_of(host, "10.1.2.3") == group


@pytest.mark.parametrize("rule", ["", "region", "zone:x", "label:", "cidr:0", "cidr:x", "list:", "list:=a"])
def test_bad_scopes(rule: str) -> None:
    with pytest.raises(ScopeInvalid):
        ScopeRule(rule)


@pytest.mark.parametrize(
    "announce",
    [
        Announce(HostInfo("", "http://x")),
        Announce(HostInfo("x" * 300, "http://x")),
        Announce(HostInfo("one", "http://x"), holdings=[Holding(BLOB, 1 << 40)]),
        Announce(HostInfo("one", "http://x"), holdings=[Holding(BLOB, -1)]),
        Announce(HostInfo("one", "http://x"), holdings=[Holding(BLOB, 4, added=[4])]),
        Announce(HostInfo("one", "http://x"), holdings=[Holding(BLOB, 4, added=[-1])]),
        Announce(HostInfo("one", "http://x"), is_everything=True, holdings=[Holding(BLOB, 4, b"toolong")]),
        Announce(HostInfo("one", "http://x"), is_everything=True, holdings=[Holding(BLOB, 4, b"\xff")]),
        Announce(HostInfo("one", "http://x"), wanted=[BLOB] * 5000),
        Announce(HostInfo("one", "http://x"), dropped=[BLOB] * 5000),
        Announce(HostInfo("one", "http://" + "x" * 300)),
        Announce(HostInfo("one", "http://x", zone="z" * 300)),
        Announce(HostInfo("one", "http://x", labels={"rack": "r" * 300})),
        Announce(HostInfo("one", "http://x", labels={"r" * 300: "rack"})),
        Announce(HostInfo("one\x1b[2J", "http://x")),
        Announce(HostInfo("one", "http://x"), uploads=-1),
        Announce(HostInfo("one", "http://x"), traffic=Traffic(origin_bytes=-1)),
        Announce(HostInfo("one", "http://x"), traffic=Traffic(served_bytes=10**400)),
    ],
)
def test_absurd_numbers_are_refused_and_counted(announce: Announce) -> None:
    scheduler = state()
    with pytest.raises(AnnounceRefused):
        scheduler.announce(announce, "10.0.0.1", 0.0)
    assert scheduler.refused == 1


def test_another_idea_of_a_blob_is_not_passed_on() -> None:
    scheduler = state()
    one, two = Teller(scheduler, "one"), Teller(scheduler, "two")
    one.tell(everything(1), is_everything=True)
    two.tell(everything(7, count=8), is_everything=True)
    assert one.tell().holders == []


def test_one_accuser_bans_nobody_and_two_do_for_a_while() -> None:
    scheduler = state()
    tellers = [Teller(scheduler, name) for name in ("one", "two", "liar")]
    for teller in tellers:
        teller.tell(is_everything=True)
    accusation = [BadPeer("liar", BLOB)]
    assert tellers[0].tell(bad_peers=accusation).banned == []
    assert tellers[0].tell(bad_peers=accusation).banned == []
    assert tellers[1].tell(bad_peers=accusation).banned == ["liar"]
    assert tellers[1].tell(now=BAN_S + 1).banned == []

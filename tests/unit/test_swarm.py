"""Whom a host asks for a piece, without a network."""

import functools
import random

import pytest

from backend.peers.health import BAN_FIRST_S, DEAD_FIRST_S, DEAD_MAX_S, HEDGE_MIN_S, HedgeTimer, PeerHealth
from backend.peers.piece import PieceSet
from backend.peers.piece_queue import ASKED_MAX, PieceQueue, Wanted
from backend.peers.swarm import ERRANDS_MAX, OWNER_TRIES, AskOrigin, AskPeer, Choice, Pause, Swarm
from backend.peers.wire import Answer, HolderChange, HostInfo, MemberChange

BLOB = "b" * 64
PIECES = 64
MIB = 1 << 20
HOSTS = [HostInfo(f"h{n}", f"http://10.0.0.{n}:1", zone=f"az{n % 2}") for n in range(8)]


def held(*pieces: int) -> bytes:
    found = PieceSet(PIECES)
    found.update(pieces)
    return bytes(found)


def swarm(own: str = "h0", holders: dict[str, bytes] | None = None, **answer: object) -> Swarm:
    made = Swarm(own, "az0", random.Random(1))
    made.note_blob(BLOB, PIECES)
    changes = [HolderChange(BLOB, name, PIECES, have) for name, have in (holders or {}).items()]
    members = MemberChange(1, full=True, joined=HOSTS)
    made.take(Answer("e", 1, 1.0, members, changes, **answer))  # type: ignore[arg-type]
    return made


def piece_of(made: Swarm, owner: str) -> int:
    """A piece that `owner` is first for."""
    return next(piece for piece in range(PIECES) if made._ranked(BLOB, piece)[0] == owner)


def test_alone_means_the_origin() -> None:
    assert Swarm("h0").choose(BLOB, 1, MIB, 0.0) == AskOrigin(is_owner=True)
    assert swarm(peers_enabled=False).choose(BLOB, 1, MIB, 0.0) == AskOrigin(is_owner=True)


def test_owners_are_sent_and_own_pieces_fetched() -> None:
    made = swarm()
    assert made.choose(BLOB, piece_of(made, "h3"), MIB, 0.0) == AskPeer(HOSTS[3], is_owner=True)
    assert made.choose(BLOB, piece_of(made, "h0"), MIB, 0.0) == AskOrigin(is_owner=True)
    assert made.is_owner(BLOB, piece_of(made, "h0"), 0.0)
    assert not made.is_owner(BLOB, piece_of(made, "h3"), 0.0)


def test_holders_come_before_owners() -> None:
    made = swarm(holders={"h5": held(7)})
    assert made.choose(BLOB, 7, MIB, 0.0) == AskPeer(HOSTS[5])
    made.note_absent(BLOB, "h5", 7)
    choice = made.choose(BLOB, 7, MIB, 0.0)
    assert isinstance(choice, AskOrigin) or choice.is_owner  # type: ignore[union-attr]


def test_the_next_owner_follows_and_after_three_the_origin() -> None:
    made = swarm("h9")
    ranked = made._ranked(BLOB, 4)
    others = [name for name in ranked if name != "h9"]
    tried: set[str] = set()
    for name in others[:OWNER_TRIES]:
        choice = made.choose(BLOB, 4, MIB, 0.0, tried)
        if isinstance(choice, AskOrigin):
            break
        assert choice == AskPeer(made.members[name], is_owner=True)
        tried.add(name)
    assert isinstance(made.choose(BLOB, 4, MIB, 0.0, tried), AskOrigin)


def test_a_dead_owner_is_passed_over_and_comes_back() -> None:
    made = swarm()
    piece = piece_of(made, "h3")
    made.health_of("h3").note_dead(0.0)
    choice = made.choose(BLOB, piece, MIB, 0.5)
    assert choice != AskPeer(HOSTS[3], is_owner=True)
    assert made.choose(BLOB, piece, MIB, DEAD_FIRST_S) == AskPeer(HOSTS[3], is_owner=True)


def test_busy_holders_are_waited_for() -> None:
    made = swarm(holders={"h5": held(7)})
    made.health_of("h5").note_busy(10.0, 0.5)
    choice = made.choose(BLOB, 7, MIB, 10.1)
    assert isinstance(choice, Pause)
    assert choice.delay_s == pytest.approx(0.4)
    assert made.choose(BLOB, 7, MIB, 10.5) == AskPeer(HOSTS[5])


def test_liars_and_those_banned_for_all_are_not_asked() -> None:
    made = swarm(holders={"h5": held(7), "h6": held(7)}, banned=["h6"])
    made.health_of("h5").note_wrong(0.0)
    choice = made.choose(BLOB, 7, MIB, BAN_FIRST_S - 1)
    assert not isinstance(choice, AskPeer) or choice.host.id not in ("h5", "h6")
    assert made.choose(BLOB, 7, MIB, BAN_FIRST_S) == AskPeer(HOSTS[5])


def test_near_and_quick_hosts_are_preferred() -> None:
    made = swarm(holders={"h4": held(7), "h5": held(7)})
    assert made.choose(BLOB, 7, MIB, 0.0) == AskPeer(HOSTS[4])  # of the same zone
    made.health_of("h4").note_done(MIB, 10.0, 0)
    made.health_of("h5").note_done(MIB, 0.1, 0)
    assert made.choose(BLOB, 7, MIB, 0.0) == AskPeer(HOSTS[5])


def test_a_slow_host_gets_little_to_do() -> None:
    made = swarm(holders={f"h{n}": held(*range(PIECES)) for n in (2, 4, 6)})
    for name, seconds in (("h2", 1.0), ("h4", 0.1), ("h6", 0.1)):
        made.health_of(name).note_done(MIB, seconds, 0)
    asked = dict.fromkeys(("h2", "h4", "h6"), 0)
    for piece in range(PIECES):
        choice = made.choose(BLOB, piece, MIB, 0.0)
        assert isinstance(choice, AskPeer)
        asked[choice.host.id] += 1
        made.health_of(choice.host.id).in_flight += MIB
    assert asked["h2"] < PIECES // 10


def test_nonsense_from_others_is_ignored() -> None:
    made = swarm()
    for change in (
        HolderChange(BLOB, "h5", PIECES, b"short"),
        HolderChange(BLOB, "h5", PIECES, added=[PIECES]),
        HolderChange(BLOB, "h5", 1 << 40, b""),
        HolderChange(BLOB, "h0", PIECES, held(1)),
    ):
        made.take(Answer("e", 1, 1.0, MemberChange(1), [change]))
        assert made.holder_count(BLOB, 1) == 0


def test_pauses_of_dead_hosts_grow() -> None:
    health, now = PeerHealth(), 0.0
    pauses = []
    for _ in range(8):
        health.note_dead(now)
        pauses.append(health.dead_until - now)
        now = health.dead_until
    assert pauses[0] == DEAD_FIRST_S
    assert pauses == sorted(pauses)
    assert pauses[-1] == DEAD_MAX_S


def test_hedges_wait_for_most_answers() -> None:
    timer = HedgeTimer()
    unknown = timer.after_s()
    for number in range(100):
        timer.note(0.2 if number % 50 else 5.0)
    assert HEDGE_MIN_S < timer.after_s() == 0.2 < unknown


class Queue:
    """A queue, its time, and what it decides."""

    def __init__(self, made: Swarm) -> None:
        self.now = 0.0
        self.decided: dict[int, Choice] = {}
        self.queue = PieceQueue(made, random.Random(1), lambda: self.now)

    def want(self, pieces: range) -> None:
        for piece in pieces:
            note = functools.partial(self.decided.__setitem__, piece)
            self.queue.add(Wanted(BLOB, piece, MIB, set(), note))
        self.queue.dispatch()


def test_the_rarest_goes_first_and_few_at_once() -> None:
    holders = {f"h{n}": held(*range(PIECES)) for n in range(1, 8)}
    made = swarm("h9", holders)
    for name in list(holders)[1:]:
        made.note_absent(BLOB, name, 0)
    rig = Queue(made)
    rig.want(range(16))
    assert next(iter(rig.decided)) == 0
    assert len(rig.decided) == rig.queue.asked == ASKED_MAX
    rig.queue.release(rig.decided[0])
    assert len(rig.decided) == ASKED_MAX + 1
    assert rig.queue.asked == ASKED_MAX


def test_few_owners_are_sent_when_nobody_waits() -> None:
    made = swarm("h9")
    rig = Queue(made)
    rig.want(range(32))
    sent = [choice for choice in rig.decided.values() if isinstance(choice, AskPeer)]
    assert len(sent) == rig.queue.asked == ERRANDS_MAX
    for choice in sent:
        rig.queue.release(choice)
    assert made.errands == ERRANDS_MAX


def test_a_host_that_has_left_meanwhile_is_not_counted_below_nothing() -> None:
    made = swarm(holders={"h5": held(7)})
    rig = Queue(made)
    rig.want(range(7, 8))
    gone = [host for host in HOSTS if host.id != "h5"]
    made.take(Answer("e", 2, 1.0, MemberChange(2, full=True, joined=gone)))
    made.take(Answer("e", 3, 1.0, MemberChange(3, full=True, joined=HOSTS)))
    rig.queue.release(rig.decided[7])
    assert made.health_of("h5").requests == 0

"""Which piece a host begins next, without a network."""

import functools
import random
from collections.abc import Iterable

import pytest

from backend.peers.piece import PieceSet
from backend.peers.piece_picker import PiecePicker
from backend.peers.piece_queue import ASKED_MAX, PieceQueue, Wanted
from backend.peers.swarm import COMMON, ERRANDS_MAX, Choice, Swarm
from backend.peers.wire import Answer, HolderChange, HostInfo, MemberChange

BLOB = "b" * 64
PIECES = 61
MIB = 1 << 20
HOSTS = [HostInfo(f"h{n}", f"http://10.0.0.{n}:1") for n in range(8)]


class Rig:
    """A host, `h0`, among others that hold what `holders` says."""

    def __init__(self, holders: dict[str, Iterable[int]] | None = None, seed: int = 1) -> None:
        chance = random.Random(seed)
        self.have = PieceSet(PIECES)
        self.decided: list[Choice] = []
        self.swarm = Swarm("h0", "", chance)
        self.swarm.note_blob(BLOB, PIECES)
        changes = [
            HolderChange(BLOB, name, PIECES, _bits(pieces)) for name, pieces in (holders or {}).items()
        ]
        members = MemberChange(1, full=True, joined=HOSTS)
        self.swarm.take(Answer("e", 1, 1.0, members, changes))
        self.queue = PieceQueue(self.swarm, chance, lambda: 0.0)
        self.picker = PiecePicker(self.swarm, self.queue, BLOB, self.have, chance, lambda: 0.0)
        self.own = set(self.swarm.own_pieces(BLOB, PIECES))

    def begin(self, own_max: int = 0) -> int | None:
        """Begins a piece and asks for it, where that is possible now."""
        piece = self.picker.begin(own_max)
        if piece is not None:
            self.queue.add(Wanted(BLOB, piece, MIB, set(), self.decided.append))
            self.queue.dispatch()
        return piece


def _bits(pieces: Iterable[int]) -> bytes:
    found = PieceSet(PIECES)
    found.update(pieces)
    return bytes(found)


def test_own_pieces_come_first_and_few_at_once() -> None:
    rig = Rig({"h1": range(PIECES)})
    assert len(rig.own) == PIECES // len(HOSTS) + 1 or len(rig.own) == PIECES // len(HOSTS)
    begun = [rig.begin(own_max=2) for _ in range(4)]
    assert set(begun[:2]) <= rig.own
    assert not set(begun[2:]) & set(begun[:2])
    rig.picker.end(begun[0] or 0)
    assert rig.begin(own_max=2) in rig.own


@pytest.mark.parametrize("rare", [0, 7, PIECES - 1])
def test_the_rarest_that_is_offered_is_begun(rare: int) -> None:
    everything = set(range(PIECES))
    holders = {f"h{n}": everything - {rare} for n in range(1, 7)}
    found = {Rig({**holders, "h7": {rare, 20, 21}}, seed).begin() for seed in range(20)}
    # One of the hosts that are compared must offer it.
    assert rare in found


def test_everything_is_begun_once_and_each_piece_where_somebody_has_it() -> None:
    rig = Rig({"h1": range(0, PIECES, 2), "h2": range(1, PIECES, 2)})
    begun: list[int] = []
    while not rig.picker.is_done:
        piece = rig.begin()
        assert piece is not None
        begun.append(piece)
        rig.have.add(piece)
        rig.queue.release(rig.decided.pop())
    assert sorted(begun) == list(range(PIECES))
    assert rig.begin() is None


def test_no_more_is_begun_than_can_be_asked_for() -> None:
    rig = Rig({f"h{n}": range(PIECES) for n in range(1, 8)})
    begun = [rig.begin() for _ in range(PIECES)]
    assert sum(piece is not None for piece in begun) == ASKED_MAX == rig.queue.asked


def test_owners_are_reminded_of_what_nobody_has_a_few_at_a_time() -> None:
    rig = Rig({"h1": [3]})
    begun = [piece for piece in (rig.begin() for _ in range(PIECES)) if piece is not None]
    assert begun[0] == 3
    assert len(begun) == 1 + ERRANDS_MAX
    rig.picker.end(begun[1])
    assert rig.begin() is not None


def test_a_host_that_divides_the_blob_otherwise_offers_nothing() -> None:
    rig = Rig()
    change = HolderChange(BLOB, "h1", 8, b"\xff")
    rig.swarm.take(Answer("e", 2, 1.0, MemberChange(1), [change]))
    assert rig.swarm.offer(BLOB, rig.have.lacking, 0.0) == 0
    assert rig.swarm.holder_count(BLOB, 3) == 0


def test_holders_are_counted_as_they_come_and_go() -> None:
    rig = Rig()
    counted = functools.partial(rig.swarm.holder_count, BLOB, 5)
    for number in range(1, 7):
        told = PieceSet(PIECES)
        told.update([5, 6])
        rig.swarm.note_more(BLOB, f"h{number}", told)
        rig.swarm.note_more(BLOB, f"h{number}", told)
        assert counted() == min(number, COMMON)
    for number in range(1, 4):
        rig.swarm.note_absent(BLOB, f"h{number}", 5)
    assert counted() == 3
    rig.swarm.take(Answer("e", 2, 1.0, MemberChange(2, full=True, joined=HOSTS[:5])))
    assert counted() == 1


def test_any_piece_of_a_mask_is_found() -> None:
    have = PieceSet(PIECES)
    have.update([0, 13, PIECES - 1])
    places = [place / 100 for place in range(100)]
    assert {have.some_of(have.mask, place) for place in places} == {0, 13, PIECES - 1}
    assert set(have) == {0, 13, PIECES - 1}
    whole = PieceSet(PIECES)
    whole.update(range(PIECES))
    assert whole.lacking == 0
    assert {whole.some_of(whole.mask, place) for place in places} == set(range(PIECES))

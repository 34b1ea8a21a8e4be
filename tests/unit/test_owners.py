"""Who brings a piece from the origin."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from backend.peers.owners import CANDIDATES, OwnerRanking
from backend.peers.piece import PIECES_MAX, PieceGrid, PieceSet, piece_bytes_of

HOSTS = [f"host-{number}" for number in range(200)]


def test_all_come_to_the_same_order() -> None:
    one, two = OwnerRanking(HOSTS), OwnerRanking(reversed(HOSTS))
    assert [one.ranked("blob", piece, 100) for piece in range(100)] == [
        two.ranked("blob", piece, 100) for piece in range(100)
    ]


def test_a_leaving_host_moves_little_of_what_others_own() -> None:
    for hosts in (HOSTS[:8], HOSTS):
        before, after = OwnerRanking(hosts), OwnerRanking(hosts[1:])
        moved = 0
        for piece in range(640):
            first = before.ranked("blob", piece, 640)[0]
            moved += first != hosts[0] and after.ranked("blob", piece, 640)[0] != first
        assert moved < 640 // 3


def test_no_host_owns_more_than_its_share() -> None:
    for pieces in (16, 64, 65, 1000):
        ranking = OwnerRanking(HOSTS[:8])
        load = Counter(ranking.ranked("blob", piece, pieces)[0] for piece in range(pieces))
        assert max(load.values()) <= sum(-(-min(64, pieces - at) // 8) for at in range(0, pieces, 64))


def test_load_is_even() -> None:
    pieces = 100 * len(HOSTS)
    ranking = OwnerRanking(HOSTS)
    load = Counter(ranking.ranked("blob", piece, pieces)[0] for piece in range(pieces))
    assert len(load) == len(HOSTS)
    assert 50 < min(load.values()) <= max(load.values()) < 160


def test_many_hosts_are_ranked_in_two_steps() -> None:
    ranking = OwnerRanking(HOSTS)
    assert len(ranking.ranked("blob", 1)) == CANDIDATES
    assert OwnerRanking([]).ranked("blob", 1) == []


@given(st.integers(1, 1 << 45))
def test_pieces_cover_a_blob(size_bytes: int) -> None:
    grid = PieceGrid(size_bytes)
    assert grid.piece_bytes == piece_bytes_of(size_bytes)
    assert sum(map(grid.size_of, range(grid.count))) == size_bytes if grid.count < 10_000 else True
    assert grid.of(size_bytes - 1) == grid.count - 1
    assert grid.count <= PIECES_MAX or grid.piece_bytes == 64 << 20


@given(st.sets(st.integers(0, 99)), st.integers(100, 120))
def test_sets(pieces: set[int], count: int) -> None:
    one = PieceSet(count)
    one.update(pieces)
    again = PieceSet(count, bytes(one))
    assert set(again) == pieces
    assert len(again) == len(pieces)
    assert all((piece in again) == (piece in pieces) for piece in range(count))
    for piece in pieces:
        again.discard(piece)
    assert len(again) == 0
    again.merge(one)
    assert set(again) == pieces

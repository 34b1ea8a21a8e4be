"""Who brings a piece from the origin."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from backend.peers.owners import CANDIDATES, OwnerRanking
from backend.peers.piece import PIECES_MAX, PieceGrid, PieceSet, piece_bytes_of

HOSTS = [f"host-{number}" for number in range(200)]


def test_all_come_to_the_same_order() -> None:
    one, two = OwnerRanking(HOSTS), OwnerRanking(reversed(HOSTS))
    assert [one.ranked("blob", piece) for piece in range(100)] == [
        two.ranked("blob", piece) for piece in range(100)
    ]


def test_a_leaving_host_moves_only_what_was_its_own() -> None:
    for hosts in (HOSTS[:8], HOSTS):
        before, after = OwnerRanking(hosts), OwnerRanking(hosts[1:])
        for piece in range(500):
            first, second = before.owners("blob", piece)
            expected = second if first == hosts[0] else first
            assert after.owners("blob", piece)[0] == expected


def test_load_is_even() -> None:
    for hosts in (HOSTS[:8], HOSTS):
        ranking = OwnerRanking(hosts)
        load = Counter(ranking.owners("blob", piece)[0] for piece in range(100 * len(hosts)))
        assert len(load) == len(hosts)
        assert 50 < min(load.values()) <= max(load.values()) < 160


def test_many_hosts_are_ranked_in_two_steps() -> None:
    ranking = OwnerRanking(HOSTS)
    assert len(ranking.ranked("blob", 1)) == CANDIDATES
    assert OwnerRanking([]).owners("blob", 1) == []


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

"""Which hosts bring a piece from the origin: rendezvous hashing (Thaler and Ravishankar, 1998). No I/O.

Every host ranks all hosts by a hash of host and piece, and all come to the same order without a word. When a
host leaves, only what it was first for moves, each to the next one.

Among many hosts the ranking is made in two steps: the best `CANDIDATES` for a block of pieces, then their
order for each piece. A host is as likely as any other to be among them, and a leaving one changes as little.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import xxhash

OWNERS = 2
"""How many may go to the origin for a piece without asking again; the second when the first is gone."""
CANDIDATES = 32
BLOCK_PIECES = 64
BLOCKS_KEPT = 1024


class OwnerRanking:
    """Ranks the hosts of a scope, given by name. Immutable: a change of members makes another one."""

    def __init__(self, hosts: Iterable[str]) -> None:
        self.hosts = tuple(sorted(set(hosts)))
        self._names = [host.encode() for host in self.hosts]
        self._candidates: OrderedDict[tuple[str, int], list[tuple[str, bytes]]] = OrderedDict()

    def ranked(self, blob_id: str, piece: int) -> Sequence[str]:
        """The hosts for a piece, the first owner first; at most `CANDIDATES`."""
        seed = _seed(blob_id, b"piece", piece)
        candidates = self._candidates_for(blob_id, piece // BLOCK_PIECES)
        scores = [(xxhash.xxh3_64_intdigest(name, seed), host) for host, name in candidates]
        scores.sort(reverse=True)
        return [host for _, host in scores]

    def owners(self, blob_id: str, piece: int) -> Sequence[str]:
        """The first `OWNERS` of `ranked`."""
        return self.ranked(blob_id, piece)[:OWNERS]

    def _candidates_for(self, blob_id: str, block: int) -> list[tuple[str, bytes]]:
        if len(self.hosts) <= CANDIDATES:
            block = 0
        key = (blob_id, block)
        known = self._candidates.get(key)
        if known is not None:
            self._candidates.move_to_end(key)
            return known
        pairs = list(zip(self.hosts, self._names, strict=True))
        if len(pairs) > CANDIDATES:
            seed = _seed(blob_id, b"block", block)
            pairs = heapq.nlargest(
                CANDIDATES, pairs, key=lambda pair: xxhash.xxh3_64_intdigest(pair[1], seed)
            )
        self._candidates[key] = pairs
        if len(self._candidates) > BLOCKS_KEPT:
            self._candidates.popitem(last=False)
        return pairs


def _seed(blob_id: str, kind: bytes, number: int) -> int:
    return xxhash.xxh3_64_intdigest(b"%s %s %d" % (kind, blob_id.encode(), number))

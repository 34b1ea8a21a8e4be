"""Which hosts bring a piece from the origin: rendezvous hashing with bounded loads. No I/O.

Every host ranks all hosts by a hash of host and piece (Thaler and Ravishankar, 1998), and all come to the
same order without a word. No host is first for more pieces of a blob than its share (Mirrokni and others,
2018): who has it already comes second. Otherwise, of few pieces, some hosts would own twice as many as
others, and everybody would wait for them. When a host leaves, what it was first for moves, and a little of
the rest.

Among many hosts it is done for blocks of pieces: the best `CANDIDATES` of all hosts share a block. A host is
as likely as any other to be among them.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import xxhash

CANDIDATES = 32
BLOCK_PIECES = 64
BLOCKS_KEPT = 1024


class OwnerRanking:
    """Ranks the hosts of a scope, given by name. Immutable: a change of members makes another one."""

    def __init__(self, hosts: Iterable[str]) -> None:
        self.hosts = tuple(sorted(set(hosts)))
        self._names = [host.encode() for host in self.hosts]
        self._blocks: OrderedDict[tuple[str, int, int], list[list[str]]] = OrderedDict()

    def ranked(self, blob_id: str, piece: int, pieces: int = BLOCK_PIECES) -> Sequence[str]:
        """The hosts for a piece of a blob of so many, the first owner first; at most `CANDIDATES`."""
        block = piece // BLOCK_PIECES
        key = (blob_id, block, pieces)
        ranked = self._blocks.get(key)
        if ranked is None:
            ranked = self._blocks[key] = self._rank_block(blob_id, block, pieces)
            if len(self._blocks) > BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(key)
        return ranked[piece - block * BLOCK_PIECES]

    def _rank_block(self, blob_id: str, block: int, pieces: int) -> list[list[str]]:
        numbers = range(block * BLOCK_PIECES, max(min(pieces, (block + 1) * BLOCK_PIECES), 1))
        candidates = self._candidates(blob_id, block)
        room = dict.fromkeys((host for host, _ in candidates), -(-len(numbers) // max(1, len(candidates))))
        ranked: list[list[str]] = []
        for piece in numbers:
            seed = _seed(blob_id, b"piece", piece)
            scores = [(xxhash.xxh3_64_intdigest(name, seed), host) for host, name in candidates]
            hosts = [host for _, host in sorted(scores, reverse=True)]
            first = next((host for host in hosts if room[host]), None)
            if first is not None:
                room[first] -= 1
                hosts.remove(first)
                hosts.insert(0, first)
            ranked.append(hosts)
        return ranked

    def _candidates(self, blob_id: str, block: int) -> list[tuple[str, bytes]]:
        pairs = list(zip(self.hosts, self._names, strict=True))
        if len(pairs) <= CANDIDATES:
            return pairs
        seed, hash_of = _seed(blob_id, b"block", block), xxhash.xxh3_64_intdigest
        return heapq.nlargest(CANDIDATES, pairs, key=lambda pair: hash_of(pair[1], seed))


def _seed(blob_id: str, kind: bytes, number: int) -> int:
    return xxhash.xxh3_64_intdigest(b"%s %s %d" % (kind, blob_id.encode(), number))

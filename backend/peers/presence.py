"""Which pieces of a blob are whole in the cache of this host: counted as chunks come and go.

Concurrency: `watch` is called in the trio thread, and so is what it hooks into (`CachedBlob.on_presence`).
"""

from array import array

from backend.cache import CachedBlob
from backend.peers.piece import PieceGrid, PieceSet
from rafs.blobmeta import BlobMeta
from rafs.record import BLOCK_SIZE


class PiecePresence:
    """The pieces of one cached blob."""

    def __init__(self, meta: BlobMeta, cached: CachedBlob, grid: PieceGrid) -> None:
        """Blocking: reads every entry of the chunk table once."""
        self.grid = grid
        self.pieces = PieceSet(grid.count)
        self.cached = cached
        blocks = grid.piece_bytes // BLOCK_SIZE
        self._piece_of = array("H", (block // blocks for block in meta.start_blocks()))
        self._lacking = [0] * grid.count

    def watch(self) -> None:
        """Counts what is there, and every change from now on until `unwatch`."""
        self._lacking = [0] * self.grid.count
        is_ready = self.cached.is_ready
        for index, piece in enumerate(self._piece_of):
            if not is_ready(index):
                self._lacking[piece] += 1
        for piece, lacking in enumerate(self._lacking):
            if not lacking:
                self.pieces.add(piece)
        self.cached.on_presence.append(self._note)

    def unwatch(self) -> None:
        """Ends what `watch` began."""
        self.cached.on_presence.remove(self._note)

    def piece_of(self, chunk: int) -> int:
        """The piece that a chunk belongs to."""
        return self._piece_of[chunk]

    def is_whole(self) -> bool:
        """Whether every piece is here."""
        return len(self.pieces) == self.grid.count

    def _note(self, chunk: int, *, is_ready: bool) -> None:
        piece = self._piece_of[chunk]
        self._lacking[piece] += -1 if is_ready else 1
        if not self._lacking[piece]:
            self.pieces.add(piece)
        elif not is_ready and piece in self.pieces:
            self.pieces.discard(piece)

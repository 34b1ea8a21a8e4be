"""The unit of location: a piece, which is some adjacent MiB of a blob's decoded file. No I/O.

A piece says where to look; what is asked for, and verified, are the chunks in it. A chunk belongs to the
piece that it starts in.
"""

import functools
from collections.abc import Iterable, Iterator

PIECE_MIN_BYTES = 1 << 20
PIECE_BYTES = 4 << 20
PIECE_MAX_BYTES = 64 << 20
"""As in Dragonfly: 4 to 64 MiB. Smaller ones for small blobs, so that many hosts can have different ones."""
PIECES_FEW = 256
PIECES_MAX = 2048
"""What a host tells of a blob in each announcement grows with this."""


@functools.cache
def piece_bytes_of(size_bytes: int) -> int:
    """The size of a piece, a power of two, of a blob with `size_bytes` decoded: the same on every host."""
    piece_bytes = PIECE_MIN_BYTES
    while piece_bytes < PIECE_BYTES and size_bytes > PIECES_FEW * piece_bytes:
        piece_bytes *= 2
    while piece_bytes < PIECE_MAX_BYTES and size_bytes > PIECES_MAX * piece_bytes:
        piece_bytes *= 2
    return piece_bytes


class PieceGrid:
    """How a blob with `size_bytes` decoded is divided into pieces."""

    __slots__ = ("count", "piece_bytes", "size_bytes")

    def __init__(self, size_bytes: int, piece_bytes: int | None = None) -> None:
        self.size_bytes = size_bytes
        self.piece_bytes = piece_bytes or piece_bytes_of(size_bytes)
        self.count = -(-size_bytes // self.piece_bytes)

    def of(self, offset: int) -> int:
        """The piece that byte `offset` of the decoded file is in."""
        return offset // self.piece_bytes

    def size_of(self, piece: int) -> int:
        """Bytes of a piece; the last one is shorter."""
        return min(self.piece_bytes, self.size_bytes - piece * self.piece_bytes)


class PieceSet:
    """Some of a blob's pieces, one bit each in `mask`; written out, the first piece is the highest bit of the
    first byte."""

    __slots__ = ("_top", "count", "mask")

    def __init__(self, count: int, bits: bytes = b"") -> None:
        """Raises `ValueError` when `bits` are not those of `count` pieces."""
        size = (count + 7) // 8
        if bits and (len(bits) != size or (count % 8 and bits[-1] & (0xFF >> count % 8))):
            raise ValueError(f"{len(bits)} bytes do not tell of {count} pieces")
        self.count = count
        self._top = size * 8 - 1
        self.mask = int.from_bytes(bits)

    def __contains__(self, piece: int) -> bool:
        return bool(self.mask >> (self._top - piece) & 1)

    def __len__(self) -> int:
        return self.mask.bit_count()

    def __iter__(self) -> Iterator[int]:
        mask = self.mask
        while mask:
            bit = mask.bit_length() - 1
            yield self._top - bit
            mask ^= 1 << bit

    def __bytes__(self) -> bytes:
        return self.mask.to_bytes((self._top + 1) // 8)

    @property
    def lacking(self) -> int:
        """The mask of the pieces that are not in."""
        return ((1 << self.count) - 1 << (self._top + 1 - self.count)) ^ self.mask

    def place_of(self, piece: int) -> int:
        """The number of a piece's bit in a mask."""
        return self._top - piece

    def add(self, piece: int) -> None:
        """Raises `IndexError` for a piece that the blob has not."""
        if not 0 <= piece < self.count:
            raise IndexError(piece)
        self.mask |= 1 << (self._top - piece)

    def discard(self, piece: int) -> None:
        """Takes a piece out, if it is in."""
        self.mask &= ~(1 << (self._top - piece))

    def update(self, pieces: Iterable[int]) -> None:
        """Adds pieces. Raises `IndexError`."""
        for piece in pieces:
            self.add(piece)

    def merge(self, other: "PieceSet") -> None:
        """Adds the pieces of another set of the same blob."""
        self.mask |= other.mask

    def some_of(self, mask: int, place: float) -> int:
        """A piece of a mask that is not empty: the first one from a place (0 to 1) of the blob on."""
        below = mask & ((1 << round((1 - place) * (self._top + 1))) - 1)
        return self._top + 1 - (below or mask).bit_length()

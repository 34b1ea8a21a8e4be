"""Which chunks there are already: in this image so far, and those it takes from chunk dictionaries."""

from rafs.chunk import ChunkRow, pack_address
from rafs.record import BLOCK_SIZE

_PENDING = -1


class DedupIndex:
    """Digest -> packed 8-byte address (`rafs.chunk`), as an integer. About 200 bytes of memory a chunk."""

    def __init__(self) -> None:
        self._addresses: dict[bytes, int] = {}

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._addresses

    def claim(self, digest: bytes) -> bool:
        """Whether the chunk is new. A new one is pending until `place` gives it an address."""
        size = len(self._addresses)
        self._addresses.setdefault(digest, _PENDING)
        return len(self._addresses) > size

    def place(self, digest: bytes, chunk_index: int, block: int) -> None:
        """Gives a claimed chunk its number and block in blob 0, the image's own."""
        self._addresses[digest] = _pack(0, chunk_index, block)

    def place_dictionary_chunk(self, digest: bytes, blob_index: int, row: ChunkRow) -> None:
        """Makes a chunk known that lies in another image's blob, which has `blob_index` here."""
        self._addresses[digest] = _pack(blob_index, row.index, row.uncompressed_offset // BLOCK_SIZE)

    def address(self, digest: bytes) -> int:
        """Address of a chunk that is known and placed."""
        return self._addresses[digest]


def _pack(blob_index: int, chunk_index: int, block: int) -> int:
    return int.from_bytes(pack_address(blob_index, chunk_index, block), "little")

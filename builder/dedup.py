"""Which chunks there are already: in this image so far, and those it takes from chunk dictionaries."""

from pathlib import Path

from builder.digest_file import DigestFile
from rafs.chunk import ChunkRow, address_word
from rafs.record import BLOCK_SIZE

_PENDING = 0
"""No address is 0: its blob counts from 1."""
IN_MEMORY_MAX = 250_000
"""Chunks that are kept in memory, at about 200 bytes each. Those after them go to a file."""


class DedupIndex:
    """Digest -> packed 8-byte address (`rafs.chunk`), as an integer.

    The first chunks stay in a dictionary, further ones go to a file, so that memory is bounded however large
    the image is. A file look-up costs a few microseconds more.
    """

    def __init__(self, spill: Path) -> None:
        """`spill` is the file for what does not fit in memory; it is made only when needed."""
        self._addresses: dict[bytes, int] = {}
        self._spill_path = spill
        self._spilled: DigestFile | None = None

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._addresses or (
            self._spilled is not None and self._spilled.get(digest) is not None
        )

    def claim(self, digest: bytes) -> bool:
        """Whether the chunk is new. A new one is pending until `place` gives it an address."""
        if self._spilled is not None:
            return digest not in self._addresses and self._spilled.add(digest, _PENDING)
        size = len(self._addresses)
        self._addresses.setdefault(digest, _PENDING)
        if len(self._addresses) == size:
            return False
        if size + 1 >= IN_MEMORY_MAX:
            self._spilled = DigestFile(self._spill_path)
        return True

    def place(self, digest: bytes, chunk_index: int, block: int) -> None:
        """Gives a claimed chunk its number and block in blob 0, the image's own."""
        self._set(digest, address_word(0, chunk_index, block))

    def place_dictionary_chunk(self, digest: bytes, blob_index: int, row: ChunkRow) -> None:
        """Makes a chunk known that lies in another image's blob, which has `blob_index` here."""
        self.claim(digest)
        self._set(digest, address_word(blob_index, row.index, row.uncompressed_offset // BLOCK_SIZE))

    def place_at(self, digest: bytes, address: int) -> None:
        """Gives a claimed chunk a packed address."""
        self._set(digest, address)

    def address(self, digest: bytes) -> int:
        """Address of a chunk that is known and placed; raises `KeyError` for another."""
        address = self._addresses.get(digest)
        if address is None and self._spilled is not None:
            address = self._spilled.get(digest)
        if not address:
            raise KeyError(digest)
        return address

    def close(self) -> None:
        """Removes the file."""
        if self._spilled is not None:
            self._spilled.close()
            self._spilled = None

    def _set(self, digest: bytes, address: int) -> None:
        if digest in self._addresses:
            self._addresses[digest] = address
        elif self._spilled is not None:
            self._spilled.replace(digest, address)

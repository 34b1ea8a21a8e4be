"""Digests of decoded chunks, and the checksum that goes with them."""

import enum
import hashlib

import blake3
import google_crc32c

from rafs.record import Buffer

DIGEST_SIZE = 32


class Digester(enum.IntEnum):
    """Digest algorithms, numbered as in a blob table entry."""

    BLAKE3 = 0
    SHA256 = 1

    def digest(self, data: Buffer) -> bytes:
        """The 32-byte digest of `data`."""
        if self is Digester.BLAKE3:
            return blake3.blake3(data).digest()
        return hashlib.sha256(data).digest()


def crc32c(data: Buffer) -> int:
    """CRC-32C (iSCSI, Castagnoli) of `data`, 32 bits unsigned."""
    checksum: int = google_crc32c.value(data if isinstance(data, bytes) else bytes(data))
    return checksum

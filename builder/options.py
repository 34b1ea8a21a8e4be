"""What a build is asked to do."""

import enum
import os
from dataclasses import dataclass, field
from typing import ClassVar

from rafs.codec import Compressor
from rafs.digest import Digester
from rafs.errors import NydusError
from rafs.superblock import CHUNK_SIZE_MAX, CHUNK_SIZE_MIN


class InvalidOption(NydusError):
    """A build option outside what the format allows."""

    message = "{option}: {why}"
    exit_code: ClassVar[int] = 2


class CompressionPolicy(enum.Enum):
    """How chunks are encoded.

    `AUTO` is zstd, but a chunk is stored as it is where zstd would save less than an eighth; large chunks are
    sampled first, so that data which cannot be compressed costs next to nothing.
    """

    AUTO = "auto"
    ZSTD = "zstd"
    LZ4 = "lz4"
    NONE = "none"

    @property
    def codec(self) -> Compressor:
        """The codec that the image names."""
        return {
            CompressionPolicy.LZ4: Compressor.LZ4_BLOCK,
            CompressionPolicy.NONE: Compressor.NONE,
        }.get(self, Compressor.ZSTD)


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Options of one build; sizes in bytes.

    `batch_size`: files smaller than half of it share units of compression of at most that size; 0 is off.
    `threads`: worker processes; the image does not depend on it. `prefetch`: patterns of absolute paths.
    """

    chunk_size: int = 1 << 20
    batch_size: int = 1 << 20
    compression: CompressionPolicy = CompressionPolicy.AUTO
    level: int = 3
    digester: Digester = Digester.BLAKE3
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    prefetch: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.chunk_size & (self.chunk_size - 1) or not CHUNK_SIZE_MIN <= self.chunk_size <= CHUNK_SIZE_MAX:
            raise InvalidOption(
                option="--chunk-size", why=f"a power of two from 4 KiB to 16 MiB, not {self.chunk_size}"
            )
        if not 0 <= self.batch_size <= self.chunk_size:
            raise InvalidOption(
                option="--batch-size",
                why=f"from 0 to the chunk size {self.chunk_size}, not {self.batch_size}",
            )
        if not 1 <= self.level <= 22:
            raise InvalidOption(option="--level", why=f"from 1 to 22, not {self.level}")
        if not 1 <= self.threads <= 256:
            raise InvalidOption(option="--threads", why=f"from 1 to 256, not {self.threads}")

    @property
    def batch_limit(self) -> int:
        """Files shorter than this many bytes go into batches."""
        return min(self.batch_size // 2, self.chunk_size)

"""The contract that every source of blob bytes keeps."""

from collections.abc import Awaitable, Callable
from typing import ClassVar, Protocol, runtime_checkable

from rafs.errors import NydusError


class BackendError(NydusError):
    """A source could not give what was asked."""

    message = "{where}: {why}"
    exit_code: ClassVar[int] = 30


class BlobNotFound(BackendError):
    """The source has no such blob."""

    message = "{where}: no such blob or image; check the name, the tag and the repository"
    exit_code = 31


class ShortRead(BackendError):
    """The source gave fewer bytes than it has promised, or none at all."""

    message = "{where}: asked for {length} bytes at offset {offset}, got {got}"
    exit_code = 32
    retryable = True


class BlobReader(Protocol):
    """Reads ranges of one encoded blob.

    Implementations are safe for concurrent use from many trio tasks, and a cancelled call leaves
    them usable. Every method is a checkpoint.
    """

    async def size(self) -> int:
        """Length of the blob in bytes. Raises `BlobNotFound` or another `BackendError`."""
        ...

    async def read_range(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `offset`.

        `length` of 0 gives b"". Raises `ValueError` for a negative argument, `ShortRead` for a
        range that ends past the blob, and other `BackendError`s when the source fails. Bytes are
        not verified here: the caller knows the digests.
        """
        ...

    async def aclose(self) -> None:
        """Free what the reader holds. Twice is harmless; reads afterwards raise `BackendError`."""
        ...


Pace = Callable[[int], Awaitable[object]]
"""Called with the size of each part that has arrived; returns when the next one may be received."""


@runtime_checkable
class PacedReader(Protocol):
    """A `BlobReader` over a link, which can be told to receive no faster than it may."""

    async def read_paced(self, offset: int, length: int, pace: Pace) -> bytes:
        """As `BlobReader.read_range`, with `pace` awaited after each part."""
        ...


@runtime_checkable
class InPlaceReader(Protocol):
    """A `BlobReader` that can put the bytes where they are wanted, which saves the memory for a copy."""

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills all of `buffer` from byte `offset` on; otherwise as `BlobReader.read_range`.

        When it has returned or raised, nobody touches the buffer any more.
        """
        ...

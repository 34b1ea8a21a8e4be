"""Moves a blob from a reader to a consumer piece by piece, reading ahead by one.

Concurrency: one task reads, the caller's task consumes. Both meet at a channel without a buffer, so at most
three pieces are in memory: the one consumed, the one waiting, the one being read.
"""

from collections.abc import Awaitable, Callable

import trio

from backend.contract import BlobReader

PIECE_BYTES = 4 << 20


async def pump(
    reader: BlobReader,
    size_bytes: int,
    consume: Callable[[bytes], Awaitable[None]],
    piece_bytes: int = PIECE_BYTES,
) -> None:
    """Hands bytes 0 to `size_bytes` of a blob to `consume`, in order. Raises what either side raises."""
    if size_bytes <= piece_bytes:
        await consume(await reader.read_range(0, size_bytes))
        return
    try:
        async with trio.open_nursery() as nursery:
            sender, receiver = trio.open_memory_channel[bytes](0)
            nursery.start_soon(_read_all, reader, size_bytes, piece_bytes, sender)
            async with receiver:
                async for piece in receiver:
                    await consume(piece)
    except BaseExceptionGroup as group:
        raise first_failure(group) from None


async def _read_all(
    reader: BlobReader, size_bytes: int, piece_bytes: int, sender: trio.MemorySendChannel[bytes]
) -> None:
    async with sender:
        for offset in range(0, size_bytes, piece_bytes):
            piece = await reader.read_range(offset, min(piece_bytes, size_bytes - offset))
            try:
                await sender.send(piece)
            except trio.BrokenResourceError:
                return  # the consumer failed and says why


def first_failure(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure in a group: an error before a cancellation, since that is what the caller can act on."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            leaves.append(error)
    failures = [leaf for leaf in leaves if not isinstance(leaf, trio.Cancelled)]
    return (failures or leaves)[0]

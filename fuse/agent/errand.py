"""What the agent does for another host that waits for bytes which are not here: an owner brings them.

Concurrency: one task for each request of the upload server. Who asks for the same waits for
the same fetch.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import ClassVar

from backend.encoded import EncodedBlob
from backend.fetch import ChunkFetcher
from backend.peers.hub import PeerBlob
from backend.peers.mirror import complete
from backend.peers.swarm import Swarm
from backend.priority import FetchClass
from fuse.agent.upload_protocol import FetchRequest
from rafs.errors import NydusError


class NotServed(NydusError):
    """Another host cannot have what it asks for here."""

    message = "blob {blob_id}: {why}"
    exit_code: ClassVar[int] = 200


async def serve_decoded(swarm: Swarm, blob: PeerBlob, wanted: FetchRequest) -> None:
    """Returns when the first byte of a range of the decoded file is there. Raises `NydusError`."""
    fetcher = blob.fetchers[0]
    _check(wanted, blob.presence.grid.size_bytes)
    chunks = fetcher.decoded_map.chunks_in(wanted.offset, wanted.end - wanted.offset)
    await _bring(swarm, blob, fetcher, chunks, wanted)


async def serve_encoded(swarm: Swarm, blob: PeerBlob, wanted: FetchRequest) -> None:
    """The same of the encoded file; all of it has to be whole, and is not fetched for that."""
    fetcher = blob.fetchers[0]
    encoded = fetcher.origin.encoded
    if encoded is None:
        raise NotServed(blob_id=blob.blob_id[:12], why="its encoded bytes are not kept")
    _check(wanted, encoded.parts.size_bytes)
    if (wanted.offset, wanted.end) == (0, encoded.parts.size_bytes):
        if not await complete(fetcher):
            raise NotServed(blob_id=blob.blob_id[:12], why="its encoded bytes are not all here")
        return
    chunks = _chunks_behind(fetcher, wanted.offset, wanted.end)
    if any(fetcher.cached.is_ready(chunk) and not _is_kept(fetcher, encoded, chunk) for chunk in chunks):
        raise NotServed(blob_id=blob.blob_id[:12], why="some of it is here decoded only")
    await _bring(swarm, blob, fetcher, chunks, wanted)
    if not encoded.has(wanted.offset, wanted.offset + 1):
        raise NotServed(blob_id=blob.blob_id[:12], why="these encoded bytes are not here")


def _check(wanted: FetchRequest, size_bytes: int) -> None:
    if not 0 <= wanted.offset < wanted.end <= size_bytes:
        raise NotServed(blob_id=wanted.blob_id[:12], why="it has no such bytes")


async def _bring(
    swarm: Swarm, blob: PeerBlob, fetcher: ChunkFetcher, chunks: Sequence[int], wanted: FetchRequest
) -> None:
    missing = [chunk for chunk in chunks if not fetcher.cached.is_ready(chunk)]
    if not missing:
        return
    # Not as if it was read here: nothing around it is wanted.
    fetch_class = max(FetchClass(wanted.fetch_class), FetchClass.READAHEAD)
    if wanted.may_fetch and swarm.may_bring(blob.blob_id, blob.presence.piece_of(missing[0])):
        fetcher.begin(missing, fetch_class)
    elif not fetcher.is_arriving(missing[0]):
        raise NotServed(blob_id=blob.blob_id[:12], why="it is not here, and another host its owner")
    if await fetcher.ensure_chunks(missing[:1], fetch_class):
        raise NotServed(blob_id=blob.blob_id[:12], why="the disk of this host is full")


def _is_kept(fetcher: ChunkFetcher, encoded: EncodedBlob, chunk: int) -> bool:
    """Whether the encoded bytes of a chunk are here."""
    extent = fetcher.meta.extent(chunk)
    return encoded.has(extent.compressed_offset, extent.compressed_offset + extent.compressed_size)


def _chunks_behind(fetcher: ChunkFetcher, offset: int, end: int) -> range:
    """The chunks that bytes `offset` to `end` of the encoded blob decode to.

    For blobs whose chunks lie in the order of their numbers, as in images of every known builder; others have
    their encoded bytes served only where they are kept already.
    """

    def start_of(chunk: int) -> int:
        return fetcher.meta.chunk(chunk).compressed_offset

    numbers = range(fetcher.chunk_count)
    last_before = max(0, bisect_right(numbers, offset, key=start_of) - 1)
    first = bisect_left(numbers, start_of(last_before), key=start_of)  # of its batch
    return range(first, bisect_right(numbers, end - 1, key=start_of))

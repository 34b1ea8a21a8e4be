"""A blob in memory that keeps the `BlobReader` contract: a test double that can be slow, wrong or gone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from backend.contract import BackendError, ShortRead
from rafs.blob_table import BlobEntry, BlobFeatures
from rafs.blobmeta import BatchContext, BlobMeta, BlobMetaHeader, ChunkInfo, node_form, pack_array
from rafs.codec import Compressor, compress
from rafs.digest import Digester
from rafs.record import BLOCK_SIZE, round_up


class MemoryBlobReader:
    """Serves `data`; what it is asked for stands in `requests` as (offset, length).

    `hold()` makes requests wait until `release()`. `script` may raise an error for a request or change its
    bytes: it is called with the number of the request (from 0), its offset and the true bytes.
    """

    def __init__(self, data: bytes, name: str = "memory") -> None:
        self.data = data
        self.requests: list[tuple[int, int]] = []
        self.script: Callable[[int, int, bytes], bytes] = lambda number, offset, data: data
        self._name = name
        self._open_gate = trio.Event()
        self._open_gate.set()
        self._arrivals = trio.Condition()
        self._closed = False

    def hold(self) -> None:
        """Lets further requests wait."""
        self._open_gate = trio.Event()

    def release(self) -> None:
        """Lets all requests go on."""
        self._open_gate.set()

    async def wait_requests(self, count: int) -> None:
        """Returns when at least `count` requests have come in."""
        async with self._arrivals:
            while len(self.requests) < count:
                await self._arrivals.wait()

    async def size(self) -> int:
        """Length of the blob in bytes."""
        await trio.lowlevel.checkpoint()
        self._check_open()
        return len(self.data)

    async def read_range(self, offset: int, length: int) -> bytes:
        """See `BlobReader.read_range`."""
        if offset < 0 or length < 0:
            raise ValueError("a range starts at 0 or later and is not negative")
        number = len(self.requests)
        self.requests.append((offset, length))
        async with self._arrivals:
            self._arrivals.notify_all()
        await self._open_gate.wait()
        self._check_open()
        data = self.script(number, offset, self.data[offset : offset + length])
        if len(data) != length:
            raise ShortRead(where=self._name, length=length, offset=offset, got=len(data))
        return data

    async def aclose(self) -> None:
        """Reads fail from now on."""
        await trio.lowlevel.checkpoint()
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError(where=self._name, why="the reader is closed")


@dataclass(frozen=True, slots=True)
class MemoryBlob:
    """A blob that was never in a file: the encoded bytes and all that describes them."""

    data: bytes
    entry: BlobEntry
    meta: BlobMeta
    digests: tuple[bytes, ...]


def make_memory_blob(
    groups: Sequence[bytes | Sequence[bytes]], compressor: Compressor = Compressor.ZSTD
) -> MemoryBlob:
    """A blob of these chunks, in this order; chunks that stand in a sequence share one batch."""
    encoded, infos, digests = bytearray(), [], []
    batches: list[BatchContext] = []
    decoded_end = 0
    for group in groups:
        members = [group] if isinstance(group, bytes) else list(group)
        unit = b"".join(members)
        body = compress(compressor, unit)
        is_batch = not isinstance(group, bytes)
        at = 0
        for member in members:
            infos.append(
                ChunkInfo(
                    compressed_offset=len(encoded),
                    compressed_size=0 if is_batch else len(body),
                    uncompressed_offset=decoded_end,
                    uncompressed_size=len(member),
                    is_compressed=compressor is not Compressor.NONE,
                    is_batch=is_batch,
                    batch_index=len(batches) if is_batch else 0,
                    offset_in_batch=at if is_batch else 0,
                )
            )
            digests.append(Digester.BLAKE3.digest(member))
            at += len(member)
            decoded_end = round_up(decoded_end + len(member), BLOCK_SIZE)
        if is_batch:
            batches.append(BatchContext(len(body), len(unit)))
        encoded += body
    array = pack_array(infos, batches)
    contexts = len(batches) * 40
    features = BlobFeatures.ALIGNED | BlobFeatures.CHUNK_INFO_V2 | BlobFeatures.BATCH
    header = BlobMetaHeader(
        features, 0, len(infos), 0, len(array), len(array), len(array) - contexts, contexts, len(batches)
    )
    blob_id = Digester.SHA256.digest(bytes(encoded)).hex()
    entry = BlobEntry(
        blob_id=blob_id,
        index=0,
        chunk_size=1 << 20,
        chunk_count=len(infos),
        compressor=compressor,
        digester=Digester.BLAKE3,
        features=features,
        compressed_size=len(encoded),
        uncompressed_size=decoded_end,
        toc_size=0,
        ci_compressor=Compressor.NONE,
        ci_offset=len(encoded),
        ci_compressed_size=len(array),
        ci_uncompressed_size=len(array),
    )
    return MemoryBlob(bytes(encoded), entry, BlobMeta(node_form(array, header)), tuple(digests))

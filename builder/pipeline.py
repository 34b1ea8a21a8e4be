"""Reading, digesting, dedup, compressing and writing at the same time, with a result that does not depend on
time.

Work goes through in numbered tasks of one arena slot each. Workers read and digest in any order; the parent
takes the results in order, decides which chunks are new and which of them form an extent, and gives every
chunk its place. Workers encode; the parent writes in order. All decisions are taken in order, so the image is
the same on any number of workers. A slot is free again when its extents are written, and that bounds the
memory.
"""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from builder.assembly import Assembly
from builder.blob_writer import NewChunk, PlacedExtent
from builder.crew import Crew
from builder.directory import FileStamp
from builder.journal import extent_key
from builder.worker import CompressResult, CompressTask, Piece, RawExtent, ReadResult, ReadTask, Segment
from rafs.record import BLOCK_SIZE, round_up

PIECES_MAX = 512
PATH_BYTES_MAX = 64 << 10
"""Limits of one task, so that a message always fits a socket's buffer and neither side blocks on sending."""


@dataclass(slots=True)
class PipelineCounters:
    """What went through so far. Bytes are those of files before encoding, but for `bytes_out`."""

    files: int = 0
    bytes_in: int = 0
    bytes_unique: int = 0
    bytes_out: int = 0
    chunks: int = 0
    chunks_unique: int = 0
    extents_reused: int = 0


@dataclass(frozen=True, slots=True)
class _Part:
    """A range of a file in a slot: its length, the file's row and the number of its first address."""

    length: int
    row: int
    first_address: int
    is_whole: bool


@dataclass(slots=True)
class _Load:
    """A task under way."""

    sequence: int
    slot: int
    parts: list[_Part] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    used: int = 0
    path_bytes: int = 0
    extents: list[PlacedExtent] = field(default_factory=list)
    reused: dict[int, bytes] = field(default_factory=dict)
    raw: list[RawExtent] = field(default_factory=list)


class ChunkPipeline:
    """Takes ranges of files and fills in `addresses`, one packed chunk address per chunk."""

    def __init__(
        self,
        assembly: Assembly,
        crew: Crew,
        addresses: "array[int]",
        on_xattrs: Callable[[int, dict[bytes, bytes]], None],
        on_progress: Callable[[PipelineCounters], None],
    ) -> None:
        """`on_xattrs` is called with a row and the extended attributes that a worker found on its file."""
        self.counters = PipelineCounters()
        self._options = assembly.options
        self._crew = crew
        self._dedup = assembly.dedup
        self._rows = assembly.rows
        self._dictionary = assembly.dictionary
        self._writer = assembly.writer
        self._work = assembly.work
        self._addresses = addresses
        self._on_xattrs = on_xattrs
        self._on_progress = on_progress
        self._free_slots = list(range(crew.slot_count))
        self._loads: dict[int, _Load] = {}
        self._current: _Load | None = None
        self._next_sequence = 0
        self._next_to_place = 0
        self._next_to_write = 0
        self._reads: dict[int, ReadResult] = {}
        self._encoded: dict[int, CompressResult] = {}

    def room(self) -> int:
        """Bytes that the next range may have: whole chunks, at least one."""
        load = self._current
        free = self._crew.slot_size - load.used if load else self._crew.slot_size
        whole = free // self._options.chunk_size * self._options.chunk_size
        if load is not None and (
            not whole or len(load.parts) >= PIECES_MAX or load.path_bytes > PATH_BYTES_MAX
        ):
            self._submit()
            return self.room()
        return whole

    def add_piece(self, piece: Piece, row: int, first_address: int) -> None:
        """Has a worker read a range of a file."""
        load = self._load_for(piece.length)
        load.pieces.append(piece)
        load.path_bytes += len(piece.path)
        self._add_part(
            load, _Part(piece.length, row, first_address, piece.length == piece.size), piece.offset
        )

    def reserve(self, size: int) -> int:
        """Room for the addresses of a file of `size` bytes; returns the number of the first."""
        start = len(self._addresses)
        self._addresses.frombytes(bytes(8 * -(-size // self._options.chunk_size)))
        return start

    def add_file(self, stamp: FileStamp, first_address: int) -> None:
        """Has workers read a whole file."""
        size, chunk_size = stamp.size, self._options.chunk_size
        offset = 0
        while offset < size or offset == 0:
            length = size - offset if size <= chunk_size else min(size - offset, self.room())
            piece = Piece(stamp.path, offset, length, size, stamp.mtime_ns, stamp.ctime_ns, stamp.sparse)
            self.add_piece(piece, stamp.row, first_address + offset // chunk_size)
            offset += max(length, 1)

    def ranges(self, size: int, first_address: int) -> Iterator[tuple[int, memoryview]]:
        """Offset and memory of each range of a file of `size` bytes, for the caller to fill one by one."""
        chunk_size = self._options.chunk_size
        self.counters.files += size == 0
        offset = 0
        while offset < size:
            length = size if size <= chunk_size else min(size - offset, self.room())
            yield offset, self.add_bytes(length, offset, size, first_address + offset // chunk_size)
            offset += length

    def add_bytes(self, length: int, offset: int, size: int, first_address: int) -> memoryview:
        """Memory for bytes `offset`.. of a file of `size` bytes, to be filled before the next call."""
        load = self._load_for(length)
        start = load.used
        self._add_part(load, _Part(length, 0, first_address, length == size), offset)
        return self._crew.slot(load.slot)[start : start + length]

    def finish(self) -> None:
        """Waits until everything is written."""
        self._submit()
        while self._loads:
            self._pump()

    def _load_for(self, length: int) -> _Load:
        if self._current is not None and (
            self._current.used + length > self._crew.slot_size
            or len(self._current.parts) >= PIECES_MAX
            or self._current.path_bytes > PATH_BYTES_MAX
        ):
            self._submit()
        if self._current is None:
            while not self._free_slots:
                self._pump()
            self._current = _Load(self._next_sequence, self._free_slots.pop())
            self._loads[self._next_sequence] = self._current
            self._next_sequence += 1
        return self._current

    def _add_part(self, load: _Load, part: _Part, offset: int) -> None:
        load.parts.append(part)
        load.used += part.length
        self.counters.files += offset == 0
        self.counters.bytes_in += part.length

    def _submit(self) -> None:
        load, self._current = self._current, None
        if load is not None:
            lengths = [part.length for part in load.parts]
            self._crew.submit(ReadTask(load.sequence, load.slot, load.pieces or None, lengths))

    def _pump(self) -> None:
        for result in self._crew.collect():
            if isinstance(result, ReadResult):
                self._reads[result.sequence] = result
            else:
                self._encoded[result.sequence] = result
        while (read := self._reads.pop(self._next_to_place, None)) is not None:
            self._place(self._loads[self._next_to_place], read)
            self._next_to_place += 1
        while (encoded := self._encoded.pop(self._next_to_write, None)) is not None:
            self._write(self._loads.pop(self._next_to_write), encoded)
            self._next_to_write += 1

    def _place(self, load: _Load, read: ReadResult) -> None:
        """Decides on the chunks of a task that was read, and sends what is new to be encoded."""
        for index, xattrs in read.xattrs.items():
            self._on_xattrs(load.parts[index].row, xattrs)
        chunks = list(self._chunks(load, read))
        if self._dictionary:
            for _, chunk in chunks:
                self._dictionary.offer(chunk.digest, self._dedup, self._rows)
        new = [chunk for _, chunk in chunks if self._dedup.claim(chunk.digest)]
        for group in self._group(new):
            self._place_extent(load, group)
        for position, chunk in chunks:
            self._addresses[position] = self._dedup.address(chunk.digest)
        self.counters.chunks += len(chunks)
        self.counters.chunks_unique += len(new)
        self.counters.bytes_unique += sum(chunk.size for chunk in new)
        if load.raw:
            self._crew.submit(CompressTask(load.sequence, load.slot, load.raw))
        else:
            self._encoded[load.sequence] = CompressResult(load.sequence, [])

    def _chunks(self, load: _Load, read: ReadResult) -> Iterator[tuple[int, NewChunk]]:
        """Each chunk of a task with the number of its address."""
        chunk_size, limit = self._options.chunk_size, self._options.batch_limit
        slot_offset = number = 0
        for part in load.parts:
            batchable = part.is_whole and part.length < limit
            for start in range(0, part.length, chunk_size):
                size = min(chunk_size, part.length - start)
                digest = read.digests[32 * number : 32 * number + 32]
                yield (
                    part.first_address + start // chunk_size,
                    NewChunk(digest, slot_offset + start, size, read.checksums[number], batchable),
                )
                number += 1
            slot_offset += part.length

    def _group(self, chunks: list[NewChunk]) -> Iterator[list[NewChunk]]:
        """Extents of the new chunks of one task: small ones in batches, the others one by one."""
        batch: list[NewChunk] = []
        filled = 0
        for chunk in chunks:
            if not chunk.batchable:
                yield [chunk]
                continue
            if filled + chunk.size > self._options.batch_size:
                yield batch
                batch, filled = [], 0
            batch.append(chunk)
            filled += chunk.size
        if batch:
            yield batch

    def _place_extent(self, load: _Load, chunks: list[NewChunk]) -> None:
        key = extent_key(b"".join(chunk.digest for chunk in chunks), self._options)
        extent = self._writer.place(chunks, key)
        block = extent.uncompressed_offset // BLOCK_SIZE
        for number, chunk in enumerate(chunks, start=extent.first_chunk):
            self._dedup.place(chunk.digest, number, block)
            block += round_up(chunk.size, BLOCK_SIZE) // BLOCK_SIZE
        stored = self._work.find(key)
        if stored is None:
            segments = _join([(chunk.slot_offset, chunk.size) for chunk in chunks])
            load.raw.append(RawExtent(segments, len(chunks) > 1))
        else:
            load.reused[len(load.extents)] = stored
            self.counters.extents_reused += 1
        load.extents.append(extent)

    def _write(self, load: _Load, encoded: CompressResult) -> None:
        slot = self._crew.slot(load.slot)
        sizes = iter(zip(load.raw, encoded.sizes, strict=True))
        for index, extent in enumerate(load.extents):
            stored = load.reused.get(index)
            if stored is not None:
                self._writer.append(extent, [memoryview(stored)])
                continue
            raw, (size, _) = next(sizes)
            self._writer.append(extent, _cut(slot, raw.segments, size))
        self.counters.bytes_out = self._writer.compressed_size
        self._free_slots.append(load.slot)
        self._on_progress(self.counters)


def _join(segments: list[Segment]) -> list[Segment]:
    """Segments that touch, as one."""
    joined = segments[:1]
    for offset, length in segments[1:]:
        last_offset, last_length = joined[-1]
        if last_offset + last_length == offset:
            joined[-1] = (last_offset, last_length + length)
        else:
            joined.append((offset, length))
    return joined


def _cut(slot: memoryview, segments: list[Segment], size: int) -> list[memoryview]:
    """The first `size` bytes of the segments."""
    parts = []
    for offset, length in segments:
        part = slot[offset : offset + min(length, size)]
        size -= len(part)
        if part:
            parts.append(part)
    return parts

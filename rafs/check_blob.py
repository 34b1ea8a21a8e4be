"""Checks of one blob: its chunk infos against the bootstrap, and its encoded bytes against their digests."""

from array import array
from collections.abc import Iterator

from rafs.blob_table import BlobEntry, BlobFeatures
from rafs.blobmeta import BlobMeta, ChunkInfo
from rafs.blobmeta_header import header_differences
from rafs.check_fault import Fault
from rafs.check_tables import FOREIGN_SIZES
from rafs.chunk import ChunkDigests, ChunkFlags
from rafs.codec import CodecError
from rafs.content import decode_extent
from rafs.digest import crc32c
from rafs.record import Buffer, FormatError

_STRUCTURE = BlobFeatures.CHUNK_INFO_V2 | BlobFeatures.ZRAN | BlobFeatures.BATCH | BlobFeatures.ENCRYPTED
"""Features that decide how a blob.meta is read."""


def check_blob_meta(blob: BlobEntry, meta: BlobMeta, digests: ChunkDigests | None) -> Iterator[Fault]:
    """Each chunk info by itself, against its neighbours, and against the rows of the bootstrap.

    `digests` is None where the bootstrap has no chunk table. Offsets in faults are into the node-side file.
    """
    at = meta.count * meta.header.entry_size
    for difference in header_differences(meta.header, blob):
        yield Fault(f"blob.meta header of {blob.blob_id[:12]}", at, difference)
    if (blob.features ^ meta.header.features) & _STRUCTURE:
        features, found = int(blob.features), int(meta.header.features)
        wanted = f"features {features:#x} as in the blob table, found {found:#x}"
        yield Fault(f"blob.meta header of {blob.blob_id[:12]}", at, wanted)
        return
    spans = _Spans()
    for index in range(meta.count):
        chunk = meta.chunk(index)
        at = index * meta.header.entry_size
        spans.add(chunk)
        for wrong in _wrong_chunk(blob, meta, chunk):
            yield Fault(f"chunk info {index}", at, wrong)
        if digests is not None:
            wrong_row = _wrong_row(blob, chunk, digests, index)
            if wrong_row:
                yield Fault(f"chunk info {index}", at, wrong_row)
    for index in spans.overlaps():
        wanted = "decoded bytes of its own, shares some with another chunk"
        yield Fault(f"chunk info {index}", index * meta.header.entry_size, wanted)


def is_decodable(blob: BlobEntry) -> bool:
    """Whether `check_extent` can decode the blob: encrypted chunks and plain tar files it cannot."""
    return not blob.features & (BlobFeatures.ENCRYPTED | BlobFeatures.TARFS)


def extents_of(meta: BlobMeta) -> Iterator[range]:
    """Chunk numbers of each unit of decoding, in order: what `check_extent` takes one by one."""
    index = 0
    while index < meta.count:
        chunks = meta.batch_range(index)
        yield chunks
        index = chunks.stop


def check_extent(
    blob: BlobEntry, meta: BlobMeta, digests: ChunkDigests | None, chunks: range, encoded: Buffer
) -> Iterator[Fault]:
    """Decodes one unit and compares size, digest and checksum of each of its chunks.

    The blob has to be one of those that `is_decodable` names.

    `chunks` is from `extents_of` or `BlobMeta.batch_range`, `encoded` the bytes of `meta.extent(chunks[0])`.
    Offsets in the faults are into the blob. A chunk of which the bootstrap has no digest, as of chunks in a
    dictionary blob that this image does not use, is decoded only.
    """
    extent = meta.extent(chunks[0])
    where = extent.compressed_offset
    record = f"chunk {chunks[0]} of blob {blob.blob_id[:12]}"
    if len(encoded) != extent.compressed_size:
        yield Fault(record, where, f"{extent.compressed_size} encoded bytes, found {len(encoded)}")
        return
    try:
        view = decode_extent(
            blob, meta, chunks[0], encoded, extent.uncompressed_size, is_compressed=extent.is_compressed
        )
    except (CodecError, FormatError) as error:
        yield Fault(record, where, f"{extent.uncompressed_size} decoded bytes: {error}")
        return
    for index in chunks:
        chunk = meta.chunk(index)
        content = view[chunk.offset_in_batch : chunk.offset_in_batch + chunk.uncompressed_size]
        digest = digests.find(index) if digests is not None else None
        for wrong in _wrong_content(blob, chunk, content, digest):
            yield Fault(f"chunk {index} of blob {blob.blob_id[:12]}", where, wrong)


def _wrong_content(
    blob: BlobEntry, chunk: ChunkInfo, content: memoryview, digest: bytes | None
) -> Iterator[str]:
    if len(content) != chunk.uncompressed_size:
        yield f"{chunk.uncompressed_size} decoded bytes, found {len(content)}"
        return
    if digest is not None:
        found = blob.digester.digest(content)
        if found != digest:
            yield f"{blob.digester.name.lower()} digest {digest.hex()}, found {found.hex()}"
    if chunk.crc32c is not None:
        checksum = crc32c(content)
        if checksum != chunk.crc32c:
            yield f"CRC-32C {chunk.crc32c:#010x}, found {checksum:#010x}"


def _wrong_chunk(blob: BlobEntry, meta: BlobMeta, chunk: ChunkInfo) -> Iterator[str]:
    try:
        extent = meta.extent_of(chunk)
    except FormatError as error:
        yield error.expectation
        return
    end = extent.compressed_offset + extent.compressed_size
    if end > blob.data_end:
        yield f"encoded bytes before {blob.data_end}, found {extent.compressed_offset} to {end}"
    decoded_end = chunk.uncompressed_offset + chunk.uncompressed_size
    if chunk.uncompressed_size > blob.chunk_size or decoded_end > blob.uncompressed_size:
        yield (
            f"at most {blob.chunk_size} decoded bytes before {blob.uncompressed_size}, "
            f"found {chunk.uncompressed_offset} to {decoded_end}"
        )
    if chunk.is_shared:
        if chunk.offset_in_batch + chunk.uncompressed_size > extent.uncompressed_size:
            unit = "context" if chunk.is_zran else "batch"
            yield (
                f"{chunk.uncompressed_size} bytes inside a {unit} of {extent.uncompressed_size}, "
                f"found them at {chunk.offset_in_batch}"
            )
    elif _is_misfit(blob, chunk):
        size = chunk.uncompressed_size
        yield f"{size} encoded bytes as it is not compressed, found {chunk.compressed_size}"


def _is_misfit(blob: BlobEntry, chunk: ChunkInfo) -> bool:
    plain = not chunk.is_compressed and not blob.features & FOREIGN_SIZES
    return plain and chunk.compressed_size != chunk.uncompressed_size


def _wrong_row(blob: BlobEntry, chunk: ChunkInfo, digests: ChunkDigests, index: int) -> str | None:
    """How the bootstrap's chunk table disagrees; None when it does not or knows nothing of the chunk."""
    if digests.find(index) is None:
        return None
    row = digests.row(index)
    compared: list[tuple[str, int | bool, int | bool]] = [
        ("encoded offset", row.compressed_offset, chunk.compressed_offset),
        ("decoded offset", row.uncompressed_offset, chunk.uncompressed_offset),
        ("decoded size", row.uncompressed_size, chunk.uncompressed_size),
        ("batch flag", bool(row.flags & ChunkFlags.BATCH), chunk.is_batch),
    ]
    if not chunk.is_batch:
        compared.append(("encoded size", row.compressed_size, chunk.compressed_size))
        if not blob.features & BlobFeatures.ZRAN:
            compared.append(("compressed flag", bool(row.flags & ChunkFlags.COMPRESSED), chunk.is_compressed))
        if chunk.crc32c is not None and row.flags & ChunkFlags.HAS_CRC32:
            compared.append(("CRC-32C", row.crc32, chunk.crc32c))
    wrong = [f"{what} {wanted}, found {found}" for what, wanted, found in compared if wanted != found]
    return "as in the chunk table " + ", ".join(wrong) if wrong else None


class _Spans:
    """Decoded bytes of chunks; 16 bytes of memory for each."""

    def __init__(self) -> None:
        self._starts = array("Q")
        self._ends = array("Q")

    def add(self, chunk: ChunkInfo) -> None:
        self._starts.append(chunk.uncompressed_offset)
        self._ends.append(chunk.uncompressed_offset + chunk.uncompressed_size)

    def overlaps(self) -> Iterator[int]:
        """Numbers of chunks that start before another one ends that starts before them."""
        end = 0
        for index in sorted(range(len(self._starts)), key=self._starts.__getitem__):
            if self._starts[index] < end:
                yield index
            end = max(end, self._ends[index])

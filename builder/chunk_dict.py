"""Chunks of other images that a build need not store again."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from builder.dedup import DedupIndex
from builder.row_spool import RowSpool
from builder.sorted_rows import SortedRows
from rafs.blob_table import BLOBS_MAX, BlobEntry, BlobFeatures
from rafs.bootstrap import Bootstrap
from rafs.chunk import ROW_SIZE, ChunkRow, at_blob
from rafs.errors import NydusError


class DictionaryMismatch(NydusError):
    """A dictionary image whose chunks cannot stand for the build's own."""

    message = "{reference}: cannot serve as chunk dictionary: {why}"
    exit_code: ClassVar[int] = 54


@dataclass(frozen=True, slots=True)
class DictionaryBlob:
    """A blob of a dictionary image, where its blob.meta is on this host, and the image that holds it."""

    entry: BlobEntry
    meta: Path
    reference: str


@dataclass(frozen=True, slots=True)
class DictionaryImage:
    """An image given by `--chunk-dict`: its reference, and its metadata on this host."""

    reference: str
    bootstrap: Path
    metas: dict[str, Path]


@dataclass(frozen=True, slots=True)
class _Table:
    """Rows of one image, and the number in the dictionary of each blob that they name."""

    rows: SortedRows
    blobs: list[int]


class ChunkDictionary:
    """All dictionary images of a build. Blobs enter the new image only when one of their chunks is used.

    Chunk tables stay where they are; their files are open until `close`.
    """

    def __init__(
        self, images: tuple[DictionaryImage, ...], chunk_size: int, digester: int, work_dir: Path
    ) -> None:
        """Tables that are not sorted are sorted into `work_dir`.

        Raises `DictionaryMismatch` for an image with another chunk size or digest, or with broken rows.
        """
        self._tables: list[_Table] = []
        self._blobs: list[DictionaryBlob] = []
        self._used: dict[int, int] = {}
        with contextlib.ExitStack() as stack:
            for image in images:
                offset, count, numbers = self._load_blobs(image, chunk_size, digester)
                file = stack.enter_context(image.bootstrap.open("rb", buffering=0))
                rows = SortedRows(file, offset, count)
                if any(max(block[32::ROW_SIZE]) >= len(numbers) for block in rows.blocks()):
                    raise DictionaryMismatch(
                        reference=image.reference, why=f"its chunks name more than its {len(numbers)} blobs"
                    )
                if not rows.is_sorted():
                    rows = SortedRows(stack.enter_context(rows.write_sorted(work_dir)), 0, count)
                self._tables.append(_Table(rows, numbers))
            self._files = stack.pop_all()

    def __len__(self) -> int:
        return sum(len(table.rows) for table in self._tables)

    @property
    def used_blobs(self) -> list[DictionaryBlob]:
        """Blobs whose chunks the new image refers to, in the order of their index there, from 1 on."""
        return [self._blobs[number] for number in self._used]

    def offer(self, digest: bytes, dedup: DedupIndex, rows: RowSpool) -> None:
        """Makes a new chunk known to `dedup` when a dictionary has it and the image has room for its blob."""
        if digest in dedup:
            return
        found = self._find(digest)
        if found is None:
            return
        number, raw = found
        index = self._used.get(number)
        if index is None:
            if len(self._used) + 1 >= BLOBS_MAX:
                return
            index = self._used[number] = len(self._used) + 1
        row = ChunkRow.unpack(raw, 0)
        dedup.place_dictionary_chunk(digest, index, row)
        rows.append(at_blob(raw, index))

    def close(self) -> None:
        """Closes the tables; `used_blobs` stays."""
        self._tables.clear()
        self._files.close()

    def _find(self, digest: bytes) -> tuple[int, bytes] | None:
        """The number of a blob and the packed row of a chunk in it; of several images, the first one's."""
        for table in self._tables:
            row = table.rows.find(digest)
            if row is not None:
                return table.blobs[row[32]], row
        return None

    def _load_blobs(
        self, image: DictionaryImage, chunk_size: int, digester: int
    ) -> tuple[int, int, list[int]]:
        """Offset in bytes and number of an image's rows, and the number here of each of its blobs."""
        with Bootstrap.open(image.bootstrap) as bootstrap:
            if bootstrap.chunk_size != chunk_size or bootstrap.digester != digester:
                raise DictionaryMismatch(
                    reference=image.reference,
                    why=f"it has {bootstrap.chunk_size}-byte chunks with {bootstrap.digester.name} digests",
                )
            known = {blob.entry.blob_id: number for number, blob in enumerate(self._blobs)}
            numbers = []
            for blob in bootstrap.blobs:
                if blob.features & (BlobFeatures.ENCRYPTED | BlobFeatures.SEPARATE | BlobFeatures.EXTERNAL):
                    raise DictionaryMismatch(
                        reference=image.reference, why=f"blob {blob.blob_id} is no native one"
                    )
                if blob.blob_id not in known:
                    known[blob.blob_id] = len(self._blobs)
                    self._blobs.append(DictionaryBlob(blob, image.metas[blob.blob_id], image.reference))
                numbers.append(known[blob.blob_id])
            with bootstrap.chunk_table as rows:
                return bootstrap.extended.chunk_table_offset, len(rows) // ROW_SIZE, numbers

"""Chunks of other images that a build need not store again."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from builder.dedup import DedupIndex
from builder.row_spool import RowSpool
from rafs.blob_table import BLOBS_MAX, BlobEntry, BlobFeatures
from rafs.bootstrap import Bootstrap
from rafs.chunk import ROW, ROW_SIZE, ChunkRow
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


class ChunkDictionary:
    """All dictionary images of a build. Blobs enter the new image only when one of their chunks is used."""

    def __init__(self, images: tuple[DictionaryImage, ...], chunk_size: int, digester: int) -> None:
        """Raises `DictionaryMismatch` for an image with another chunk size or digest."""
        self._rows: dict[bytes, tuple[int, bytes]] = {}
        self._blobs: list[DictionaryBlob] = []
        self._used: dict[int, int] = {}
        for image in images:
            self._load(image, chunk_size, digester)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def used_blobs(self) -> list[DictionaryBlob]:
        """Blobs whose chunks the new image refers to, in the order of their index there, from 1 on."""
        return [self._blobs[number] for number in self._used]

    def offer(self, digest: bytes, dedup: DedupIndex, rows: RowSpool) -> None:
        """Makes a new chunk known to `dedup` when a dictionary has it and the image has room for its blob."""
        found = self._rows.get(digest)
        if found is None or digest in dedup:
            return
        number, raw = found
        index = self._used.get(number)
        if index is None:
            if len(self._used) + 1 >= BLOBS_MAX:
                return
            index = self._used[number] = len(self._used) + 1
        row = ChunkRow.unpack(raw, 0)
        dedup.place_dictionary_chunk(digest, index, row)
        rows.append(_with_blob(raw, index))

    def _load(self, image: DictionaryImage, chunk_size: int, digester: int) -> None:
        with Bootstrap.open(image.bootstrap) as bootstrap:
            if bootstrap.chunk_size != chunk_size or bootstrap.digester != digester:
                raise DictionaryMismatch(
                    reference=image.reference,
                    why=f"it has {bootstrap.chunk_size}-byte chunks with {bootstrap.digester.name} digests",
                )
            base = len(self._blobs)
            known = {blob.entry.blob_id: number for number, blob in enumerate(self._blobs)}
            numbers = []
            for blob in bootstrap.blobs:
                if blob.features & (BlobFeatures.ENCRYPTED | BlobFeatures.SEPARATE | BlobFeatures.EXTERNAL):
                    raise DictionaryMismatch(
                        reference=image.reference, why=f"blob {blob.blob_id} is no native one"
                    )
                if blob.blob_id not in known:
                    known[blob.blob_id] = base
                    base += 1
                    self._blobs.append(DictionaryBlob(blob, image.metas[blob.blob_id], image.reference))
                numbers.append(known[blob.blob_id])
            for row in map(bytes, bootstrap.chunk_rows()):  # copies: no view may outlive the map
                self._rows.setdefault(row[:32], (numbers[row[32]], row))


def _with_blob(raw: bytes, index: int) -> bytes:
    fields = ROW.unpack(raw)
    return ROW.pack(fields[0], index, *fields[2:])


assert ROW.size == ROW_SIZE

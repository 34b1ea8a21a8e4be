"""Small but complete RAFS images for tests: a tree in memory becomes a bootstrap, blobs and blob.metas."""

import hashlib
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from rafs.blob_table import BlobEntry, BlobFeatures
from rafs.blobmeta import BATCH_CONTEXT, BatchContext, BlobMetaHeader, ChunkInfo, node_form, pack_array
from rafs.chunk import ChunkFlags, ChunkRow, pack_address
from rafs.codec import Compressor, compress
from rafs.digest import Digester, crc32c
from rafs.inode_table import Attributes, InodeTable
from rafs.record import BLOCK_SIZE, round_up
from rafs.writer import BootstrapContent, write_bootstrap
from rafs.xattr import pack_xattrs

FEATURES = BlobFeatures.ALIGNED | BlobFeatures.CHUNK_INFO_V2 | BlobFeatures.CAP_TAR_TOC


@dataclass(frozen=True, slots=True)
class Node:
    """A file of a tree: its content, its target or its children, by the type in `attributes.mode`."""

    attributes: Attributes
    content: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    children: "Mapping[bytes, Node | Link]" = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Link:
    """Another name of the regular file at the absolute path `to`."""

    to: bytes


def directory(children: "Mapping[bytes, Node | Link]", mode: int = 0o755, **attributes: int) -> Node:
    """A directory."""
    return Node(Attributes(stat.S_IFDIR | mode, **attributes), children=children)


def file(content: bytes, xattrs: dict[bytes, bytes] | None = None, mode: int = 0o644, **more: int) -> Node:
    """A regular file."""
    return Node(Attributes(stat.S_IFREG | mode, size=len(content), **more), content, xattrs or {})


def symlink(target: bytes) -> Node:
    """A symbolic link."""
    return Node(Attributes(stat.S_IFLNK | 0o777, size=len(target)), target)


def special(kind: int, rdev: int = 0) -> Node:
    """A device, fifo or socket."""
    return Node(Attributes(kind | 0o600, rdev=rdev))


@dataclass(slots=True)
class MadeBlob:
    """A blob as it grows: encoded bytes, decoded bytes and the chunk infos."""

    data: bytearray = field(default_factory=bytearray)
    decoded: bytearray = field(default_factory=bytearray)
    infos: list[ChunkInfo] = field(default_factory=list)
    batches: list[BatchContext] = field(default_factory=list)
    batch: list[int] = field(default_factory=list)
    meta: bytes = b""


@dataclass(frozen=True, slots=True)
class MadeImage:
    """A finished image. `decoded` is what a cache file or an EROFS device holds, one for each blob."""

    bootstrap: bytes
    entries: tuple[BlobEntry, ...]
    blobs: tuple[MadeBlob, ...]

    def write_devices(self, folder: Path) -> list[Path]:
        """Writes the decoded blobs and returns their paths in device order."""
        paths = []
        for entry, blob in zip(self.entries, self.blobs, strict=True):
            path = folder / f"{entry.blob_id}.{entry.index}.data"
            path.write_bytes(blob.decoded)
            paths.append(path)
        return paths


@dataclass(frozen=True, slots=True)
class Options:
    """How an image is made."""

    chunk_size: int = BLOCK_SIZE
    blob_count: int = 1
    compressor: Compressor = Compressor.ZSTD
    digester: Digester = Digester.BLAKE3
    batch: bool = False
    prefetch: tuple[bytes, ...] = ()


class ImageMaker:
    """Lays out one tree. Files go to the blobs in turn; equal chunks are stored once."""

    def __init__(self, root: Node, options: Options = Options()) -> None:
        self._options = options
        self._root = root
        self._blobs = [MadeBlob() for _ in range(options.blob_count)]
        self._rows: list[ChunkRow] = []
        self._known: dict[bytes, ChunkRow] = {}
        self._by_path: dict[bytes, int] = {b"/": 0}
        self._files = 0
        self.table = InodeTable(root.attributes)

    def make(self, path: Path) -> MadeImage:
        """Writes the bootstrap at `path` and returns the whole image."""
        self._add_tree()
        for index, blob in enumerate(self._blobs):
            self._close_batch(blob, index)
        entries = tuple(self._finish(blob, index) for index, blob in enumerate(self._blobs))
        write_bootstrap(
            path,
            BootstrapContent(
                self.table,
                entries,
                [row.pack() for row in sorted(self._rows, key=lambda row: (row.digest, row.blob_index))],
                self._options.chunk_size,
                self._options.compressor,
                self._options.digester,
                [self._by_path[name] for name in self._options.prefetch],
            ),
        )
        return MadeImage(path.read_bytes(), entries, tuple(self._blobs))

    def _add_tree(self) -> None:
        links: list[tuple[int, bytes]] = []
        pending: list[tuple[int, bytes, Node]] = [(0, b"/", self._root)]
        self._describe(0, self._root)
        for row, path, node in pending:
            self.table.begin_children(row)
            for name in sorted(node.children):
                child = node.children[name]
                where = path.rstrip(b"/") + b"/" + name
                if isinstance(child, Link):
                    mode = Attributes(stat.S_IFREG)
                    links.append((self.table.add_child(row, name, mode), child.to))
                    continue
                child_row = self.table.add_child(row, name, child.attributes)
                self._by_path[where] = child_row
                self._describe(child_row, child)
                if stat.S_ISDIR(child.attributes.mode):
                    pending.append((child_row, where, child))
        for row, target in links:
            self.table.link(row, self._by_path[target])

    def _describe(self, row: int, node: Node) -> None:
        if node.xattrs:
            self.table.xattrs[row] = pack_xattrs(node.xattrs, "test")
        if stat.S_ISLNK(node.attributes.mode):
            self.table.symlinks[row] = node.content
        if stat.S_ISREG(node.attributes.mode) and node.content:
            self._add_file(row, node.content)

    def _add_file(self, row: int, content: bytes) -> None:
        size = self._options.chunk_size
        index = self._files % len(self._blobs)
        self._files += 1
        start = self.table.place_chunks(row, -(-len(content) // size))
        for number, at in enumerate(range(0, len(content), size)):
            placed = self._add_chunk(index, content[at : at + size], small=len(content) < size // 2)
            address = pack_address(placed.blob_index, placed.index, placed.uncompressed_offset // BLOCK_SIZE)
            self.table.addresses[start + number] = int.from_bytes(address, "little")

    def _add_chunk(self, index: int, chunk: bytes, small: bool) -> ChunkRow:
        digest = self._options.digester.digest(chunk)
        if digest in self._known:
            return self._known[digest]
        blob = self._blobs[index]
        encoded = compress(self._options.compressor, chunk)
        compressed = len(encoded) < len(chunk)
        batched = small and self._options.batch
        stored = b"" if batched else encoded if compressed else chunk
        info = ChunkInfo(
            len(blob.data),
            len(stored),
            len(blob.decoded),
            len(chunk),
            is_compressed=compressed or batched,
            is_batch=batched,
            crc32c=None if batched else crc32c(chunk),
        )
        if batched:
            blob.batch.append(len(blob.infos))
        flags = ChunkFlags.BATCH if batched else ChunkFlags.HAS_CRC32
        row = ChunkRow(
            digest,
            index,
            flags | (ChunkFlags.COMPRESSED if info.is_compressed else ChunkFlags(0)),
            info.compressed_size,
            info.uncompressed_size,
            info.compressed_offset,
            info.uncompressed_offset,
            0,
            len(blob.infos),
            info.crc32c or 0,
        )
        blob.infos.append(info)
        blob.data += stored
        blob.decoded += chunk + bytes(-len(chunk) % BLOCK_SIZE)
        self._known[digest] = row
        self._rows.append(row)
        return row

    def _close_batch(self, blob: MadeBlob, blob_index: int) -> None:
        """Puts all small chunks of a blob behind the others, as one unit."""
        if not blob.batch:
            return
        buffer = bytearray()
        for number in blob.batch:
            info = blob.infos[number]
            blob.infos[number] = replace(
                info, compressed_offset=len(blob.data), batch_index=0, offset_in_batch=len(buffer)
            )
            start = info.uncompressed_offset
            buffer += blob.decoded[start : start + info.uncompressed_size]
        for position, row in enumerate(self._rows):
            if row.blob_index == blob_index and row.flags & ChunkFlags.BATCH:
                self._rows[position] = replace(row, compressed_offset=len(blob.data))
        encoded = compress(self._options.compressor, buffer)
        stored = encoded if len(encoded) < len(buffer) else bytes(buffer)
        blob.batches.append(BatchContext(len(stored), len(buffer)))
        blob.data += stored

    def _finish(self, blob: MadeBlob, index: int) -> BlobEntry:
        array = pack_array(blob.infos, blob.batches)
        encoded = compress(Compressor.ZSTD, array)
        features = FEATURES | BlobFeatures.BATCH if blob.batches else FEATURES
        contexts = BATCH_CONTEXT.size * len(blob.batches)
        header = BlobMetaHeader(
            features,
            Compressor.ZSTD,
            len(blob.infos),
            len(blob.data),
            len(encoded),
            len(array),
            len(array) - contexts if contexts else 0,
            contexts,
            len(blob.batches),
        )
        blob.meta = node_form(array, header)
        blob.data += encoded + header.pack()
        return BlobEntry(
            hashlib.sha256(blob.data).hexdigest(),
            index,
            self._options.chunk_size,
            len(blob.infos),
            self._options.compressor,
            self._options.digester,
            features,
            len(blob.data),
            round_up(len(blob.decoded), BLOCK_SIZE),
            0,
            Compressor.ZSTD,
            header.ci_offset,
            len(encoded),
            len(array),
        )


def walk_nodes(root: Node) -> Iterator[tuple[bytes, Node]]:
    """Every name of a tree with its node, hard links resolved, in the order of `Bootstrap.walk`."""
    by_path: dict[bytes, Node] = {}
    names: list[tuple[bytes, Node | Link]] = []
    pending: list[tuple[bytes, Node | Link]] = [(b"/", root)]
    while pending:
        path, node = pending.pop()
        names.append((path, node))
        if isinstance(node, Link):
            continue
        by_path[path] = node
        prefix = path.rstrip(b"/") + b"/"
        pending.extend((prefix + name, node.children[name]) for name in sorted(node.children, reverse=True))
    for path, node in names:
        yield path, by_path[node.to] if isinstance(node, Link) else node

"""Layers on top of each other become one tree: bootstraps of single layers in, one bootstrap out.

The tree is made as when the layers are unpacked one after the other. Blobs stay as they are; a chunk that
several layers hold is taken from the lowest one, and a blob of which nothing is left goes.
"""

import os
import stat
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from builder.dedup import DedupIndex
from builder.layer_marks import HAS_LINKS, IMPLIED, LINK, OPAQUE, is_whiteout, unmarked
from builder.path_tree import ROOT, Found, PathInvalid, PathTree
from builder.prefetch_patterns import PrefetchPaths, PrefetchPatterns
from builder.row_spool import RowSpool
from rafs.blob_table import BLOBS_MAX, BlobEntry
from rafs.bootstrap import Bootstrap
from rafs.chunk import ADDRESS_SIZE, ROW, ROW_SIZE, BlobRenumbering, address_parts, address_word, at_blob
from rafs.codec import Compressor
from rafs.errors import NydusError
from rafs.inode import Inode
from rafs.inode_table import Attributes, InodeTable
from rafs.record import BLOCK_SIZE
from rafs.superblock import COMPRESSION_FLAGS
from rafs.writer import BootstrapContent, ImageTooLarge, write_bootstrap
from rafs.xattr import pack_xattrs

CLAIMED_CHUNKS_MAX = 1 << 24
"""In the blobs of a layer that describes few of them: each of them takes 8 bytes of memory."""
CLAIMED_RATIO = 64
_UNUSED, _WANTED = 0, 1
"""What a chunk's place in `_Blob.final` holds before it has an address; no address is so small."""


class LayersUnfit(NydusError):
    """Layers that cannot be one image."""

    message = "layer {number}: {why}"
    exit_code: ClassVar[int] = 59


@dataclass(frozen=True, slots=True)
class MergedImage:
    """The bootstrap that was written, and the blobs that it names, in the order of its blob table."""

    bootstrap: Path
    blobs: tuple[BlobEntry, ...]
    inodes: int
    bytes_in: int


@dataclass(slots=True)
class _Blob:
    """A blob of the layers, and the address at which each of its chunks is to be found."""

    entry: BlobEntry
    final: "array[int]"


class LayerMerge:
    """Takes layers from the lowest to the highest. A context manager: leaving it removes temporary files."""

    def __init__(self, work_dir: Path, *, has_marks: bool = True) -> None:
        """Without `has_marks` nothing is taken for a mark of `layer_marks`: it is one whole image."""
        self._work_dir = work_dir
        self._has_marks = has_marks
        self._preferred: list[Path] = []
        self._tree = PathTree(work_dir / "merge-tree")
        self._layers: list[Path] = []
        self._blobs: list[_Blob] = []
        self._numbers: dict[str, int] = {}
        self._addresses = array("Q")
        self._last_node = 0
        self._chunk_size = 0
        self._room = 0

    def __enter__(self) -> "LayerMerge":
        return self

    def __exit__(self, *exception: object) -> None:
        self._tree.__exit__(*exception)  # type: ignore[arg-type]

    def add(self, layer: Path) -> None:
        """Puts a layer on top. Raises `LayersUnfit`, and `FormatError` for a broken bootstrap."""
        self._layers.append(layer)
        with Bootstrap.open(layer) as bootstrap:
            self._expect_fit(bootstrap)
            self._room = bootstrap.size_bytes
            try:
                self._add_tree(bootstrap)
            except PathInvalid as error:
                raise LayersUnfit(number=len(self._layers), why=str(error)) from error

    def prefer(self, chunks: Path) -> None:
        """Takes chunks from the blobs of that bootstrap before all others, whatever its files."""
        self._preferred.append(chunks)
        with Bootstrap.open(chunks) as bootstrap:
            self._expect_fit(bootstrap)
            for entry in bootstrap.blobs:
                wanted = array("Q", (_WANTED,)) * entry.chunk_count
                self._blobs[self._numbers[entry.blob_id]].final = wanted

    def write(self, output: Path, prefetch: PrefetchPatterns | PrefetchPaths) -> MergedImage:
        """Writes the bootstrap of what is there. Raises `ImageTooLarge`."""
        if not self._layers:
            raise LayersUnfit(number=0, why="an image has at least one layer")
        table = self._tree.table()
        table.addresses = self._addresses
        self._mark_wanted(table)
        rows = RowSpool(self._work_dir / "merge-rows")
        try:
            self._place_chunks(rows)
            kept = self._renumber()
            self._rewrite(table, kept)
            entries = [self._blobs[number].entry.at_index(index) for number, index in kept.items()]
            with Bootstrap.open(self._layers[0]) as first:
                content = BootstrapContent(
                    table,
                    entries,
                    (_with_blobs(block, kept) for block in rows.sorted_rows()),
                    first.chunk_size,
                    _compressor(first),
                    first.digester,
                    prefetch.select(table) if prefetch else [],
                )
            inodes = write_bootstrap(output, content)
        finally:
            rows.close()
        return MergedImage(output, tuple(entries), inodes, sum(table.size[row] for row in _files(table)))

    # -- the tree

    def _expect_fit(self, bootstrap: Bootstrap) -> None:
        number = len(self._layers)
        self._chunk_size = self._chunk_size or bootstrap.chunk_size
        if number > 1:
            with Bootstrap.open(self._layers[0]) as first:
                shape, wanted = ((image.chunk_size, image.digester.name) for image in (bootstrap, first))
            if shape != wanted:
                why = f"{shape[0]}-byte chunks with {shape[1]} digests; the lowest layer has {wanted}"
                raise LayersUnfit(number=number, why=why)
        claimed, described = (
            sum(entry.chunk_count for entry in bootstrap.blobs),
            bootstrap.extended.chunk_table_size // ROW_SIZE,
        )
        if claimed > max(CLAIMED_CHUNKS_MAX, CLAIMED_RATIO * described):
            raise LayersUnfit(number=number, why=f"blobs of {claimed} chunks, of which it has {described}")
        for entry in bootstrap.blobs:
            if entry.blob_id in self._numbers:
                known = self._blobs[self._numbers[entry.blob_id]].entry
                if known.at_index(0) != entry.at_index(0):
                    raise LayersUnfit(number=number, why=f"it describes blob {entry.blob_id} in another way")
                continue
            if len(self._blobs) == BLOBS_MAX:
                raise ImageTooLarge(why=f"its layers have more than {BLOBS_MAX} blobs")
            self._numbers[entry.blob_id] = len(self._blobs)
            self._blobs.append(_Blob(entry, array("Q", bytes(8 * entry.chunk_count))))

    def _add_tree(self, bootstrap: Bootstrap) -> None:
        numbers = [self._numbers[entry.blob_id] for entry in bootstrap.blobs]
        lower = self._find_linked(bootstrap)
        links: dict[int, int] = {}
        for path, inode in bootstrap.walk():
            parts = _parts(path)
            xattrs = bootstrap.xattrs(inode) if inode.has_xattrs else {}
            if inode.is_dir:
                self._add_directory(parts, inode, xattrs)
            elif self._has_marks and is_whiteout(inode.mode, inode.rdev):
                self._hide(parts)
            elif self._has_marks and LINK in xattrs:
                found = lower.get(xattrs[LINK])
                if found is None:
                    why = f"{os.fsdecode(path)!r} is marked as a link, and its image as one without any"
                    raise LayersUnfit(number=len(self._layers), why=why)
                self._tree.put(parts, found.node, found.kind)
            elif inode.nid in links:
                self._tree.put(parts, links[inode.nid], stat.S_IFREG)
            else:
                node = self._add_file(bootstrap, parts, inode, xattrs, numbers)
                if inode.is_file and inode.nlink > 1:
                    links[inode.nid] = node

    def _add_directory(self, parts: list[bytes], inode: Inode, xattrs: dict[bytes, bytes]) -> None:
        if self._has_marks and IMPLIED in xattrs:
            # Made when something is put into it, which whiteouts are not.
            node = self._tree.find_directory(parts)
        else:
            node = self._tree.put(parts, self._new_node(), stat.S_IFDIR) if parts else ROOT
            self._tree.describe(node, _attributes(inode), xattrs=self._packed(xattrs, parts))
        if self._has_marks and OPAQUE in xattrs and node is not None:
            self._tree.empty(node)

    def _hide(self, parts: list[bytes]) -> None:
        parent = self._tree.find_directory(parts[:-1])
        if parent is not None:
            self._tree.remove(parent, parts[-1])

    def _find_linked(self, bootstrap: Bootstrap) -> dict[bytes, Found]:
        """What the layer's hard links to lower layers lead to, before the layer changes anything."""
        found: dict[bytes, Found] = {}
        root = bootstrap.root()
        if not self._has_marks or not root.has_xattrs or HAS_LINKS not in bootstrap.xattrs(root):
            return found
        for path, inode in bootstrap.walk():
            target = bootstrap.xattrs(inode).get(LINK) if inode.has_xattrs else None
            if target is None:
                continue
            known = self._tree.find(_parts(target))
            if known is None or stat.S_ISDIR(known.kind):
                why = f"{os.fsdecode(path)!r} is a hard link to {os.fsdecode(target)!r}, which is no file"
                raise LayersUnfit(number=len(self._layers), why=why)
            found[target] = known
        return found

    def _add_file(
        self,
        bootstrap: Bootstrap,
        parts: list[bytes],
        inode: Inode,
        xattrs: dict[bytes, bytes],
        numbers: Sequence[int],
    ) -> int:
        node = self._tree.put(parts, self._new_node(), stat.S_IFMT(inode.mode))
        first_address = len(self._addresses)
        if inode.is_file:
            self._expect_room(bootstrap, inode)
            self._addresses.extend(
                address_word(numbers[ref.blob_index], ref.chunk_index, ref.uncompressed_offset // BLOCK_SIZE)
                for ref in bootstrap.chunk_refs(inode)
            )
        self._tree.describe(
            node,
            _attributes(inode),
            symlink=bootstrap.readlink(inode) if inode.is_symlink else b"",
            xattrs=self._packed(xattrs, parts),
            first_address=first_address,
        )
        return node

    def _expect_room(self, bootstrap: Bootstrap, inode: Inode) -> None:
        """Files that share their addresses could make a small bootstrap describe endless content."""
        self._room -= bootstrap.chunk_count_of(inode) * ADDRESS_SIZE
        if self._room < 0:
            why = "its files have more chunks than it has room for their addresses"
            raise LayersUnfit(number=len(self._layers), why=why)

    def _packed(self, xattrs: dict[bytes, bytes], parts: list[bytes]) -> bytes:
        own = unmarked(xattrs) if self._has_marks else xattrs
        return pack_xattrs(own, os.fsdecode(b"/" + b"/".join(parts))) if own else b""

    def _new_node(self) -> int:
        self._last_node += 1
        return self._last_node

    # -- chunks

    def _mark_wanted(self, table: InodeTable) -> None:
        for row in _files(table):
            for position in self._positions(table, row):
                number, chunk = address_parts(self._addresses[position])
                self._blobs[number].final[chunk] = _WANTED

    def _place_chunks(self, rows: RowSpool) -> None:
        """Gives every wanted chunk its place, the lowest layer's first, and spools the rows of the table."""
        dedup = DedupIndex(self._work_dir / "merge-dedup")
        try:
            images = [*self._preferred, *self._layers]
            for number, image in enumerate(images, start=1 - len(self._preferred)):
                with Bootstrap.open(image) as bootstrap:
                    numbers = [self._numbers[entry.blob_id] for entry in bootstrap.blobs]
                    with bootstrap.chunk_table as table:
                        for at in range(0, len(table), ROW_SIZE):
                            self._place_chunk(bytes(table[at : at + ROW_SIZE]), numbers, number, dedup, rows)
        finally:
            dedup.close()
        for blob in self._blobs:
            if _WANTED in blob.final:
                why = f"no row for chunk {blob.final.index(_WANTED)} of blob {blob.entry.blob_id}"
                raise LayersUnfit(number=0, why=why)

    def _place_chunk(
        self, row: bytes, numbers: Sequence[int], layer: int, dedup: DedupIndex, rows: RowSpool
    ) -> None:
        digest, blob_index, _, _, _, _, uncompressed_offset, _, index, _ = ROW.unpack(row)
        if blob_index >= len(numbers):
            raise LayersUnfit(number=layer, why=f"a chunk of blob {blob_index} of {len(numbers)}")
        number = numbers[blob_index]
        final = self._blobs[number].final
        if index >= len(final) or final[index] != _WANTED:
            return
        if dedup.claim(digest):
            final[index] = address_word(number, index, uncompressed_offset // BLOCK_SIZE)
            dedup.place_at(digest, final[index])
            rows.append(at_blob(row, number))
        else:
            final[index] = dedup.address(digest)

    def _renumber(self) -> dict[int, int]:
        """Blobs of which something is left: their number among the layers' blobs, and their new index."""
        used: set[int] = set()
        for blob in self._blobs:
            used.update(address_parts(address)[0] for address in blob.final if address != _UNUSED)
        return {number: index for index, number in enumerate(sorted(used))}

    def _rewrite(self, table: InodeTable, kept: dict[int, int]) -> None:
        renumbering = BlobRenumbering(kept)
        for row in _files(table):
            for position in self._positions(table, row):
                number, chunk = address_parts(self._addresses[position])
                self._addresses[position] = renumbering.apply(self._blobs[number].final[chunk])

    def _positions(self, table: InodeTable, row: int) -> range:
        start = table.chunk_start[row]
        return range(start, start + -(-table.size[row] // self._chunk_size))


def _parts(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part]


def _files(table: InodeTable) -> Iterator[int]:
    """Rows of regular files, each inode once."""
    return (row for row in table.inode_rows() if stat.S_ISREG(table.mode[row]))


def _attributes(inode: Inode) -> Attributes:
    return Attributes(
        inode.mode,
        inode.uid,
        inode.gid,
        inode.size if inode.is_file else 0,
        inode.mtime_s,
        inode.mtime_ns,
        inode.rdev,
    )


def _compressor(bootstrap: Bootstrap) -> Compressor:
    flags = bootstrap.extended.flags
    return next(compressor for compressor, flag in COMPRESSION_FLAGS.items() if flags & flag)


def _with_blobs(rows: bytes, kept: dict[int, int]) -> bytes:
    """Packed rows, joined, with the numbers of blobs replaced by their indexes."""
    changed = bytearray(rows)
    changed[32::ROW_SIZE] = bytes(kept[number] for number in rows[32::ROW_SIZE])
    return bytes(changed)

"""What a new image has that an old one lacks: files, and the chunks and bytes of a host that has the old one.

Both trees are walked side by side, directory by directory in the order of names, so that memory does not
depend on their size.
"""

import enum
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from builder.dedup import DedupIndex
from rafs.blobmeta import BlobMeta
from rafs.bootstrap import Bootstrap
from rafs.inode import Inode


class Change(enum.Enum):
    """What became of a name."""

    ADDED = "added"
    REMOVED = "removed"
    CONTENT = "content"
    METADATA = "metadata"


@dataclass(frozen=True, slots=True)
class ChangedFile:
    """A name that differs; `size_bytes` of the newer file, or of the one that is gone."""

    path: bytes
    change: Change
    size_bytes: int


@dataclass(slots=True)
class MissingChunks:
    """What a host with the old image would fetch of the new one. `encoded_bytes` as they travel."""

    chunks: int = 0
    decoded_bytes: int = 0
    encoded_bytes: int = 0
    all_chunks: int = 0
    all_decoded_bytes: int = 0
    all_encoded_bytes: int = 0
    blobs: set[str] = field(default_factory=set)


def changed_files(old: Bootstrap, new: Bootstrap) -> Iterator[ChangedFile]:
    """Every name that one has and the other has not, or has differently; parents first, names sorted.

    Files whose chunks were cut or digested differently count as different in content when they have any.
    """
    pending: list[tuple[bytes, Inode | None, Inode | None]] = [(b"/", old.root(), new.root())]
    while pending:
        path, before, after = pending.pop()
        change = _compare(old, before, new, after)
        if change is not None:
            shown = after if after is not None else before
            assert shown is not None
            yield ChangedFile(path, change, shown.size if shown.is_file else 0)
        left, right = _children(old, before), _children(new, after)
        prefix = path if path == b"/" else path + b"/"
        for name in sorted(left.keys() | right.keys(), reverse=True):
            pending.append(
                (
                    prefix + name,
                    old.inode(left[name]) if name in left else None,
                    new.inode(right[name]) if name in right else None,
                )
            )


def _children(bootstrap: Bootstrap, inode: Inode | None) -> dict[bytes, int]:
    if inode is None or not inode.is_dir:
        return {}
    return {entry.name: entry.nid for entry in bootstrap.readdir(inode) if entry.name not in (b".", b"..")}


def _compare(old: Bootstrap, before: Inode | None, new: Bootstrap, after: Inode | None) -> Change | None:
    if before is None:
        return Change.ADDED
    if after is None:
        return Change.REMOVED
    if _content(old, before) != _content(new, after):
        return Change.CONTENT
    return Change.METADATA if _metadata(old, before) != _metadata(new, after) else None


def _content(bootstrap: Bootstrap, inode: Inode) -> object:
    kind = stat.S_IFMT(inode.mode)
    if inode.is_symlink:
        return kind, bootstrap.readlink(inode)
    if not inode.is_file:
        return kind, inode.rdev
    if not inode.size:
        return kind, 0
    digests = [
        bootstrap.chunk_digests(ref.blob_index)[ref.chunk_index] for ref in bootstrap.chunk_refs(inode)
    ]
    return kind, inode.size, bootstrap.digester, digests


def _metadata(bootstrap: Bootstrap, inode: Inode) -> object:
    xattrs = bootstrap.xattrs(inode) if inode.has_xattrs else {}
    return inode.mode, inode.uid, inode.gid, inode.mtime_s, inode.mtime_ns, xattrs


def missing_chunks(
    old: Bootstrap, new: Bootstrap, open_meta: Callable[[str], BlobMeta], work_dir: Path
) -> MissingChunks:
    """Counts the chunks of the new image that no file of the old one has, in whichever blob.

    Chunks that are compressed together travel together. `open_meta` gives the chunk table of a blob of the
    new image; `work_dir` is for the index of the old one's digests when it is large. Images with different
    digests have no chunk in common.
    """
    found = MissingChunks()
    held = DedupIndex(work_dir / "held")
    try:
        if old.digester == new.digester:
            for row in old.chunk_rows():
                held.claim(bytes(row[:32]))
        for blob in new.blobs:
            _count(new, blob.index, open_meta(blob.blob_id), held, found)
    finally:
        held.close()
    return found


def _count(new: Bootstrap, blob_index: int, meta: BlobMeta, held: DedupIndex, found: MissingChunks) -> None:
    digests = new.chunk_digests(blob_index)
    travelling, travelled = -1, -1  # offsets of the last extents: chunks of one are neighbours
    for index in range(len(digests)):
        digest = digests.find(index)
        if digest is None:
            continue
        size = digests.row(index).uncompressed_size
        extent = meta.extent(index)
        found.all_chunks += 1
        found.all_decoded_bytes += size
        if extent.compressed_offset != travelled:
            travelled = extent.compressed_offset
            found.all_encoded_bytes += extent.compressed_size
        if digest in held:
            continue
        found.chunks += 1
        found.decoded_bytes += size
        found.blobs.add(new.blobs[blob_index].blob_id)
        if extent.compressed_offset != travelling:
            travelling = extent.compressed_offset
            found.encoded_bytes += extent.compressed_size

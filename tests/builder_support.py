"""Trees on disk and images in a work directory, read into the same form, so that a test compares the two."""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import blake3

from builder.build import Build, BuildStatistics, BuiltImage
from builder.chunk_dict import DictionaryImage
from builder.options import BuildOptions, CompressionPolicy
from rafs.blobmeta import BlobMeta
from rafs.blobmeta_header import check_against_blob
from rafs.bootstrap import Bootstrap
from rafs.check import check_blob_meta, check_bootstrap
from rafs.chunk import ChunkRef
from rafs.codec import decompress
from rafs.digest import Digester, crc32c
from rafs.inode import Inode
from rafs.record import round_up


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of a tree and all that it says. `content` is a digest, `first_name` that of a hard link."""

    mode: int
    uid: int
    gid: int
    size: int
    nlink: int
    mtime_ns: int
    rdev: int
    xattrs: dict[bytes, bytes]
    symlink: bytes
    content: str
    first_name: bytes


Tree = dict[bytes, Entry]


def options(
    *,
    chunk_size: int = 4096,
    batch_size: int = 0,
    compression: CompressionPolicy = CompressionPolicy.AUTO,
    digester: Digester = Digester.BLAKE3,
    threads: int = 1,
    prefetch: tuple[str, ...] = (),
) -> BuildOptions:
    """Options that make small trees interesting: small chunks and one worker."""
    return BuildOptions(chunk_size, batch_size, compression, 3, digester, threads, prefetch)


def build(
    source: Path,
    work_dir: Path,
    chosen: BuildOptions | None = None,
    dictionaries: tuple[DictionaryImage, ...] = (),
) -> BuiltImage:
    """Builds and leaves everything in `work_dir`."""
    with Build(work_dir, chosen or options(), dictionaries) as running:
        return running.run(source)


def image_bytes(built: BuiltImage) -> list[bytes]:
    """Everything that is published: bootstrap, and blob and blob.meta of each own blob."""
    files = built.files
    own = [blob for blob in files.blobs if blob.path is not None]
    paths = [files.bootstrap, *(blob.meta for blob in own), *(blob.path for blob in own if blob.path)]
    return [path.read_bytes() for path in paths]


def as_dictionary(built: BuiltImage, reference: str = "other") -> DictionaryImage:
    """A built image as `--chunk-dict` gives it to another build."""
    metas = {blob.blob_id: blob.meta for blob in built.files.blobs}
    return DictionaryImage(reference, built.files.bootstrap, metas)


def blob_paths(*images: BuiltImage) -> dict[str, Path]:
    """Where the blobs of images are."""
    return {blob.blob_id: blob.path for image in images for blob in image.files.blobs if blob.path}


def small_statistics(built: BuiltImage) -> tuple[int, int, int]:
    """Files, chunks and chunks that are stored."""
    found: BuildStatistics = built.statistics
    return found.files, found.chunks, found.chunks_unique


# --- trees on disk


def read_tree(root: Path) -> Tree:
    """What is in a directory; only hard links inside it count."""
    found = [(b"/", bytes(root)), *_below(bytes(root), b"/")]
    status = {name: os.lstat(path) for name, path in found}
    names: dict[tuple[int, int], list[bytes]] = {}
    for name, one in status.items():
        if stat.S_ISREG(one.st_mode):
            names.setdefault((one.st_dev, one.st_ino), []).append(name)
    tree = {}
    for name, path in found:
        one = status[name]
        same = names.get((one.st_dev, one.st_ino), [name])
        tree[name] = Entry(
            one.st_mode,
            one.st_uid,
            one.st_gid,
            one.st_size if stat.S_ISREG(one.st_mode) else 0,
            len(same),
            one.st_mtime_ns,
            one.st_rdev if stat.S_ISCHR(one.st_mode) or stat.S_ISBLK(one.st_mode) else 0,
            {os.fsencode(key): _xattr(path, key) for key in os.listxattr(path, follow_symlinks=False)},
            os.readlink(path) if stat.S_ISLNK(one.st_mode) else b"",
            _content(path) if stat.S_ISREG(one.st_mode) else "",
            same[0],
        )
    return with_directory_links(tree)


def with_directory_links(tree: Tree) -> Tree:
    """The tree with the link counts of directories counted: file systems have rules of their own."""
    counts = {name: 2 for name, entry in tree.items() if stat.S_ISDIR(entry.mode)}
    for name in counts:
        if name != b"/":
            counts[os.path.dirname(name)] += 1
    return {
        name: _replace(entry, nlink=counts[name]) if name in counts else entry
        for name, entry in sorted(tree.items())
    }


def _replace(entry: Entry, nlink: int) -> Entry:
    values = {name: getattr(entry, name) for name in Entry.__slots__}
    return Entry(**{**values, "nlink": nlink})


def _below(directory: bytes, name: bytes) -> Iterator[tuple[bytes, bytes]]:
    for entry in sorted(os.listdir(directory)):
        path = directory + b"/" + entry
        inner = (name if name == b"/" else name + b"/") + entry
        yield inner, path
        if stat.S_ISDIR(os.lstat(path).st_mode):
            yield from _below(path, inner)


def _xattr(path: bytes, key: str) -> bytes:
    return os.getxattr(path, key, follow_symlinks=False)


def _content(path: bytes) -> str:
    hasher = blake3.blake3()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            hasher.update(data)
    return hasher.hexdigest()


# --- images


@dataclass(slots=True)
class ImageReader:
    """A built image, every chunk of it decoded from its blob and checked against all that describes it."""

    bootstrap: Bootstrap
    blobs: Sequence[bytes]
    metas: Sequence[BlobMeta]
    _extents: dict[tuple[int, int], bytes] = field(default_factory=dict)

    @classmethod
    def open(cls, built: BuiltImage, elsewhere: Mapping[str, Path] | None = None) -> "ImageReader":
        """`elsewhere`: where the blobs of dictionary images are, by ID. No fault may be in the tables."""
        bootstrap = Bootstrap(built.files.bootstrap.read_bytes())
        assert [blob.blob_id for blob in built.files.blobs] == [b.blob_id for b in bootstrap.blobs]
        assert list(check_bootstrap(bootstrap)) == []
        paths = {**(elsewhere or {}), **blob_paths(built)}
        blobs, metas = [], []
        for file, entry in zip(built.files.blobs, bootstrap.blobs, strict=True):
            data = paths[file.blob_id].read_bytes()
            assert len(data) == file.size_bytes == entry.compressed_size
            meta = BlobMeta(file.meta.read_bytes())
            check_against_blob(meta.header, entry)
            assert list(check_blob_meta(entry, meta, bootstrap.chunk_digests(entry.index))) == []
            blobs.append(data)
            metas.append(meta)
        return cls(bootstrap, blobs, metas)

    def chunk(self, ref: ChunkRef) -> bytes:
        """A chunk's decoded bytes; fails when its digest, checksum or place is wrong."""
        meta = self.metas[ref.blob_index]
        info = meta.chunk(ref.chunk_index)
        assert info.uncompressed_offset == ref.uncompressed_offset
        data = self._extent(ref)[info.offset_in_batch : info.offset_in_batch + info.uncompressed_size]
        digests = self.bootstrap.chunk_digests(ref.blob_index)
        assert self.bootstrap.digester.digest(data) == digests[ref.chunk_index]
        assert info.crc32c in (None, crc32c(data))
        return data

    def content(self, inode: Inode) -> Iterator[bytes]:
        """The chunks of a file, in order; all but the last one are whole."""
        left = inode.size
        for ref in self.bootstrap.chunk_refs(inode):
            data = self.chunk(ref)
            assert len(data) == min(left, self.bootstrap.chunk_size)
            left -= len(data)
            yield data

    def read(self, path: bytes) -> bytes:
        """The content of the file at `path`."""
        return b"".join(self.content(self.bootstrap.resolve(path)))

    def tree(self) -> Tree:
        """The whole image."""
        found = {}
        first_names: dict[int, bytes] = {}
        for path, inode in self.bootstrap.walk():
            is_file = inode.is_file
            found[path] = Entry(
                inode.mode,
                inode.uid,
                inode.gid,
                inode.size if is_file else 0,
                inode.nlink,
                inode.mtime_s * 1_000_000_000 + inode.mtime_ns,
                inode.rdev,
                self.bootstrap.xattrs(inode),
                self.bootstrap.readlink(inode) if inode.is_symlink else b"",
                _digest(self.content(inode)) if is_file else "",
                first_names.setdefault(inode.nid, path),
            )
        assert self.bootstrap.inode_count == len(first_names)
        return dict(sorted(found.items()))

    def first_blob_offset(self, path: bytes) -> int:
        """Lowest offset in the encoded blob of a file's chunks."""
        refs = self.bootstrap.chunk_refs(self.bootstrap.resolve(path))
        return min(self.metas[ref.blob_index].chunk(ref.chunk_index).compressed_offset for ref in refs)

    def _extent(self, ref: ChunkRef) -> bytes:
        extent = self.metas[ref.blob_index].extent(ref.chunk_index)
        key = (ref.blob_index, extent.compressed_offset)
        if key not in self._extents:
            raw = self.blobs[ref.blob_index][extent.compressed_offset :][: extent.compressed_size]
            assert len(raw) == extent.compressed_size
            if extent.is_compressed:
                codec = self.bootstrap.blobs[ref.blob_index].compressor
                raw = decompress(codec, raw, extent.uncompressed_size)
            assert len(raw) == extent.uncompressed_size
            self._extents[key] = raw
        return self._extents[key]


def read_image(built: BuiltImage, elsewhere: Mapping[str, Path] | None = None) -> Tree:
    """The tree in a built image; fails when anything in it does not fit together."""
    return ImageReader.open(built, elsewhere).tree()


def _digest(chunks: Iterator[bytes]) -> str:
    hasher = blake3.blake3()
    for chunk in chunks:
        hasher.update(chunk)
    return hasher.hexdigest()


def decoded_size(sizes: Sequence[int]) -> int:
    """Bytes that chunks of these sizes take in the decoded blob."""
    return sum(round_up(size, 4096) for size in sizes)


# --- trees to build


CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
"""`cap_net_bind_service=ep` as the kernel stores it."""
ACL = bytes.fromhex(
    "02000000 01000600ffffffff 02000400e8030000 04000400ffffffff 10000400ffffffff 20000400ffffffff"
)
"""user::rw-, user:1000:r--, group::r--, mask::r--, other::r--."""


def make_plain_tree(root: Path) -> None:
    """A tree that any user can make: links, names, times, sparse and empty files."""
    root.mkdir()
    names = [b"!bang", b"-dash", b".hidden", b"...", b"n" * 255, b"\xff\xfe", "é".encode(), b"a\nb", b" "]
    for name in names:
        put(root, name, b"in " + name)
    put(root, b"empty", b"")
    put(root, b"zeros", bytes(20_000))
    put(root, b"many/chunks", b"".join(b"%08d" % number for number in range(3000)))
    put(root, b"many/same-chunks", b"".join(b"%08d" % number for number in range(3000)))
    put(root, b"random", blake3.blake3(b"seed").digest(50_001))
    put(root, b"a/b/c/d/e/deep", b"down here")
    (root / "a" / "nothing-inside").mkdir()
    for number in range(40):
        put(root, b"small/%03d" % number, b"%d " % number * (number * 13))
    os.symlink(b"x" * 4095, root / "longest-link")
    os.symlink(b"../\xff/nowhere", root / "dangling")
    os.mkfifo(root / "fifo")
    os.link(root / "many" / "chunks", root / "a" / "b" / "other-name")
    os.link(root / "many" / "chunks", root / "zz-third-name")
    with (root / "sparse").open("wb") as file:
        file.seek(1_000_000)
        file.write(b"in the middle")
        file.truncate(3_000_001)
    os.chmod(root / "zeros", 0o6751)
    os.utime(root / "zeros", ns=(0, 1_700_000_000_123_456_789))
    os.utime(root / "random", ns=(0, -1_500_000_001))
    os.utime(root / "a" / "b", ns=(0, -1))
    os.utime(root / "dangling", ns=(0, 77), follow_symlinks=False)
    root.chmod(0o1750)
    os.utime(root, ns=(0, 987_654_321_000_000_001))


def make_root_tree(root: Path) -> None:
    """`make_plain_tree`, and what only root can make: owners, devices, all kinds of extended attributes."""
    make_plain_tree(root)
    os.chown(root / "empty", 70_000, 4_000_000_000)
    os.chown(root, 12, 34)
    os.chmod(root, 0o1750)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "large-minor", stat.S_IFCHR | 0o600, os.makedev(4095, 0xFFFFF))
    os.mknod(root / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 70_000))
    os.mknod(root / "socket", stat.S_IFSOCK | 0o700)
    put(root, b"capable", b"#!")
    os.setxattr(root / "capable", "security.capability", CAPABILITY)
    os.setxattr(root / "capable", "user.binary", bytes(range(256)))
    os.setxattr(root / "empty", "user.on-an-empty-file", b"")
    os.setxattr(root / "empty", "user." + "n" * 250, b"a long name")
    os.setxattr(root / "a", "trusted.overlay.opaque", b"y")
    os.setxattr(root / "longest-link", "trusted.on-a-link", b"\0\xff", follow_symlinks=False)
    os.setxattr(root / "fifo", "trusted.on-a-fifo", b"f")
    os.setxattr(root / "zeros", "user.equals=sign%", b"1=2\n")
    os.setxattr(root / "null", "security.label", b"device")
    os.setxattr(root / "many" / "chunks", "user.shared", b"by all names")
    os.setxattr(root / "random", "system.posix_acl_access", ACL)
    os.setxattr(root / "small", "system.posix_acl_default", ACL)
    os.setxattr(root, "user.root", b"of the tree")
    os.utime(root, ns=(0, 987_654_321_000_000_001))


def put(root: Path, name: bytes, content: bytes) -> Path:
    """Writes a file, with its directories."""
    path = root / os.fsdecode(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path

"""Layers that are unpacked here: as containerd does it, and never outside."""

import gzip
import hashlib
import io
import os
import stat
import tarfile
from pathlib import Path

import pytest
import zstandard

from fuse.snapshotter.directories import remove_tree
from fuse.snapshotter.layer_tar import LayerNotUnpacked, unpack_layer
from tests.oci_images import MTIME, Layer

pytestmark = pytest.mark.needs_root


def digest_of(tar: bytes) -> str:
    return f"sha256:{hashlib.sha256(tar).hexdigest()}"


def unpack(tar: bytes, target: Path, *lower: Path, diff_id: str = "") -> None:
    target.mkdir(exist_ok=True)
    unpack_layer(io.BytesIO(tar), "sha256:layer", target, lower, diff_id or digest_of(tar))


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
def test_every_kind_of_member(tmp_path: Path, pack: type[bytes]) -> None:
    layer = Layer().directory("d", mode=0o750, uid=5, gid=6, mtime=5)
    layer.add("d/f", b"content", mode=0o4755, uid=7, gid=8, mtime=1.5, xattrs={"user.a": b"\xff\x00b"})
    layer.add("d/hard", kind=b"1", link="d/f", mode=0o4755, uid=7, gid=8, mtime=1.5).symlink(
        "d/soft", "/nowhere", uid=9
    )
    layer.add("d/fifo", kind=b"6", mode=0o600).add("d/null", kind=b"3", device=(1, 3), mode=0o666)
    tar = layer.tar()
    root = tmp_path / "root"
    unpack(pack(tar), root, diff_id=digest_of(tar))
    found = (root / "d/f").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o4755, 7, 8)
    assert found.st_mtime_ns == 1_500_000_000
    assert found.st_nlink == 2
    assert os.getxattr(root / "d/f", "user.a") == b"\xff\x00b"
    assert (root / "d/soft").lstat().st_uid == 9
    assert stat.S_ISFIFO((root / "d/fifo").stat().st_mode)
    assert (root / "d/null").stat().st_rdev == os.makedev(1, 3)
    directory = (root / "d").stat()
    assert (directory.st_uid, directory.st_mtime, stat.S_IMODE(directory.st_mode)) == (5, 5, 0o750)


def test_whiteouts_become_what_overlayfs_knows(tmp_path: Path) -> None:
    root = tmp_path / "root"
    unpack(Layer().directory("d").whiteout("d/gone").opaque("o").add("o/new", b"x").tar(), root)
    gone = (root / "d/gone").lstat()
    assert stat.S_ISCHR(gone.st_mode)
    assert gone.st_rdev == 0
    assert os.getxattr(root / "o", "trusted.overlay.opaque") == b"y"
    assert os.listdir(root / "o") == ["new"]


def test_a_directory_that_the_layer_does_not_describe_is_as_below(tmp_path: Path) -> None:
    below, root = tmp_path / "below", tmp_path / "root"
    (below / "a/b").mkdir(parents=True)
    os.chown(below / "a", 3, 4)
    (below / "a").chmod(0o711)
    os.setxattr(below / "a", "user.x", b"1")
    unpack(Layer().add("a/b/f", b"x").tar(), root, tmp_path / "nothing", below)
    found = (root / "a").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o711, 3, 4)
    assert os.getxattr(root / "a", "user.x") == b"1"


def test_nothing_leaves_the_directory(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    root = tmp_path / "root"
    layer = Layer().symlink("link", str(outside)).symlink("up", "../../..")
    layer.add("link/a", b"1").add("up/b", b"2").add("../../c", b"3").add("/../d", b"4")
    layer.whiteout("link/secret")
    unpack(layer.tar(), root)
    assert os.listdir(outside) == ["secret"]
    assert (root / "b").read_bytes() == b"2"
    assert (root / "c").read_bytes() == b"3"
    assert (root / "d").read_bytes() == b"4"
    assert (root / str(outside).lstrip("/") / "a").read_bytes() == b"1"
    assert sorted(os.listdir(tmp_path)) == ["outside", "root"]


def test_a_later_member_replaces_an_earlier_one(tmp_path: Path) -> None:
    root = tmp_path / "root"
    layer = Layer().directory("a", mode=0o700).add("a/in", b"1").add("f", b"1").directory("a", mode=0o755)
    layer.add("f", b"2").directory("g").add("g", b"file").symlink("h", "f").directory("h")
    unpack(layer.tar(), root)
    assert (root / "a/in").read_bytes() == b"1"
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o755
    assert (root / "f").read_bytes() == b"2"
    assert (root / "g").read_bytes() == b"file"
    assert (root / "h").is_dir()
    assert (root / "f").stat().st_mtime == MTIME


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(Layer().add("f", b"x" * 100_000).tar())[:-2000],
        b"\x1f\x8b" + b"broken" * 100,
        b"no tar at all" * 100,
        zstandard.ZstdCompressor().compress(Layer().add("f", b"x").tar())[:-4],
        Layer().add("d/.wh...", b"").tar(),
        Layer().symlink("a", "b").symlink("b", "a").add("a/f", b"x").tar(),
    ],
)
def test_what_is_broken_is_said_to_be_so(tmp_path: Path, data: bytes) -> None:
    with pytest.raises((LayerNotUnpacked, OSError)):
        unpack(data, tmp_path / "root", diff_id="sha256:" + "0" * 64)


def test_other_content_than_the_image_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayerNotUnpacked, match="its image says sha256:00"):
        unpack(Layer().add("f", b"x").tar(), tmp_path / "root", diff_id="sha256:" + "0" * 64)


def test_an_extended_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 1 << 40
    with pytest.raises(LayerNotUnpacked, match="an extended header of"):
        unpack(member.tobuf(tarfile.GNU_FORMAT) + bytes(10_240), tmp_path / "root")


def test_directories_as_deep_as_a_path_can_be(tmp_path: Path) -> None:
    deep = "d/" * 1500 + "f"
    root = tmp_path / "root"
    unpack(Layer().add(deep, b"x").tar(), root)
    assert (root / deep).read_bytes() == b"x"
    remove_tree(root)  # which pytest cannot
    assert not root.exists()

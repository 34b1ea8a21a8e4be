"""Mount points before a mount, and what /proc says of mounts."""

import errno
import os
from pathlib import Path

import pytest

from fuse.mount_table import find_mount
from fuse.mountpoint import (
    FuseUnavailable,
    MountpointForbidden,
    MountpointMissing,
    MountpointNotDirectory,
    MountpointNotEmpty,
    NothingMounted,
    UnmountFailed,
    _fusermount,
    find_users,
    is_dead,
    prepare_mountpoint,
    real_path,
    require_fuse,
    unmount,
)

MOUNTINFO = b"""\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
40 22 0:39 / /mnt/a ro,nosuid - fuse.nydus-py 127.0.0.1:5000/a:v1 ro,user_id=0
41 22 0:40 / /mnt/with\\040space\\134 ro - fuse.nydus-py x\\040y ro
42 40 0:41 / /mnt/a rw - tmpfs tmpfs rw
43 22 0:42 / /mnt/b rw shared:7 master:3 - fuse.sshfs host: rw
"""


def test_mountinfo(tmp_path: Path) -> None:
    path = tmp_path / "mountinfo"
    path.write_bytes(MOUNTINFO)
    topmost = find_mount(Path("/mnt/a"), path)
    assert topmost is not None
    assert (topmost.filesystem, topmost.device, topmost.is_ours) == ("tmpfs", "0:41", False)
    spaced = find_mount(Path("/mnt/with space\\"), path)
    assert spaced is not None
    assert (spaced.source, spaced.is_ours) == ("x y", True)
    other = find_mount(Path("/mnt/b"), path)
    assert other is not None
    assert (other.filesystem, other.source) == ("fuse.sshfs", "host:")
    assert find_mount(Path("/mnt"), path) is None


def test_good_directory_gives_its_real_path(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert prepare_mountpoint(tmp_path / "real") == tmp_path / "real"
    assert prepare_mountpoint(tmp_path / "link") == tmp_path / "real"
    assert prepare_mountpoint(tmp_path / "link" / ".." / "real") == tmp_path / "real"
    assert real_path(tmp_path / "link" / "x") == tmp_path / "real" / "x"


def test_unfit_directories(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MountpointMissing, match="no such directory; create it"):
        prepare_mountpoint(tmp_path / "absent")
    with pytest.raises(MountpointMissing):
        prepare_mountpoint(tmp_path / "absent" / "deeper")
    with pytest.raises(MountpointNotDirectory):
        prepare_mountpoint(tmp_path / "file")
    with pytest.raises(MountpointNotDirectory):
        prepare_mountpoint(tmp_path / "file" / "deeper")
    with pytest.raises(MountpointNotEmpty, match="not empty"):
        prepare_mountpoint(tmp_path)


def test_directory_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(MountpointForbidden):
        prepare_mountpoint(tmp_path)


def test_fuse_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FuseUnavailable, match="load the kernel module"):
        require_fuse(tmp_path / "fuse")

    def refuse(path: Path, flags: int) -> int:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FuseUnavailable, match="Operation not permitted; mount as root"):
        require_fuse()


def test_fuse_for_users_needs_fusermount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fuse").touch()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FuseUnavailable, match="install fuse3"):
        require_fuse(tmp_path / "fuse")


def test_nothing_to_unmount(tmp_path: Path) -> None:
    with pytest.raises(NothingMounted):
        unmount(tmp_path)
    assert not is_dead(tmp_path)


def test_users_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    assert find_users(tmp_path / "used") == []
    with (tmp_path / "used" / "file").open("w"):
        assert find_users(tmp_path / "used") == [os.getpid()]
        assert find_users(tmp_path / "us") == []


def test_what_fusermount_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "fusermount3"
    tool.write_text("#!/bin/sh\necho first >&2\necho 'fusermount3: entry not found' >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UnmountFailed, match=r"fusermount3: entry not found$"):
        _fusermount(tmp_path, tmp_path, lazy=False)

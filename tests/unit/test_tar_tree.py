"""The tree that members describe, in whatever order they come; headers that describe none."""

import errno
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builder.tar_member import read_attributes, read_xattrs
from builder.tar_tree import InvalidArchive, TarTree
from rafs.inode_table import Attributes, InodeTable
from tests.builder_support import ACL


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    member.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    return member


def _extended(headers: dict[str, str]) -> tarfile.TarInfo:
    member = _member("f")
    member.pax_headers = headers
    return member


Fill = Callable[..., InodeTable]


@pytest.fixture
def fill(tmp_path: Path) -> Iterator[Fill]:
    """Makes a table of members, in a database that is gone afterwards."""

    def made(*members: tarfile.TarInfo) -> InodeTable:
        with TarTree("test.tar", tmp_path / "tree") as tree:
            for member in members:
                tree.add(member)
            return tree.table()

    yield made
    assert not list(tmp_path.iterdir())


def _paths(table: InodeTable) -> list[bytes]:
    return [table.path(row) for row in range(len(table))]


def test_rows_come_in_the_order_of_a_directory_scan(fill: Fill) -> None:
    tree = fill(_member("b/y"), _member("z"), _member("b", tarfile.DIRTYPE), _member("a/x/1"))
    assert _paths(tree) == [b"/", b"/a", b"/b", b"/z", b"/a/x", b"/a/x/1", b"/b/y"]


def test_a_directory_behind_its_content_gives_its_attributes(fill: Fill) -> None:
    late = _member("d", tarfile.DIRTYPE)
    late.mode, late.uid = 0o711, 70_000
    table = fill(_member("d/file"), late)
    assert (table.mode[1], table.uid[1]) == (stat.S_IFDIR | 0o711, 70_000)
    assert table.path(2) == b"/d/file"


def test_missing_parents_are_plain_directories(fill: Fill) -> None:
    table = fill(_member("a/b"))
    assert table.mode[1] == stat.S_IFDIR | 0o755
    assert (table.uid[1], table.mtime_s[1]) == (0, 0)
    assert table.nlink[0] == 3


def test_the_root_has_a_member_of_its_own(fill: Fill) -> None:
    root = _member("./", tarfile.DIRTYPE)
    root.mode = 0o1777
    assert fill(_member("x"), root).mode[0] == stat.S_IFDIR | 0o1777


@pytest.mark.parametrize("name", ["a/b", "./a/b", "/a/b", "a//b", "./././a/./b"])
def test_spellings_of_one_path(fill: Fill, name: str) -> None:
    assert _paths(fill(_member(name))) == [b"/", b"/a", b"/a/b"]


def test_the_last_one_wins(fill: Fill) -> None:
    first, second = _member("f"), _member("f")
    second.size = 7
    assert list(fill(first, second).size) == [0, 7]


def test_a_file_becomes_a_directory_and_back(fill: Fill) -> None:
    file, directory, inside = _member("x"), _member("x", tarfile.DIRTYPE), _member("x/inside")
    assert _paths(fill(file, directory, inside)) == [b"/", b"/x", b"/x/inside"]
    assert _paths(fill(file, inside)) == [b"/", b"/x", b"/x/inside"]
    assert _paths(fill(directory, inside, file)) == [b"/", b"/x"]


def test_hard_links_share_an_inode_across_directories(fill: Fill) -> None:
    table = fill(_member("b/file"), _member("a/link", tarfile.LNKTYPE, "./b/file"), _member("c/file"))
    rows = {table.path(row): row for row in range(len(table))}
    first = rows[b"/a/link"]
    assert table.target[rows[b"/b/file"]] == first
    assert table.nlink[first] == 2
    assert table.nlink[rows[b"/c/file"]] == 1


def test_a_link_keeps_the_file_that_its_name_meant_then(fill: Fill) -> None:
    later = _member("file")
    later.size = 9
    table = fill(_member("file"), _member("link", tarfile.LNKTYPE, "file"), later)
    assert list(table.size) == [0, 9, 0]
    assert list(table.nlink) == [2, 1, 1]


@pytest.mark.parametrize("target", ["nothing", "directory", "file/below", "", "../out"])
def test_links_to_no_file(fill: Fill, target: str) -> None:
    members = (_member("directory", tarfile.DIRTYPE), _member("file"))
    with pytest.raises(InvalidArchive, match=r"test\.tar: "):
        fill(*members, _member("link", tarfile.LNKTYPE, target))


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "a/..", "/..", "x" * 256, "a\0b"])
def test_names_that_lead_nowhere(fill: Fill, name: str) -> None:
    with pytest.raises(InvalidArchive, match="member"):
        fill(_member(name))


def test_the_root_is_a_directory(fill: Fill) -> None:
    with pytest.raises(InvalidArchive, match="root is not a directory"):
        fill(_member("./"))


@pytest.mark.parametrize("kind", [b"V", b"M", b"D", b"Z", b"\xff"])
def test_unknown_types_are_named(fill: Fill, kind: bytes) -> None:
    with pytest.raises(InvalidArchive, match="'label' has unknown type"):
        fill(_member("label", kind))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.5", (1, 500_000_000)),
        ("1700000000.123456789", (1_700_000_000, 123_456_789)),
        ("1700000000.1234567899", (1_700_000_000, 123_456_789)),
        ("-1.5", (-2, 500_000_000)),
        ("-0.000000001", (-1, 999_999_999)),
        ("-7", (-7, 0)),
        ("3", (3, 0)),
        (".25", (0, 250_000_000)),
        ("-.25", (-1, 750_000_000)),
        ("8.", (8, 0)),
    ],
)
def test_times_are_exact(text: str, expected: tuple[int, int]) -> None:
    attributes = read_attributes(_extended({"mtime": text}))
    assert (attributes.mtime_s, attributes.mtime_ns) == expected


@pytest.mark.parametrize(
    "text", ["", "x", "1e5", "nan", "inf", "1.5.5", "1.-5", "--1", "9" * 30, "1_0", " 1"]
)
def test_times_that_are_none(fill: Fill, text: str) -> None:
    with pytest.raises(InvalidArchive, match="'f' has a broken header"):
        fill(_extended({"mtime": text}))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (tarfile.REGTYPE, "uid", 1 << 32),
        (tarfile.REGTYPE, "gid", -1),
        (tarfile.REGTYPE, "size", -1),
        (tarfile.REGTYPE, "size", 1 << 70),
        (tarfile.REGTYPE, "mtime", 1 << 70),
        (tarfile.CHRTYPE, "devmajor", 1 << 12),
        (tarfile.BLKTYPE, "devminor", 1 << 20),
        (tarfile.BLKTYPE, "devminor", -1),
        (tarfile.SYMTYPE, "linkname", ""),
        (tarfile.SYMTYPE, "linkname", "x" * 4096),
        (tarfile.SYMTYPE, "linkname", "a\0b"),
    ],
)
def test_values_past_the_format(fill: Fill, kind: bytes, field: str, value: object) -> None:
    member = _member("f", kind)
    setattr(member, field, value)
    with pytest.raises(InvalidArchive, match="'f' has a broken header"):
        fill(member)


def test_devices_with_large_numbers() -> None:
    member = _member("d", tarfile.BLKTYPE)
    member.devmajor, member.devminor = 4095, 0xFFFFF
    assert read_attributes(member) == Attributes(stat.S_IFBLK | 0o644, rdev=os.makedev(4095, 0xFFFFF))


def test_extended_attributes_of_both_kinds() -> None:
    headers = {
        "SCHILY.xattr.user.binary": "\udcff\0=\n",
        "SCHILY.xattr.user.a%3Db%25": "escaped by GNU tar",
        "SCHILY.xattr.system.nfs4_acl": "cannot be stored",
        "LIBARCHIVE.xattr.user.percent%20sign": "AAH/",
        "comment": "none",
    }
    assert read_xattrs(_extended(headers)) == {
        b"user.binary": b"\xff\0=\n",
        b"user.a=b%": b"escaped by GNU tar",
        b"user.percent sign": b"\0\1\xff",
    }


@pytest.mark.parametrize(
    "text",
    [
        "user::rw-\nuser:1000:r--\ngroup::r--\nmask::r--\nother::r--\n",
        "user::rw-,user:nobody-here:r--:1000,group::r--,other::r--,mask::r--",
        "group::r--,user:1000:r--\t#effective:r--,mask::r--,user::rw-,other::r--",
    ],
)
def test_access_control_lists_as_text(text: str) -> None:
    headers = {"SCHILY.acl.access": text, "SCHILY.acl.default": text}
    assert read_xattrs(_extended(headers)) == {
        b"system.posix_acl_access": ACL,
        b"system.posix_acl_default": ACL,
    }


def test_an_access_control_list_that_is_the_mode() -> None:
    minimal = "user::rwx\ngroup::r-x\nother::r-x"
    assert read_xattrs(_extended({"SCHILY.acl.access": minimal})) == {}
    default = read_xattrs(_extended({"SCHILY.acl.default": minimal}))
    assert len(default[b"system.posix_acl_default"]) == 4 + 3 * 8


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "user::rwz",
        "user::rw",
        "users::rwx",
        "user:nobody-here:rwx",
        "group:4294967295:rwx",
        "user::r:w:x",
    ],
)
def test_access_control_lists_that_are_none(fill: Fill, text: str) -> None:
    with pytest.raises(InvalidArchive, match="access control entry"):
        fill(_extended({"SCHILY.acl.access": text}))


def test_a_broken_attribute_is_an_error(fill: Fill) -> None:
    with pytest.raises(InvalidArchive, match="broken header"):
        fill(_extended({"LIBARCHIVE.xattr.user.x": "\udcff"}))


def test_a_directory_that_is_replaced_is_empty_when_it_comes_again(fill: Fill) -> None:
    directory = _member("x", tarfile.DIRTYPE)
    table = fill(directory, _member("x/old/1"), _member("x"), _member("x/new"), directory, _member("x/2"))
    assert _paths(table) == [b"/", b"/x", b"/x/2", b"/x/new"]


def test_a_link_keeps_what_was_in_a_replaced_directory(fill: Fill) -> None:
    inside = _member("x/inside")
    inside.size = 5
    table = fill(inside, _member("link", tarfile.LNKTYPE, "x/inside"), _member("x"))
    assert _paths(table) == [b"/", b"/link", b"/x"]
    assert list(table.size) == [0, 5, 0]
    assert list(table.nlink) == [2, 1, 1]


def test_a_link_below_its_own_target(fill: Fill) -> None:
    table = fill(_member("x"), _member("x/y", tarfile.LNKTYPE, "x"))
    assert _paths(table) == [b"/", b"/x", b"/x/y"]
    assert stat.S_ISREG(table.mode[2])


def test_a_link_in_place_of_the_root(fill: Fill) -> None:
    with pytest.raises(InvalidArchive, match="root is not a directory"):
        fill(_member("x"), _member("./", tarfile.LNKTYPE, "x"))


def test_more_directories_and_nodes_than_are_kept_in_memory(fill: Fill) -> None:
    names = [f"{number % 5000:04}/{number:05}" for number in range(10_000)]
    assert sorted(_paths(fill(*map(_member, names)))) == sorted(
        [b"/", *(b"/%04d" % number for number in range(5000)), *(b"/" + name.encode() for name in names)]
    )


def test_rows_of_members(tmp_path: Path) -> None:
    with TarTree("test.tar", tmp_path / "tree") as tree:
        for name in ("b", "a", "b"):
            tree.add(_member(name))
        tree.table()
        assert [tree.row_of_member(number) for number in range(3)] == [0, 1, 2]


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    def fill_up() -> None:
        with TarTree("test.tar", tmp_path / "tree") as tree:
            tree._database.execute("PRAGMA max_page_count = 50")
            for number in range(100_000):
                tree.add(_member(f"{number:0200}"))

    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        fill_up()
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())

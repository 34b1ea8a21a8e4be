"""The tree that members describe, in whatever order they come; headers that describe none."""

import os
import stat
import tarfile

import pytest

from builder.tar_tree import InvalidArchive, TarNode, TarTree
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


def _tree(*members: tarfile.TarInfo) -> TarTree:
    tree = TarTree("test.tar")
    for member in members:
        tree.add(member)
    return tree


def _filled(tree: TarTree) -> InodeTable:
    table = InodeTable(tree.root.attributes)
    tree.fill(table)
    return table


def _paths(tree: TarTree) -> list[bytes]:
    table = _filled(tree)
    return [table.path(row) for row in range(len(table))]


def _only(tree: TarTree) -> TarNode:
    (node,) = (tree.root.children or {}).values()
    return node


def test_rows_come_in_the_order_of_a_directory_scan() -> None:
    tree = _tree(_member("b/y"), _member("z"), _member("b", tarfile.DIRTYPE), _member("a/x/1"))
    assert _paths(tree) == [b"/", b"/a", b"/b", b"/z", b"/a/x", b"/a/x/1", b"/b/y"]


def test_a_directory_behind_its_content_gives_its_attributes() -> None:
    late = _member("d", tarfile.DIRTYPE)
    late.mode, late.uid = 0o711, 70_000
    table = _filled(_tree(_member("d/file"), late))
    assert (table.mode[1], table.uid[1]) == (stat.S_IFDIR | 0o711, 70_000)
    assert table.path(2) == b"/d/file"


def test_missing_parents_are_plain_directories() -> None:
    table = _filled(_tree(_member("a/b")))
    assert table.mode[1] == stat.S_IFDIR | 0o755
    assert (table.uid[1], table.mtime_s[1]) == (0, 0)
    assert table.nlink[0] == 3


def test_the_root_has_a_member_of_its_own() -> None:
    root = _member("./", tarfile.DIRTYPE)
    root.mode = 0o1777
    assert _filled(_tree(_member("x"), root)).mode[0] == stat.S_IFDIR | 0o1777


@pytest.mark.parametrize("name", ["a/b", "./a/b", "/a/b", "a//b", "./././a/./b"])
def test_spellings_of_one_path(name: str) -> None:
    assert _paths(_tree(_member(name))) == [b"/", b"/a", b"/a/b"]


def test_the_last_one_wins() -> None:
    first, second = _member("f"), _member("f")
    second.size = 7
    assert list(_filled(_tree(first, second)).size) == [0, 7]


def test_a_file_becomes_a_directory_and_back() -> None:
    file, directory, inside = _member("x"), _member("x", tarfile.DIRTYPE), _member("x/inside")
    assert _paths(_tree(file, directory, inside)) == [b"/", b"/x", b"/x/inside"]
    assert _paths(_tree(file, inside)) == [b"/", b"/x", b"/x/inside"]
    assert _paths(_tree(directory, inside, file)) == [b"/", b"/x"]


def test_hard_links_share_an_inode_across_directories() -> None:
    tree = _tree(_member("b/file"), _member("a/link", tarfile.LNKTYPE, "./b/file"), _member("c/file"))
    table = _filled(tree)
    rows = {table.path(row): row for row in range(len(table))}
    first = rows[b"/a/link"]
    assert table.target[rows[b"/b/file"]] == first
    assert table.nlink[first] == 2
    assert table.nlink[rows[b"/c/file"]] == 1


def test_a_link_keeps_the_file_that_its_name_meant_then() -> None:
    later = _member("file")
    later.size = 9
    table = _filled(_tree(_member("file"), _member("link", tarfile.LNKTYPE, "file"), later))
    assert list(table.size) == [0, 9, 0]
    assert list(table.nlink) == [2, 1, 1]


@pytest.mark.parametrize("target", ["nothing", "directory", "file/below", "", "../out"])
def test_links_to_no_file(target: str) -> None:
    members = (_member("directory", tarfile.DIRTYPE), _member("file"))
    with pytest.raises(InvalidArchive, match=r"test\.tar: "):
        _tree(*members, _member("link", tarfile.LNKTYPE, target))


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "a/..", "/..", "x" * 256, "a\0b"])
def test_names_that_lead_nowhere(name: str) -> None:
    with pytest.raises(InvalidArchive, match="member"):
        _tree(_member(name))


def test_the_root_is_a_directory() -> None:
    with pytest.raises(InvalidArchive, match="root is not a directory"):
        _tree(_member("./"))


@pytest.mark.parametrize("kind", [b"V", b"M", b"D", b"Z", b"\xff"])
def test_unknown_types_are_named(kind: bytes) -> None:
    with pytest.raises(InvalidArchive, match="'label' has unknown type"):
        _tree(_member("label", kind))


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
    attributes = _only(_tree(_extended({"mtime": text}))).attributes
    assert (attributes.mtime_s, attributes.mtime_ns) == expected


@pytest.mark.parametrize(
    "text", ["", "x", "1e5", "nan", "inf", "1.5.5", "1.-5", "--1", "9" * 30, "1_0", " 1"]
)
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArchive, match="'f' has a broken header"):
        _tree(_extended({"mtime": text}))


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
def test_values_past_the_format(kind: bytes, field: str, value: object) -> None:
    member = _member("f", kind)
    setattr(member, field, value)
    with pytest.raises(InvalidArchive, match="'f' has a broken header"):
        _tree(member)


def test_devices_with_large_numbers() -> None:
    member = _member("d", tarfile.BLKTYPE)
    member.devmajor, member.devminor = 4095, 0xFFFFF
    assert _only(_tree(member)).attributes == Attributes(stat.S_IFBLK | 0o644, rdev=os.makedev(4095, 0xFFFFF))


def test_extended_attributes_of_both_kinds() -> None:
    headers = {
        "SCHILY.xattr.user.binary": "\udcff\0=\n",
        "SCHILY.xattr.user.a%3Db%25": "escaped by GNU tar",
        "SCHILY.xattr.system.nfs4_acl": "cannot be stored",
        "LIBARCHIVE.xattr.user.percent%20sign": "AAH/",
        "comment": "none",
    }
    assert _only(_tree(_extended(headers))).xattrs == {
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
    node = _only(_tree(_extended({"SCHILY.acl.access": text, "SCHILY.acl.default": text})))
    assert node.xattrs == {b"system.posix_acl_access": ACL, b"system.posix_acl_default": ACL}


def test_an_access_control_list_that_is_the_mode() -> None:
    minimal = "user::rwx\ngroup::r-x\nother::r-x"
    assert _only(_tree(_extended({"SCHILY.acl.access": minimal}))).xattrs is None
    default = _only(_tree(_extended({"SCHILY.acl.default": minimal}))).xattrs
    assert default is not None
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
def test_access_control_lists_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArchive, match="access control entry"):
        _tree(_extended({"SCHILY.acl.access": text}))


def test_a_broken_attribute_is_an_error() -> None:
    with pytest.raises(InvalidArchive, match="broken header"):
        _tree(_extended({"LIBARCHIVE.xattr.user.x": "\udcff"}))


def test_names_lists_every_name() -> None:
    tree = _tree(_member("a/b/c"), _member("l", tarfile.LNKTYPE, "a/b/c"), _member("e", tarfile.DIRTYPE))
    assert sorted(name for name, _ in tree.names()) == [b"/a", b"/a/b", b"/a/b/c", b"/e", b"/l"]

"""A tree with everything that a POSIX file system can hold, as the builder of tests sees it."""

import os
import stat

from rafs.inode_table import Attributes
from tests.rafs_image import Link, Node, directory, file, special, symlink

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
"""`cap_net_bind_service=ep` as the kernel stores it in security.capability."""


def posix_tree() -> Node:
    """The tree; the same bytes at every call."""
    return directory(
        {
            b"!bang": file(b"sorts below the dots"),
            b"-dash": file(b"so does this"),
            b"...": file(b"between"),
            b"names": _names(),
            b"files": _files(),
            b"special": _special(),
            b"links": directory({b"one": Link(b"/files/two-chunks"), b"two": Link(b"/files/two-chunks")}),
            b"empty": directory({}),
            b"empty-file": file(b""),
            b"deep": directory({b"er": directory({b"and": directory({b"deeper": file(b"down here")})})}),
        },
        mode=0o1777,
        mtime_s=-1,
        mtime_ns=999_999_999,
    )


def _names() -> Node:
    names = [b"n" * 255, "é".encode(), b"\xff\xfe not utf-8", b"new\nline", b" ", b"~", b"\\", b"a\x01b"]
    return directory({name: file(name) for name in names})


def _files() -> Node:
    chunky = b"".join(b"%08d" % number for number in range(2000))
    return directory(
        {
            b"one-chunk": file(b"4" * 4096),
            b"two-chunks": file(b"5" * 4097, uid=70_000, gid=4_000_000_000, mtime_s=1 << 33, mtime_ns=1),
            b"many-chunks": file(chunky, mtime_s=1_700_000_000, mtime_ns=123_456_789),
            b"zeros": file(bytes(20_000)),
            b"setuid": file(b"#!", mode=0o6755),
            b"secret": file(b"no bits", mode=0),
            b"old": file(b"before 1970", mtime_s=-(1 << 35)),
            b"xattrs": file(
                b"x",
                {
                    b"user.binary": bytes(range(256)),
                    b"user.empty": b"",
                    b"user." + b"n" * 250: b"a long name",
                    b"trusted.overlay.opaque": b"y",
                    b"security.capability": CAPABILITY,
                },
            ),
        },
        uid=1000,
        gid=1000,
    )


def _special() -> Node:
    marked = Node(
        Attributes(stat.S_IFDIR | 0o755), xattrs={b"user.on": b"a directory"}, children={b"f": file(b"f")}
    )
    return directory(
        {
            b"null": special(stat.S_IFCHR, os.makedev(1, 3)),
            b"large-minor": special(stat.S_IFCHR, os.makedev(4095, 0xFFFFF)),
            b"disk": special(stat.S_IFBLK, os.makedev(259, 70_000)),
            b"fifo": special(stat.S_IFIFO),
            b"socket": special(stat.S_IFSOCK),
            b"link": symlink(b"../files/one-chunk"),
            b"dangling": symlink(b"\xff/nowhere"),
            b"long-link": symlink(b"/".join([b"long"] * 600)),
            b"longest-link": symlink(b"x" * 4095),
            b"marked": marked,
        }
    )

"""`nydus-py ls`: the files of an image."""

import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import typer

from rafs.bootstrap import Bootstrap
from rafs.inode import Inode
from tools.image import open_image
from tools.output import JsonOption, emit, json_name, shown_name
from tools.runtime import run_async
from tools.settings import Settings, settings_of


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in an image; the time in whole seconds since the epoch and nanoseconds on top."""

    path: str
    type: str
    mode: str
    nlink: int
    uid: int
    gid: int
    size: int
    mtime_s: int
    mtime_ns: int
    rdev: str | None
    target: str | None


Row = tuple[bytes, Inode, bytes | None]

TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def run(
    ctx: typer.Context,
    reference: Annotated[str, typer.Argument(metavar="REF", help="The image.")],
    path: Annotated[str, typer.Argument(metavar="[PATH]", help="A file or directory in it.")] = "/",
    long: Annotated[bool, typer.Option("-l", "--long", help="Show mode, owner, size and time.")] = False,
    recursive: Annotated[
        bool, typer.Option("-R", "--recursive", help="Also what is in directories below; full paths.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List files of an image."""
    rows = _read(reference, os.fsencode(path), recursive, settings_of(ctx))
    if as_json:
        emit([_entry(row) for row in rows], as_json=True, render=lambda _: ())
    else:
        emit(rows, as_json=False, render=lambda found: (_line(row, long) for row in found))


def _read(reference: str, path: bytes, recursive: bool, settings: Settings) -> list[Row]:
    async def read() -> list[Row]:
        async with open_image(reference, settings) as image:
            return [
                (name, inode, image.bootstrap.readlink(inode) if inode.is_symlink else None)
                for name, inode in _select(image.bootstrap, path, recursive)
            ]

    return run_async(read)


def _select(bootstrap: Bootstrap, path: bytes, recursive: bool) -> Iterator[tuple[bytes, Inode]]:
    """Names and inodes to show: those in a directory, or the file itself."""
    top = bootstrap.resolve(path)
    if not top.is_dir:
        yield path, top
        return
    if recursive:
        base = b"/" + b"/".join(name for name in path.split(b"/") if name not in (b"", b"."))
        inside = base.rstrip(b"/") + b"/"
        yield from (row for row in bootstrap.walk() if row[0] == base or row[0].startswith(inside))
        return
    for entry in bootstrap.readdir(top):
        if entry.name not in (b".", b".."):
            yield entry.name, bootstrap.inode(entry.nid)


def _entry(row: Row) -> Entry:
    name, inode, target = row
    return Entry(
        path=json_name(name),
        type=TYPES[stat.S_IFMT(inode.mode)],
        mode=f"{stat.S_IMODE(inode.mode):04o}",
        nlink=inode.nlink,
        uid=inode.uid,
        gid=inode.gid,
        size=inode.size,
        mtime_s=inode.mtime_s,
        mtime_ns=inode.mtime_ns,
        rdev=_device(inode),
        target=None if target is None else json_name(target),
    )


def _line(row: Row, long: bool) -> str:
    name, inode, target = row
    if not long:
        return shown_name(name)
    size = _device(inode) or str(inode.size)
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(inode.mtime_s))
    arrow = f" -> {shown_name(target)}" if target is not None else ""
    owner = f"{inode.uid:>5} {inode.gid:>5}"
    return f"{stat.filemode(inode.mode)} {inode.nlink:>3} {owner} {size:>12} {when} {shown_name(name)}{arrow}"


def _device(inode: Inode) -> str | None:
    if stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode):
        return f"{os.major(inode.rdev)},{os.minor(inode.rdev)}"
    return None

"""What containerd is to mount for a snapshot: as its overlayfs snapshotter has it, to the letter."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fuse.snapshotter.directories import Directories
from fuse.snapshotter.records import Kind, Snapshot

_INDEX_PARAMETER = Path("/sys/module/overlay/parameters/index")
_UID_MAP = Path("/proc/self/uid_map")
_WHOLE_MAP = "0 0 4294967295"


class Mount(NamedTuple):
    """One mount, in the words of mount(8)."""

    type: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OverlayOptions:
    """Options that every overlay gets on this host."""

    options: tuple[str, ...] = ()

    @classmethod
    def of_this_host(cls) -> "OverlayOptions":
        """`index=off` where the kernel has an index (one upper directory is used under two mounts now and
        then), `userxattr` where this is the root of a user namespace, which may not have trusted ones.
        """
        options = []
        if _INDEX_PARAMETER.exists():
            options.append("index=off")
        if " ".join(_UID_MAP.read_text().split()) != _WHOLE_MAP:
            options.append("userxattr")
        return cls(tuple(options))


def mounts_of(
    snapshot: Snapshot, lower: Sequence[Path], directories: Directories, overlay: OverlayOptions
) -> list[Mount]:
    """The mounts of an active snapshot or a view over the directories `lower`, the topmost first."""
    own = str(directories.files(snapshot.id))
    if not lower:
        return [Mount("bind", own, ("ro" if snapshot.kind is Kind.VIEW else "rw", "rbind"))]
    if snapshot.kind is Kind.VIEW and len(lower) == 1:
        return [Mount("bind", str(lower[0]), ("ro", "rbind"))]
    options = list(overlay.options)
    if snapshot.kind is Kind.ACTIVE:
        options += [f"workdir={directories.work(snapshot.id)}", f"upperdir={own}"]
    options.append("lowerdir=" + ":".join(map(str, lower)))
    return [Mount("overlay", "overlay", tuple(options))]

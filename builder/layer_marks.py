"""How a bootstrap of a single layer says what the layer does to those below it.

Whiteouts and opaque directories are marked as overlayfs has them, so that a layer can be a lower directory of
an overlay. Two things overlayfs has no word for: a directory that the layer needs on the way and does not
describe, and a hard link to a file of a lower layer. Merging takes all marks away again.
"""

import stat

OPAQUE = b"trusted.overlay.opaque"
"""On a directory, with the value `y`: nothing shows through from below."""
IMPLIED = b"trusted.nydus-py.implied"
"""On a directory: what is below it at this path, a link to a directory too, stays as it is."""
LINK = b"trusted.nydus-py.link"
"""On an empty file: it is another name of the file at this path, given without a leading slash."""
HAS_LINKS = b"trusted.nydus-py.has-links"
"""On the root: there are such files. They are looked up before the layer changes anything."""
YES = b"y"
WHITEOUT_PREFIX = b".wh."
"""Of names in the layers of container images (OCI image specification): the rest of the name is hidden."""

_RESERVED = (b"trusted.overlay.", b"trusted.nydus-py.")


def is_reserved(name: bytes) -> bool:
    """Whether an extended attribute would be taken for a mark, or for one by overlayfs."""
    return name.startswith(_RESERVED)


def is_whiteout(mode: int, rdev: int) -> bool:
    """Whether an inode hides what is below: a character device 0/0, as overlayfs has it."""
    return stat.S_ISCHR(mode) and rdev == 0


def unmarked(xattrs: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """The attributes that are the file's own."""
    return {name: value for name, value in xattrs.items() if not is_reserved(name)}

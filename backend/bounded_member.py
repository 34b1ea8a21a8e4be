"""Members of tar archives that cannot fill the memory: the size of their extended headers is bounded."""

import tarfile
from tarfile import ReadError
from typing import Self

EXTENDED_MAX_BYTES = 16 << 20
"""Of one extended header; extended attributes of a file take 256 KiB."""
_EXTENDED_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class BoundedMember(tarfile.TarInfo):
    """For `tarfile.open(tarinfo=...)`, which then raises `tarfile.ReadError` for a larger header."""

    # The one place that every header passes, in the tarfile modules of Python and of Debian's Python alike.
    def _proc_member(self, tarfile: tarfile.TarFile) -> Self:
        if self.type in _EXTENDED_TYPES and self.size > EXTENDED_MAX_BYTES:
            raise ReadError(f"an extended header of {self.size} bytes")
        return super()._proc_member(tarfile)  # type: ignore[misc,no-any-return]

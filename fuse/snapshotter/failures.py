"""What a snapshot request can fail with. containerd acts on the gRPC code, its user reads the message."""

import errno
from typing import ClassVar

from rafs.errors import NydusError


class SnapshotError(NydusError):
    """The root of them; `code` is the name of the gRPC status code."""

    message = "{why}"
    exit_code: ClassVar[int] = 204
    code: ClassVar[str] = "UNKNOWN"


class SnapshotMissing(SnapshotError):
    """There is no snapshot of that name."""

    message = "snapshot {name}: not found"
    exit_code: ClassVar[int] = 205
    errno: ClassVar[int] = errno.ENOENT
    code: ClassVar[str] = "NOT_FOUND"


class SnapshotExists(SnapshotError):
    """There is one of that name, or (to containerd: the good answer) the layer asked for is here already."""

    message = "snapshot {name}: already exists"
    exit_code: ClassVar[int] = 206
    errno: ClassVar[int] = errno.EEXIST
    code: ClassVar[str] = "ALREADY_EXISTS"


class SnapshotUnfit(SnapshotError):
    """It is there and in another state than the request wants."""

    message = "snapshot {name}: {why}"
    exit_code: ClassVar[int] = 207
    errno: ClassVar[int] = errno.EBUSY
    code: ClassVar[str] = "FAILED_PRECONDITION"


class RequestInvalid(SnapshotError):
    """A request that cannot be meant."""

    message = "{why}"
    exit_code: ClassVar[int] = 208
    errno: ClassVar[int] = errno.EINVAL
    code: ClassVar[str] = "INVALID_ARGUMENT"


class ImageUnavailable(SnapshotError):
    """An image cannot be mounted now."""

    message = "image {reference}: {why}"
    exit_code: ClassVar[int] = 209
    retryable: ClassVar[bool] = True
    code: ClassVar[str] = "UNAVAILABLE"


class NoRoom(SnapshotError):
    """The disk that the snapshots are on takes no more."""

    message = "{where}: {why}; free some space"
    exit_code: ClassVar[int] = 210
    errno: ClassVar[int] = errno.ENOSPC
    retryable: ClassVar[bool] = True
    code: ClassVar[str] = "RESOURCE_EXHAUSTED"


class RootUnusable(SnapshotError):
    """The directory for the snapshots cannot be used."""

    message = "{where}: {why}"
    exit_code: ClassVar[int] = 211

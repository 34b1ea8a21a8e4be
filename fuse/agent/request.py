"""What clients ask of an agent. Cheap to import: a client has no time."""

import enum

import msgspec

from backend.prefetch_mode import PrefetchMode

STATUS_TARGET = "/api/v1/status"
MOUNT_TARGET = "/api/v1/mount"
UNMOUNT_TARGET = "/api/v1/unmount"
UPGRADE_TARGET = "/api/v1/upgrade"
LIMITS_TARGET = "/api/v1/limits"


class Driver(enum.StrEnum):
    """How the kernel is served."""

    AUTO = "auto"
    EROFS = "erofs"
    FUSE = "fuse"
    PYFUSE3 = "pyfuse3"


NO_DRIVER = 87
"""Exit code in the answer when none of the agent's drivers works here; a client may have another one."""


class MountRequest(msgspec.Struct, frozen=True):
    """An image to mount. Paths are absolute; `environment` names where the client's credentials are.

    `credentials_socket` is where to ask for credentials first (backend/credential_service.py); never a
    secret, because a request is kept for the agent's successor.
    """

    reference: str
    mountpoint: str
    cache_dir: str
    driver: Driver = Driver.AUTO
    prefetch: PrefetchMode = PrefetchMode.HINTS
    allow_other: bool = False
    passthrough: bool = False
    read_timeout_s: float = 60.0
    plain_http: bool | None = None
    ca_file: str | None = None
    insecure: bool = False
    environment: dict[str, str] = {}
    credentials_socket: str | None = None


class UnmountRequest(msgspec.Struct, frozen=True):
    """A mount to take down; `lazy` although somebody uses it."""

    mountpoint: str
    lazy: bool = False


class LimitsChange(msgspec.Struct, frozen=True):
    """Limits to change, by their names in `LimitSettings`; None lifts one, and those not named stay."""

    limits: dict[str, int | None]

"""What a host says of its limits. Cheap to import: a client has no time."""

import msgspec

from backend.peers.leases import OriginShare
from backend.peers.limit_settings import LimitSettings


class LimitStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What has passed since the start, and who waits."""

    up_bytes: int
    down_bytes: int
    origin_bytes: int
    origin_requests: int
    origin_busy: int
    waiting: int


class LimitStatus(msgspec.Struct, frozen=True):
    """The limits of a host: its own, those of the cluster, and what follows.

    `lease` is what the cluster lends it of the origin; `yielded_bps` what serving is held to at the moment.
    """

    own: LimitSettings
    cluster: LimitSettings
    effective: LimitSettings
    lease: OriginShare | None
    yielded_bps: float | None
    statistics: LimitStatistics

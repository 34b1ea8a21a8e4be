"""What a host says of its part in the peer cache. Cheap to import: a client has no time."""

import msgspec

from backend.peers.limit_status import LimitStatus
from backend.peers.wire import HostInfo, Traffic


class PeerStatus(msgspec.Struct, frozen=True):
    """What a host says of its part in the peer cache. `by_peer`: bytes received from each host.

    `encoded_bytes`: disk space of encoded bytes that are kept.
    """

    host: HostInfo
    scheduler: str
    members: int
    enabled: bool
    blobs: int
    traffic: Traffic
    uploads: int
    upload_restarts: int
    degraded: int
    hedges: int
    dead_peers: int
    wrong_bytes: int
    busy_answers: int
    by_peer: dict[str, int]
    refused: dict[str, int]
    limits: LimitStatus
    encoded_bytes: int = 0

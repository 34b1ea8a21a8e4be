"""What hosts and schedulers tell each other: JSON, see docs/peers.md.

Everything that comes from another host is a hint at most: sizes and numbers are bounded where they are taken.
"""

import msgspec

from backend.peers.leases import Lease, OriginShare
from backend.peers.limit_settings import LimitSettings, read_limits

ANNOUNCE_TARGET = "/v1/announce"
TERMS_TARGET = "/v1/terms"
STATUS_TARGET = "/v1/status"
LIMITS_TARGET = "/v1/limits"
SWITCH_TARGET = "/v1/switch"


class HostInfo(msgspec.Struct, frozen=True):
    """A host, and the address of its upload server (`http://10.0.0.1:8771`).

    `keeps_encoded`: of some blobs at least, it has the encoded bytes, too.
    """

    id: str
    url: str
    zone: str = ""
    labels: dict[str, str] = {}
    keeps_encoded: bool = False


class Holding(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a host has of a blob: all of it (`have`, base64 in JSON), or what came since (`added`)."""

    blob_id: str
    pieces: int
    have: bytes | None = None
    added: list[int] = []


class Traffic(msgspec.Struct, frozen=True):
    """Bytes since the agent started, decoded but for `*_encoded_bytes` and what was served.

    `peer_encoded_bytes`: what came encoded from other hosts, of which `peer_bytes` has the decoded size.
    """

    origin_bytes: int = 0
    origin_encoded_bytes: int = 0
    peer_bytes: int = 0
    served_bytes: int = 0
    peer_encoded_bytes: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return Traffic(*(a + b for a, b in pairs))


class BadPeer(msgspec.Struct, frozen=True):
    """A host that has sent wrong bytes of a blob."""

    host_id: str
    blob_id: str


class Announce(msgspec.Struct, frozen=True, omit_defaults=True):
    """From a host, every `Answer.interval_s`.

    `epoch` and `sequence` are those of the last answer that arrived; others than the scheduler expects make
    it tell everything again. `wanted`: blobs of which the host lacks pieces. `is_everything`: all holdings
    are here and full. `origin_wants`: what the host would use of the origin; `lease_seen`: its last lease.
    `members_digest`: of the members it knows, when `members_version` is -1. `is_standby`: another scheduler
    is the one that tells it of members and holders.
    """

    host: HostInfo
    epoch: str = ""
    sequence: int = 0
    members_version: int = -1
    members_digest: str = ""
    is_standby: bool = False
    is_everything: bool = False
    holdings: list[Holding] = []
    dropped: list[str] = []
    wanted: list[str] = []
    traffic: Traffic = Traffic()
    uploads: int = 0
    bad_peers: list[BadPeer] = []
    is_leaving: bool = False
    origin_wants: OriginShare = OriginShare(0, 0.0, 0)
    lease_seen: int = 0


class ClusterLimits(msgspec.Struct, frozen=True):
    """What no host may exceed (`hosts`), and what all together may not ask of the origin."""

    hosts: LimitSettings = LimitSettings()
    origin: OriginShare = OriginShare()


class Terms(msgspec.Struct, frozen=True):
    """What counts for all: `limits`, and whether hosts use each other at all (`peers_enabled`).

    `version`: ms of the clock of the scheduler that was told them, 0 for those that it was started with.
    """

    version: int = 0
    peers_enabled: bool = True
    limits: ClusterLimits = ClusterLimits()


class LimitsChange(msgspec.Struct, frozen=True):
    """Limits to change, by name in `LimitSettings`; `origin_*` of `cluster` are those of all together.

    None lifts one, and those not named stay.
    """

    hosts: dict[str, int | None] = {}
    cluster: dict[str, int | None] = {}

    def applied_to(self, before: ClusterLimits) -> ClusterLimits:
        """The limits after it. Raises `LimitInvalid`."""
        hosts = read_limits({**msgspec.to_builtins(before.hosts), **self.hosts})
        bps, rps, places = msgspec.structs.astuple(before.origin)
        origin = {"origin_bps": bps, "origin_rps": rps, "origin_concurrency": places, **self.cluster}
        whole = read_limits(origin)
        return ClusterLimits(hosts, OriginShare(whole.origin_bps, whole.origin_rps, whole.origin_concurrency))


class MemberChange(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the hosts of the scope have changed since the version that was named; `full`: these are all."""

    version: int
    full: bool = False
    joined: list[HostInfo] = []
    left: list[str] = []


class HolderChange(msgspec.Struct, frozen=True, omit_defaults=True):
    """What another host has of a wanted blob: all of it (`have`), or what came since the last answer."""

    blob_id: str
    host_id: str
    pieces: int
    have: bytes | None = None
    added: list[int] = []


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """To a host. `wants_everything`: the scheduler does not know the host (any more).

    `scope`: what certificates of those must be for that the host serves, "" for any of the cluster.
    `limits` are what no host may exceed, `lease` what this one may ask of the origin.
    """

    epoch: str
    sequence: int
    interval_s: float
    members: MemberChange
    holders: list[HolderChange] = []
    peers_enabled: bool = True
    banned: list[str] = []
    wants_everything: bool = False
    scope: str = ""
    limits: LimitSettings = LimitSettings()
    lease: Lease | None = None


class _Refusal(msgspec.Struct, frozen=True):
    error: str


REFUSAL_CHARACTERS = 256


def refusal_text(data: bytes) -> str:
    """Why a scheduler refused, from the body of its answer; the body itself when it is somebody else's."""
    try:
        text = msgspec.json.decode(data, type=_Refusal).error
    except msgspec.DecodeError:
        text = data.decode(errors="replace")
    return text.strip()[:REFUSAL_CHARACTERS]

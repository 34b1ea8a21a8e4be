"""Cluster-wide limits of the origin: what a host is lent of them, and what it does when nobody renews that.

Rates are bytes or requests per second; times are seconds of a monotonic clock of whoever asks. Sans-I/O.
"""

import math

import msgspec

from backend.peers.limit_settings import LimitInvalid

LEASE_S = 3.0
"""Long enough to miss several announces, short enough for work to move on from a host that died."""


class OriginShare(msgspec.Struct, frozen=True):
    """Bytes per second, requests per second and requests at once; None is without limit."""

    bps: int | None = None
    rps: float | None = None
    concurrency: int | None = None


def split_share(share: OriginShare, parts: int) -> OriginShare:
    """One of `parts` equal parts, rounded down. Raises `LimitInvalid` for requests at once that are fewer."""
    if share.concurrency is not None and 0 < share.concurrency < parts:
        why = f"{share.concurrency} cannot be split between {parts} schedulers"
        raise LimitInvalid(name="origin_concurrency", why=why)
    return OriginShare(
        bps=None if share.bps is None else share.bps // parts,
        rps=None if share.rps is None else share.rps / parts,
        concurrency=None if share.concurrency is None else share.concurrency // parts,
    )


class Lease(msgspec.Struct, frozen=True):
    """What one host may ask of the origin. `ttl_s` counts from when the host asked, on the host's clock."""

    number: int
    share: OriginShare
    floor: OriginShare
    ttl_s: float


class HostLease:
    """The host's side: the lease it holds, and the floor it keeps to when that has expired."""

    def __init__(self) -> None:
        self._lease: Lease | None = None
        self._expires_at = -math.inf

    @property
    def seen(self) -> int:
        """Number of the last lease that arrived, for the next announce; 0 before the first."""
        return self._lease.number if self._lease else 0

    def renew(self, lease: Lease, asked_at: float) -> None:
        """A lease has arrived for an announce sent at `asked_at`. One older than that held is dropped."""
        if self._lease is None or lease.number > self._lease.number or asked_at > self._expires_at:
            self._lease = lease
            self._expires_at = asked_at + lease.ttl_s

    def is_live(self, now: float) -> bool:
        """Whether it holds a lease that is not over."""
        return now < self._expires_at

    def share(self, now: float) -> OriginShare | None:
        """What the host may do now; None while no scheduler has ever said anything."""
        if self._lease is None:
            return None
        return self._lease.share if self.is_live(now) else self._lease.floor

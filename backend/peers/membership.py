"""Who is in a scope, told to each member as changes. No I/O; times are seconds of any clock."""

import math
from collections import deque
from collections.abc import Iterable
from itertools import islice

import msgspec
import xxhash

from backend.peers.wire import HostInfo, MemberChange

CHANGES_KEPT = 4096
PUBLISH_S = 0.25
EXACT_HOSTS = 64
"""Larger scopes are told of changes in steps of so many seconds: while thousands join, many hosts go from the
same version to the same one, and what they are told is made, and encoded, once."""

_ENCODER = msgspec.json.Encoder(order="deterministic")


def digest_of(hosts: Iterable[HostInfo]) -> str:
    """A name for a set of hosts, the same in any order: who has the same one need not be told them."""
    return f"{_digest(hosts):016x}"


def _digest(hosts: Iterable[HostInfo]) -> int:
    digest = 0
    for host in hosts:
        digest ^= xxhash.xxh3_64_intdigest(_ENCODER.encode(host))
    return digest


class Membership:
    """The hosts of one scope, and the latest changes, so that an announcement costs little at any size."""

    def __init__(self) -> None:
        self.hosts: dict[str, HostInfo] = {}
        self.version = 0
        self._digest = 0
        self._published, self._published_at = 0, -math.inf
        self._told: dict[int, MemberChange] = {}  # by the version from which; until the next step
        # Host ids, one for each version: it joined, changed or left.
        self._changes: deque[str] = deque(maxlen=CHANGES_KEPT)

    @property
    def digest(self) -> str:
        """See `digest_of`."""
        return f"{self._digest:016x}"

    def put(self, host: HostInfo) -> None:
        """A host has joined, or tells something else of itself than before."""
        before = self.hosts.get(host.id)
        if before != host:
            self._digest ^= _digest([host] if before is None else [before, host])
            self.hosts[host.id] = host
            self._note(host.id)

    def remove(self, host_id: str) -> None:
        """A host has gone."""
        host = self.hosts.pop(host_id, None)
        if host is not None:
            self._digest ^= _digest([host])
            self._note(host_id)

    def since(self, version: int, now: float) -> MemberChange:
        """What has changed since `version`; everything when that is too long ago, or unknown.

        It may end some changes ago, and is the same object for many: the next call tells the rest.
        """
        if self._published != self.version and (
            len(self.hosts) < EXACT_HOSTS or not 0 <= now - self._published_at < PUBLISH_S
        ):
            self._published, self._published_at = self.version, now
            self._told.clear()
        told = self._told.get(version)
        if told is None:
            told = self._told[version] = self._change(version)
        return told

    def _change(self, version: int) -> MemberChange:
        since_then = self.version - version
        if version < 0 or version > self._published or since_then > len(self._changes):
            if self._published != self.version:
                self._told.clear()  # the list is of now, and so is what others are told from here on
                self._published = self.version
            return MemberChange(self._published, full=True, joined=list(self.hosts.values()))
        not_yet = self.version - self._published
        names = set(islice(reversed(self._changes), not_yet, since_then))
        joined = [self.hosts[name] for name in names if name in self.hosts]
        return MemberChange(
            self._published, joined=joined, left=[name for name in names if name not in self.hosts]
        )

    def _note(self, host_id: str) -> None:
        self.version += 1
        self._changes.append(host_id)

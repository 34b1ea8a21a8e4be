"""Who is in a scope, told to each member as changes. No I/O, no clock."""

from collections import deque

from backend.peers.wire import HostInfo, MemberChange

CHANGES_KEPT = 4096


class Membership:
    """The hosts of one scope, and the latest changes, so that an announcement costs little at any size."""

    def __init__(self) -> None:
        self.hosts: dict[str, HostInfo] = {}
        self.version = 0
        # (version, host id): the host joined, changed or left at that version.
        self._changes: deque[tuple[int, str]] = deque(maxlen=CHANGES_KEPT)

    def put(self, host: HostInfo) -> None:
        """A host has joined, or tells something else of itself than before."""
        if self.hosts.get(host.id) != host:
            self.hosts[host.id] = host
            self._note(host.id)

    def remove(self, host_id: str) -> None:
        """A host has gone."""
        if self.hosts.pop(host_id, None) is not None:
            self._note(host_id)

    def since(self, version: int) -> MemberChange:
        """What has changed since `version`; everything when that is too long ago, or unknown."""
        oldest = self._changes[0][0] if self._changes else self.version + 1
        if not oldest - 1 <= version <= self.version:
            return MemberChange(self.version, full=True, joined=list(self.hosts.values()))
        names = {name for at, name in self._changes if at > version} if version < self.version else set()
        joined = [self.hosts[name] for name in names if name in self.hosts]
        return MemberChange(
            self.version, joined=joined, left=[name for name in names if name not in self.hosts]
        )

    def _note(self, host_id: str) -> None:
        self.version += 1
        self._changes.append((self.version, host_id))

"""Whose limits count: those that the host has set itself, tightened by those of the cluster.

Concurrency: for the trio thread, free of checkpoints.
"""

from collections.abc import Callable

from backend.peers.limit_settings import LimitSettings
from backend.peers.limit_status import LimitStatus
from backend.peers.limits import HostLimits


class LimitControl:
    """See above. Changes count at once, for those that wait as well."""

    def __init__(self, limits: HostLimits) -> None:
        """`limits` are set to what the host wants itself."""
        self.limits = limits
        self.own = limits.settings
        self.cluster = LimitSettings()
        self.on_change: list[Callable[[], None]] = []
        """Called after each change."""

    def set_own(self, settings: LimitSettings) -> None:
        """The host wants other limits."""
        self.own = settings
        self._apply()

    def set_cluster(self, settings: LimitSettings) -> None:
        """The scheduler says what no host may exceed."""
        if settings != self.cluster:
            self.cluster = settings
            self._apply()

    def status(self) -> LimitStatus:
        """The state at this moment."""
        limits = self.limits
        return LimitStatus(
            own=self.own,
            cluster=self.cluster,
            effective=limits.settings,
            lease=limits.lease,
            yielded_bps=limits.yielded_bps,
            statistics=limits.statistics(),
        )

    def _apply(self) -> None:
        self.limits.change(self.own.tightened_by(self.cluster))
        for told in self.on_change:
            told()

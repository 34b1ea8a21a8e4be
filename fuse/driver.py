"""What the drivers of the agent have in common."""

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class DriverOptions:
    """`allow_other`: every user may look in. `passthrough`: large complete files are read by the kernel."""

    allow_other: bool
    passthrough: bool = False
    readahead_kib: int = 1024
    read_timeout_s: float = 60.0


class HoldMount(Protocol):
    """Has the supervisor hold a mount: of which kind, what its driver wants to know again, and descriptors.

    Without descriptors those of the last call stay.
    """

    def __call__(
        self, kind: str, values: Mapping[str, Any], descriptors: Sequence[int] = ()
    ) -> Awaitable[None]:
        """Returns when it is held."""
        ...


class DriverMount(Protocol):
    """A mount that a driver has made. `state` is "mounted" or "detached" (unmounted, but still in use)."""

    @property
    def name(self) -> str:
        """The driver."""
        ...

    @property
    def state(self) -> str:
        """See above."""
        ...

    async def serve(self) -> None:
        """Returns when nobody can use the mount any more. Being cancelled leaves it to a successor."""
        ...

    async def release(self) -> None:
        """Gives back what it has; only after `serve` has returned."""
        ...

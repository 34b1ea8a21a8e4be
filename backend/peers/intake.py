"""What one download may receive, part by part, by the limits of its host.

Concurrency: one task. The ticket may become more urgent while the task waits.
"""

from dataclasses import dataclass

from backend.peers.limits import HostLimits
from backend.priority import Ticket


@dataclass(frozen=True, slots=True)
class Intake:
    """See above. `task` is the blob; `ticket` says how urgent it is at the moment."""

    limits: HostLimits
    ticket: Ticket
    task: str
    from_origin: bool = False

    @property
    def part_bytes(self) -> int:
        """The most to receive before `take`, so that limits hold within 5 % over 5 s."""
        return self.limits.part_bytes

    async def pay_first(self, n_bytes: int) -> "Intake | None":
        """What is to be held to while so many bytes arrive: None when they were paid for in advance.

        A checkpoint where a limit is so low.
        """
        if not self.limits.pays_first(n_bytes, from_origin=self.from_origin):
            return self
        await self.take(n_bytes)
        return None

    async def take(self, n_bytes: int) -> None:
        """Returns when what has just been received is paid for, and the next part may be. A checkpoint."""
        while True:
            part = min(n_bytes, self.limits.part_bytes)
            await self.limits.take(
                part, self.ticket.fetch_class, self.task, from_origin=self.from_origin, owner=self.ticket
            )
            n_bytes -= part
            if not n_bytes:
                return

"""What an upload server has done: counters that are cheap to raise, and a picture of them."""

from collections import Counter
from dataclasses import dataclass, field

import msgspec

from backend.peers.refusal import Refusal


class ServerStatistics(msgspec.Struct, frozen=True):
    """Counters since the start, but `connections`, those of now. `bytes_sent` are bytes of blobs.

    `refused` is by reason; what is refused once per request and once per connection is in the same table.
    """

    bytes_sent: int
    requests: int
    connections: int
    connections_made: int
    cold_reads: int
    refused: dict[str, int]


@dataclass(slots=True)
class ServerCounters:
    """The counters of one server. `cold_reads` counts the times that the disk was read in a thread."""

    bytes_sent: int = 0
    requests: int = 0
    connections: int = 0
    connections_made: int = 0
    cold_reads: int = 0
    refused: Counter[Refusal] = field(default_factory=Counter)

    def refuse(self, refusal: Refusal) -> None:
        """Counts one."""
        self.refused[refusal] += 1

    def snapshot(self) -> ServerStatistics:
        """The counters as they are now; those of refusals without the zeros."""
        return ServerStatistics(
            bytes_sent=self.bytes_sent,
            requests=self.requests,
            connections=self.connections,
            connections_made=self.connections_made,
            cold_reads=self.cold_reads,
            refused={refusal.value: count for refusal, count in self.refused.items() if count},
        )

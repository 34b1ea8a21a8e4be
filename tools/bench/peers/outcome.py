"""What one measurement says, beside the bound that it is judged by."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from tools.bench.peers.bounds import bound_s, bound_without_peers_s
from tools.bench.peers.host import MountCounts, PeerCounts
from tools.bench.peers.party import Measured
from tools.bench.peers.rate import PAYLOAD_SHARE, Rate
from tools.bench.peers.registry_node import Image, blob_bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """One measurement. Sizes in bytes; ratios are to the bound, or to the unique bytes.

    `payload_ratio` is `ratio` for links whose headers carry nothing: what a perfect program would bring to 1.
    `*_link_bytes` are counted on links, headers included. `cpu_share` is that of `cpu_s` in all CPUs: near 1
    the machine is measured, not the program. `peer_bytes` is None when nydus-py knows no peers; `trouble` is
    the sum over hosts.
    """

    scenario: str
    peers: bool
    hosts: int
    size_bytes: int
    unique_bytes: int
    makespan_s: float
    bound_s: float
    ratio: float
    payload_ratio: float
    origin_blob_bytes: int
    origin_other_bytes: int
    origin_link_bytes: int
    origin_ratio: float
    moved_ratio: float
    peer_bytes: int | None
    hosts_sent_link_bytes: int
    cpu_s: float
    cpu_share: float
    scheduler_cpu_s: float
    wrong_bytes: int
    failures: tuple[str, ...]
    driver: str
    direct_s: float | None = None
    trouble: PeerCounts | None = None

    @property
    def is_right(self) -> bool:
        """Everybody who had to finish has finished, with the right bytes."""
        return not self.failures and not self.wrong_bytes


@dataclass(frozen=True, slots=True)
class Case:
    """What was to be done: what each host wanted of an image, and what the registry had to send at least."""

    scenario: str
    peers: bool
    image: Image
    unique_bytes: int
    wanted_bytes: Sequence[int]
    origin_rate: Rate
    host_rate: Rate

    def bound_s(self) -> float:
        """The least makespan."""
        if self.peers:
            return bound_s(self.unique_bytes, self.wanted_bytes, self.origin_rate, self.host_rate)
        return bound_without_peers_s(self.wanted_bytes, self.origin_rate, self.host_rate)

    def judge(
        self,
        measured: Measured,
        counts: Sequence[MountCounts],
        trouble: Sequence[PeerCounts],
        direct_s: float | None = None,
    ) -> Outcome:
        """Puts all together; `counts` and `trouble` are what the hosts that are left said at the end."""
        least_s = self.bound_s()
        blobs = blob_bytes(measured.sent, self.image)
        told = [count.from_peers_bytes for count in counts]
        peer_bytes = sum(count or 0 for count in told) if any(count is not None for count in told) else None
        moved = blobs + (peer_bytes or 0)
        hosts = len(self.wanted_bytes)
        return Outcome(
            scenario=self.scenario,
            peers=self.peers,
            hosts=hosts,
            size_bytes=self.image.size_bytes,
            unique_bytes=self.unique_bytes,
            makespan_s=measured.makespan_s,
            bound_s=least_s,
            ratio=measured.makespan_s / least_s,
            payload_ratio=measured.makespan_s / least_s * PAYLOAD_SHARE,
            origin_blob_bytes=blobs,
            origin_other_bytes=measured.sent.total() - blobs,
            origin_link_bytes=measured.registry.sent_bytes,
            origin_ratio=blobs / self.unique_bytes,
            moved_ratio=moved / hosts / self.image.size_bytes,
            peer_bytes=peer_bytes,
            hosts_sent_link_bytes=measured.hosts.sent_bytes,
            cpu_s=measured.cpu_s,
            cpu_share=measured.cpu_s / max(measured.makespan_s, 0.001) / len(os.sched_getaffinity(0)),
            scheduler_cpu_s=measured.scheduler_cpu_s,
            wrong_bytes=sum(done.wrong_bytes for done in measured.done),
            failures=measured.failures,
            driver=",".join(sorted({count.driver for count in counts})),
            direct_s=direct_s,
            trouble=_sum(trouble),
        )


def _sum(each: Sequence[PeerCounts]) -> PeerCounts | None:
    if not each:
        return None
    return PeerCounts(
        **{name: sum(getattr(count, name) for count in each) for name in PeerCounts.__struct_fields__}
    )

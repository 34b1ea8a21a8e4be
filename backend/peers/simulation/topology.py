"""Which hosts there are in a simulation, and what their links can do."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import msgspec

from backend.contract import BackendError

NEAR_S = 0.0002
FAR_S = 0.001
SLOW_PART = 0.1


class TopologyInvalid(BackendError):
    """A file does not describe a topology."""

    message = "topology {path}: {why}"
    exit_code: ClassVar[int] = 190


@dataclass(frozen=True, slots=True)
class HostShape:
    """One host: bytes per second up and down, when it starts, and when it dies (`inf`: never), in seconds."""

    name: str
    up_bps: float
    down_bps: float
    zone: str = ""
    starts_s: float = 0.0
    dies_s: float = math.inf
    up_limit_bps: int | None = None


@dataclass(frozen=True, slots=True)
class Topology:
    """All hosts, and the origin. `near_s`, `far_s`: a round trip within a zone, and to another one or the
    origin. `origin_concurrency`: how many requests all hosts together may have open there, lent as leases."""

    hosts: Sequence[HostShape]
    origin_bps: float
    origin_concurrency: int | None = None
    near_s: float = NEAR_S
    far_s: float = FAR_S

    def bound_s(self, size_bytes: float) -> float:
        """The least makespan: max(F/u_s, F/d, N F/(u_s + sum u_i)); Mundinger, Weber and Weiss (2008)."""
        living = [host for host in self.hosts if host.dies_s == math.inf]
        sending = self.origin_bps + sum(host.up_bps for host in living)
        slowest = min(host.down_bps for host in living)
        return max(size_bytes / self.origin_bps, size_bytes / slowest, len(living) * size_bytes / sending)


class _Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hosts that are alike; rates in bits per second, as in `10gbit`."""

    count: int = 1
    up: str = ""
    down: str = ""
    zone: str = ""
    starts_s: float = 0.0
    dies_s: float = math.inf
    up_limit: str = ""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    hosts: list[_Group]
    origin: str = "10gbit"
    origin_concurrency: int | None = None
    near_ms: float = NEAR_S * 1000
    far_ms: float = FAR_S * 1000


def uniform(
    count: int,
    rate_bps: float,
    origin_bps: float,
    *,
    zones: int = 1,
    slow_part: float = 0.0,
    origin_concurrency: int | None = None,
) -> Topology:
    """`count` hosts, spread over `zones`; `slow_part` of them have a tenth of the rate, both ways."""
    slow = round(count * slow_part)
    hosts = []
    for number in range(count):
        is_slow = number * slow // count != (number + 1) * slow // count
        rate = rate_bps * (SLOW_PART if is_slow else 1)
        hosts.append(HostShape(f"host-{number}", rate, rate, f"zone-{number % zones}"))
    return Topology(hosts, origin_bps, origin_concurrency)


def read_topology(path: Path) -> Topology:
    """The topology in a TOML file. Raises `TopologyInvalid`.

    Fields of the file are those of `_File`, of each table `[[hosts]]` those of `_Group`.
    """
    try:
        file = msgspec.toml.decode(path.read_bytes(), type=_File)
        hosts = [
            _shape(group, number, at) for at, group in enumerate(file.hosts) for number in range(group.count)
        ]
        origin_bps = parse_bit_rate(file.origin)
    except (OSError, ValueError) as error:
        raise TopologyInvalid(path=path, why=str(error)) from error
    if not any(host.dies_s == math.inf for host in hosts):
        raise TopologyInvalid(path=path, why="no host lives to the end")
    return Topology(hosts, origin_bps, file.origin_concurrency, file.near_ms / 1000, file.far_ms / 1000)


def _shape(group: _Group, number: int, at: int) -> HostShape:
    up = parse_bit_rate(group.up or group.down or "10gbit")
    down = parse_bit_rate(group.down or group.up or "10gbit")
    limit = round(parse_bit_rate(group.up_limit)) if group.up_limit else None
    name = f"host-{at}-{number}"
    return HostShape(name, up, down, group.zone, group.starts_s, group.dies_s, limit)


def parse_bit_rate(text: str) -> float:
    """Bytes per second of `10gbit`, `50mbit`, 10^3 to the kilobit. Raises `ValueError`."""
    number, unit = text.strip().lower().removesuffix("bit"), 1.0
    if number and number[-1] in "kmgt":
        unit = 1000.0 ** ("kmgt".index(number[-1]) + 1)
        number = number[:-1]
    try:
        rate = float(number) * unit / 8
    except ValueError:
        rate = 0.0
    if not text.strip().lower().endswith("bit") or not 0 < rate < math.inf:
        raise ValueError(f"not a rate: {text!r}; write for example 10gbit")
    return rate

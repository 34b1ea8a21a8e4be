"""Which hosts give to each other: those of one scope. No I/O."""

import ipaddress
from collections.abc import Mapping, Sequence
from typing import ClassVar

from backend.peers.wire import HostInfo
from rafs.errors import NydusError


class ScopeInvalid(NydusError):
    """A scope that nobody understands."""

    message = "scope {text!r}: {why}; use cluster, zone, label:NAME, cidr:LENGTH or list:NAME=HOST,HOST..."
    exit_code: ClassVar[int] = 150


class ScopeRule:
    """Tells by what a host is grouped: hosts of the same group form a scope.

    `cluster`: all. `zone`: by zone. `label:NAME`: by the value of a label. `cidr:LENGTH`: by the network of
    the address. `list:NAME=HOST,...` (several, apart by semicolons): by name; hosts in no list are alone.
    """

    def __init__(self, text: str = "cluster") -> None:
        """Raises `ScopeInvalid`."""
        self.text = text
        self._kind, _, self._argument = text.partition(":")
        self._lists: Mapping[str, str] = {}
        if self._kind in ("cluster", "zone"):
            if self._argument:
                raise ScopeInvalid(text=text, why="nothing may follow")
        elif self._kind == "label":
            if not self._argument:
                raise ScopeInvalid(text=text, why="which label?")
        elif self._kind == "cidr":
            if not self._argument.isdecimal() or not 0 < int(self._argument) <= 128:
                raise ScopeInvalid(text=text, why="a length of 1 to 128 bits is needed")
        elif self._kind == "list":
            self._lists = dict(_listed(text, self._argument.split(";")))
        else:
            raise ScopeInvalid(text=text, why="there is none such")

    def group_of(self, host: HostInfo, address: str) -> str:
        """The name of the scope that a host at `address` is in."""
        if self._kind == "zone":
            return f"zone {host.zone}"
        if self._kind == "label":
            return f"{self._argument} {host.labels.get(self._argument, '')}"
        if self._kind == "cidr":
            ip = ipaddress.ip_address(address)
            length = min(int(self._argument), ip.max_prefixlen)
            return str(ipaddress.ip_network((ip, length), strict=False))
        if self._kind == "list":
            return self._lists.get(host.id, f"alone {host.id}")
        return "cluster"

    def certificate_scope(self, host: HostInfo, address: str) -> str:
        """What a certificate must be for, to be of the same scope; "" is that of any host of the cluster.

        `zone:az1`, `label:NAME=VALUE`, `cidr:10.0.0.0/16`, `list:NAME`; a host in no list is alone.
        """
        group = self.group_of(host, address)
        if self._kind == "zone":
            return f"zone:{host.zone}"
        if self._kind == "label":
            return f"label:{self._argument}={host.labels.get(self._argument, '')}"
        if self._kind == "cidr":
            return f"cidr:{group}"
        return f"list:{group.removeprefix('list ')}" if group.startswith("list ") else ""


def _listed(text: str, lists: Sequence[str]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for one in lists:
        name, separator, hosts = one.partition("=")
        if not separator or not name:
            raise ScopeInvalid(text=text, why="a list is NAME=HOST,HOST...")
        pairs += [(host.strip(), f"list {name}") for host in hosts.split(",") if host.strip()]
    return pairs

"""A switch with nodes on it, each on a link of its own that is shaped in both directions.

The switch is a bridge in a node of its own: this machine gets no interface, route or address. Each end of a
link has a token bucket for what it sends, and what the bucket has let through counts as sent: it knows the
headers of all segments, where the interface's own counter sees those of a large packet once.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tools.bench.peers.node import Node, run_tool, started_node
from tools.bench.peers.rate import Rate

SUBNET = "10.77.0"
REGISTRY_ADDRESS = f"{SUBNET}.2"
SCHEDULER_ADDRESS = f"{SUBNET}.3"
FIRST_HOST = 11
MOST_HOSTS = 200
BRIDGE = "br0"
INTERFACE = "eth0"
QUEUE = "50ms"
GUARANTEED = "1mbit"
SHARE_BYTES = 15140
"""What one receiver gets before it is the next one's turn: ten frames."""


def host_address(number: int) -> str:
    """The address of host `number`, from 1 on. Raises `ValueError` when there are too many."""
    if not 1 <= number <= MOST_HOSTS:
        raise ValueError(f"no host {number}: 1 to {MOST_HOSTS}")
    return f"{SUBNET}.{FIRST_HOST + number - 1}"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes on a link since it is there, headers included."""

    sent_bytes: int
    received_bytes: int

    def since(self, earlier: "Traffic") -> "Traffic":
        """What came after `earlier`."""
        sent = self.sent_bytes - earlier.sent_bytes
        return Traffic(sent, self.received_bytes - earlier.received_bytes)


@dataclass(frozen=True, slots=True)
class Link:
    """A node on the switch; `port` is the switch's end."""

    node: Node
    switch: Node
    port: str

    def traffic(self) -> Traffic:
        """What it has carried."""
        return Traffic(_carried(self.node, INTERFACE), _carried(self.switch, self.port))

    def unplug(self) -> None:
        """The node is still there, and nobody can reach it."""
        self.switch.run("ip", "link", "set", self.port, "down")

    def plug(self) -> None:
        """Ends `unplug`."""
        self.switch.run("ip", "link", "set", self.port, "up")


@dataclass(slots=True)
class Network:
    """The switch."""

    switch: Node
    _ports: int = field(default=0, init=False)

    def connect(self, node: Node, address: str, rate: Rate | None) -> Link:
        """A link from `node` to the switch; not shaped without `rate`. It goes away with the node."""
        self._ports += 1
        link = Link(node, self.switch, f"p{self._ports}")
        ends = [INTERFACE, "netns", str(node.pid), "type", "veth", "peer"]
        other = ["name", link.port, "netns", str(self.switch.pid)]
        run_tool(node.name, ["ip", "link", "add", *ends, *other])
        node.run("ip", "address", "add", f"{address}/24", "dev", INTERFACE)
        node.run("ip", "link", "set", INTERFACE, "up")
        self.switch.run("ip", "link", "set", link.port, "master", BRIDGE, "up")
        if rate is not None:
            _shape(node, INTERFACE, rate)
            _shape(self.switch, link.port, rate)
        return link


@contextlib.contextmanager
def running_network() -> Iterator[Network]:
    """A switch without links."""
    with started_node("switch") as switch:
        switch.run("ip", "link", "add", BRIDGE, "type", "bridge", "stp_state", "0", "forward_delay", "0")
        switch.run("ip", "link", "set", BRIDGE, "up")
        yield Network(switch)


def share_fairly(link: Link, rate: Rate, receivers: Sequence[str]) -> None:
    """Gives each address an equal share of what the node of `link` sends, and all of it to one alone.

    With one bucket for all, the receivers with luck finish early. A class for each does what fair queueing
    does, on kernels without it.
    """
    tc = ("tc", "class", "add", "dev", INTERFACE, "parent")
    burst = f"{rate.burst_bytes}b"
    run = link.node.run
    root = ("tc", "qdisc", "replace", "dev", INTERFACE, "root", "handle", "1:")
    run(*root, "htb", "default", "999", "r2q", "1000")
    run(*tc, "1:", "classid", "1:1", "htb", "rate", rate, "ceil", rate, "burst", burst, "cburst", burst)
    each = ("htb", "rate", GUARANTEED, "ceil", rate, "burst", burst, "cburst", burst, "quantum", SHARE_BYTES)
    run(*tc, "1:1", "classid", "1:999", *each)
    for number, address in enumerate(receivers, 100):
        classid = f"1:{number}"
        run(*tc, "1:1", "classid", classid, *each)
        where = ("tc", "filter", "add", "dev", INTERFACE, "parent", "1:", "protocol", "ip")
        run(*where, "u32", "match", "ip", "dst", f"{address}/32", "flowid", classid)


def _shape(node: Node, interface: str, rate: Rate) -> None:
    bucket = ("tbf", "rate", rate, "burst", f"{rate.burst_bytes}b", "latency", QUEUE)
    node.run("tc", "qdisc", "replace", "dev", interface, "root", *bucket)


def _carried(node: Node, interface: str) -> int:
    """Bytes that left through the queue of an interface, or through the interface where it has no queue."""
    for queue in json.loads(node.run("tc", "-s", "-j", "qdisc", "show", "dev", interface)):
        if queue.get("root") and queue["kind"] != "noqueue":
            return int(queue["bytes"])
    (state,) = json.loads(node.run("ip", "-s", "-j", "link", "show", "dev", interface))
    return int(state["stats64"]["tx"]["bytes"])

"""`nydus-py status --peers`: a host's part in the peer cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from fuse.agent.peer_report import PeerStatus
from fuse.supervisor.main import SOCKET_NAME
from rafs.errors import NydusError
from tools.agent_client import ask_agent
from tools.limits import lines
from tools.sizes import format_size

SHOWN_PEERS = 20


class NoPeers(NydusError):
    """This host takes no part in a peer cache."""

    message = "no agent with a scheduler runs here; start one with `nydus-py agent --scheduler URL`"
    exit_code: ClassVar[int] = 223


def read_peers(run_dir: Path) -> PeerStatus:
    """What the agent says. Raises `NoPeers`."""
    agent = ask_agent(run_dir / SOCKET_NAME)
    if agent is None or agent.peers is None:
        raise NoPeers
    return agent.peers


def peer_lines(status: PeerStatus) -> Iterator[str]:
    """The status for people."""
    traffic = status.traffic
    yield f"{status.host.id} at {status.host.url}{f', zone {status.host.zone}' if status.host.zone else ''}"
    yield f"scheduler: {status.scheduler or 'none answers'}; {status.members} hosts known"
    if not status.enabled:
        yield "peers are switched off by the scheduler"
    yield (
        f"from the origin {format_size(traffic.origin_bytes)}, from peers {format_size(traffic.peer_bytes)}, "
        f"to peers {format_size(traffic.served_bytes)} ({status.uploads} uploads now)"
    )
    if status.encoded_bytes or traffic.peer_encoded_bytes:
        kept, came = format_size(status.encoded_bytes), format_size(traffic.peer_encoded_bytes)
        yield f"encoded: {kept} kept, {came} from peers"
    yield (
        f"past the owners {status.degraded}, hedges {status.hedges}, dead peers {status.dead_peers}, "
        f"wrong bytes {status.wrong_bytes}, busy {status.busy_answers}"
    )
    yield from lines(status.limits)
    by_size = sorted(status.by_peer.items(), key=lambda pair: -pair[1])
    for peer, size_bytes in by_size[:SHOWN_PEERS]:
        yield f"  {format_size(size_bytes)} from {peer}"

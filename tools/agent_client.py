"""What an agent, or a single mount's process, says of itself, as far as it is shown."""

from pathlib import Path

import msgspec

from fuse.agent.client import call
from fuse.agent.peer_report import PeerStatus
from fuse.agent.request import STATUS_TARGET

STATUS_TIMEOUT_S = 5.0


class Fetched(msgspec.Struct, frozen=True):
    """What a mount has fetched: encoded bytes, requests, and errors on the way.

    `bytes_copied` are decoded ones that the cache had already, of other images; those from peers are too.
    """

    bytes_fetched: int = 0
    requests: int = 0
    errors: int = 0
    bytes_copied: int = 0
    bytes_from_peers: int = 0


class MountAnswer(msgspec.Struct, frozen=True):
    """What a mount says of itself, as far as it is shown. Sizes in bytes."""

    mountpoint: str
    reference: str
    digest: str
    driver: str
    pid: int
    since: str = ""
    image_size_bytes: int = 0
    decoded_size_bytes: int = 0
    cached_bytes: int = 0
    fetched: Fetched = Fetched()
    driver_remark: str = ""
    is_complete: bool = False
    state: str = "mounted"


class AgentAnswer(msgspec.Struct, frozen=True):
    """What an agent says of itself."""

    pid: int
    version: str
    restarts: int
    mounts: list[MountAnswer]
    peers: PeerStatus | None = None


def ask(path: Path) -> MountAnswer:
    """What the process of a single mount behind the socket `path` says. Raises as `call`."""
    return call(path, "GET", STATUS_TARGET, MountAnswer, timeout_s=STATUS_TIMEOUT_S)


def ask_agent(path: Path) -> AgentAnswer | None:
    """What the agent behind the socket `path` says; None when there is none. Raises `TimeoutError`."""
    try:
        return call(path, "GET", STATUS_TARGET, AgentAnswer, timeout_s=STATUS_TIMEOUT_S)
    except TimeoutError:
        raise
    except OSError:
        return None

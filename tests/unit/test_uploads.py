"""The agent's side of serving others, where that cannot be done."""

import logging
import socket
from typing import cast

import pytest
import trio
import trio.testing

from backend.peers.client import PeerClient
from backend.peers.hub import PeerHub
from backend.peers.limit_control import LimitControl
from backend.peers.limit_settings import LimitSettings
from backend.peers.limits import open_limits
from backend.peers.wire import HostInfo
from fuse.agent.agent import Agent
from fuse.agent.peering import Peering
from fuse.agent.uploads import Uploads

OWN = HostInfo("own", "http://127.0.0.1:1")


async def nobody(image: str, blob_id: str, peer: str) -> None:
    """Opens nothing."""
    await trio.lowlevel.checkpoint()


@pytest.mark.logs_warning
async def test_a_server_that_cannot_be_started_is_tried_again(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """For lack of memory or descriptors, say; it ended the agent and with it every mount."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with open_limits(LimitSettings()) as limits, trio.open_nursery() as nursery:
            hub = PeerHub(OWN, PeerClient())
            uploads = Uploads(hub, LimitControl(limits), listener, ["/nowhere/to/be/found"], nobody)
            nursery.start_soon(uploads.run)
            await trio.sleep(20)
            assert uploads.restarts > 3
            nursery.cancel_scope.cancel()
    assert "the upload server does not start: No such file or directory" in caplog.text


@pytest.mark.logs_warning
async def test_a_fault_among_peers_ends_no_mount(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        hub = PeerHub(OWN, PeerClient())

        async def run(self) -> None:
            await trio.lowlevel.checkpoint()
            raise RuntimeError("a fault of ours")

    broken = Broken()
    with caplog.at_level(logging.ERROR):
        await Agent._run_peering(cast("Agent", None), cast("Peering", broken))
    assert "a fault of ours" in caplog.text
    assert broken.hub.swarm.is_alone

"""What a host says when a scheduler does not answer."""

import logging
import socket

import pytest
import trio

from backend.http import HttpClient, HttpOptions
from backend.peers.announcer import Announcer
from backend.peers.client import PeerClient
from backend.peers.hub import PeerHub
from backend.peers.limit_control import LimitControl
from backend.peers.limit_settings import LimitSettings
from backend.peers.limits import HostLimits
from backend.peers.wire import HostInfo


@pytest.mark.logs_warning
async def test_a_scheduler_that_does_not_answer_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        urls = [f"http://127.0.0.1:{closed.getsockname()[1]}" for closed in (one, two)]
    hub = PeerHub(HostInfo("one", "http://127.0.0.1:1"), PeerClient())
    async with HttpClient(HttpOptions()) as http, trio.open_nursery() as nursery:
        limits = HostLimits(LimitSettings(), trio.current_time)
        announcer = Announcer(hub, urls, http, LimitControl(limits))
        with caplog.at_level(logging.WARNING, "backend.peers.announcer"):
            nursery.start_soon(announcer.run)
            await trio.sleep(1.5)  # several tries
        nursery.cancel_scope.cancel()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(urls)
    for url in urls:
        assert sum(f"scheduler {url}: " in line for line in said) == 1

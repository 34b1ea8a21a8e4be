"""What a host says when a scheduler does not answer."""

import logging

import pytest
import trio

from backend.http import HttpClient, HttpOptions
from backend.peers.announcer import Announcer, SchedulerRefused
from backend.peers.client import PeerClient
from backend.peers.hub import PeerHub
from backend.peers.limit_control import LimitControl
from backend.peers.limit_settings import LimitSettings
from backend.peers.limits import HostLimits
from backend.peers.scheduler_link import SchedulerLink
from backend.peers.wire import Announce, Answer, HostInfo


@pytest.mark.logs_warning
async def test_why_a_scheduler_does_not_answer_is_said_once_for_each_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = ["http://10.0.0.1:8770", "http://10.0.0.2:8770"]
    refusals = {
        urls[0]: ["connection refused", "timed out"] * 2 + ["not in this scope"],
        urls[1]: ["no answer within 2 s"] * 6,
    }
    ended = trio.Event()

    async def send(_: Announcer, url: str, announce: Announce) -> Answer:
        if all(len(left) == 1 for left in refusals.values()):
            ended.set()
        why = refusals[url].pop(0) if len(refusals[url]) > 1 else refusals[url][0]
        await trio.lowlevel.checkpoint()
        raise SchedulerRefused(where=url, why=why)

    async def follow(_: Announcer, link: SchedulerLink) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(Announcer, "_send", send)
    monkeypatch.setattr(Announcer, "_follow", follow)
    hub = PeerHub(HostInfo("one", "http://127.0.0.1:1"), PeerClient())
    async with HttpClient(HttpOptions()) as http, trio.open_nursery() as nursery:
        limits = HostLimits(LimitSettings(), trio.current_time)
        announcer = Announcer(hub, urls, http, LimitControl(limits))
        with caplog.at_level(logging.WARNING, "backend.peers.announcer"):
            nursery.start_soon(announcer.run)
            with trio.fail_after(60):
                await ended.wait()
        nursery.cancel_scope.cancel()
    said = [record.getMessage().partition(";")[0] for record in caplog.records]
    assert sorted(said) == [
        f"scheduler {urls[0]}: connection refused",
        f"scheduler {urls[0]}: not in this scope",
        f"scheduler {urls[0]}: timed out",
        f"scheduler {urls[1]}: no answer within 2 s",
    ]

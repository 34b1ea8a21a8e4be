"""For whom an image is opened that nobody here has mounted, and how often."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from backend.peers.client import PeerClient
from backend.peers.hub import PeerHub
from backend.peers.limit_settings import LimitSettings
from backend.peers.limits import open_limits
from backend.peers.wire import HostInfo
from backend.registry import RegistryOptions
from backend.shelf import BlobShelf
from fuse.agent.guests import OPENINGS_MAX, OPENINGS_S, GuestImages, GuestRefused
from rafs.errors import NydusError

OWN = HostInfo("own", "http://10.0.0.1:1")
OTHER = HostInfo("other", "http://10.0.0.2:1")
BLOB = "b" * 64


def image(number: int = 0) -> str:
    """An image of a registry that is not there."""
    return f"127.0.0.1:1/model{number}@sha256:{number:064x}"


@asynccontextmanager
async def guests(tmp_path: Path, *, has_certificates: bool = False) -> AsyncIterator[GuestImages]:
    async with open_limits(LimitSettings()) as limits, trio.open_nursery() as nursery:
        hub = PeerHub(OWN, PeerClient())
        hub.swarm.members = {OWN.id: OWN, OTHER.id: OTHER}
        made = GuestImages(
            hub,
            tmp_path,
            BlobShelf(),
            RegistryOptions(plain_http=True),
            limits,
            has_certificates=has_certificates,
        )
        nursery.start_soon(made.run)
        await trio.testing.wait_all_tasks_blocked()
        yield made
        nursery.cancel_scope.cancel()


async def refusal(made: GuestImages, name: str, peer: str) -> str:
    """Why an image is not opened: here it never is, as there is no registry."""
    with pytest.raises(NydusError) as caught:
        await made.open(name, BLOB, peer)
    return str(caught.value) if isinstance(caught.value, GuestRefused) else "no registry"


async def test_for_hosts_that_a_scheduler_has_named(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with guests(tmp_path) as made:
        assert "no scheduler has named a host at 10.0.0.9" in await refusal(made, image(), "10.0.0.9")
        assert "not the exact name" in await refusal(made, "oci:/etc", "10.0.0.2")
        assert "not the exact name" in await refusal(made, "127.0.0.1:1/model:v1", "10.0.0.2")
        assert dict(made.refused) == {"unknown host": 1, "no exact name": 2}


async def test_a_host_that_has_just_joined_is_waited_for(tmp_path: Path) -> None:
    async with guests(tmp_path) as made, trio.open_nursery() as nursery:
        nursery.start_soon(refusal, made, image(), "::ffff:10.0.0.3")
        await trio.testing.wait_all_tasks_blocked()
        made._hub.swarm.members["third"] = HostInfo("third", "http://10.0.0.3:1")
        made._hub.note_news()
    assert not made.refused


async def test_with_certificates_the_upload_server_has_looked(tmp_path: Path) -> None:
    async with guests(tmp_path, has_certificates=True) as made:
        assert await refusal(made, image(), "host-a") == "no registry"


async def test_one_host_has_few_opened_in_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = [0.0]
    monkeypatch.setattr("fuse.agent.guests.trio.current_time", lambda: times[0])
    made = GuestImages.__new__(GuestImages)
    made._guests, made._openings, made.refused = {}, {}, __import__("collections").Counter()
    for _ in range(OPENINGS_MAX):
        made._note_opening(image(), "10.0.0.2")
    with pytest.raises(GuestRefused, match="within 60 s"):
        made._note_opening(image(), "10.0.0.2")
    made._note_opening(image(), "10.0.0.3")
    times[0] = OPENINGS_S + 1
    made._note_opening(image(), "10.0.0.2")
    assert made.refused["too often"] == 1

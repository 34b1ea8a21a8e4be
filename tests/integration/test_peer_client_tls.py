"""Peers and schedulers as a host with a certificate meets them: bytes, causes by name, renewal."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from backend.http import HttpClient, HttpOptions, HttpRequest
from backend.peers.client import PeerClient, PeerFailed, PeerRequest
from backend.peers.intake import Intake
from backend.peers.limit_settings import LimitSettings
from backend.peers.limits import open_limits
from backend.peers.scheduler import Scheduler, new_epoch
from backend.peers.scheduler_state import SchedulerState
from backend.peers.tls import PeerTls
from backend.peers.wire import ANNOUNCE_TARGET, Announce, HostInfo
from backend.priority import FetchClass, Ticket
from tests.peer_host import BLOB_ID, random_file, serving
from tests.tls_hosts import Cluster

MIB = 1 << 20
REQUEST = PeerRequest(BLOB_ID, 0, "", FetchClass.PREFETCH)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster.create(tmp_path / "pki")


async def fetched(url: str, tls: PeerTls | None, size: int, intake: Intake | None = None) -> bytes:
    client = PeerClient(ssl_context=tls.client if tls else None)
    buffer = bytearray(size)
    try:
        for _ in range(2):  # the second time on the connection that was kept
            await client.fetch(url, REQUEST, memoryview(buffer), intake)
    finally:
        client.close()
    return bytes(buffer)


async def test_bytes_come_as_fast_as_the_limits_of_the_host_allow(cluster: Cluster, tmp_path: Path) -> None:
    file, content = random_file(tmp_path / "blob", MIB)
    async with (
        serving(file, ssl_context=cluster.host("server").server) as server,
        open_limits(LimitSettings(host_down_bps=4 * MIB)) as limits,
    ):
        began = trio.current_time()
        intake = Intake(limits, Ticket(FetchClass.PREFETCH), BLOB_ID)
        url = f"https://127.0.0.1:{server.port}"
        assert await fetched(url, cluster.host("client"), MIB, intake) == content
        assert trio.current_time() - began > 0.25
        assert limits.statistics().down_bytes == 2 * MIB


@pytest.mark.logs_warning
async def test_who_is_refused_is_told_why(cluster: Cluster, tmp_path: Path) -> None:
    file, _ = random_file(tmp_path / "blob", MIB)
    other = Cluster.create(tmp_path / "other")
    async with serving(file, ssl_context=cluster.host("server").server) as server:
        url = f"https://127.0.0.1:{server.port}"
        with pytest.raises(PeerFailed, match="its certificate is of another authority"):
            await fetched(url, other.host("client"), MIB)
        mixed = cluster.host("mixed")
        mixed.client.load_cert_chain(other.issue("mixed").certificate)
        with pytest.raises(PeerFailed, match="our certificate is of another authority"):
            await fetched(url, mixed, MIB)
        with pytest.raises(PeerFailed, match="give --pki to both"):
            await fetched(url, None, MIB)
        with pytest.raises(PeerFailed, match="give --pki to both"):
            await fetched(f"http://127.0.0.1:{server.port}", cluster.host("client"), MIB)


@asynccontextmanager
async def scheduling(tls: PeerTls) -> AsyncIterator[tuple[str, SchedulerState]]:
    state = SchedulerState(new_epoch())
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Scheduler(state, tls=tls).serve, listener)
        yield f"https://127.0.0.1:{listener.getsockname()[1]}", state
        nursery.cancel_scope.cancel()


async def announced(http: HttpClient, url: str, host: HostInfo) -> tuple[int, bytes]:
    body = msgspec.json.encode(Announce(host))
    async with http.exchange(HttpRequest("POST", url + ANNOUNCE_TARGET, (), body)) as response:
        return response.status, await response.read(MIB)


async def test_a_renewed_certificate_is_seen_after_a_refusal(cluster: Cluster) -> None:
    host = HostInfo("a", "https://127.0.0.1:8771")
    files = cluster.issue("a", addresses=("10.0.0.1",))
    tls = PeerTls(files)
    async with (
        scheduling(cluster.host("scheduler")) as (url, state),
        HttpClient(HttpOptions(ssl_context=tls.client)) as http,
    ):
        status, why = await announced(http, url, host)
        assert (status, state.refused) == (422, 1)
        assert b"its certificate is not for address 127.0.0.1, but for 10.0.0.1" in why
        cluster.issue("a")
        assert tls.refresh()
        assert (await announced(http, url, host))[0] == 200


async def test_nobody_takes_the_id_of_another_host(cluster: Cluster) -> None:
    first, second = (
        HttpClient(HttpOptions(ssl_context=cluster.host(name).client)) for name in ("first", "second")
    )
    async with scheduling(cluster.host("scheduler")) as (url, state), first, second:
        assert (await announced(first, url, HostInfo("a", "https://127.0.0.1:8771")))[0] == 200
        status, why = await announced(second, url, HostInfo("a", "https://127.0.0.1:9999"))
        assert (status, b"second: another host is a" in why) == (422, True)
        assert state.hosts["a"].info.url == "https://127.0.0.1:8771"

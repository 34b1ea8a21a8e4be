"""A cluster whose hosts know each other by certificate, and those who do not belong to it."""

import contextlib
import socket
import ssl
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from backend.peers.certificate import utc_now
from backend.peers.tls import TlsFiles
from backend.peers.wire import ANNOUNCE_TARGET
from tests.integration.peer_cluster import PATIENCE_S, Cluster, PeerHost, peer_cluster, until
from tests.integration.test_peers import make_model, same
from tests.tls_hosts import Cluster as Authority
from tools.scheduler_client import SchedulerSilent

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]

MIB = 1 << 20
SIZE = 8 * MIB


def raw_answer(url: str, files: TlsFiles | None, authority: Authority, request: str) -> bytes:
    """What a client gets that trusts the cluster and shows what it likes; b"" when it is hung up on."""
    parts = urlsplit(url)
    context = ssl.create_default_context(cafile=str(authority.directory / "ca.pem"))
    if files is not None:
        context.load_cert_chain(files.certificate)
    received = b""
    with (
        contextlib.suppress(OSError),
        socket.create_connection((parts.hostname, parts.port), PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname=parts.hostname) as tls,
    ):
        tls.sendall(request.encode())
        while data := tls.recv(1 << 16):
            received += data
    return received


def asking_for(blob_id: str) -> str:
    headers = ("Host: h", "Range: bytes=0-99", "Connection: close")
    return "\r\n".join([f"GET /v1/blobs/{blob_id}/decoded HTTP/1.1", *headers, "", ""])


def blob_of(cluster: Cluster) -> str:
    status = cluster.scheduler_status()
    assert status is not None
    return str(status["blobs"][0]["blob_id"])


def members(host: PeerHost) -> int:
    return int(host.peers()["members"])


def log_of(host: PeerHost) -> str:
    return "".join(path.read_text() for path in host.machine.directory.rglob("agent.*") if path.is_file())


def test_hosts_with_certificates_give_each_other_what_they_have(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", SIZE)
    authority = Authority.create(tmp_path / "pki")
    with peer_cluster(tmp_path / "cluster", 2, pki=authority) as cluster:
        reference = cluster.build(source, "model:v1")
        for host in cluster.hosts:
            host.mount(reference, "--prefetch", "all")
            assert same(source, host.mount_dir)
        assert cluster.origin_bytes() == SIZE + 2
        states = [host.peers() for host in cluster.hosts]
        assert all(state["degraded"] == state["wrong_bytes"] == state["dead_peers"] == 0 for state in states)

        # One that trusts another authority knows nobody, and has the registry.
        other = Authority.create(tmp_path / "other-pki")
        stranger = cluster.add_host(pki=cluster.pki_options("stranger", authority=other))
        stranger.mount(reference)
        assert same(source, stranger.mount_dir)
        alone = stranger.peers()
        assert (alone["scheduler"], alone["members"], alone["traffic"]["peer_bytes"]) == ("", 0, 0)
        until(lambda: "of another authority" in log_of(stranger))

        # Nor does who trusts the cluster get anything for another certificate, one that is over, or none.
        blob_id, giver = blob_of(cluster), cluster.hosts[0]
        good = authority.issue("guest")
        over = authority.issue("late", now=utc_now() - timedelta(days=8), days=7)
        foreign = other.issue("foreign")
        announce = f"POST {ANNOUNCE_TARGET} HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{{}}"
        assert b" 206 " in raw_answer(giver.url, good, authority, asking_for(blob_id))
        for files in (over, foreign, None):
            assert raw_answer(giver.url, files, authority, asking_for(blob_id)) == b""
            assert raw_answer(cluster.scheduler_url, files, authority, announce) == b""
        until(lambda: giver.peers()["refused"].get("TLS handshake failed", 0) >= 3)
        assert all(members(host) == 2 for host in cluster.hosts[:2])


@pytest.mark.slow
def test_a_certificate_says_where_a_host_is_and_in_which_scope(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", SIZE)
    authority = Authority.create(tmp_path / "pki")
    with peer_cluster(tmp_path / "cluster", 0, pki=authority) as cluster:
        cluster.stop_scheduler()
        cluster.start_scheduler("--scope", "zone")
        for name in ("a", "b"):
            cluster.add_host("--zone", "az1", pki=cluster.pki_options(name, scopes=("zone:az1",)))
        cluster.wait_acquainted()
        reference = cluster.build(source, "model:v1")
        for host in cluster.hosts:
            host.mount(reference, "--prefetch", "all")
            assert same(source, host.mount_dir)
        blob_id, giver = blob_of(cluster), cluster.hosts[0]
        outsider = authority.issue("outsider", scopes=("zone:az2",))
        answer = raw_answer(giver.url, outsider, authority, asking_for(blob_id))
        assert b" 403 " in answer
        assert b"not for scope zone:az1, but for zone:az2" in answer
        # A host that claims a zone which its certificate does not have is not let in.
        liar = cluster.add_host("--zone", "az1", pki=cluster.pki_options("liar", scopes=("zone:az2",)))
        until(lambda: "not for scope zone:az1" in log_of(liar))
        elsewhere = cluster.add_host(
            "--zone", "az1", pki=cluster.pki_options("c", scopes=("zone:az1",), addresses=("10.9.9.9",))
        )
        until(lambda: "is not for 127.0.0.1" in log_of(elsewhere))
        assert members(liar) == 0
        assert members(giver) == 2
        # Only who may change something for all does.
        code, line = giver.machine.failure(
            "scheduler", "disable", "--scheduler", cluster.scheduler_url, *cluster.pki_options("a")
        )
        assert (code, "not for scope admin" in line) == (SchedulerSilent.exit_code, True)
        giver.machine.nydus("scheduler", "limits", "--limit-up", "9MiB/s", *cluster.as_admin)
        until(lambda: giver.peers()["limits"]["effective"]["host_up_bps"] == 9 * MIB)

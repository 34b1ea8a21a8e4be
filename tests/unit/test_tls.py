"""Mutual TLS between hosts, over real connections on loopback."""

import logging
import os
import shutil
import ssl
import time
from datetime import timedelta
from pathlib import Path

import pytest
import trio

from backend.peers.certificate import utc_now
from backend.peers.identity import (
    AddressNotInCertificate,
    CertificateExpired,
    CertificateRefused,
    NoCertificate,
    PeerIdentity,
    ScopeMissing,
    normal_address,
    peer_identity,
    require_address,
    require_current,
    require_scope,
)
from backend.peers.pki import CertificateUnusable
from backend.peers.tls import REFRESH_S, PeerTls, TlsFiles
from backend.peers.tls_failure import CertificateNotYetValid, HandshakeFailed, OtherAuthority, tls_failure
from tests.tls_hosts import LOOPBACK, Cluster, meet

IN_30_DAYS = timedelta(days=30)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """A cluster whose authority is old enough for hosts with clocks that are wrong."""
    return Cluster.create(tmp_path / "authority", utc_now() - timedelta(days=60))


async def test_hosts_of_one_cluster_know_each_other(cluster: Cluster) -> None:
    server = cluster.host("one", scopes=("zone:az1", "cluster"))
    client = cluster.host("two", addresses=("10.0.0.2", "two.example", "fd00::2"))
    met_by_server, met_by_client = await meet(server.server, client.client)
    assert isinstance(met_by_client, PeerIdentity)
    assert isinstance(met_by_server, PeerIdentity)
    assert met_by_client.name == "one"
    assert met_by_client.scopes == {"zone:az1", "cluster"}
    assert met_by_client.addresses == {LOOPBACK}
    assert (met_by_server.name, met_by_server.scopes) == ("two", frozenset())
    assert met_by_server.addresses == {"10.0.0.2", "two.example", "fd00::2"}
    assert met_by_server.expires_at == client.facts.valid_until.timestamp()


async def test_a_client_whose_certificate_has_expired(cluster: Cluster) -> None:
    late = cluster.host("late", clock=utc_now() - IN_30_DAYS)
    met_by_server, met_by_client = await meet(cluster.host("one").server, late.client)
    assert isinstance(met_by_server, CertificateExpired)
    assert str(met_by_server).startswith("client: its certificate has expired: issue it a new one")
    assert isinstance(met_by_client, CertificateExpired)
    assert str(met_by_client).startswith("server: our certificate has expired: so it says")


async def test_a_server_whose_certificate_has_expired(cluster: Cluster) -> None:
    late = cluster.host("late", clock=utc_now() - IN_30_DAYS)
    met_by_server, met_by_client = await meet(late.server, cluster.host("two").client)
    assert isinstance(met_by_client, CertificateExpired)
    assert isinstance(met_by_server, CertificateExpired)


async def test_a_certificate_of_a_clock_that_is_ahead(cluster: Cluster) -> None:
    early = cluster.host("early", clock=utc_now() + IN_30_DAYS)
    met_by_server, met_by_client = await meet(cluster.host("one").server, early.client)
    assert isinstance(met_by_server, CertificateNotYetValid)
    assert str(met_by_server) == (
        "client: its certificate is not valid yet: compare the clocks of both hosts"
    )
    assert "may not be valid yet" in str(met_by_client)


async def test_a_clock_that_is_4_minutes_ahead_is_no_trouble(cluster: Cluster) -> None:
    ahead = cluster.host("ahead", clock=utc_now() + timedelta(minutes=4))
    outcomes = await meet(cluster.host("one").server, ahead.client)
    assert all(isinstance(each, PeerIdentity) for each in outcomes)


async def test_a_client_of_another_authority(cluster: Cluster, tmp_path: Path) -> None:
    other = Cluster.create(tmp_path / "other")  # same name, other key
    foreign = PeerTls(TlsFiles(other.issue("one").certificate, other.directory / "ca.pem"))
    foreign.client.load_verify_locations(cluster.directory / "ca.pem")
    met_by_server, met_by_client = await meet(cluster.host("one").server, foreign.client)
    assert isinstance(met_by_server, OtherAuthority)
    assert "ca.key" in str(met_by_server)
    assert isinstance(met_by_client, CertificateRefused)


async def test_a_server_of_another_authority(cluster: Cluster, tmp_path: Path) -> None:
    other = Cluster.create(tmp_path / "other")
    met_by_server, met_by_client = await meet(other.host("one").server, cluster.host("two").client)
    assert isinstance(met_by_client, OtherAuthority)
    assert isinstance(met_by_server, OtherAuthority)
    assert "compare ca.pem" in str(met_by_server)


async def test_the_authorities_of_the_system_are_not_trusted(cluster: Cluster) -> None:
    for context in (cluster.host("one").server, cluster.host("one").client):
        assert len(context.get_ca_certs()) == 1


async def test_a_client_without_a_certificate(cluster: Cluster) -> None:
    bare = ssl.create_default_context(cafile=cluster.directory / "ca.pem")
    met_by_server, met_by_client = await meet(cluster.host("one").server, bare)
    assert isinstance(met_by_server, NoCertificate)
    assert "only hosts of the cluster" in str(met_by_server)
    assert isinstance(met_by_client, NoCertificate)
    assert "pki issue" in str(met_by_client)


async def test_an_old_version_of_tls(cluster: Cluster) -> None:
    old = ssl.create_default_context(cafile=cluster.directory / "ca.pem")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    met_by_server, met_by_client = await meet(cluster.host("one").server, old)
    assert isinstance(met_by_server, HandshakeFailed)
    assert isinstance(met_by_client, HandshakeFailed)


async def test_a_server_at_an_address_that_its_certificate_does_not_have(cluster: Cluster) -> None:
    elsewhere = cluster.host("one", addresses=("10.0.0.1",))
    _, met_by_client = await meet(elsewhere.server, cluster.host("two").client)
    assert isinstance(met_by_client, AddressNotInCertificate)
    assert LOOPBACK in str(met_by_client)
    named = cluster.host("one", addresses=("one.example",))
    _, met_by_client = await meet(named.server, cluster.host("two").client, "one.example")
    assert isinstance(met_by_client, PeerIdentity)


async def test_a_host_that_announces_the_address_of_another(cluster: Cluster) -> None:
    identity, _ = await meet(cluster.host("one").server, cluster.host("two", addresses=("10.0.0.2",)).client)
    assert isinstance(identity, PeerIdentity)
    require_address(identity, "10.0.0.2")
    require_address(identity, "::ffff:10.0.0.2")
    with pytest.raises(AddressNotInCertificate, match=r"two: .* not for address 10.0.0.3, but for 10.0.0.2"):
        require_address(identity, "10.0.0.3")


async def test_a_host_that_wants_something_of_another_scope(cluster: Cluster) -> None:
    client = cluster.host("two", scopes=("zone:az1",))
    identity, _ = await meet(cluster.host("one").server, client.client)
    assert isinstance(identity, PeerIdentity)
    require_scope(identity, "zone:az1")
    for scope in ("zone:az2", "zone:az", "", "*"):
        with pytest.raises(ScopeMissing, match="but for zone:az1; issue one with --scope"):
            require_scope(identity, scope)


async def test_a_connection_that_outlives_its_certificate(cluster: Cluster) -> None:
    identity, _ = await meet(cluster.host("one").server, cluster.host("two").client)
    assert isinstance(identity, PeerIdentity)
    require_current(identity, time.time())
    with pytest.raises(CertificateExpired, match="connect anew"):
        require_current(identity, identity.expires_at)


async def test_no_session_is_resumed(cluster: Cluster) -> None:
    assert cluster.host("one").server.num_tickets == 0


async def test_a_renewed_certificate_is_taken_over(cluster: Cluster) -> None:
    server = PeerTls(cluster.issue("one"))
    assert server.refresh() is False
    cluster.issue("one", scopes=("zone:new",))
    assert server.refresh() is True
    _, met_by_client = await meet(server.server, cluster.host("two").client)
    assert isinstance(met_by_client, PeerIdentity)
    assert met_by_client.scopes == {"zone:new"}


async def test_files_are_looked_at_again_and_again(cluster: Cluster, autojump_clock: object) -> None:
    server = PeerTls(cluster.issue("one"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.keep_fresh)
        cluster.issue("one", scopes=("zone:new",))
        await trio.sleep(REFRESH_S + 1)
        assert server.facts.scopes == ["zone:new"]
        nursery.cancel_scope.cancel()


@pytest.mark.logs_warning
@pytest.mark.parametrize("damage", ["garbage", "missing", "other key", "other authority"])
async def test_broken_files_leave_the_certificate_before_in_use(
    damage: str, cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = cluster.issue("one")
    server = PeerTls(files)
    spoil(files, damage, cluster, tmp_path)
    assert server.refresh() is False
    assert server.refresh() is False
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "the certificate before stays in use" in record.getMessage()
    outcomes = await meet(server.server, cluster.host("two").client)
    assert all(isinstance(each, PeerIdentity) for each in outcomes)
    with pytest.raises(CertificateUnusable):
        PeerTls(files)


def spoil(files: TlsFiles, damage: str, cluster: Cluster, tmp_path: Path) -> None:
    match damage:
        case "garbage":
            files.certificate.write_text("garbage")
        case "missing":
            files.certificate.unlink()
        case "other key":
            own, other = files.certificate.read_text(), cluster.issue("other").certificate.read_text()
            cut = "-----BEGIN CERTIFICATE-----"
            files.certificate.write_text(own.partition(cut)[0] + cut + other.partition(cut)[2])
        case "other authority":
            shutil.copy(Cluster.create(tmp_path / "other").issue("one").certificate, files.certificate)


@pytest.mark.logs_warning
async def test_an_end_that_is_near_is_told_a_day_ahead_and_once(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    begin = utc_now()
    clock = [begin]
    host = PeerTls(cluster.issue("one", days=7, now=begin), now=lambda: clock[0])
    clock[0] = begin + timedelta(days=5, hours=23)
    host.refresh()
    assert caplog.records == []
    clock[0] = begin + timedelta(days=6, minutes=1)
    host.refresh()
    host.refresh()
    clock[0] = begin + timedelta(days=7, minutes=1)
    host.refresh()
    host.refresh()
    near, over = (record.getMessage() for record in caplog.records)
    assert "the certificate of one ends on" in near
    assert "`nydus-py pki issue`" in near
    assert "the certificate of one has ended on" in over


async def test_own_certificates_that_cannot_be_used_are_refused_at_the_start(cluster: Cluster) -> None:
    with pytest.raises(CertificateExpired, match="the certificate has expired: on "):
        PeerTls(cluster.issue("one", now=utc_now() - IN_30_DAYS))
    with pytest.raises(CertificateNotYetValid, match="only from "):
        PeerTls(cluster.issue("one", now=utc_now() + IN_30_DAYS))


def test_no_certificate_is_nobody() -> None:
    with pytest.raises(NoCertificate):
        peer_identity(None)
    with pytest.raises(NoCertificate):
        peer_identity({})
    with pytest.raises(CertificateRefused, match="no name"):
        peer_identity({"subject": (), "notAfter": "Jan  1 00:00:00 2030 GMT"})


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::FFFF:10.0.0.1", "10.0.0.1"),
        ("[FD00:0::1]", "fd00::1"),
        ("Node7.Example.", "node7.example"),
        ("010.0.0.1", "010.0.0.1"),
    ],
)
def test_addresses_are_compared_in_one_form(text: str, normal: str) -> None:
    assert normal_address(text) == normal


def test_other_failures_are_told_as_they_are() -> None:
    assert "connection reset" in str(tls_failure(ConnectionResetError("connection reset"), "peer"))
    assert isinstance(tls_failure(trio.BrokenResourceError(), "peer"), HandshakeFailed)


def test_the_key_is_nobody_elses_business(cluster: Cluster) -> None:
    files = cluster.issue("one")
    for path in (files.certificate, cluster.directory / "ca.key"):
        assert os.stat(path).st_mode & 0o777 == 0o600

"""The cluster's authority: its files, what certificates say, and `nydus-py pki`."""

import json
import re
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from backend.peers.certificate import AUTHORITY_DAYS, HOST_DAYS, HostWish, NameUnusable, utc_now
from backend.peers.identity import CertificateExpired
from backend.peers.pki import (
    AuthorityExists,
    CertificateUnusable,
    create_authority,
    issue_certificate,
    read_certificate,
)
from backend.peers.scope import ScopeRule
from backend.peers.wire import HostInfo
from backend.publishing import CannotWrite
from tools.main import run

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    directory = tmp_path / "pki"
    create_authority(directory, "models", AUTHORITY_DAYS, NOW)
    return directory


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_an_authority_is_two_files_and_never_replaced(authority: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in authority.iterdir()}
    with pytest.raises(AuthorityExists):
        create_authority(authority, "models", 1, NOW)
    assert {path.name: path.read_bytes() for path in authority.iterdir()} == before
    assert before.keys() == {"ca.pem", "ca.key"}
    assert (authority / "ca.key").stat().st_mode & 0o777 == 0o600
    assert names_in(tmp_path) == {"pki"}  # no leftovers
    certificate = read_certificate(authority / "ca.pem")
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"


def test_an_authority_takes_an_empty_directory_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    create_authority(tmp_path / "empty", "models", 1, NOW)
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite):
        create_authority(tmp_path / "file", "models", 1, NOW)


def test_a_certificate_says_what_was_asked_for(authority: Path, tmp_path: Path) -> None:
    wish = HostWish("node7", ("zone:az1", "cluster"), ("10.0.0.7", "FD00::7", "Node7.Example"))
    facts = issue_certificate(authority, wish, tmp_path / "out", NOW)
    assert (facts.name, facts.cluster, facts.is_authority) == ("node7", "models", False)
    assert facts.scopes == ["cluster", "zone:az1"]
    assert facts.addresses == ["10.0.0.7", "fd00::7", "node7.example"]
    assert facts.valid_from == NOW - timedelta(minutes=5)
    assert facts.valid_until == NOW + timedelta(days=HOST_DAYS)
    assert names_in(tmp_path / "out") == {"host.pem", "ca.pem"}
    assert (tmp_path / "out" / "host.pem").stat().st_mode & 0o777 == 0o600
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "out" / "host.pem")
    assert (tmp_path / "out" / "ca.pem").read_bytes() == (authority / "ca.pem").read_bytes()


@pytest.mark.parametrize(
    ("rule", "address", "scope"),
    [
        ("zone", "10.0.0.7", "zone:az1"),
        ("label:rack", "10.0.0.7", "label:rack=r7"),
        ("cidr:16", "10.0.0.7", "cidr:10.0.0.0/16"),
        ("cidr:64", "fd00::7", "cidr:fd00::/64"),
        ("list:left=node7;right=node8", "10.0.0.7", "list:left"),
    ],
)
def test_what_a_scheduler_asks_for_can_be_issued(
    rule: str, address: str, scope: str, authority: Path, tmp_path: Path
) -> None:
    """Certificates took no slash, so that no host could belong to a scope of the kind cidr."""
    host = HostInfo("node7", f"http://{address}:8771", "az1", {"rack": "r7"})
    assert ScopeRule(rule).certificate_scope(host, address) == scope
    facts = issue_certificate(authority, HostWish("node7", (scope, "admin")), tmp_path / "out", NOW)
    assert facts.scopes == ["admin", scope]


def test_issuing_again_renews_with_another_key(authority: Path, tmp_path: Path) -> None:
    first = issue_certificate(authority, HostWish("node7"), tmp_path / "out", NOW)
    before = (tmp_path / "out" / "host.pem").read_text()
    second = issue_certificate(authority, HostWish("node7"), tmp_path / "out", NOW + timedelta(days=6))
    assert second.valid_until - first.valid_until == timedelta(days=6)
    assert (tmp_path / "out" / "host.pem").read_text().partition("CERT")[0] != before.partition("CERT")[0]


def test_no_certificate_outlives_its_authority(authority: Path, tmp_path: Path) -> None:
    near_the_end = NOW + timedelta(days=AUTHORITY_DAYS - 1)
    facts = issue_certificate(authority, HostWish("node7", days=7), tmp_path / "out", near_the_end)
    assert facts.valid_until == NOW + timedelta(days=AUTHORITY_DAYS)
    with pytest.raises(CertificateExpired, match="the authority's certificate has expired"):
        issue_certificate(authority, HostWish("node7"), tmp_path / "out", near_the_end + timedelta(days=2))


@pytest.mark.parametrize(
    "wish",
    [
        HostWish(""),
        HostWish("a/b"),
        HostWish("-a"),
        HostWish("x" * 61),
        HostWish("node", scopes=("a b",)),
        HostWish("node", scopes=("",)),
        HostWish("node", scopes=("ä",)),
        HostWish("node", scopes=("zones:az1",)),
        HostWish("node", scopes=("admin:all",)),
        HostWish("node", scopes=("label:rack",)),
        HostWish("node", scopes=("cidr:10.0.0.7/16",)),
        HostWish("node", scopes=("cidr:10.0.0.0",)),
        HostWish("node", scopes=("list:",)),
        HostWish("node", addresses=("10.0.0.7:8770",)),
        HostWish("node", addresses=("*.example",)),
        HostWish("node", addresses=("",)),
        HostWish("node", addresses=("a..b",)),
        HostWish("node", days=0),
        HostWish("node", days=10**9),
    ],
)
def test_what_cannot_be_in_a_certificate_is_refused(wish: HostWish, authority: Path, tmp_path: Path) -> None:
    with pytest.raises(NameUnusable):
        issue_certificate(authority, wish, tmp_path / "out", NOW)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["ca.pem", "ca.key"])
@pytest.mark.parametrize("damage", ["missing", "garbage", "of another"])
def test_an_authority_that_is_broken_issues_nothing(
    name: str, damage: str, authority: Path, tmp_path: Path
) -> None:
    create_authority(tmp_path / "other", "models", 1, NOW)
    match damage:
        case "missing":
            (authority / name).unlink()
        case "garbage":
            (authority / name).write_bytes(b"\xff\0")
        case "of another":
            (authority / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(CertificateUnusable, match=r"ca\."):
        issue_certificate(authority, HostWish("node7"), tmp_path / "out", NOW)


def test_a_host_cannot_issue_certificates(authority: Path, tmp_path: Path) -> None:
    issue_certificate(authority, HostWish("node7"), tmp_path / "out", NOW)
    data = (tmp_path / "out" / "host.pem").read_bytes()
    (tmp_path / "out" / "ca.key").write_bytes(data)
    (tmp_path / "out" / "ca.pem").write_bytes(data)
    with pytest.raises(CertificateUnusable, match="not the certificate of an authority"):
        issue_certificate(tmp_path / "out", HostWish("evil"), tmp_path / "evil", NOW)


def test_the_command_line_from_init_to_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["pki", "init", "--name", "models", "--json"]) == 0
    assert json.loads(capsysbinary.readouterr().out)["cluster"] == "models"
    assert run(["pki", "init"]) == AuthorityExists.exit_code
    assert b"there is something already" in capsysbinary.readouterr().err

    options = ["--scope", "zone:az1", "--scope", "cluster", "--address", "10.0.0.7", "--days", "2"]
    assert run(["pki", "issue", "node7", *options]) == 0
    shown = capsysbinary.readouterr()
    assert b"copy pki/hosts/node7 to the host" in shown.err
    assert run(["pki", "show", "pki/hosts/node7/host.pem"]) == 0
    assert capsysbinary.readouterr().out == shown.out
    assert re.search(rb"^scopes: cluster, zone:az1$", shown.out, re.MULTILINE)

    assert run(["pki", "issue", "node8", "--out", "there", "--debug"]) == 0
    assert b"cannot" not in capsysbinary.readouterr().err
    assert names_in(tmp_path / "there") == {"host.pem", "ca.pem"}


def test_show_says_when_a_certificate_is_over(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    create_authority(tmp_path / "old", "models", 1, utc_now() - timedelta(days=9))
    create_authority(tmp_path / "new", "models", 1, utc_now() + timedelta(days=9))
    assert run(["pki", "show", str(tmp_path / "old" / "ca.pem")]) == 0
    assert b"UTC (expired)" in capsysbinary.readouterr().out
    assert run(["pki", "show", str(tmp_path / "new" / "ca.pem")]) == 0
    assert b"UTC (not valid yet)" in capsysbinary.readouterr().out
    assert run(["pki", "show", str(tmp_path / "none.pem")]) == CertificateUnusable.exit_code


@pytest.mark.parametrize("arguments", [["pki"], ["pki", "revoke"], ["pki", "issue"], ["pki", "init", "x"]])
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    assert run(arguments) == 2

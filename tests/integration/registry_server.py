"""Real registries on loopback: Debian's docker-registry with every kind of access, and a token issuer."""

import base64
import json
import secrets
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlsplit
from urllib.request import Request, urlopen

import bcrypt
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from backend.credentials import Credential

USER = Credential("alice", "correct horse")
_STARTED_WITHIN_S = 20.0


@dataclass(frozen=True, slots=True)
class RegistryServer:
    """A running docker-registry. `host` is HOST:PORT, as references want it."""

    host: str
    root: Path
    pid: int
    ca_file: Path | None = None

    def begun_uploads(self, repository: str) -> list[Path]:
        """Uploads that were begun and neither finished nor abandoned.

        The registry leaves a directory without `startedat` behind an abandoned one: that does not count.
        """
        uploads = self.root / "data/docker/registry/v2/repositories" / repository / "_uploads"
        return sorted(uploads.glob("*/startedat"))


@dataclass(frozen=True, slots=True)
class TokenIssuer:
    """A token server for docker-registry; `requests` are the (method, scopes, user) it has answered."""

    realm: str
    certificate: Path
    requests: list[tuple[str, tuple[str, ...], str]]
    refresh_token: str


def free_port() -> int:
    """A loopback port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def registry_server(
    root: Path,
    *,
    htpasswd: bool = False,
    issuer: TokenIssuer | None = None,
    authority: trustme.CA | None = None,
) -> Iterator[RegistryServer]:
    """Runs docker-registry with its data under `root` until the block ends."""
    root.mkdir(parents=True, exist_ok=True)
    host = f"127.0.0.1:{free_port()}"
    config = root / "config.yml"
    config.write_text(json.dumps(_config(root, host, htpasswd, issuer, authority)))  # JSON is YAML
    log = root / "registry.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(config)], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        _wait_until_up(process, host, authority is not None, log)
        yield RegistryServer(host, root, process.pid, root / "ca.pem" if authority else None)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _config(
    root: Path, host: str, htpasswd: bool, issuer: TokenIssuer | None, authority: trustme.CA | None
) -> dict[str, object]:
    http: dict[str, object] = {"addr": host, "secret": "of a test"}
    config: dict[str, object] = {
        "version": "0.1",
        "log": {"level": "info"},
        "storage": {
            "filesystem": {"rootdirectory": str(root / "data")},
            "delete": {"enabled": True},
            "maintenance": {"uploadpurging": {"enabled": False}},
        },
        "http": http,
    }
    if htpasswd:
        digest = bcrypt.hashpw(USER.password.encode(), bcrypt.gensalt(4)).decode()
        (root / "htpasswd").write_text(f"{USER.username}:{digest}\n")
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(root / "htpasswd")}}
    if issuer is not None:
        config["auth"] = {
            "token": {
                "realm": issuer.realm,
                "service": "test registry",
                "issuer": "test issuer",
                "rootcertbundle": str(issuer.certificate),
            }
        }
    if authority is not None:
        http["tls"] = _certificate_files(root, authority)
    return config


def _certificate_files(root: Path, authority: trustme.CA) -> dict[str, str]:
    authority.cert_pem.write_to_path(root / "ca.pem")
    server = authority.issue_cert("127.0.0.1", "localhost")
    server.private_key_pem.write_to_path(root / "server.key")
    for pem in server.cert_chain_pems:
        pem.write_to_path(root / "server.pem", append=True)
    return {"certificate": str(root / "server.pem"), "key": str(root / "server.key")}


def _wait_until_up(process: "subprocess.Popen[bytes]", host: str, tls: bool, log: Path) -> None:
    """Returns when the registry answers; there is no event for that, so it is asked until it does."""
    context = ssl._create_unverified_context() if tls else None
    url = f"{'https' if tls else 'http'}://{host}/"
    end = time.monotonic() + _STARTED_WITHIN_S
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            with urlopen(Request(url), timeout=2, context=context):
                return
        except OSError:
            time.sleep(0.02)
    raise AssertionError(f"docker-registry does not start: {log.read_text()[-2000:]}")


@contextmanager
def token_issuer(root: Path) -> Iterator[TokenIssuer]:
    """A token server: anonymous users may pull, `USER` (by password or refresh token) may push."""
    root.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    signer = authority.issue_cert("issuer.test", key_type=trustme.KeyType.ECDSA)
    certificate = root / "issuer.pem"
    authority.cert_pem.write_to_path(certificate)
    requests: list[tuple[str, tuple[str, ...], str]] = []
    refresh_token = secrets.token_hex(8)
    handler = type(
        "Handler",
        (_TokenHandler,),
        {
            "key": serialization.load_pem_private_key(signer.private_key_pem.bytes(), None),
            "chain": [_der64(pem.bytes()) for pem in signer.cert_chain_pems],
            "requests": requests,
            "refresh_token": refresh_token,
        },
    )
    with ExitStack() as stack:
        server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        realm = f"http://127.0.0.1:{server.server_address[1]}/token"
        yield TokenIssuer(realm, certificate, requests, refresh_token)


class _TokenHandler(BaseHTTPRequestHandler):
    key: ec.EllipticCurvePrivateKey
    chain: list[str]
    requests: list[tuple[str, tuple[str, ...], str]]
    refresh_token: str
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        given = self.headers.get("Authorization", "")
        if given and given != USER.basic():
            return self._reply(401, {})
        query = parse_qs(urlsplit(self.path).query)
        return self._grant(query, USER.username if given else "")

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        if form.get("refresh_token") != [self.refresh_token]:
            return self._reply(401, {})
        return self._grant({**form, "scope": form["scope"][0].split()}, USER.username)

    def _grant(self, query: dict[str, list[str]], user: str) -> None:
        scopes = tuple(query.get("scope", []))
        self.requests.append((self.command, scopes, user))
        access = []
        for scope in scopes:
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            allowed = [action for action in actions.split(",") if user or action == "pull"]
            access.append({"type": kind, "name": name, "actions": allowed})
        now = int(time.time())
        claims = {
            "iss": "test issuer",
            "sub": user,
            "aud": query["service"][0],
            "access": access,
            "exp": now + 60,
            "nbf": now - 10,
            "iat": now,
            "jti": secrets.token_hex(8),
        }
        token = self._signed(claims)
        self._reply(200, {"token": token, "access_token": token, "expires_in": 60})

    def _signed(self, claims: dict[str, object]) -> str:
        head = {"typ": "JWT", "alg": "ES256", "x5c": self.chain}
        text = f"{_base64url(json.dumps(head).encode())}.{_base64url(json.dumps(claims).encode())}"
        r, s = decode_dss_signature(self.key.sign(text.encode(), ec.ECDSA(SHA256())))
        return f"{text}.{_base64url(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def _reply(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return


def _der64(pem: bytes) -> str:
    der = x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
    return base64.b64encode(der).decode()


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

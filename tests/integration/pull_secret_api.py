"""A Kubernetes API server as far as pull secrets need one, over TLS, for a service account of its own."""

import base64
import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.parse import parse_qs, urlsplit

import trustme

DOCKER_CONFIG = "kubernetes.io/dockerconfigjson"


@dataclass(slots=True)
class SecretApi:
    """A running server. `account` has what a pod finds; who shows another token is refused."""

    url: str
    account: Path
    token: str = "first"
    secrets: list[dict[str, object]] = field(default_factory=list)
    refused: int = 0
    ended: Event = field(default_factory=Event)

    def rotate(self, token: str) -> None:
        """Another token, as the kubelet does it."""
        self.token = token
        (self.account / "token").write_text(token)

    def add(self, name: str, host: str, username: str, password: str) -> None:
        """A pull secret."""
        auth = base64.b64encode(f"{username}:{password}".encode()).decode()
        text = json.dumps({"auths": {host: {"auth": auth}}}).encode()
        data = {".dockerconfigjson": base64.b64encode(text).decode()}
        self.secrets.append({"metadata": {"name": name, "namespace": "default"}, "data": data})


@contextmanager
def secret_api(directory: Path) -> Iterator[SecretApi]:
    """Serves until the block ends."""
    directory.mkdir()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.crt")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.headers.get("Authorization") != f"Bearer {api.token}":
                api.refused += 1
                self._reply(401, {"message": "Unauthorized"})
                return
            query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
            if "watch" in query:
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                api.ended.wait()
                return
            items = api.secrets if query["fieldSelector"] == f"type={DOCKER_CONFIG}" else []
            self._reply(200, {"metadata": {"resourceVersion": "1"}, "items": items})

        def _reply(self, status: int, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.socket = context.wrap_socket(server.socket, server_side=True)
    api = SecretApi(f"https://127.0.0.1:{server.server_address[1]}", directory)
    api.rotate(api.token)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield api
    finally:
        api.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()

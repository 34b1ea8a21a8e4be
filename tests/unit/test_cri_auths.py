"""What is learned from CRI requests, and what passes through the proxy to a server of the test."""

import base64
import os
import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.credentials import Credential
from fuse.snapshotter import image_auth_pb2 as pb
from fuse.snapshotter.cri_auths import CREDENTIALS_MAX, REPOSITORIES_MAX, CriAuths, auth_of_pull
from fuse.snapshotter.cri_proxy import CannotProxy, start_cri_proxy
from fuse.supervisor.systemd import tell_ready

KEY = ("r.example.com", "team/app")
PULL = "/runtime.{}.ImageService/PullImage"


def request(image: str = "r.example.com/team/app:v1", **auth: str) -> bytes:
    message = pb.PullImageRequest(image=pb.ImageSpec(image=image))
    if auth:
        message.auth.CopyFrom(pb.AuthConfig(**auth))
    return bytes(message.SerializeToString())


PAIR = base64.b64encode(b"bob:pw").decode()


@pytest.mark.parametrize(
    ("auth", "expected"),
    [
        ({"username": "bob", "password": "pw"}, Credential("bob", "pw")),
        ({"auth": PAIR}, Credential("bob", "pw")),
        ({"identity_token": "it"}, Credential(identity_token="it")),
        ({"registry_token": "rt", "username": "bob"}, Credential(registry_token="rt")),
        (
            {"username": "bob", "password": "pw", "server_address": "https://r.example.com/v2/"},
            Credential("bob", "pw"),
        ),
        ({"username": "bob", "password": "pw", "server_address": "other.example.com"}, None),
        ({"registry_token": "a\nb"}, None),
        ({"auth": "!!!"}, None),
        ({"auth": base64.b64encode(b"no colon").decode()}, None),
        ({}, None),
    ],
)
def test_what_a_request_says(auth: dict[str, str], expected: Credential | None) -> None:
    found = auth_of_pull(request(**auth))
    assert found == (None if expected is None else (KEY, expected))


@pytest.mark.parametrize(
    ("image", "key"),
    [
        ("r.example.com/team/app@sha256:" + "0" * 64, KEY),
        ("r.example.com/team/app:v1@sha256:" + "0" * 64, KEY),
        ("busybox", ("docker.io", "library/busybox")),
        ("127.0.0.1:5000/a:b", ("127.0.0.1:5000", "a")),
        ("sha256:" + "0" * 64, ("docker.io", "library/sha256")),
        ("", None),
        ("A B", None),
    ],
)
def test_for_which_image(image: str, key: tuple[str, str] | None) -> None:
    found = auth_of_pull(request(image, username="bob", password="pw"))
    assert (found and found[0]) == key


@given(st.binary(max_size=200))
def test_no_request_breaks_it(data: bytes) -> None:
    auth_of_pull(data)
    auth_of_pull(request(username="bob") + data)


async def test_the_newest_first_and_not_too_many() -> None:
    auths = CriAuths()
    for number in range(CREDENTIALS_MAX + 2):
        assert auths.remember(KEY, Credential(f"u{number}"))
    assert not auths.remember(KEY, Credential("u3"))
    found = [each.username for each in await auths.candidates(*KEY, fresh=False)]
    assert found == ["u3", "u5", "u4", "u2"]
    auths.forget(KEY, Credential("u3"))
    assert [each.username for each in await auths.candidates(*KEY, fresh=True)] == ["u5", "u4", "u2"]
    for number in range(REPOSITORIES_MAX):
        auths.remember(("other", str(number)), Credential("x"))
    assert await auths.candidates(*KEY, fresh=False) == []
    assert "u5" not in repr(auths)


class Behind(grpc.GenericRpcHandler):  # type: ignore[misc] # untyped base
    """A server that answers any method with what it was asked, and notes it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[bytes], dict[str, object], float | None]] = []
        self.fails = False
        self.hangs = False
        self.started = threading.Event()
        self.cancelled = threading.Event()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        def answer(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            if self.hangs:
                context.add_callback(self.cancelled.set)
                self.started.set()
                self.cancelled.wait(30)
                return
            got = list(requests)
            metadata = dict(context.invocation_metadata())
            self.calls.append((details.method, got, metadata, context.time_remaining()))
            context.send_initial_metadata([("first", "1")])
            context.set_trailing_metadata([("last-bin", b"\x00\xff")])
            for each in got:
                yield b"answer to " + each
            if self.fails:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, "as told")

        return grpc.stream_stream_rpc_method_handler(answer)


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[Behind]:
    handler = Behind()
    options = [("grpc.max_receive_message_length", 16 << 20)]
    server = grpc.server(futures.ThreadPoolExecutor(8), handlers=[handler], options=options)
    server.add_insecure_port(f"unix://{tmp_path}/behind.sock")
    server.start()
    yield handler
    handler.cancelled.set()
    server.stop(0).wait()


@pytest.fixture
def auths() -> CriAuths:
    return CriAuths()


@pytest.fixture
def channel(tmp_path: Path, behind: Behind, auths: CriAuths) -> Iterator[grpc.Channel]:
    path = tmp_path / "proxy.sock"
    path.write_bytes(b"left by a dead process")
    proxy = start_cri_proxy(path, tmp_path / "behind.sock", auths)
    assert os.stat(path).st_mode & 0o777 == 0o600
    options = [("grpc.default_authority", "localhost"), ("grpc.max_receive_message_length", 16 << 20)]
    with grpc.insecure_channel(f"unix://{path}", options=options) as channel:
        yield channel
    proxy.stop(1.0)
    assert not path.exists()


def test_streams_metadata_and_deadlines_pass(channel: grpc.Channel, behind: Behind) -> None:
    call = channel.stream_stream("/any.Service/Method")(
        iter([b"a", b"\xff\x00"]), timeout=20, metadata=[("key", "value"), ("key-bin", b"\x01")]
    )
    assert list(call) == [b"answer to a", b"answer to \xff\x00"]
    assert dict(call.initial_metadata())["first"] == "1"
    assert dict(call.trailing_metadata())["last-bin"] == b"\x00\xff"
    ((method, got, metadata, remaining),) = behind.calls
    assert (method, got) == ("/any.Service/Method", [b"a", b"\xff\x00"])
    assert (metadata["key"], metadata["key-bin"]) == ("value", b"\x01")
    assert remaining is not None
    assert remaining <= 20


def test_an_error_passes_with_its_details(channel: grpc.Channel, behind: Behind) -> None:
    behind.fails = True
    call = channel.stream_stream("/any.Service/Method")(iter([b"a"]))
    assert next(call) == b"answer to a"
    with pytest.raises(grpc.RpcError):
        next(call)
    assert (call.code(), call.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "as told")
    assert dict(call.trailing_metadata())["last-bin"] == b"\x00\xff"


def test_who_gives_up_ends_the_call_behind(channel: grpc.Channel, behind: Behind) -> None:
    behind.hangs = True
    call = channel.unary_unary("/any.Service/Method").future(b"a")
    assert behind.started.wait(20)
    call.cancel()
    assert behind.cancelled.wait(20)


def test_a_message_of_many_megabytes_passes(channel: grpc.Channel) -> None:
    large = bytes(12 << 20)
    assert channel.unary_unary("/any.Service/Method")(large) == b"answer to " + large


@pytest.mark.parametrize("version", ["v1", "v1alpha2"])
async def test_pulls_are_learned_from(
    channel: grpc.Channel, behind: Behind, auths: CriAuths, version: str
) -> None:
    pull = channel.unary_unary(PULL.format(version))
    # A field that nobody here knows stays where it is.
    data = request(username="bob", password="pw") + b"\x9a\x06\x03new"
    assert pull(data) == b"answer to " + data
    assert await auths.candidates(*KEY, fresh=False) == [Credential("bob", "pw")]
    behind.fails = True
    for user, left in (("eve", "bob"), ("bob", "bob")):
        with pytest.raises(grpc.RpcError):
            pull(request(username=user, password="pw"))
        assert [each.username for each in await auths.candidates(*KEY, fresh=False)] == [left]


def test_a_socket_that_cannot_be(tmp_path: Path, auths: CriAuths) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    for name in ("x" * 120, "none/s", "directory", "file/s"):
        with pytest.raises(CannotProxy):
            start_cri_proxy(tmp_path / name, tmp_path / "behind.sock", auths)


def test_a_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        tell_ready("listens")
        assert manager.recv(100) == b"READY=1\nSTATUS=listens"
    monkeypatch.delenv("NOTIFY_SOCKET")
    tell_ready("nobody hears it")

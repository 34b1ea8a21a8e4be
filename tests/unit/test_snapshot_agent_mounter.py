"""How the snapshotter asks an agent: one that answers as it is told stands in for it."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import TypeVar

import pytest

from fuse.agent.client import AgentRefused
from fuse.mountpoint import AlreadyMounted, MountBusy, NothingMounted
from fuse.snapshotter.agent_mounter import TRIES, AgentMounter, MountOptions
from rafs.errors import NydusError

T = TypeVar("T")
MOUNTED = {"mountpoint": "/m", "digest": "sha256:ab"}


class Agent(ThreadingUnixStreamServer):
    """Answers by script: (status, body) for each request of a kind, the last one again and again."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        self.mounts: list[tuple[int, object]] = [(200, MOUNTED)]
        self.unmounts: list[tuple[int, object]] = [(200, {"mountpoint": "/m"})]
        self.served: list[list[object]] = [[MOUNTED]]
        self.asked: list[tuple[str, object]] = []
        super().__init__(str(path), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Agent

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(200, {"mounts": _next(self.server.served)})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path.rpartition("/")[2], body))
        status, answer = _next(self.server.mounts if self.path.endswith("/mount") else self.server.unmounts)
        if status == 0:
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self._answer(status, answer)

    def _answer(self, status: int, answer: object) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _next(script: list[T]) -> T:
    return script.pop(0) if len(script) > 1 else script[0]


def refused(kind: type[NydusError]) -> tuple[int, object]:
    return (422, {"error": kind.__name__, "exit_code": kind.exit_code})


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    with Agent(tmp_path / "agent.sock") as agent:
        thread = threading.Thread(target=agent.serve_forever, args=(0.01,))
        thread.start()
        yield agent
        agent.shutdown()
        thread.join()


@pytest.fixture
def mounter(agent: Agent, tmp_path: Path) -> AgentMounter:
    return AgentMounter(tmp_path / "agent.sock", MountOptions(tmp_path / "cache"))


def test_what_an_agent_is_asked(agent: Agent, mounter: AgentMounter, tmp_path: Path) -> None:
    mounter.mount("reg.test/a@sha256:ab", Path("/m"))
    ((_, body),) = agent.asked
    assert isinstance(body, dict)
    assert (body["reference"], body["mountpoint"]) == ("reg.test/a@sha256:ab", "/m")
    assert (body["cache_dir"], body["allow_other"]) == (str(tmp_path / "cache"), True)
    assert mounter.serves(Path("/m"))
    assert not mounter.serves(Path("/other"))
    assert mounter.mounted_digests() == {"sha256:ab"}


def test_a_mount_that_a_killed_process_has_begun_is_waited_for(agent: Agent, mounter: AgentMounter) -> None:
    agent.mounts = [refused(AlreadyMounted)]
    agent.served = [[], [], [MOUNTED]]
    mounter.mount("reg.test/a@sha256:ab", Path("/m"))
    assert len(agent.asked) == 3


def test_a_mount_whose_agent_dies_is_asked_for_again(agent: Agent, mounter: AgentMounter) -> None:
    agent.mounts = [(0, None), (0, None), (200, MOUNTED)]
    mounter.mount("reg.test/a@sha256:ab", Path("/m"))
    assert len(agent.asked) == 3
    agent.mounts = [(0, None)]
    with pytest.raises(ConnectionError):
        mounter.mount("reg.test/a@sha256:ab", Path("/m"))
    assert len(agent.asked) == 3 + TRIES


def test_what_is_wrong_with_an_image_is_said_at_once(agent: Agent, mounter: AgentMounter) -> None:
    agent.mounts = [(422, {"error": "no such image", "exit_code": 31})]
    with pytest.raises(AgentRefused, match="no such image"):
        mounter.mount("reg.test/a@sha256:ab", Path("/m"))
    assert len(agent.asked) == 1


def test_what_is_busy_is_detached(agent: Agent, mounter: AgentMounter) -> None:
    agent.unmounts = [refused(MountBusy), (200, {"mountpoint": "/m"})]
    mounter.unmount(Path("/m"))
    assert [body for _, body in agent.asked] == [
        {"mountpoint": "/m", "lazy": False},
        {"mountpoint": "/m", "lazy": True},
    ]
    agent.unmounts = [refused(NothingMounted)]
    mounter.unmount(Path("/m"))


def test_an_agent_that_comes_later_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "late.sock"
    mounter = AgentMounter(path, MountOptions(tmp_path))
    mounter.wait(0.0)
    waiting = threading.Thread(target=mounter.wait, args=(60.0,))
    waiting.start()
    with Agent(path):
        waiting.join(60.0)
        assert not waiting.is_alive()
    starting = AgentMounter(tmp_path / "none.sock", MountOptions(tmp_path), lambda: None)
    starting.wait(60.0)  # it would be started when it is needed


def test_an_agent_has_an_identity_as_long_as_it_lives(agent: Agent, tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    mounter = AgentMounter(path, MountOptions(tmp_path))
    first = mounter.identity()
    assert first is not None
    assert mounter.identity() == first
    path.rename(tmp_path / "moved")
    assert mounter.identity() is None
    with Agent(path):
        second = mounter.identity()
        assert second not in (None, first)
    path.unlink()
    assert mounter.identity() is None
    assert mounter.mounted_digests() == set()

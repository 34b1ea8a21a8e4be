"""What is taken for the URL of a scheduler, how one is asked, and how limits of a cluster are shown."""

import socket
import threading
from pathlib import Path

import pytest

from backend.peers.leases import OriginShare
from backend.peers.limit_settings import LimitSettings
from backend.peers.scheduler import LimitsStatus
from backend.peers.wire import refusal_text
from tools.main import run
from tools.peer_config import ConfigInvalid, PeerSection, peer_options, read_config
from tools.scheduler import _limit_lines
from tools.scheduler_url import SchedulerUrlInvalid, scheduler_place
from tools.settings import make_settings

UNLIMITED = OriginShare()


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("http://sched:8770", ("http", "sched", 8770)),
        ("https://sched/", ("https", "sched", 443)),
        ("http://[fd00::7]:8770", ("http", "fd00::7", 8770)),
    ],
)
def test_urls_of_schedulers(url: str, place: tuple[str, str, int]) -> None:
    assert scheduler_place(url) == place


@pytest.mark.parametrize(
    "url",
    [
        "sched:8770",
        "127.0.0.1:8770",
        "sched",
        "",
        "ftp://sched",
        "http://",
        "http://:8770",
        "http://sched:x",
        "http://sched:99999",
        "http://sched/v1",
        "http://sched?a",
        "http://me@sched",
        "http://[fd00",
    ],
)
def test_what_is_no_url_is_said_at_once(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An agent with such a URL went to the registry for everything, without a word."""
    with pytest.raises(SchedulerUrlInvalid):
        peer_options(make_settings(), PeerSection(scheduler=["http://sched:8770", url]))
    assert run(["scheduler", "status", "--scheduler", url]) == SchedulerUrlInvalid.exit_code
    assert run(["scheduler", "--listen", "127.0.0.1:0", "--peer-scheduler", url]) == (
        SchedulerUrlInvalid.exit_code
    )
    assert "write for example" in capsys.readouterr().err


def test_https_is_never_asked_in_the_clear(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --pki it was: who changed limits so told them to whoever listened."""
    received: list[bytes] = []

    def answer(listener: socket.socket) -> None:
        with listener.accept()[0] as connection:
            received.append(connection.recv(1 << 16))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=answer, args=(listener,))
        answering.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        assert run(["scheduler", "limits", "--limit-up", "1", "--scheduler", url]) > 2
        answering.join()
    assert received[0][:1] == b"\x16"  # a handshake record (RFC 8446, 5.1)
    assert url in capsys.readouterr().err


def test_the_reason_of_a_refusal_is_shown_without_its_wrapping() -> None:
    assert refusal_text(b'{"error":"not for scope admin","exit_code":179}') == "not for scope admin"
    assert refusal_text(b"404 page not found\n") == "404 page not found"
    assert refusal_text(b"\xff[]") == "\ufffd[]"


def test_what_nobody_wants_is_not_shown_as_a_pause() -> None:
    def lines(limit: OriginShare, lent: OriginShare) -> str:
        return list(_limit_lines(LimitsStatus(LimitSettings(), limit, lent)))[1]

    assert lines(UNLIMITED, UNLIMITED) == "limits of all together: no limit"
    limit = OriginShare(bps=1 << 20)
    assert lines(limit, OriginShare(bps=0)) == "limits of all together: origin 1.0 MiB/s; lent: nothing"
    assert lines(limit, limit) == "limits of all together: origin 1.0 MiB/s; lent: origin 1.0 MiB/s"
    assert lines(OriginShare(bps=0), OriginShare(bps=0)).startswith("limits of all together: origin paused")


@pytest.mark.parametrize("text", ['[peer]\nscheduler = ["http://sched:8770"]', 'metrics_listn = ":9310"'])
def test_a_slip_in_the_file_is_no_silence(text: str, tmp_path: Path) -> None:
    """A host with `[peer]` took no part, and nothing said why."""
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigInvalid, match="unknown field"):
        read_config(path)

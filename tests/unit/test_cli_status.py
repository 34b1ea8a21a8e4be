"""Status of mounts: records, sockets, and mounts whose process has died."""

import datetime
import json
import socket
from pathlib import Path

import pytest
import trio

from backend.fetch_statistics import FetchStatistics
from fuse.mount_status import SessionStatus
from fuse.status_socket import serve_status
from tools.agent_client import ask
from tools.main import run
from tools.mount_record import MountFiles, MountRecord, NotMounted, known_mounts, mount_files
from tools.status import read_statuses

RECORD = MountRecord("/mnt/a", "host:5000/repo:v1", "sha256:" + "0" * 64, "pyfuse3", 4711)
SESSION = SessionStatus(
    reference=RECORD.reference,
    digest=RECORD.digest,
    driver=RECORD.driver,
    mountpoint=RECORD.mountpoint,
    pid=RECORD.pid,
    since=datetime.datetime.now(datetime.UTC),
    image_size_bytes=100,
    decoded_size_bytes=200,
    cached_bytes=20,
    fetched=FetchStatistics(bytes_fetched=7, requests=2, bytes_copied=9),
)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Longer than the address of a unix socket may be.
    directory = tmp_path / ("r" * 120)
    monkeypatch.setenv("NYDUS_PY_RUN_DIR", str(directory))
    return directory


def recorded(run_dir: Path) -> MountFiles:
    files = mount_files(run_dir, Path(RECORD.mountpoint))
    files.write(RECORD)
    return files


async def test_what_a_mount_says_is_what_status_shows(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = recorded(run_dir)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_status, files.socket, lambda: SESSION)
        (status,) = await trio.to_thread.run_sync(read_statuses, run_dir, Path(RECORD.mountpoint))
        assert await trio.to_thread.run_sync(run, ["status"]) == 0
        nursery.cancel_scope.cancel()
    assert (status.state, status.mountpoint, status.pid) == ("mounted", RECORD.mountpoint, RECORD.pid)
    assert (status.image_size_bytes, status.decoded_size_bytes, status.cached_bytes) == (100, 200, 20)
    assert (status.fetched_bytes, status.fetched_requests, status.fetch_errors) == (7, 2, 0)
    assert status.copied_bytes == 9
    shown = capsys.readouterr().out
    assert "fetched  7 B of 100 B (7.0%) in 2 requests" in shown
    assert "copied   9 B of other images in the cache" in shown


def test_an_answer_that_makes_no_sense_is_an_error(run_dir: Path) -> None:
    files = recorded(run_dir)
    with pytest.raises(OSError, match=r"No such file|not an answer"):
        ask(files.socket)


def test_a_mount_that_does_not_answer_is_hanging(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = recorded(run_dir)
    monkeypatch.setattr("tools.agent_client.STATUS_TIMEOUT_S", 0.01)
    monkeypatch.chdir(files.socket.parent)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(files.socket.name)
        listener.listen()
        (status,) = read_statuses(run_dir, None)
    assert status.state == "hanging"
    assert files.record.exists()


def test_a_dead_mount_is_shown_once_and_forgotten(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = recorded(run_dir)
    files.socket.touch()
    assert run(["status", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["mountpoint"], shown["pid"]) == ("dead", "/mnt/a", 4711)
    assert list(known_mounts(run_dir)) == []
    assert not files.socket.exists()


def test_nothing_mounted(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status"]) == 0
    assert capsys.readouterr().out == "nothing is mounted\n"
    assert run(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_directory_without_a_mount_is_an_error(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "/mnt/b"]) == NotMounted.exit_code
    assert capsys.readouterr().err.startswith("nydus-py: /mnt/b: no image of nydus-py is mounted here")


def test_a_broken_record_is_passed_over(run_dir: Path) -> None:
    recorded(run_dir).record.write_text("{")
    assert list(known_mounts(run_dir)) == []

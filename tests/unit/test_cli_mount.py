"""Which way `nydus-py mount` goes when the agent says yes, no, or dies."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fuse.agent.client import AgentRefused
from fuse.agent.request import NO_DRIVER, MountRequest
from tools.agent_client import MountAnswer
from tools.main import run
from tools.mount import TRIES


class Calls:
    """Stands for the agent and for the process of a pyfuse3 mount."""

    def __init__(self, answers: list[Callable[[], MountAnswer]]) -> None:
        self.answers = answers
        self.requests: list[MountRequest] = []
        self.remarks: list[object] = []

    def call(
        self, path: Path, method: str, target: str, answer: type[MountAnswer], body: MountRequest
    ) -> MountAnswer:
        self.requests.append(body)
        return self.answers[min(len(self.requests), len(self.answers)) - 1]()

    def mount_alone(self, *arguments: object, foreground: bool, remark: str = "") -> None:
        self.remarks.append(remark)


def refusal(code: int, why: str) -> Callable[[], MountAnswer]:
    def refuse() -> MountAnswer:
        error = AgentRefused(why=why)
        error.exit_code = code  # type: ignore[misc]
        raise error

    return refuse


def die() -> MountAnswer:
    raise ConnectionResetError


def mounted() -> MountAnswer:
    return MountAnswer("/mnt", "dir:/x", "sha256:0", "fuse", 1, driver_remark="not erofs: no capability")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    made = Calls([])
    monkeypatch.setenv("NYDUS_PY_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setattr("tools.mount.ensure_agent", lambda settings: settings.run_dir / "agent.sock")
    monkeypatch.setattr("tools.mount.call", made.call)
    monkeypatch.setattr("tools.mount_process.mount_in_own_process", made.mount_alone)
    return made


def mount(tmp_path: Path, *options: str) -> int:
    (tmp_path / "mnt").mkdir(exist_ok=True)
    return run(["mount", *options, "dir:/x", str(tmp_path / "mnt")])


def test_what_was_taken_and_why_is_one_line(
    tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    calls.answers = [mounted]
    assert mount(tmp_path) == 0
    expected = "dir:/x is mounted at /mnt (fuse; not erofs: no capability)\n"
    assert capsys.readouterr().err == expected
    assert calls.remarks == []


def test_auto_goes_on_to_pyfuse3_and_keeps_the_reasons(tmp_path: Path, calls: Calls) -> None:
    calls.answers = [refusal(NO_DRIVER, "/mnt: not erofs: a; not fuse: b")]
    assert mount(tmp_path) == 0
    assert calls.remarks == ["/mnt: not erofs: a; not fuse: b"]


def test_a_driver_that_was_asked_for_is_not_replaced(tmp_path: Path, calls: Calls) -> None:
    calls.answers = [refusal(86, "no EROFS")]
    assert mount(tmp_path, "--driver", "erofs") == 86
    assert calls.remarks == []


def test_pyfuse3_needs_no_agent(tmp_path: Path, calls: Calls) -> None:
    assert mount(tmp_path, "--driver", "pyfuse3") == 0
    assert (calls.requests, calls.remarks) == ([], [""])


def test_an_agent_that_dies_is_asked_again(tmp_path: Path, calls: Calls) -> None:
    calls.answers = [die, die, mounted]
    assert mount(tmp_path) == 0
    assert len(calls.requests) == 3


def test_an_agent_that_always_dies_is_an_error(
    tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    calls.answers = [die]
    assert mount(tmp_path) == 93
    assert len(calls.requests) == TRIES
    assert "agent.log" in capsys.readouterr().err


def test_the_request_names_where_credentials_are_and_none_of_them(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", "/somewhere")
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    calls.answers = [mounted]
    assert mount(tmp_path, "--passthrough", "--prefetch", "all") == 0
    (request,) = calls.requests
    assert request.environment["DOCKER_CONFIG"] == "/somewhere"
    assert "hidden" not in repr(request)
    assert (request.passthrough, request.prefetch) == (True, "all")

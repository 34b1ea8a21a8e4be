"""The command line as a whole: verbs, global options, errors and exit codes."""

import errno
import subprocess
import sys

import pytest

from rafs.bootstrap import NoSuchEntry
from tools.failure import EXIT_FAULT, EXIT_INTERRUPTED, SystemFault, known_error, report_failure
from tools.main import VERBS, load_verb, run
from tools.settings import hoist_globals


def stderr_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [verb for verb in VERBS if f"  {verb} " not in shown] == []


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_of_a_verb_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Example: {VERBS[verb].example}" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["ls"],
        ["ls", "--frobnicate", "x/y"],
        ["cat", "host/repo"],
        ["--log-level", "loud", "status"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert capsys.readouterr().out == ""


def test_no_arguments_show_the_help() -> None:
    assert run([]) in (0, 2)


def test_a_reference_that_does_not_parse_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ls", "not a reference"]) == 43
    (line,) = stderr_lines(capsys)
    assert line.startswith("nydus-py: 'not a reference' is not an image reference")


def test_global_options_stand_anywhere() -> None:
    assert hoist_globals(["ls", "ref", "--debug", "--cache-dir", "/c", "--ca-file=/x"]) == [
        "--debug",
        "--cache-dir",
        "/c",
        "--ca-file=/x",
        "ls",
        "ref",
    ]


def test_what_follows_two_dashes_is_not_an_option() -> None:
    assert hoist_globals(["cat", "--", "ref", "--debug"]) == ["cat", "--", "ref", "--debug"]


def test_every_verb_loads() -> None:
    assert [verb for verb in VERBS if load_verb(verb).name != verb] == []


def test_help_imports_no_verb_and_no_loop() -> None:
    heavy = {"trio", "httpx", "rich", "pyfuse3", "zstandard"} | {f"tools.{verb}" for verb in VERBS}
    script = "import sys; from tools.main import run; run(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert heavy & set(done.stderr.split()) == set()


def test_a_known_error_in_groups_is_one_line_and_its_own_code(capsys: pytest.CaptureFixture[str]) -> None:
    inner = ExceptionGroup("inner", [ValueError("beside"), NoSuchEntry(path="/a\nb")])
    assert report_failure(ExceptionGroup("outer", [inner]), debug=False) == NoSuchEntry.exit_code
    assert stderr_lines(capsys) == ["nydus-py: /a b: no such file or directory in the image"]


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_failure(NoSuchEntry(path="/x"), debug=True) == NoSuchEntry.exit_code
    assert any("NoSuchEntry" in line for line in stderr_lines(capsys))


def test_what_the_system_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/cache/x")
    assert report_failure(error, debug=False) == SystemFault.exit_code
    assert stderr_lines(capsys) == ["nydus-py: /cache/x: No space left on device"]


def test_an_interrupt_exits_130(capsys: pytest.CaptureFixture[str]) -> None:
    group = BaseExceptionGroup("nursery", [KeyboardInterrupt()])
    assert report_failure(group, debug=False) == EXIT_INTERRUPTED
    assert stderr_lines(capsys) == ["nydus-py: interrupted"]


def test_a_fault_of_ours_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert known_error(ValueError("oops")) is None
    assert report_failure(ValueError("oops"), debug=False) == EXIT_FAULT
    lines = stderr_lines(capsys)
    assert lines[0].startswith(("Traceback", "ValueError"))
    assert "please report" in lines[-1]

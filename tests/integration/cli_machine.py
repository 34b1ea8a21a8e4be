"""A host of its own for each test of the command line."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fuse.mountpoint import NothingMounted, unmount

HANGS_AFTER_S = 180


def unmount_anyway(directory: Path) -> None:
    """Leaves nothing mounted at `directory`, whatever a test did there."""
    with contextlib.suppress(NothingMounted):
        while True:
            unmount(directory, lazy=True)


def processes_of(run_dir: Path) -> list[int]:
    """Supervisor, template and agent with that run directory."""
    wanted = os.fsencode(run_dir)
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                if wanted in (entry / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def kill_all(run_dir: Path) -> None:
    """Ends what `processes_of` finds. Stopped first: each of them would start the other one again."""
    while found := processes_of(run_dir):
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        time.sleep(0.01)


def with_socket(command: list[str], descriptor: int) -> list[str]:
    """The command as systemd would run it, with a listening socket (sd_listen_fds(3)); pass that on, too."""
    script = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); "
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); os.execvp(sys.argv[2], sys.argv[2:])"
    )
    return [sys.executable, "-S", "-c", script, str(descriptor), *command]


@dataclass(frozen=True, slots=True)
class Machine:
    """A host of its own: cache, run directory and home of one test."""

    directory: Path

    def command(self, *arguments: str | Path) -> list[str]:
        """A command line as `subprocess` takes it."""
        program = [sys.executable, "-m", "tools.main", "--cache-dir", str(self.directory / "cache")]
        return [*program, *map(str, arguments)]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a command line."""
        return {**os.environ, "NYDUS_PY_RUN_DIR": str(self.directory / "run")}

    def run(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        """Runs a command line in a process of its own."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=HANGS_AFTER_S,
        )

    def nydus(self, *arguments: str | Path) -> str:
        """Standard output of a command line that succeeds."""
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def failure(self, *arguments: str | Path) -> tuple[int, str]:
        """Exit code and the one line of a command line that fails."""
        done = self.run(*arguments)
        assert done.stderr.count("\n") == 1, done.stderr
        line = done.stderr.rstrip("\n")
        assert done.stdout == ""
        return done.returncode, line

    def json(self, *arguments: str | Path) -> dict[str, object]:
        """What a command line that succeeds reports as JSON."""
        report = json.loads(self.nydus(*arguments, "--json"))
        assert isinstance(report, dict)
        return report

    def statuses(self, *arguments: str | Path) -> list[dict[str, object]]:
        """What `status` reports."""
        found = json.loads(self.nydus("status", "--json", *arguments))
        assert isinstance(found, list)
        return found

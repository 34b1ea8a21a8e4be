"""Starting a supervisor: as a process of its own in the background, or in place of this one."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fuse.supervisor.main import LOG_NAME

ROOT = Path(__file__).resolve().parents[2]
"""Where the packages are, installed or in a checkout."""


def python_command(module: str, *flags: str) -> list[str]:
    """A command line that runs `module` as a program, whatever the working directory is then."""
    code = f"import sys; sys.path.insert(0, {os.fspath(ROOT)!r}); import runpy; "
    code += f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [sys.executable, *flags, "-c", code]


def supervisor_command(run_dir: Path, agent_command: Sequence[str], *own: str) -> list[str]:
    """The command line of a supervisor. Without `site`, which would import what it does not need."""
    program = python_command("fuse.supervisor.main", "-S", "-E")
    return [*program, os.fspath(run_dir), *own, "--", *agent_command]


def start_in_background(
    run_dir: Path, agent_command: Sequence[str], own: Sequence[str] = (), descriptors: Sequence[int] = ()
) -> int:
    """Starts a supervisor that outlives this process and its terminal; its pid. It writes to a log."""
    with open(run_dir / LOG_NAME, "ab") as log:
        process = subprocess.Popen(
            supervisor_command(run_dir, agent_command, *own),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
            pass_fds=descriptors,
        )
    process.returncode = 0  # nobody waits for it: its parent will be init
    return process.pid


def become_supervisor(run_dir: Path, agent_command: Sequence[str]) -> None:
    """Runs a supervisor in place of this process. Does not return."""
    command = supervisor_command(run_dir, agent_command)
    os.execv(command[0], command)

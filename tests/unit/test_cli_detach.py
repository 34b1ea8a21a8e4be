"""Going to the background: who exits with what, and where the child talks to."""

import os
import signal
import subprocess
import sys
from pathlib import Path

PRELUDE = """
import os, signal, sys
from pathlib import Path
from tools.detach import BackgroundProcessDied, detach
"""


def run_script(body: str, log: Path) -> subprocess.CompletedProcess[str]:
    """Runs `body`, whose background process must end by itself; waits for both."""
    command = [sys.executable, "-c", PRELUDE + body, str(log)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_parent_exits_with_0_when_the_child_is_ready(tmp_path: Path) -> None:
    log = tmp_path / "log"
    read_end, write_end = os.pipe()
    body = f"""
ready = detach(Path(sys.argv[1]))
print("about to be ready", flush=True)
ready()
print("now in the log", flush=True)
os.write({write_end}, os.getcwd().encode())
"""
    command = [sys.executable, "-c", PRELUDE + body, str(log)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, pass_fds=[write_end])
    os.close(write_end)
    with os.fdopen(read_end) as child:
        working_directory = child.read()  # until the child has ended
    assert (done.returncode, done.stdout, done.stderr) == (0, "about to be ready\n", "")
    assert working_directory == "/"
    assert log.read_text() == "now in the log\n"


def test_the_parent_exits_with_the_code_of_a_child_that_gave_up(tmp_path: Path) -> None:
    done = run_script(
        "detach(Path(sys.argv[1]))\nprint('one line', file=sys.stderr)\nsys.exit(33)", tmp_path / "log"
    )
    assert (done.returncode, done.stderr) == (33, "one line\n")


def test_a_killed_child_is_named(tmp_path: Path) -> None:
    body = """
try:
    detach(Path(sys.argv[1]))
except BackgroundProcessDied as error:
    print(error)
else:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run_script(body, tmp_path / "log")
    assert "killed by SIGKILL" in done.stdout
    assert str(tmp_path / "log") in done.stdout


def test_an_interrupt_ends_the_child_too(tmp_path: Path) -> None:
    body = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
parent = os.getpid()
try:
    detach(Path(sys.argv[1]))
except KeyboardInterrupt:
    print("parent interrupted, child gone")
else:
    signal.signal(signal.SIGTERM, lambda *_: (print("child told", flush=True), os._exit(0)))
    os.kill(parent, signal.SIGINT)
    signal.pause()
"""
    done = run_script(body, tmp_path / "log")
    assert done.stdout == "child told\nparent interrupted, child gone\n"
    assert done.returncode == 0
    assert signal.getsignal(signal.SIGINT) is not None

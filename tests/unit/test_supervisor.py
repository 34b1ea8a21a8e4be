"""The supervisor with agents of a few lines: who is started when, and what it is given."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuse.supervisor.launch import supervisor_command
from fuse.supervisor.listener import is_served
from fuse.supervisor.systemd import FIRST_PASSED

ROOT = Path(__file__).parents[2]
DEADLINE_S = 30.0

# Does what tools/agent_process.py does, without the agent: every line that it writes is a fact for the test.
AGENT = """
import os, socket, sys, time
sys.path.insert(0, {root!r})
from fuse.supervisor.channel import Packet, receive, send
def note(*words):
    with open({facts!r}, "a") as facts:
        print(*words, file=facts, flush=True)
orders = socket.socket(fileno=int(sys.argv[sys.argv.index("--channel") + 1]))
{prelude}
send(orders, Packet("ready", {{"pid": os.getpid()}}))
note("template", os.getpid())
while (order := receive(orders)) is not None:
    child = os.fork()
    if child == 0:
        if os.fork():
            os._exit(0)
        channel = socket.socket(fileno=order.descriptors[0])
        send(channel, Packet("ready", {{"pid": os.getpid()}}))
        entries = []
        while (packet := receive(channel)).do == "take":
            entries.append((packet.values["name"], len(packet.descriptors)))
        note("agent", os.getpid(), packet.values["restarts"], sorted(entries))
        {body}
    os.waitpid(child, 0)
"""
SERVE = """
        send(channel, Packet("serving"))
        while (packet := receive(channel)) is not None:
            note("told", os.getpid(), packet.do)
            if packet.do == "stop":
                os._exit(0)
            if packet.do == "shutdown":
                send(channel, Packet("ended"))
                os._exit(0)
        os._exit(0)
"""
HOLD = """
        memory = os.memfd_create("x")
        hold = {"name": "m", "kind": "other", "values": {}, "sequence": 1}
        if len(entries) == 1:
            send(channel, Packet("hold", hold, (memory,)))
            note("held", receive(channel).do)
"""


class Supervised:
    """A running supervisor and the facts that its agents have written."""

    def __init__(
        self, directory: Path, prelude: str, body: str, environment: dict[str, str] | None = None
    ) -> None:
        self.directory = directory
        self.facts_path = directory / "facts"
        self.facts_path.touch()
        script = directory / "agent.py"
        script.write_text(
            AGENT.format(root=str(ROOT), facts=str(self.facts_path), prelude=prelude, body=body)
        )
        self.command = supervisor_command(directory, [sys.executable, str(script)])
        self.start(environment or {})

    def start(self, environment: dict[str, str], stored: dict[str, int] | None = None) -> None:
        """Starts a supervisor, with what a service manager has stored for it."""
        stored = stored or {}
        script = 'exec "$@"'
        if stored:
            numbers = " ".join(f"{place}<&{fd}" for place, fd in enumerate(stored.values(), FIRST_PASSED))
            names = ":".join(stored)
            script = f'LISTEN_PID=$$ LISTEN_FDS={len(stored)} LISTEN_FDNAMES={names} exec "$@" {numbers}'
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", script, "bash", *self.command],
                stdout=log,
                stderr=log,
                cwd="/",
                env={**os.environ, **environment},
                pass_fds=list(stored.values()),
            )

    def facts(self, kind: str) -> list[list[str]]:
        """The lines of one kind, without it."""
        lines = [line.split(maxsplit=3) for line in self.facts_path.read_text().splitlines()]
        return [line[1:] for line in lines if line[0] == kind]

    def wait_for(self, kind: str, count: int) -> list[list[str]]:
        """Waits until there are so many facts of a kind."""
        deadline = time.monotonic() + DEADLINE_S
        while len(found := self.facts(kind)) < count:
            assert time.monotonic() < deadline, (self.directory / "log").read_text()
            assert self.process.poll() is None, (self.directory / "log").read_text()
            time.sleep(0.005)
        return found

    def end(self) -> None:
        """Ends whatever is left, by pid."""
        pids = {int(fact[0]) for kind in ("template", "agent") for fact in self.facts(kind)}
        self.process.kill()
        self.process.wait()
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.fixture
def supervised(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Supervised]:
    prelude, body = getattr(request, "param", ("", SERVE))
    running = Supervised(tmp_path, prelude, body)
    try:
        yield running
    finally:
        running.end()


def test_a_killed_agent_is_replaced_by_a_fork_of_the_same_template(supervised: Supervised) -> None:
    ((first, restarts, entries),) = supervised.wait_for("agent", 1)
    assert (restarts, entries) == ("0", "[('listener', 1)]")
    assert is_served(supervised.directory / "agent.sock")
    for death in range(1, 6):
        os.kill(int(first), signal.SIGKILL)
        first, restarts, _ = supervised.wait_for("agent", death + 1)[-1]
        assert restarts == str(death)
    assert len(supervised.facts("template")) == 1


@pytest.mark.parametrize("supervised", [("", HOLD + SERVE)], indirect=True)
def test_what_was_held_is_given_to_the_successor(supervised: Supervised) -> None:
    supervised.wait_for("held", 1)
    os.kill(int(supervised.facts("agent")[0][0]), signal.SIGKILL)
    assert supervised.wait_for("agent", 2)[1][2] == "[('listener', 1), ('m', 1)]"


def test_a_killed_template_is_replaced_while_the_agent_goes_on(supervised: Supervised) -> None:
    supervised.wait_for("agent", 1)
    os.kill(int(supervised.facts("template")[0][0]), signal.SIGKILL)
    supervised.wait_for("template", 2)
    assert len(supervised.facts("agent")) == 1
    os.kill(int(supervised.facts("agent")[0][0]), signal.SIGKILL)
    supervised.wait_for("agent", 2)


@pytest.mark.parametrize(
    "supervised",
    [("", "send(channel, Packet('serving')); send(channel, Packet('upgrade'))\n" + SERVE)],
    indirect=True,
)
def test_an_upgrade_has_a_new_template_before_it_stops_the_agent(supervised: Supervised) -> None:
    supervised.wait_for("template", 2)
    told = supervised.wait_for("told", 1)[0]
    assert told == [supervised.facts("agent")[0][0], "stop"]
    supervised.wait_for("agent", 2)


def test_the_end_comes_when_the_agent_says_so(supervised: Supervised) -> None:
    supervised.wait_for("agent", 1)
    time.sleep(0.1)
    supervised.process.terminate()
    assert supervised.process.wait(DEADLINE_S) == 0
    assert supervised.facts("told")[-1][1] == "shutdown"
    assert not (supervised.directory / "agent.sock").exists()


@pytest.mark.parametrize("supervised", [("", "os._exit(7)")], indirect=True)
def test_an_agent_that_cannot_begin_is_tried_again_more_and_more_slowly(supervised: Supervised) -> None:
    supervised.wait_for("agent", 5)
    start = time.monotonic()
    supervised.wait_for("agent", 7)
    assert time.monotonic() - start > 0.2  # 0.2 + 0.4 s of pauses: the bound is one of them
    assert "ended with 7 while taking over" in (supervised.directory / "log").read_text()


def test_a_second_supervisor_of_the_same_directory_ends(supervised: Supervised) -> None:
    supervised.wait_for("agent", 1)
    command = supervisor_command(supervised.directory, ["/bin/false"])
    assert subprocess.run(command, check=False, timeout=DEADLINE_S).returncode == 0


@pytest.mark.parametrize("supervised", [("", HOLD + SERVE)], indirect=True)
def test_a_killed_supervisor_gets_everything_back_from_systemd(
    tmp_path_factory: pytest.TempPathFactory, supervised: Supervised
) -> None:
    supervised.end()
    directory = tmp_path_factory.mktemp("systemd")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(directory / "notify"))
        systemd.settimeout(DEADLINE_S)
        environment = {"NOTIFY_SOCKET": str(directory / "notify")}
        second = Supervised(directory, "", HOLD + SERVE, environment)
        try:
            stored = store_like_systemd(systemd)
            second.wait_for("held", 1)
            # Far from the numbers that the successor finds them at.
            high = {name: fcntl.fcntl(fd, fcntl.F_DUPFD, 200) for name, fd in stored.items()}
            (agent,) = second.facts("agent")
            second.process.kill()
            second.process.wait()
            second.start(environment, high)
            os.kill(int(agent[0]), signal.SIGKILL)
            assert second.wait_for("agent", 2)[1][2] == "[('listener', 1), ('m', 1)]"
        finally:
            second.end()
            for descriptor in (*stored.values(), *high.values()):
                os.close(descriptor)


def store_like_systemd(systemd: socket.socket) -> dict[str, int]:
    """What the supervisor has stored by the time that it says READY, and the entry `m` behind it."""
    stored: dict[str, int] = {}
    ready = False
    while not (ready and len(stored) >= 5):  # index, listener, channel and pidfd of the agent, m
        data, descriptors, _, _ = socket.recv_fds(systemd, 4096, 4)
        lines = dict(line.split("=", 1) for line in data.decode().splitlines())
        ready = ready or "READY" in lines
        if "FDSTORE" in lines:
            stored[lines["FDNAME"]] = descriptors[0]
    return stored


def test_it_is_small(supervised: Supervised) -> None:
    supervised.wait_for("agent", 1)
    status = Path(f"/proc/{supervised.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    assert int(line.split()[1]) < 20 * 1024

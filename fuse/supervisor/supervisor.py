"""Keeps one agent running and holds its descriptors.

The agent may die at any instruction. Then, in this order: its last packets are read (what it sent is held),
it is reaped, the kernel's view is put right (`aftermath`), and a fresh fork is given everything. An upgrade
is the same with a template of the new program, started before the old agent is told to stop. Every point of
death is in docs/notes/supervisor.md.
"""

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from fuse.supervisor.aftermath import take_back
from fuse.supervisor.channel import DescriptorsLost, Packet, close_all, receive
from fuse.supervisor.holdings import KIND_EVENTS, Entry, Holdings
from fuse.supervisor.process import ChildProcess, Stage, fork_agent, start_template
from fuse.supervisor.systemd import ServiceManager

STOP_TIMEOUT_S = 10.0
"""An agent that was told to stop for its successor and does not is killed."""
FAILURES_AT_ONCE = 3
BACKOFF_MAX_S = 5.0
KIND_AGENT = "agent"
"""The serving agent itself: its channel and its pidfd. Held for a successor of the supervisor."""


class Supervisor:
    """See above. `run` is the whole life."""

    def __init__(self, command: Sequence[str], holdings: Holdings, manager: ServiceManager) -> None:
        """`command` starts a template."""
        self._command = list(command)
        self._holdings = holdings
        self._manager = manager
        self._template: ChildProcess | None = None
        self._next_template: ChildProcess | None = None
        self._agent: ChildProcess | None = None
        self._template_due: float | None = 0.0
        self._fork_due: float | None = None
        self._stop_due: float | None = None
        self._shutdowns = 0
        self._failures = 0
        self._restarts = 0
        self._ended = False
        self._selector = selectors.DefaultSelector()

    def run(self) -> int:
        """Until the agent says that it is done; the exit code."""
        self._receive_signals()
        self._find_agent()
        while not self._ended:
            self._do_what_is_due()
            for key, _ in self._selector.select(self._time_left()):
                key.data()
        for template in (self._template, self._next_template):
            self._end_template(template)
        return 0

    def adopt(self, pid: int, channel: socket.socket) -> None:
        """Takes a serving agent over from a supervisor that has died."""
        self._agent = ChildProcess(channel, pid, os.pidfd_open(pid), Stage.SERVING)

    # -- starting

    def _find_agent(self) -> None:
        """Goes on with the agent that an earlier supervisor left with the service manager."""
        entry = self._holdings.get(KIND_AGENT)
        if self._agent is None and entry is not None:
            channel, process = (os.dup(fd) for fd in entry.descriptors)
            pid = int(entry.values["pid"])
            self._agent = ChildProcess(socket.socket(fileno=channel), pid, process, Stage.SERVING)
        if self._agent is not None:
            self._watch(self._agent)
        else:
            self._fork_due = 0.0

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        if self._template_due is not None and now >= self._template_due:
            self._template_due = None
            self._template = self._template or self._start_template()
        ready = self._template is not None and self._template.stage is Stage.READY
        if self._fork_due is not None and now >= self._fork_due and self._template is not None and ready:
            self._fork_due = None
            self._agent = fork_agent(self._template)
            self._watch(self._agent)
        if self._stop_due is not None and now >= self._stop_due and self._agent is not None:
            self._stop_due = None
            log(f"agent {self._agent.pid} does not stop and is killed")
            self._agent.kill()

    def _time_left(self) -> float | None:
        ready = self._template is not None and self._template.stage is Stage.READY
        times = (self._template_due, self._fork_due if ready else None, self._stop_due)
        due = [moment for moment in times if moment is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _start_template(self) -> ChildProcess | None:
        try:
            template = start_template(self._command)
        except OSError as error:
            log(f"cannot start a template: {error}")
            self._template_due = time.monotonic() + BACKOFF_MAX_S
            return None
        self._watch(template)
        return template

    def _watch(self, child: ChildProcess) -> None:
        self._selector.register(child.channel, selectors.EVENT_READ, lambda: self._hear(child))
        if child.process >= 0:
            self._selector.register(child.process, selectors.EVENT_READ, lambda: self._bury(child))

    # -- what they say

    def _hear(self, child: ChildProcess) -> None:
        """Handles every packet that is there."""
        while True:
            try:
                packet = receive(child.channel, wait=False)
            except BlockingIOError:
                return
            except DescriptorsLost as error:
                log(f"process {child.pid}: {error}")
                child.tell(Packet("refused", {"why": str(error)}))
                continue
            except (OSError, ValueError) as error:
                log(f"process {child.pid} sends what cannot be read and is killed: {error}")
                child.kill()
                return
            if packet is None:
                # It has closed its end, or is dying: its pidfd follows, if there is one already.
                with contextlib.suppress(KeyError):
                    self._selector.unregister(child.channel)
                    if child.process < 0:
                        self._bury(child)
                return
            self._handle(child, packet)

    def _handle(self, child: ChildProcess, packet: Packet) -> None:
        values, descriptors = packet.values, packet.descriptors
        if packet.do == "hold" and child is self._agent:
            self._holdings.put(values["name"], values["kind"], values["values"], descriptors)
            child.tell(Packet("held", {"sequence": values["sequence"]}))
            return
        close_all(descriptors)
        if packet.do == "release" and child is self._agent:
            self._holdings.release(values["name"])
        elif packet.do == "ready":
            self._is_ready(child, int(values["pid"]))
        elif packet.do == "serving":
            self._is_serving(child)
        elif packet.do == "upgrade":
            self._upgrade()
        elif packet.do == "ended":
            child.stage = Stage.ENDED

    def _is_ready(self, child: ChildProcess, pid: int) -> None:
        child.stage = Stage.READY
        if child is self._agent:
            # It is our child, by way of PR_SET_CHILD_SUBREAPER: its pid is its own until we reap it.
            child.pid, child.process = pid, os.pidfd_open(pid)
            self._selector.register(child.process, selectors.EVENT_READ, lambda: self._bury(child))
            self._hand_over(child)
        elif child is self._next_template:
            self._end_template(self._template)
            self._template, self._next_template = child, None
            if self._agent is not None:
                self._agent.stage = Stage.STOPPING
                self._agent.tell(Packet("stop"))
                self._stop_due = time.monotonic() + STOP_TIMEOUT_S

    def _is_serving(self, agent: ChildProcess) -> None:
        agent.stage = Stage.SERVING
        self._failures = 0
        self._manager.notify(f"READY=1\nSTATUS=agent {agent.pid}, {self._restarts} restarts")
        if self._shutdowns:
            self._tell_shutdown(agent)

    def _hand_over(self, agent: ChildProcess) -> None:
        """Gives an agent everything that is held, the events first: it must reserve their numbers."""
        agent.stage = Stage.TAKING
        if self._manager.is_there:
            own = (os.dup(agent.channel.fileno()), os.dup(agent.process))
            self._holdings.put(KIND_AGENT, KIND_AGENT, {"pid": agent.pid}, own)
        for entry in sorted(self._holdings, key=lambda entry: entry.kind != KIND_EVENTS):
            if entry.kind != KIND_AGENT:
                agent.tell(_take(entry))
        agent.tell(Packet("go", {"restarts": self._restarts}))

    # -- death

    def _bury(self, child: ChildProcess) -> None:
        with contextlib.suppress(KeyError):
            self._selector.get_key(child.channel)
            self._hear(child)
        for registered in (child.channel, child.process):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(registered)
        code = child.reap()
        if child is self._agent:
            self._agent = None
            self._replace(child, code)
        elif child is self._template:
            log(f"template {child.pid} ended with {code}")
            self._template = None
            self._template_due = time.monotonic() + (0.0 if child.stage is Stage.READY else BACKOFF_MAX_S)
        elif child is self._next_template:
            log(f"the new template ended with {code}: no upgrade, the running agent goes on")
            self._next_template = None

    def _replace(self, dead: ChildProcess, code: int) -> None:
        if dead.stage is Stage.ENDED and code == 0:
            self._ended = True
            return
        self._stop_due = None
        if not (dead.stage is Stage.STOPPING and code == 0):
            log(f"agent {dead.pid} ended with {code} while {dead.stage.value}")
        if denied := take_back(self._holdings):
            log(f"{denied} events of agent {dead.pid} are in no journal and denied")
        self._restarts += 1
        if dead.stage in (Stage.STARTING, Stage.READY, Stage.TAKING) and code != -signal.SIGKILL:
            self._failures += 1  # of its own; one that is killed from outside is replaced at once
        exponent = self._failures - FAILURES_AT_ONCE
        delay_s = min(BACKOFF_MAX_S, 0.1 * 2**exponent) if exponent > 0 else 0.0
        self._fork_due = time.monotonic() + delay_s

    # -- upgrade and end

    def _upgrade(self) -> None:
        """Has a template of the new program ready before the running agent is told to stop."""
        if self._next_template is None:
            self._next_template = self._start_template()

    def _end_template(self, template: ChildProcess | None) -> None:
        if template is not None:
            for registered in (template.channel, template.process):
                with contextlib.suppress(KeyError):
                    self._selector.unregister(registered)
            template.kill()
            template.reap()

    def _receive_signals(self) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        self._signals = (ours, theirs)
        self._selector.register(ours, selectors.EVENT_READ, self._on_signal)

    def _on_signal(self) -> None:
        """First unmount, last close: the agent does it, and goes on answering what cannot be unmounted."""
        numbers = self._signals[0].recv(64)
        if set(numbers) & {signal.SIGTERM, signal.SIGINT}:
            self._shutdowns += 1
            self._manager.notify("STOPPING=1")
            if self._agent is not None and self._agent.stage is Stage.SERVING:
                self._tell_shutdown(self._agent)

    def _tell_shutdown(self, agent: ChildProcess) -> None:
        agent.tell(Packet("shutdown", {"lazy": self._shutdowns > 1}))


def _take(entry: Entry) -> Packet:
    values: dict[str, Any] = {"name": entry.name, "kind": entry.kind, "values": dict(entry.values)}
    return Packet("take", values, entry.descriptors)


def log(line: str) -> None:
    """Writes a line to standard error, which is the log."""
    now = time.time()
    moment = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))},{int(now % 1 * 1000):03}"
    sys.stderr.write(f"{moment} supervisor {os.getpid()}: {line}\n")
    sys.stderr.flush()

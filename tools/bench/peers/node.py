"""A machine of its own as far as a program can tell: namespaces for network, mounts and processes.

They have no name. What holds them is the first process of the process namespace, and that ends when the pipe
to it is closed, also by the death of this process, however it dies. The kernel then kills every process of
the namespace and takes mounts and links with it, so nothing is ever left behind.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rafs.errors import NydusError

Argument = object

# `wait` also reaps orphans; the CPU time of what is dead so ends up in that of the first process.
HOLD = "exec 3<&0; cat <&3 >/dev/null & echo up; wait $!"
UNSHARE = ("unshare", "--net", "--mount", "--propagation=slave", "--pid", "--fork", "--mount-proc")
DAEMON = 'log=$1; shift; "$@" </dev/null >>"$log" 2>&1 &'
END_TIMEOUT_S = 20.0
RUN_TIMEOUT_S = 300.0
# Mounts of others: a copy in our namespace would keep them alive after they are unmounted.
FOREIGN_TYPES = ("fuse", "erofs", "squashfs")
# utime, stime, cutime, cstime of /proc/PID/stat, counted from the state; proc(5)
CPU_FIELDS = slice(11, 15)


class NodeFailed(NydusError):
    """A command of the test bed failed, so there is nothing to measure."""

    message = "{node}: {command}: {why}"
    exit_code: ClassVar[int] = 107


@dataclass(frozen=True, slots=True)
class Node:
    """Running namespaces. `pid` is of a process in the network and mount namespaces."""

    name: str
    pid: int
    holders: frozenset[int]

    def enter(self, *command: Argument) -> list[str]:
        """The command line that runs `command` inside, in the working directory of this process."""
        ns = f"/proc/{self.pid}/ns"
        inside = [f"--net={ns}/net", f"--mount={ns}/mnt", f"--pid={ns}/pid_for_children"]
        return ["nsenter", *inside, f"--wdns={os.getcwd()}", "--", *map(str, command)]

    def run(self, *command: Argument, environment: Mapping[str, str] | None = None) -> str:
        """Standard output of a command that succeeds inside. Raises `NodeFailed`."""
        return run_tool(self.name, self.enter(*command), environment)

    def start(self, log: Path, *command: Argument, environment: Mapping[str, str] | None = None) -> None:
        """Starts a program that stays; what it says is added to `log`."""
        self.run("setsid", "sh", "-c", DAEMON, "sh", log, *command, environment=environment)

    def processes(self) -> list[int]:
        """All processes inside, but for those that hold the namespaces."""
        return [pid for pid in self._members() if pid not in self.holders]

    def cpu_s(self) -> float:
        """CPU seconds of everything that runs inside, or ran and was not waited for from outside."""
        ticks = 0
        for pid in self._members():
            with contextlib.suppress(OSError):
                fields = Path("/proc", str(pid), "stat").read_bytes().rpartition(b")")[2].split()
                ticks += sum(map(int, fields[CPU_FIELDS]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def kill_all(self) -> int:
        """Kills every process inside but the holders; how many there were."""
        killed: set[int] = set()
        end = time.monotonic() + END_TIMEOUT_S
        while (found := self.processes()) and time.monotonic() < end:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed.update(found)
            time.sleep(0.01)
        return len(killed)

    def _members(self) -> list[int]:
        inside = os.readlink(f"/proc/{self.pid}/ns/pid_for_children")
        members = []
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if name.isdigit() and os.readlink(f"/proc/{name}/ns/pid") == inside:
                    members.append(int(name))
        return members


@contextlib.contextmanager
def started_node(name: str) -> Iterator[Node]:
    """Makes the namespaces; at the end everything in them is gone. Needs root. Raises `NodeFailed`."""
    command = [*UNSHARE, "sh", "-c", HOLD]
    holder = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        said = holder.stdout.readline()
        if said != b"up\n":
            raise NodeFailed(
                node=name, command=UNSHARE[0], why=said.decode(errors="replace").strip() or "died"
            )
        empty = Node(name, holder.pid, frozenset())
        node = Node(name, holder.pid, frozenset(empty._members()))
        _drop_foreign_mounts(node)
        node.run("ip", "link", "set", "lo", "up")
        yield node
    finally:
        holder.stdin.close()
        holder.stdout.close()
        try:
            holder.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            holder.kill()
            holder.wait()


def run_tool(
    name: str,
    command: list[str],
    environment: Mapping[str, str] | None = None,
    timeout_s: float = RUN_TIMEOUT_S,
) -> str:
    """Standard output of a command that succeeds. Raises `NodeFailed`."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=environment,
            timeout=timeout_s,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NodeFailed(node=name, command=" ".join(command), why=str(error)) from error
    if done.returncode:
        why = " ".join(done.stderr.split())[-300:] or f"exit code {done.returncode}"
        raise NodeFailed(node=name, command=" ".join(command), why=why)
    return done.stdout


def _drop_foreign_mounts(node: Node) -> None:
    """Unmounts our copies of what others have mounted, innermost first."""
    lines = Path(f"/proc/{node.pid}/mountinfo").read_text().splitlines()
    found = []
    for line in lines:
        before, _, behind = line.partition(" - ")
        if behind.split()[0].partition(".")[0] in FOREIGN_TYPES:
            found.append(before.split()[4].encode().decode("unicode_escape"))
    for mountpoint in reversed(found):
        with contextlib.suppress(NodeFailed):  # its owner was faster
            node.run("umount", "-l", mountpoint)

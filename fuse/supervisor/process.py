"""The processes that the supervisor has: a template with everything imported, and the agent forked from it.

Starting Python and importing an agent takes half a second, forking takes milliseconds; and memory that both
only read is there once. The template never runs anything but forks, so it has no threads and no state.
"""

import contextlib
import enum
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from fuse.supervisor.channel import Packet, channel_pair, send


class Stage(enum.Enum):
    """How far a process has come."""

    STARTING = "starting"
    READY = "ready"
    """The template can fork; the agent waits for what is held."""
    TAKING = "taking over"
    """The agent has been given what is held."""
    SERVING = "serving"
    STOPPING = "stopping"
    """The agent was told to make room for its successor."""
    ENDED = "ended"
    """The agent has said that nothing is mounted any more and that it goes."""


@dataclass(slots=True)
class ChildProcess:
    """A template or an agent, and our end of its channel.

    `process` is a pidfd, readable when it has ended with all its threads; -1 before a fork has told its pid.
    """

    channel: socket.socket
    pid: int = 0
    process: int = -1
    stage: Stage = Stage.STARTING

    def tell(self, packet: Packet) -> None:
        """Sends a packet; that it has died in the meantime, its pidfd or its channel will say."""
        with contextlib.suppress(OSError):
            send(self.channel, packet)

    def kill(self) -> None:
        """SIGKILL, which is always safe: what it did somebody else goes on with."""
        if self.process >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.process, signal.SIGKILL)

    def reap(self) -> int:
        """Waits for its end; the exit code (negative: the signal). Frees what belongs to it.

        0 for one that an earlier supervisor has started, which is not our child.
        """
        self.channel.close()
        if self.process < 0:
            return os.EX_SOFTWARE
        os.close(self.process)
        try:
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:
            return 0


def start_template(command: Sequence[str]) -> ChildProcess:
    """Starts `command` with `--channel N`, its end of the channel, behind it. Raises `OSError`."""
    ours, theirs = channel_pair()
    try:
        os.set_inheritable(theirs.fileno(), True)
        arguments = [*command, "--channel", str(theirs.fileno())]
        pid = os.posix_spawn(arguments[0], arguments, os.environ)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return ChildProcess(ours, pid, os.pidfd_open(pid))


def fork_agent(template: ChildProcess) -> ChildProcess:
    """Has the template fork an agent, which becomes our child and says with its first packet who it is."""
    ours, theirs = channel_pair()
    with theirs:
        template.tell(Packet("fork", {}, (theirs.fileno(),)))
    return ChildProcess(ours)

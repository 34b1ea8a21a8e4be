"""The agent as a program, which the supervisor starts: `--run-dir DIR [--peers JSON] ... --channel N`.

It begins as a template: it imports everything, says that it is ready, and forks an agent whenever the
supervisor asks. The fork takes over what it is given before its loop starts, because events of a dead agent
must be known by then.
"""

import argparse
import contextlib
import fcntl
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import trio

# Not needed before a registry is asked; but then somebody waits.
import backend.registry_store  # noqa: F401
from backend.peers.limit_settings import LimitSettings
from fuse.agent.agent import Agent, AgentOptions
from fuse.agent.peer_options import PeerOptions
from fuse.erofs.fanotify import deny
from fuse.erofs.journal import Journal, Pending
from fuse.keeper import HeldEntry, SupervisedKeeper, take_over
from fuse.mount_status import SessionStatus
from fuse.supervisor.aftermath import EVENT_NUMBERS
from fuse.supervisor.channel import Packet, channel_pair, close_all, receive, send
from fuse.supervisor.holdings import KIND_EVENTS
from fuse.supervisor.launch import start_in_background
from tools.logs import LogLevel, configure_logging
from tools.mount_record import MountRecord, mount_files
from tools.runtime import run_async

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005
"""Events are answered within microseconds; they must not wait 5 ms for a thread that decodes to yield."""
NUMBERS_KEPT = 64
"""Descriptors below this are never events: what a successor opens before it knows of them must not clash."""


def main(arguments: Sequence[str]) -> int:
    """Runs as an agent; the exit code."""
    parser = argparse.ArgumentParser(prog="nydus-py agent process")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--ends-when-idle", action="store_true")
    parser.add_argument("--peers", type=peer_options)
    parser.add_argument("--limits", type=limit_settings, default=LimitSettings())
    parser.add_argument("--metrics-listen", default="")
    parser.add_argument("--log-level", type=LogLevel, default=LogLevel.WARNING)
    parser.add_argument("--channel", type=int, required=True)
    options = parser.parse_args(arguments)
    configure_logging(options.log_level, sys.stderr)
    # A terminal interrupts all that it runs at once; the supervisor has us unmount first then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("0")  # the supervisor's is for itself
    limit_files()
    orders = socket.socket(fileno=options.channel)
    orders.set_inheritable(False)
    channel = fork_when_asked(orders)
    if channel is None:
        return 0
    orders.close()
    return serve(channel, options)


def fork_when_asked(orders: socket.socket) -> socket.socket | None:
    """Forks for every order; returns in each fork with its channel, and at last with None: nobody is there.

    A fork of a fork, whose parent ends: so the supervisor becomes its parent.
    """
    gc.collect()
    gc.freeze()  # so that collections in a fork do not copy what all share
    send(orders, Packet("ready", {"pid": os.getpid()}))
    while (packet := receive(orders)) is not None:
        assert len(os.listdir("/proc/self/task")) == 1, "a thread would not survive the fork"
        child = os.fork()
        if child == 0:
            if os.fork() == 0:
                return socket.socket(fileno=packet.descriptors[0])
            os._exit(0)
        close_all(packet.descriptors)
        os.waitpid(child, 0)
    return None


def serve(channel: socket.socket, options: argparse.Namespace) -> int:
    """The agent's life; the exit code."""
    pending: list[Pending] = []
    takeover = take_over(channel, lambda entry: pending.extend(reserve(entry)))
    keep_low_numbers()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    keeper = SupervisedKeeper(channel, takeover.entries, lambda: respawn(options.run_dir))
    agent_options = AgentOptions(
        program_version(),
        ends_when_idle=options.ends_when_idle,
        peers=options.peers,
        limits=options.limits,
        metrics_listen=options.metrics_listen,
    )
    agent = Agent(agent_options, keeper, takeover, pending, Records(options.run_dir))
    if run_async(agent.run):
        send(keeper.channel, Packet("ended"))
    return 0


def peer_options(text: str) -> PeerOptions:
    """What stands behind `--peers`: JSON."""
    return msgspec.json.decode(text, type=PeerOptions)


def limit_settings(text: str) -> LimitSettings:
    """What stands behind `--limits`: JSON."""
    return msgspec.json.decode(text, type=LimitSettings)


def limit_files() -> None:
    """As many files as allowed, and no event with a number that the journal has no slot for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, EVENT_NUMBERS), hard))


def reserve(entry: HeldEntry) -> list[Pending]:
    """Occupies the numbers of unanswered events, before anything else can get them; gives the events."""
    if entry.kind != KIND_EVENTS:
        return []
    group, memory = entry.descriptors
    pending: list[Pending] = []
    with open(os.devnull, "rb") as nothing, contextlib.closing(Journal(memory)) as journal:
        journal.adopt_hand()
        for event in list(journal.pending()):
            if is_open(event.number):  # not if NUMBERS_KEPT does its work; the kernel asks again
                log.warning("event %d of a dead agent is denied: its number is in use", event.number)
                with contextlib.suppress(FileNotFoundError):
                    os.write(group, deny(event.number))
                journal.clear(event.number)
                continue
            os.dup2(nothing.fileno(), event.number, inheritable=False)
            pending.append(event)
    return pending


def is_open(number: int) -> bool:
    """Whether this process has a descriptor of that number."""
    try:
        fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def keep_low_numbers() -> None:
    """Fills the low descriptor numbers, so that the kernel gives events higher ones."""
    while (number := os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)) < NUMBERS_KEPT:
        pass
    os.close(number)


async def respawn(run_dir: Path) -> socket.socket:
    """Starts another supervisor, which takes this process over; the channel to it."""
    ours, theirs = channel_pair()
    with theirs:
        own = ["--adopt", str(os.getpid()), str(theirs.fileno())]
        command = sys.orig_argv[: sys.orig_argv.index("--channel")]
        await trio.to_thread.run_sync(lambda: start_in_background(run_dir, command, own, [theirs.fileno()]))
    return ours


def program_version() -> str:
    """The installed version."""
    try:
        return version("nydus-py")
    except PackageNotFoundError:
        return "unknown"


class Records:
    """Writes the records that `status` and `umount` go by when no agent answers."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def wrote(self, status: SessionStatus) -> None:
        """See `MountRecorder`."""
        record = MountRecord(
            status.mountpoint,
            status.reference,
            status.digest,
            status.driver,
            status.pid,
            status.is_complete,
        )
        mount_files(self._run_dir, Path(status.mountpoint)).write(record)

    def removed(self, mountpoint: Path) -> None:
        """See `MountRecorder`."""
        mount_files(self._run_dir, mountpoint).remove()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

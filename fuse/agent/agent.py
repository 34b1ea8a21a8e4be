"""The agent: all mounts of a host, their API, and how it begins and ends.

Concurrency: one nursery has a task for each mount, the API, the supervisor's channel, the events of EROFS and
the watch on the table of mounts. A mount that fails ends alone. Leaving the nursery by cancellation (an
upgrade) flushes the caches and leaves every mount to the successor.
"""

import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from backend.json_api import ApiRequest, PlainText, Routes, serve_api
from backend.metrics import CONTENT_TYPE, METRICS_TARGET
from backend.peers.limit_control import LimitControl
from backend.peers.limit_settings import LimitSettings, read_limits
from backend.peers.limit_status import LimitStatus
from backend.peers.limits import open_limits
from backend.shelf import BlobShelf
from fuse.agent.agent_metrics import AgentMetrics
from fuse.agent.kept import AgentStatus, KeptMount
from fuse.agent.live_mount import LiveMount
from fuse.agent.metrics_listener import serve_metrics
from fuse.agent.peer_options import PeerOptions
from fuse.agent.peering import Peering, open_peering
from fuse.agent.request import (
    LIMITS_TARGET,
    MOUNT_TARGET,
    STATUS_TARGET,
    UNMOUNT_TARGET,
    UPGRADE_TARGET,
    LimitsChange,
    MountRequest,
    UnmountRequest,
)
from fuse.erofs.driver import KIND_BLOB, KIND_EROFS, ErofsHost
from fuse.erofs.events import EventOptions
from fuse.erofs.journal import Pending
from fuse.keeper import HeldEntry, SupervisedKeeper, Takeover
from fuse.mount_status import SessionStatus
from fuse.mount_table import find_mount
from fuse.mount_watch import MountWatch
from fuse.mountpoint import AlreadyMounted, MountBusy, NothingMounted, unmount
from fuse.supervisor.channel import Packet
from fuse.supervisor.holdings import KIND_EVENTS, KIND_FUSE, KIND_LIMITS, KIND_LISTENER, KIND_PEER_LISTENER
from rafs.errors import NydusError

log = logging.getLogger(__name__)

ADOPT_TIMEOUT_S = 30.0
IDLE_START_S = 30.0
"""An agent that was started for a mount, and gets none, ends after this."""
UNMOUNTED_TIMEOUT_S = 10.0
SHUTDOWN_RETRY_S = 1.0


class MountRecorder(Protocol):
    """Writes down what is mounted, for whoever finds no agent."""

    def wrote(self, status: SessionStatus) -> None:
        """A mount is there, or has changed."""
        ...

    def removed(self, mountpoint: Path) -> None:
        """A mount is gone."""
        ...


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """`ends_when_idle`: there is nothing to do after the last mount, as for an agent that a mount started."""

    version: str
    ends_when_idle: bool = False
    read_timeout_s: float = 60.0
    peers: PeerOptions | None = None
    limits: LimitSettings = field(default_factory=LimitSettings)
    metrics_listen: str = ""


class Agent:
    """See above."""

    def __init__(
        self,
        options: AgentOptions,
        keeper: SupervisedKeeper,
        takeover: Takeover,
        pending: Sequence[Pending],
        recorder: MountRecorder,
    ) -> None:
        """`pending`: events that a dead agent has left unanswered; their numbers are occupied here."""
        self._options = options
        self._keeper = keeper
        self._takeover = takeover
        self._pending = pending
        self._recorder = recorder
        self._mounts: dict[Path, LiveMount] = {}
        self._watch = MountWatch()
        # The kernel asks a second time after a denial: together as long as one read may take.
        self._erofs = ErofsHost(keeper, self._watch, EventOptions(options.read_timeout_s / 2))
        held = {
            str(entry.values["key"]): (entry.descriptors[0], entry.descriptors[1], entry.descriptors[2])
            for entry in takeover.entries
            if entry.kind == KIND_BLOB
        }
        self._shelf = BlobShelf(held)
        self._control: LimitControl
        self._metrics = AgentMetrics(options.version, takeover.restarts)
        self._peering: Peering | None = None
        self._nursery: trio.Nursery | None = None
        self._stop = trio.CancelScope()
        self._idle = trio.Event()
        self._busy = 0
        self._shutting_down = False

    async def run(self) -> bool:
        """Serves until told to stop (False: a successor goes on) or nothing is left to do (True)."""
        with self._stop:
            async with open_limits(self._own_limits()) as limits, trio.open_nursery() as nursery:
                self._nursery = nursery
                self._control = LimitControl(limits)
                nursery.start_soon(self._keeper.listen, self._on_packet)
                nursery.start_soon(self._watch.run)
                await self._join_peers(nursery)
                await self._adopt_all(nursery)
                nursery.start_soon(self._erofs.serve)
                nursery.start_soon(serve_api, self._listener(), self._routes())
                if self._options.metrics_listen:
                    nursery.start_soon(serve_metrics, self._options.metrics_listen, self._answer_metrics)
                await self._keeper.tell("serving")
                if self._options.ends_when_idle and not self._mounts:
                    nursery.start_soon(self._end_without_mounts)
                await self._idle.wait()
                nursery.cancel_scope.cancel()
        return self._idle.is_set()

    def stop(self) -> None:
        """Ends this process's part; a successor goes on with every mount."""
        self._stop.cancel()

    # -- beginning

    def _listener(self) -> socket.socket:
        for entry in self._takeover.entries:
            if entry.kind == KIND_LISTENER:
                return socket.socket(fileno=os.dup(entry.descriptors[0]))
        raise RuntimeError("the supervisor holds no listening socket")

    async def _join_peers(self, nursery: trio.Nursery) -> None:
        """Whatever is wrong with that does not keep mounts from being served."""
        if self._options.peers is None:
            return
        held = [entry for entry in self._takeover.entries if entry.kind == KIND_PEER_LISTENER]
        listener = socket.socket(fileno=os.dup(held[0].descriptors[0])) if held else None
        try:
            self._peering = await open_peering(
                self._options.peers, self._control, listener, self._keeper, self._shelf, self._metrics.fetch
            )
        except NydusError as error:
            log.error("%s; everything is fetched from the registry", error)
            return
        nursery.start_soon(self._run_peering, self._peering)

    async def _run_peering(self, peering: Peering) -> None:
        """A fault in it ends it, and nothing else: what peers would have given the registry gives."""
        try:
            await peering.run()
        except Exception:
            log.exception("peers are given up until the agent is started again")
            peering.hub.swarm.enabled = False

    async def _adopt_all(self, nursery: trio.Nursery) -> None:
        """Goes on with every mount of a dead agent; one that cannot be opened does not stop the others."""
        entries = self._takeover.entries
        for entry in entries:
            if entry.kind == KIND_EVENTS:
                self._erofs.adopt_events(entry, self._pending)
        waiting = []
        for entry in entries:
            if entry.kind in (KIND_EROFS, KIND_FUSE):
                kept = msgspec.convert(entry.values, KeptMount)
                if not kept.is_mounted:
                    await self._forget_half_mounted(entry, kept)
                    continue
                mount = self._new_mount(kept.request, entry)
                started = trio.Event()
                waiting.append((mount, started))
                nursery.start_soon(self._run_adopted, mount, started)
        with trio.move_on_after(ADOPT_TIMEOUT_S):
            for _, started in waiting:
                await started.wait()

    async def _forget_half_mounted(self, entry: HeldEntry, kept: KeptMount) -> None:
        """The dead agent was about to mount; whoever asked for it has heard nothing, and asks again."""
        path = Path(kept.request.mountpoint)
        mount = await trio.to_thread.run_sync(find_mount, path)
        ours = (kept.metadata.bootstrap, kept.request.reference)
        if mount is not None and mount.source in ours:
            await trio.to_thread.run_sync(lambda: unmount(path, lazy=True))
        await self._keeper.release(entry.name)
        for descriptor in entry.descriptors:
            os.close(descriptor)

    async def _run_adopted(self, mount: LiveMount, started: trio.Event) -> None:
        try:
            await self._run(mount, started.set)
        except NydusError as error:
            log.error("%s: reads fail until it is mounted again: %s", mount.mountpoint, error)
        except Exception:
            log.exception("%s: reads fail until it is mounted again", mount.mountpoint)
        finally:
            started.set()

    def _new_mount(self, request: MountRequest, adopted: HeldEntry | None = None) -> LiveMount:
        hub = self._peering.hub if self._peering else None
        limits = self._control.limits
        fetched = self._metrics.fetch
        mount = LiveMount(request, self._keeper, self._erofs, self._shelf, adopted, hub, limits, fetched)
        self._mounts[Path(request.mountpoint)] = mount
        return mount

    async def _run(self, mount: LiveMount, started: Callable[[], None]) -> None:
        """A mount's whole life."""

        def tell() -> None:
            status = mount.status()
            assert status is not None
            self._recorder.wrote(status)
            started()

        key = Path(mount.request.mountpoint)
        try:
            await mount.run(tell)
            self._recorder.removed(mount.mountpoint)
        finally:
            self._metrics.note_ended(mount.fetched)
            if self._mounts.get(key) is mount:
                del self._mounts[key]
        self._end_if_idle()

    # -- the API

    def _routes(self) -> Routes:
        return {
            ("GET", STATUS_TARGET): self._answer_status,
            ("POST", MOUNT_TARGET): self._answer_mount,
            ("POST", UNMOUNT_TARGET): self._answer_unmount,
            ("POST", UPGRADE_TARGET): self._answer_upgrade,
            ("GET", LIMITS_TARGET): self._answer_limits,
            ("POST", LIMITS_TARGET): self._answer_limits_change,
            ("GET", METRICS_TARGET): self._answer_metrics,
        }

    async def _answer_status(self, call: ApiRequest) -> AgentStatus:
        await trio.lowlevel.checkpoint()
        return self._status()

    def _status(self) -> AgentStatus:
        found = [status for mount in self._mounts.values() if (status := mount.status()) is not None]
        peers = self._peering.status() if self._peering else None
        return AgentStatus(os.getpid(), self._options.version, self._takeover.restarts, found, peers)

    async def _answer_metrics(self, call: ApiRequest) -> PlainText:
        await trio.lowlevel.checkpoint()
        text = self._metrics.render(self._status().mounts, self._control, self._peering)
        return PlainText(text, CONTENT_TYPE)

    async def _answer_mount(self, call: ApiRequest) -> SessionStatus:
        request = msgspec.json.decode(call.body, type=MountRequest)
        path = Path(request.mountpoint)
        if path in self._mounts:
            raise AlreadyMounted(directory=path, source=self._mounts[path].request.reference)
        assert self._nursery is not None
        self._busy += 1
        try:
            mount = self._new_mount(request)
            outcome = _Outcome()
            self._nursery.start_soon(self._run_requested, mount, outcome)
            await outcome.known.wait()
        finally:
            self._busy -= 1
            self._end_if_idle()
        if outcome.failure is not None:
            raise outcome.failure
        status = mount.status()
        assert status is not None
        return status

    async def _run_requested(self, mount: LiveMount, outcome: "_Outcome") -> None:
        try:
            await self._run(mount, outcome.known.set)
        except Exception as error:
            if outcome.known.is_set():
                log.exception("%s: the mount has failed", mount.mountpoint)
            outcome.failure = error
        finally:
            outcome.known.set()

    async def _answer_unmount(self, call: ApiRequest) -> dict[str, str]:
        request = msgspec.json.decode(call.body, type=UnmountRequest)
        mount = self._mounts.get(Path(request.mountpoint))
        if mount is None:
            raise NothingMounted(directory=request.mountpoint)
        self._busy += 1
        try:
            await self._unmount(mount, lazy=request.lazy)
            with trio.move_on_after(0.0 if request.lazy else UNMOUNTED_TIMEOUT_S):
                await mount.ended.wait()
        finally:
            self._busy -= 1
        # Afterwards, so that the answer is on its way before this process may end.
        assert self._nursery is not None
        self._nursery.start_soon(self._end_soon)
        return {"mountpoint": request.mountpoint}

    async def _unmount(self, mount: LiveMount, *, lazy: bool) -> None:
        await trio.to_thread.run_sync(lambda: unmount(mount.mountpoint, lazy=lazy))

    async def _answer_upgrade(self, call: ApiRequest) -> AgentStatus:
        await self._keeper.tell("upgrade")
        return self._status()

    async def _answer_limits(self, call: ApiRequest) -> LimitStatus:
        await trio.lowlevel.checkpoint()
        return self._control.status()

    async def _answer_limits_change(self, call: ApiRequest) -> LimitStatus:
        change = msgspec.json.decode(call.body, type=LimitsChange)
        own = read_limits({**msgspec.to_builtins(self._control.own), **change.limits})
        self._control.set_own(own)
        # For the next agent of this supervisor, unless it is started with other limits.
        values = {"given": msgspec.to_builtins(self._options.limits), "own": msgspec.to_builtins(own)}
        await self._keeper.hold(KIND_LIMITS, KIND_LIMITS, values)
        return self._control.status()

    def _own_limits(self) -> LimitSettings:
        """Those that an agent before this one was told last, or those given."""
        for entry in self._takeover.entries:
            if entry.kind == KIND_LIMITS:
                given = msgspec.convert(entry.values["given"], LimitSettings)
                if given == self._options.limits:
                    return msgspec.convert(entry.values["own"], LimitSettings)
        return self._options.limits

    # -- ending

    async def _end_without_mounts(self) -> None:
        await trio.sleep(IDLE_START_S)
        self._end_if_idle()

    async def _end_soon(self) -> None:
        await trio.sleep(0.05)
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        wants_to = self._options.ends_when_idle or self._shutting_down
        if wants_to and not self._mounts and not self._busy:
            self._idle.set()

    def _on_packet(self, packet: Packet) -> None:
        assert self._nursery is not None
        if packet.do == "stop":
            self.stop()
        elif packet.do == "shutdown":
            self._nursery.start_soon(self._shut_down, bool(packet.values["lazy"]))

    async def _shut_down(self, lazy: bool) -> None:
        """Unmounts everything. What is in use is answered until it is not; that comes before obeying."""
        self._shutting_down = True
        told: set[Path] = set()
        while self._mounts:
            changed = self._watch.changed
            for mount in list(self._mounts.values()):
                try:
                    await self._unmount(mount, lazy=lazy)
                except MountBusy as error:
                    if mount.mountpoint not in told:
                        log.warning("%s: it is served on until then", error)
                    told.add(mount.mountpoint)
                except NydusError as error:
                    log.info("%s", error)
            with trio.move_on_after(SHUTDOWN_RETRY_S):
                await changed.wait()
        self._end_if_idle()


class _Outcome:
    """Whether a mount has come about."""

    def __init__(self) -> None:
        self.known = trio.Event()
        self.failure: Exception | None = None

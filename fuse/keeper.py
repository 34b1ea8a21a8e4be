"""An agent's side of the supervisor: what it wants held, and what the supervisor tells it.

Concurrency: `listen` is one task; it reads the channel and wakes who waits in `hold`. Holds go one after the
other. When the supervisor has died, `listen` starts another one and gives it everything again; meanwhile
the agent itself keeps all descriptors open, so nothing is lost.
"""

import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from fuse.packets import receive_packet, send_packet
from fuse.supervisor.channel import Packet, receive, send
from rafs.errors import NydusError

log = logging.getLogger(__name__)


class NotHeld(NydusError):
    """The supervisor could not take descriptors over; without them the death of the agent would be felt."""

    message = "the supervisor cannot hold {name}: {why}"
    exit_code = 85


@dataclass(frozen=True, slots=True)
class HeldEntry:
    """Something that is held: its values, and descriptors that stay the caller's."""

    name: str
    kind: str
    values: Mapping[str, Any]
    descriptors: tuple[int, ...]


class Keeper(Protocol):
    """Holds descriptors and values for a successor of this process."""

    async def hold(
        self, name: str, kind: str, values: Mapping[str, Any], descriptors: Sequence[int] = ()
    ) -> None:
        """Returns when the entry is held. One of the same name keeps its descriptors when none are given.

        The caller's descriptors stay open and its own. Raises `NotHeld`.
        """
        ...

    async def release(self, name: str) -> None:
        """Lets go of an entry."""
        ...


class MemoryKeeper:
    """Keeps entries for nobody: where there is no supervisor, and for tests."""

    def __init__(self) -> None:
        self.entries: dict[str, HeldEntry] = {}

    async def hold(
        self, name: str, kind: str, values: Mapping[str, Any], descriptors: Sequence[int] = ()
    ) -> None:
        """See `Keeper`."""
        await trio.lowlevel.checkpoint()
        self.entries[name] = _updated(self.entries.get(name), name, kind, values, descriptors)

    async def release(self, name: str) -> None:
        """See `Keeper`."""
        await trio.lowlevel.checkpoint()
        self.entries.pop(name, None)


Respawn = Callable[[], Awaitable[socket.socket]]
"""Starts another supervisor for this process; gives the channel to it."""


class SupervisedKeeper:
    """A `Keeper` whose entries live in the supervisor."""

    def __init__(self, channel: socket.socket, entries: Sequence[HeldEntry], respawn: Respawn) -> None:
        """`entries` are those that this process was given when it started."""
        channel.setblocking(False)
        self._channel = channel
        self._entries = {entry.name: entry for entry in entries}
        self._respawn = respawn
        self._lock = trio.Lock()
        self._sequence = 0
        self._replied = trio.Event()
        self._refusal = ""

    @property
    def channel(self) -> socket.socket:
        """The way to the supervisor at this moment."""
        return self._channel

    async def hold(
        self, name: str, kind: str, values: Mapping[str, Any], descriptors: Sequence[int] = ()
    ) -> None:
        """See `Keeper`."""
        async with self._lock:
            entry = _updated(self._entries.get(name), name, kind, values, descriptors)
            await self._send_entry(entry, descriptors)
            self._entries[name] = entry

    async def release(self, name: str) -> None:
        """See `Keeper`."""
        async with self._lock:
            if self._entries.pop(name, None) is not None:
                await self._send(Packet("release", {"name": name}))

    async def tell(self, do: str) -> None:
        """Sends a word without values."""
        async with self._lock:
            await self._send(Packet(do))

    async def listen(self, on_packet: Callable[[Packet], None]) -> None:
        """Reads the channel for ever; `on_packet` gets what is not an answer to `hold`."""
        while True:
            packet = await receive_packet(self._channel)
            if packet is None:
                log.warning("the supervisor has died; another one is started")
                await self._start_over()
            elif packet.do in ("held", "refused"):
                self._refusal = packet.values.get("why", "")
                self._replied.set()
            else:
                on_packet(packet)

    async def _send_entry(self, entry: HeldEntry, descriptors: Sequence[int]) -> None:
        self._sequence += 1
        self._replied, self._refusal = trio.Event(), ""
        values = {
            "name": entry.name,
            "kind": entry.kind,
            "values": entry.values,
            "sequence": self._sequence,
        }
        await self._send(Packet("hold", values, tuple(descriptors)))
        await self._replied.wait()
        if self._refusal:
            raise NotHeld(name=entry.name, why=self._refusal)

    async def _send(self, packet: Packet) -> None:
        try:
            await send_packet(self._channel, packet)
        except (BrokenPipeError, ConnectionError):
            # `listen` sees it as well, starts another supervisor and sends all entries.
            await trio.lowlevel.checkpoint()

    async def _start_over(self) -> None:
        """Another supervisor, and everything again: free of `hold`'s lock, which may wait for us."""
        old = self._channel
        self._channel = await self._respawn()
        self._channel.setblocking(False)
        old.close()
        for entry in list(self._entries.values()):
            values = {"name": entry.name, "kind": entry.kind, "values": entry.values, "sequence": 0}
            await self._send(Packet("hold", values, entry.descriptors))
        await self._send(Packet("serving"))
        # Whoever waited for the dead one's answer: its entry was among these.
        self._replied.set()


def _updated(
    old: HeldEntry | None, name: str, kind: str, values: Mapping[str, Any], descriptors: Sequence[int]
) -> HeldEntry:
    kept = old.descriptors if old is not None and not descriptors else tuple(descriptors)
    return HeldEntry(name, kind, values, kept)


@dataclass(frozen=True, slots=True)
class Takeover:
    """What an agent begins with: everything that is held, and how many agents there were before it."""

    entries: tuple[HeldEntry, ...]
    restarts: int


def take_over(channel: socket.socket, on_entry: Callable[[HeldEntry], None]) -> Takeover:
    """Says that this process is ready and waits for what is held. Blocking.

    `on_entry` sees each entry at once, before the next one's descriptors are received. Ends the process
    when the supervisor is gone.
    """
    send(channel, Packet("ready", {"pid": os.getpid()}))
    entries: list[HeldEntry] = []
    while (packet := receive(channel)) is not None:
        if packet.do == "go":
            return Takeover(tuple(entries), int(packet.values["restarts"]))
        if packet.do == "take":
            values = packet.values
            entry = HeldEntry(values["name"], values["kind"], values["values"], packet.descriptors)
            on_entry(entry)
            entries.append(entry)
    os._exit(0)

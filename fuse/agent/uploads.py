"""The agent's side of serving other hosts: starts the process that does it, and fetches what that asks for.

Concurrency: `run` starts a process and, when it has died, another one; reads go on meanwhile. A request of
the process is one task. Blobs are told to the process when they are opened, and again to its successor.
"""

import logging
import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import trio

from backend.keep_mode import KeepEncoded
from backend.peers.hub import PeerBlob, PeerHub
from backend.peers.limit_control import LimitControl
from fuse.agent.errand import NotServed, serve_decoded, serve_encoded
from fuse.agent.upload_protocol import (
    Failure,
    FetchRequest,
    MirrorRequest,
    OpenRequest,
    ServedBlob,
    ServedDocument,
    UploadTerms,
    UploadTraffic,
)
from fuse.packets import receive_packet, send_packet
from fuse.supervisor.channel import Packet, channel_pair
from rafs.errors import NydusError

log = logging.getLogger(__name__)

RESTART_PAUSE_S = 0.2
RESTART_PAUSE_MAX_S = 5.0
LONG_LIFE_S = 10.0
TERMS_PAUSE_S = 0.01

OpenGuest = Callable[[str, str, str], Awaitable[None]]
"""Opens an image, by its exact name, because another host (the last) needs this blob of it.

Raises `NydusError`.
"""


class Uploads:
    """See above."""

    def __init__(
        self,
        hub: PeerHub,
        control: LimitControl,
        listener: socket.socket,
        command: Sequence[str],
        open_guest: OpenGuest,
    ) -> None:
        """`command` starts the process, but for its descriptors."""
        self._hub = hub
        self._control = control
        self._listener = listener
        self._command = command
        self._open_guest = open_guest
        self._channel: socket.socket | None = None
        self._before = UploadTraffic(0, 0, {})
        """What the processes before this one have done."""
        self._nursery: trio.Nursery | None = None
        self._sending = trio.Lock()
        self.restarts = 0
        self._new_terms = trio.Event()
        hub.on_blob.append(self._tell_blob)
        control.on_change.append(self._note_terms)
        control.limits.on_yield.append(self._note_terms)
        hub.on_scope.append(self._note_terms)

    async def run(self) -> None:
        """Keeps a process serving until cancelled."""
        pause_s = RESTART_PAUSE_S
        while True:
            began = trio.current_time()
            try:
                await self._live()
            except OSError as error:  # it could not be started: this host is short of something
                log.warning("the upload server does not start: %s", error.strerror)
            else:
                log.warning("the upload server has died; another one is started")
            counters = self._hub.counters
            self._before = UploadTraffic(
                counters.served_bytes, 0, dict(counters.refused), counters.upload_requests
            )
            self._hub.uploads = 0
            self.restarts += 1
            if trio.current_time() - began > LONG_LIFE_S:
                pause_s = RESTART_PAUSE_S
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, RESTART_PAUSE_MAX_S)

    async def _live(self) -> None:
        """One process, from its start to its end."""
        ours, theirs = channel_pair()
        with ours:
            with theirs:
                process = self._start(theirs)
            ours.setblocking(False)
            self._channel = ours
            try:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    await self._send_terms()
                    nursery.start_soon(self._tell_terms)
                    for blob in list(self._hub.blobs.values()):
                        await self._send_blob(blob)
                    while (packet := await receive_packet(ours)) is not None:
                        self._take(packet, nursery)
                    nursery.cancel_scope.cancel()
            except* OSError as group:
                log.info("upload server: %s", group.exceptions[0])
            finally:
                self._channel = self._nursery = None
                ours.close()
                _end(process)

    def _start(self, channel: socket.socket) -> subprocess.Popen[bytes]:
        numbers = (channel.fileno(), self._listener.fileno())
        flags = ["--channel", str(numbers[0]), "--listener", str(numbers[1])]
        # It ends with its agent, whose end of the channel is closed then; no signal of a terminal reaches it.
        return subprocess.Popen(
            [*self._command, *flags], stdin=subprocess.DEVNULL, pass_fds=numbers, start_new_session=True
        )

    def _note_terms(self) -> None:
        self._new_terms.set()

    async def _tell_terms(self) -> None:
        """Keeps the process's limits up to date, however often they change."""
        while True:
            await self._new_terms.wait()
            await self._send_terms()
            await trio.sleep(TERMS_PAUSE_S)

    async def _send_terms(self) -> None:
        self._new_terms = trio.Event()
        limits = self._control.limits
        told = UploadTerms(limits.settings, limits.yielded_bps, self._hub.scope)
        await self._send(Packet("terms", msgspec.to_builtins(told)))

    def _tell_blob(self, blob: PeerBlob, is_there: bool) -> None:
        """From the hub, where nothing waits."""
        if self._nursery is not None:
            self._nursery.start_soon(self._send_blob if is_there else self._send_drop, blob)

    async def _send_blob(self, blob: PeerBlob) -> None:
        if not blob.fetchers:
            return  # it has gone meanwhile
        fetcher = blob.fetchers[0]
        path = os.fspath(blob.meta_path)
        served = ServedBlob(blob.blob_id, blob.presence.grid.size_bytes, path)
        await self._send(Packet("blob", msgspec.to_builtins(served), fetcher.cached.descriptors))
        if (encoded := fetcher.origin.encoded) is not None:
            served = ServedBlob(blob.blob_id, encoded.parts.size_bytes, path, is_encoded=True)
            await self._send(Packet("blob", msgspec.to_builtins(served), encoded.cached.descriptors))

    async def _send_drop(self, blob: PeerBlob) -> None:
        if blob.blob_id not in self._hub.blobs:
            await self._send(Packet("drop", {"blob_id": blob.blob_id}))

    async def _send(self, packet: Packet) -> None:
        async with self._sending:
            if self._channel is not None:
                try:
                    await send_packet(self._channel, packet)
                except OSError as error:
                    log.info("upload server: %s", error)

    # -- what the process asks for

    def _take(self, packet: Packet, nursery: trio.Nursery) -> None:
        if packet.do == "traffic":
            traffic = msgspec.convert(packet.values, UploadTraffic)
            served_bytes = self._before.sent_bytes + traffic.sent_bytes
            self._control.limits.note_served(served_bytes - self._hub.counters.served_bytes)
            self._hub.counters.served_bytes = served_bytes
            self._hub.counters.refused = dict(Counter(self._before.refused) + Counter(traffic.refused))
            self._hub.counters.upload_requests = self._before.requests + traffic.requests
            self._hub.uploads = traffic.active
        elif packet.do == "open":
            opened = msgspec.convert(packet.values, OpenRequest)
            nursery.start_soon(self._answer, opened.number, self._open, opened)
        elif packet.do == "mirror":
            asked = msgspec.convert(packet.values, MirrorRequest)
            nursery.start_soon(self._answer, asked.number, self._mirror, asked)
        elif packet.do == "fetch":
            wanted = msgspec.convert(packet.values, FetchRequest)
            nursery.start_soon(self._answer, wanted.number, self._fetch, wanted)

    async def _answer(self, number: int, work: Callable[..., Awaitable[None]], wanted: object) -> None:
        try:
            await work(wanted)
        except NydusError as error:
            await self._send(Packet("failed", msgspec.to_builtins(Failure(number, str(error)))))
        except Exception as error:
            log.exception("what another host asked for")
            await self._send(Packet("failed", msgspec.to_builtins(Failure(number, repr(error)))))
        else:
            await self._send(Packet("done", {"number": number}))

    async def _open(self, wanted: OpenRequest) -> None:
        if wanted.blob_id not in self._hub.blobs:
            await self._open_guest(wanted.image, wanted.blob_id, wanted.peer)
        # What is told of new blobs may be behind the answer to this.
        await self._send_blob(self._hub.blobs[wanted.blob_id])

    async def _mirror(self, wanted: MirrorRequest) -> None:
        mirror = self._hub.mirror
        if self._hub.keep is KeepEncoded.NEVER:
            raise NotServed(blob_id=wanted.digest[:12], why="this host mirrors no images")
        opening = mirror.open_manifest if wanted.is_manifest else mirror.open_document
        descriptor, media_type = await opening(wanted.digest)
        try:
            document = ServedDocument(wanted.number, media_type)
            await self._send(Packet("document", msgspec.to_builtins(document), (descriptor,)))
        finally:
            os.close(descriptor)

    async def _fetch(self, wanted: FetchRequest) -> None:
        """Returns when the first byte of the range is there."""
        blob = self._hub.blobs.get(wanted.blob_id)
        if blob is None or not blob.fetchers:
            raise NotServed(blob_id=wanted.blob_id[:12], why="it is not open here")
        serve = serve_encoded if wanted.is_encoded else serve_decoded
        await serve(self._hub.swarm, blob, wanted)


def _end(process: subprocess.Popen[bytes]) -> None:
    """It has nothing to lose."""
    process.send_signal(signal.SIGKILL)
    process.wait()

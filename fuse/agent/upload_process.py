"""The process that serves other hosts: the agent's cache files, read-only, on a listening socket.

Concurrency: one task reads the channel to the agent, one tells it of the traffic, and `serve_peers` has one
for each connection. When the agent goes, so does this process: the next agent starts another one.
"""

import itertools
import logging
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import trio

from backend.peers.identity import CertificateRefused, peer_identity, require_current, require_scope
from backend.peers.limit_settings import LimitSettings
from backend.peers.limits import HostLimits, open_limits
from backend.peers.refusal import Dropped, Refusal
from backend.peers.send_turns import SendTurns
from backend.peers.served import Admit, BlobRequest, Decision, NotAvailable, Paused, ServedFile
from backend.peers.served_cache import CachedFile, DocumentFile, RequestedFile
from backend.peers.server import serve_peers
from backend.peers.server_counters import ServerCounters
from backend.peers.server_options import ServerOptions
from backend.peers.tls import PeerTls
from backend.peers.upload_slots import UploadSlots
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
from fuse.supervisor.channel import Packet, close_all

log = logging.getLogger(__name__)

TRAFFIC_PAUSE_S = 0.05
"""The agent finds out in trials of 0.1 s whether serving costs its own reads anything."""


class UploadProcess:
    """See above."""

    def __init__(self, channel: socket.socket, listener: socket.socket, tls: PeerTls | None = None) -> None:
        self._tls = tls
        self._scope: str | None = None
        channel.setblocking(False)
        self._channel = channel
        self._listener = listener
        self._files: dict[str, CachedFile] = {}
        self._encoded: dict[str, CachedFile] = {}
        self._counters = ServerCounters()
        self._turns = SendTurns()
        self._limits: HostLimits
        self._told_terms = trio.Event()
        self._slots = UploadSlots(self._decoded_size, time.monotonic, lambda: len(self._turns))
        self._pacing: set[trio.CancelScope] = set()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Reply] = {}
        self._sending = trio.Lock()

    async def run(self) -> None:
        """Serves until the agent goes."""
        async with open_limits(LimitSettings()) as self._limits, trio.open_nursery() as nursery:
            nursery.start_soon(self._report)
            nursery.start_soon(self._serve)
            if self._tls is not None:
                nursery.start_soon(self._tls.keep_fresh)
            while (packet := await receive_packet(self._channel)) is not None:
                await self._take(packet)
            nursery.cancel_scope.cancel()

    async def _serve(self) -> None:
        await self._told_terms.wait()
        await serve_peers(
            self._listener,
            self,
            self,
            self._pace,
            ServerOptions(),
            self._counters,
            slice_bytes=lambda: self._limits.part_bytes,
            ssl_context=self._tls.server if self._tls else None,
            authorize=self._authorize,
        )

    def _authorize(self, certificate: Mapping[str, Any] | None) -> None:
        """With TLS, hosts of the same scope are served. Raises `CertificateRefused`."""
        if self._tls is None:
            return
        identity = peer_identity(certificate)
        require_current(identity, time.time())
        if self._scope is None:
            raise CertificateRefused(peer=identity.name, why="no scheduler has said yet who is served here")
        if self._scope:
            require_scope(identity, self._scope)

    async def open(self, request: BlobRequest) -> ServedFile | None:
        """See `Shelf`."""
        if request.kind == "manifest":
            return await self._mirrored(request, is_manifest=True)
        files = self._encoded if request.kind == "encoded" else self._files
        if request.blob_id not in self._files and request.may_fetch and request.reference:
            number = next(self._numbers)
            wanted = OpenRequest(number, request.blob_id, request.reference, request.peer)
            await self._ask("open", wanted, number)
        file = files.get(request.blob_id)
        if file is None and request.kind == "encoded" and request.blob_id not in self._files:
            return await self._mirrored(request, is_manifest=False)
        if file is None:
            await trio.lowlevel.checkpoint()
            return None

        async def fetch(offset: int, end: int) -> None:
            number = next(self._numbers)
            asked = FetchRequest(
                number,
                request.blob_id,
                offset,
                end,
                int(request.fetch_class),
                request.may_fetch,
                request.kind == "encoded",
            )
            await self._ask("fetch", asked, number)

        # Who is asked for encoded bytes has all of a range, or brings it: other hosts have it decoded.
        only_whole = request.kind == "encoded" and not request.may_fetch
        return RequestedFile(file, fetch, only_whole=only_whole)

    async def _mirrored(self, request: BlobRequest, *, is_manifest: bool) -> ServedFile | None:
        number = next(self._numbers)
        try:
            reply = await self._ask("mirror", MirrorRequest(number, request.blob_id, is_manifest), number)
        except NotAvailable:
            return None
        return reply.document

    def _decoded_size(self, blob_id: str) -> int:
        file = self._files.get(blob_id)
        return file.size_bytes if file is not None else 0

    def admit(self, request: BlobRequest, offset: int, end: int) -> Decision:
        """See `Admission`."""
        if self._limits.settings.sends_nothing:
            return Paused()
        answer = self._slots.admit(request, offset, end)
        if isinstance(answer, Admit):
            self._turns.expect(request, self._slots.given(request, offset))
        return answer

    def done(self, request: BlobRequest, offset: int, end: int, sent_bytes: int) -> None:
        """See `Admission`."""
        self._turns.end(request)
        self._slots.done(request, offset, end, sent_bytes)

    async def _pace(self, count: int, request: BlobRequest) -> None:
        with trio.CancelScope() as scope:
            self._pacing.add(scope)
            try:
                await self._turns.take(request)
                await self._limits.pace(count, request)
            finally:
                self._pacing.discard(scope)
        if scope.cancelled_caught:
            raise Dropped(Refusal.PAUSED)  # whoever waits for the rest has to ask somebody else

    async def _ask(
        self, do: str, question: OpenRequest | FetchRequest | MirrorRequest, number: int
    ) -> "_Reply":
        """Asks the agent and waits for its answer. Raises `NotAvailable`."""
        reply = self._waiting[number] = _Reply()
        try:
            async with self._sending:
                await send_packet(self._channel, Packet(do, msgspec.to_builtins(question)))
            await reply.arrived.wait()
        except OSError as error:
            reply.why = str(error)
        finally:
            del self._waiting[number]
        if reply.why is not None:
            name = question.digest if isinstance(question, MirrorRequest) else question.blob_id
            raise NotAvailable(blob_id=name[:12], offset=0, end=0, why=reply.why)
        return reply

    async def _take(self, packet: Packet) -> None:
        if packet.do == "blob":
            await self._take_blob(msgspec.convert(packet.values, ServedBlob), packet.descriptors)
            return
        if packet.do == "document":
            self._take_document(msgspec.convert(packet.values, ServedDocument), packet.descriptors)
            return
        close_all(packet.descriptors)
        if packet.do == "terms":
            self._take_terms(msgspec.convert(packet.values, UploadTerms))
        elif packet.do == "drop":
            for files in (self._files, self._encoded):
                files.pop(packet.values["blob_id"], None)
        elif packet.do in ("done", "failed"):
            reply = self._waiting.get(int(packet.values["number"]))
            if reply is not None:
                if packet.do == "failed":
                    reply.why = msgspec.convert(packet.values, Failure).why
                reply.arrived.set()

    def _take_terms(self, told: UploadTerms) -> None:
        if told.settings != self._limits.settings:
            self._limits.change(told.settings)
            if told.settings.sends_nothing:
                for scope in self._pacing:
                    scope.cancel()
        self._limits.yield_up(told.yielded_bps)
        self._scope = told.scope
        self._told_terms.set()

    async def _take_blob(self, blob: ServedBlob, descriptors: tuple[int, ...]) -> None:
        data, chunk_map, fresh = descriptors
        make = CachedFile.encoded if blob.is_encoded else CachedFile.decoded
        try:
            file = await trio.to_thread.run_sync(
                make, blob.size_bytes, Path(blob.meta_path), (data, chunk_map, fresh)
            )
        except Exception:
            log.exception("blob %s is not served", blob.blob_id[:12])
            close_all(descriptors)
            return
        (self._encoded if blob.is_encoded else self._files)[blob.blob_id] = file

    def _take_document(self, document: ServedDocument, descriptors: tuple[int, ...]) -> None:
        reply = self._waiting.get(document.number)
        if reply is None:  # who has asked for it has gone
            close_all(descriptors)
            return
        reply.document = DocumentFile(descriptors[0], document.media_type)
        reply.arrived.set()

    async def _report(self) -> None:
        last: UploadTraffic | None = None
        while True:
            statistics = self._counters.snapshot()
            traffic = UploadTraffic(
                statistics.bytes_sent, self._slots.active, statistics.refused, statistics.requests
            )
            if traffic != last:
                last = traffic
                try:
                    async with self._sending:
                        await send_packet(self._channel, Packet("traffic", msgspec.to_builtins(traffic)))
                except OSError:
                    return  # the agent has gone: the channel says so to `run`, too
            await trio.sleep(TRAFFIC_PAUSE_S)


class _Reply:
    def __init__(self) -> None:
        self.arrived = trio.Event()
        self.why: str | None = None
        self.document: DocumentFile | None = None

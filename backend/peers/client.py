"""Asks other hosts for ranges of decoded files: HTTP/1.1, h11 for the heads, the body straight into memory.

Concurrency: one `PeerClient` for all tasks; a connection belongs to one request at a time, and is kept for
the next one to the same host and class when the answer was read to its end. So what somebody waits for is
never behind a prefetch. A cancelled request closes its connection.
"""

import enum
import logging
import math
import ssl
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import h11
import trio

from backend.contract import BackendError
from backend.peers.identity import CertificateRefused
from backend.peers.intake import Intake
from backend.peers.multipart import AnswerRefused, PartialAnswer, Ranges, range_header
from backend.peers.peer_connection import PeerConnection, place_of
from backend.peers.reach import LATE_S, is_reachable
from backend.pieces import first_failure
from backend.priority import FetchClass

log = logging.getLogger(__name__)

STALL_S = 0.3
"""Silence after which it is asked on a new connection whether the host is alive."""
HEARD_S = 1.0
SILENCE_MAX_S = 30.0
"""A live host that sends nothing for so long will not send anything: it waits for an origin, perhaps."""
RETRY_AFTER_S = 0.2
IDLE_PER_HOST = 4
COMPLAINTS_MAX = 4096


class Verdict(enum.Enum):
    """Why a host did not give what was asked."""

    DEAD = "does not answer"
    BUSY = "is busy"
    PAUSED = "sends nothing at the moment"
    ABSENT = "has not what was asked"
    MOVED = "names another host"
    FAULTY = "makes no sense"


class PeerFailed(BackendError):
    """A host did not give what was asked; never seen by a reader, who gets it from somewhere else."""

    message = "peer {where}: {why}"
    exit_code: ClassVar[int] = 154

    def __init__(
        self,
        where: str,
        verdict: Verdict,
        detail: str = "",
        retry_after_s: float = 0.0,
        *,
        has_begun: bool = False,
    ) -> None:
        """`has_begun`: some of the answer has arrived before it broke off."""
        super().__init__(where=where, why=f"{verdict.value}{f': {detail}' if detail else ''}")
        self.verdict = verdict
        self.has_begun = has_begun
        self.location = detail if verdict is Verdict.MOVED else ""
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class PeerRequest:
    """A range of a decoded file. `image`: from where the blob can be read; `may_fetch`: whoever is asked is
    an owner, and to bring from there what it lacks. `ranges`: more than the one that begins at `offset`, in
    order and apart; `is_encoded`: they are of the encoded blob."""

    blob_id: str
    offset: int
    image: str
    fetch_class: FetchClass
    may_fetch: bool = False
    ranges: tuple[tuple[int, int], ...] = ()
    is_encoded: bool = False

    @property
    def target(self) -> bytes:
        """What is asked for."""
        if self.is_encoded:
            return f"/v2/peer/blobs/sha256:{self.blob_id}".encode()
        return f"/v1/blobs/{self.blob_id}/decoded".encode()


class PeerClient:
    """See above. `own_url` tells the others where this host's upload server is."""

    def __init__(self, own_url: str = "", ssl_context: ssl.SSLContext | None = None) -> None:
        self.own_url = own_url
        self._ssl = ssl_context
        self.late_verdicts = 0
        """Times that a host was not taken for dead, because this one was late itself."""
        self._complaints: dict[str, str] = {}
        self._heard_at: dict[str, float] = {}
        self._probes: dict[str, trio.Event] = {}
        self._unreachable: set[str] = set()
        """Those whose last probe has failed."""
        self._idle: dict[tuple[str, FetchClass], list[PeerConnection]] = defaultdict(list)

    async def fetch(
        self, url: str, request: PeerRequest, buffer: memoryview, intake: Intake | None = None
    ) -> list[tuple[int, int]]:
        """Fills `buffer` with the range that starts at `request.offset`, or with `request.ranges` in a row.

        The ranges that were given: all, or some of several. The bytes are not verified. `intake` says how
        fast they may be received. Raises `PeerFailed`.
        """
        idle = self._idle[url, request.fetch_class]
        while idle:
            connection = idle.pop()
            try:
                return await self._exchange(connection, request, buffer, intake)
            except _Stale:
                continue  # closed by the other side while nobody used it
        connection = await self._connect(url)
        try:
            return await self._exchange(connection, request, buffer, intake)
        except _Stale:
            raise PeerFailed(url, Verdict.DEAD, "hung up") from None

    def heard(self, url: str) -> None:
        """Something has arrived from a host, on whatever connection."""
        self._heard_at[url] = trio.current_time()

    def note_late(self) -> None:
        """This host was late, and cannot tell who was silent meanwhile."""
        self.late_verdicts += 1

    def was_heard(self, url: str) -> bool:
        """Whether a host has sent something within `HEARD_S`: it is alive, however full its link is."""
        return trio.current_time() - self._heard_at.get(url, -math.inf) < HEARD_S

    async def is_alive(self, url: str) -> bool:
        """Whether the host has sent something a moment ago, or can be connected to."""
        while not self.was_heard(url):
            asked = self._probes.get(url)
            if asked is None:
                return await self._probe(url)
            await asked.wait()  # many requests to a host stall together: one of them looks
            if url in self._unreachable:
                return False
        return True

    async def _probe(self, url: str) -> bool:
        ended = self._probes[url] = trio.Event()
        try:
            is_there = await is_reachable(*place_of(url), self.note_late)
            self._unreachable.discard(url)
            if is_there:
                self.heard(url)
            else:
                self._unreachable.add(url)
            return is_there
        finally:
            del self._probes[url]
            ended.set()

    def close(self) -> None:
        """Closes idle connections."""
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
        self._idle.clear()

    async def _connect(self, url: str) -> "PeerConnection":
        try:
            return await PeerConnection.open(url, self._ssl, self.heard, self.note_late)
        except CertificateRefused as error:
            self._complain(url, error)
            raise PeerFailed(url, Verdict.DEAD, str(error)) from error
        except (OSError, ValueError) as error:
            if self.was_heard(url) and not isinstance(error, ConnectionRefusedError):
                why = "its link is full"
                raise PeerFailed(url, Verdict.BUSY, why, retry_after_s=RETRY_AFTER_S) from error
            raise PeerFailed(url, Verdict.DEAD, getattr(error, "strerror", None) or str(error)) from error

    def _complain(self, url: str, error: CertificateRefused) -> None:
        """Once for each host and reason: somebody has to issue a certificate, or to set a clock."""
        if self._complaints.get(url) != str(error) and len(self._complaints) < COMPLAINTS_MAX:
            self._complaints[url] = str(error)
            log.warning("%s", error)

    async def _exchange(
        self,
        connection: "PeerConnection",
        request: PeerRequest,
        buffer: memoryview,
        intake: Intake | None,
    ) -> list[tuple[int, int]]:
        """One request on a connection, which is closed or kept afterwards."""
        url, is_whole = connection.url, False
        given: list[tuple[int, int]] = []
        try:
            async with trio.open_nursery() as nursery:
                watch = _StallWatch(self, connection)
                nursery.start_soon(watch.run)
                try:
                    given, is_whole = await self._ask(connection, request, buffer, intake)
                except CertificateRefused as error:
                    self._complain(url, error)
                    raise PeerFailed(url, Verdict.DEAD, str(error)) from error
                except (OSError, h11.ProtocolError) as error:
                    if connection.heard == 0 and connection.uses > 1:
                        raise _Stale from error
                    if connection.was_held_long:
                        why = "gave up while this host received nothing"
                        raise PeerFailed(url, Verdict.BUSY, why, retry_after_s=RETRY_AFTER_S) from error
                    why = str(error) or type(error).__name__
                    has_begun = connection.heard > 0
                    raise PeerFailed(url, Verdict.DEAD, why, has_begun=has_begun) from error
                finally:
                    nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise first_failure(group) from None
        finally:
            idle = self._idle[url, request.fetch_class]
            if is_whole and len(idle) < IDLE_PER_HOST:
                idle.append(connection)
            else:
                connection.close()
        return given

    async def _ask(
        self,
        connection: "PeerConnection",
        request: PeerRequest,
        buffer: memoryview,
        intake: Intake | None,
    ) -> tuple[list[tuple[int, int]], bool]:
        """The ranges that were given, and whether the connection can be used again."""
        ranges = request.ranges or ((request.offset, request.offset + len(buffer)),)
        headers = [
            (b"Range", range_header(ranges)),
            (b"Nydus-Class", b"%d" % request.fetch_class),
            (b"Nydus-Peer", self.own_url.encode()),
        ]
        if request.image:
            headers.append((b"Nydus-Image", request.image.encode()))
        if request.may_fetch:
            headers.append((b"Nydus-Fetch", b"1"))
        head = await connection.ask(request.target, headers)
        answer = self._check(connection.url, head, ranges)
        try:
            given = await _receive(connection, answer, ranges, buffer, intake)
        except AnswerRefused as error:
            raise PeerFailed(connection.url, Verdict.FAULTY, str(error)) from error
        return given, not connection.is_last(head)

    def _check(self, url: str, head: h11.Response, ranges: Ranges) -> PartialAnswer:
        """What is going to be received. Raises `PeerFailed`."""
        values = dict(head.headers)
        if head.status_code == 206:
            try:
                return PartialAnswer.of(values, ranges)
            except AnswerRefused as error:
                raise PeerFailed(url, Verdict.FAULTY, str(error)) from error
        if head.status_code == 307:
            raise PeerFailed(url, Verdict.MOVED, values.get(b"location", b"").decode("latin-1"))
        if head.status_code == 429:
            raise PeerFailed(url, Verdict.BUSY, retry_after_s=_retry_after_s(values))
        if head.status_code == 503 and b"nydus-paused" in values:
            raise PeerFailed(url, Verdict.PAUSED)
        verdict = Verdict.ABSENT if head.status_code in (404, 409, 416, 503) else Verdict.FAULTY
        raise PeerFailed(url, verdict, f"status {head.status_code}")


async def _receive(
    connection: PeerConnection,
    answer: PartialAnswer,
    ranges: Ranges,
    buffer: memoryview,
    intake: Intake | None,
) -> list[tuple[int, int]]:
    """Receives a body; the ranges that are in `buffer` then. Raises `AnswerRefused`."""
    if answer.single is None:
        body = memoryview(bytearray(answer.length))
        await connection.receive_body(body, intake)
        return answer.place(body, ranges, buffer)
    at = sum(end - offset for offset, end in ranges if offset < answer.single[0])
    await connection.receive_body(buffer[at : at + answer.length], intake)
    return [answer.single]


def _retry_after_s(headers: dict[bytes, bytes]) -> float:
    try:
        return int(headers.get(b"nydus-retry-after-ms", b"")) / 1000
    except ValueError:
        return RETRY_AFTER_S


class _Stale(Exception):
    """A kept connection was closed by the other side before it answered anything."""


class _StallWatch:
    """Ends a request to a host that is silent and does not answer elsewhere either."""

    def __init__(self, client: PeerClient, connection: "PeerConnection") -> None:
        self._client = client
        self._connection = connection

    async def run(self) -> None:
        heard, since = -1, trio.current_time()
        while True:
            due = trio.current_time() + STALL_S
            await trio.sleep_until(due)
            if trio.current_time() > due + LATE_S:
                # What has arrived meanwhile is still to be read.
                self._client.note_late()
                heard, since = -1, trio.current_time()
                continue
            if self._connection.heard != heard or self._connection.is_held:
                heard, since = self._connection.heard, trio.current_time()
                continue
            silent_s = trio.current_time() - since
            if silent_s > SILENCE_MAX_S:
                raise PeerFailed(self._connection.url, Verdict.DEAD, f"silent for {silent_s:.0f} s")
            if not await self._client.is_alive(self._connection.url):
                raise PeerFailed(self._connection.url, Verdict.DEAD, "silent")

"""What the upload server asks of the rest of the host: files, whether to serve, and how fast.

Concurrency: the server calls everything here from its one loop. What is no coroutine must return at once.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from backend.priority import FetchClass
from rafs.errors import NydusError


class NotAvailable(NydusError):
    """A part of a blob that a peer waits for will not come to this host."""

    message = "blob {blob_id}: bytes {offset} to {end} will not come here: {why}"
    exit_code: ClassVar[int] = 119
    retryable: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class BlobRequest:
    """What a peer wants of which blob, and what it says of itself.

    `blob_id` is the digest of a manifest, for one. `repository` is that of the target, "" for decoded bytes;
    `namespace` the registry that the client of a mirror names (`?ns=`), "" without. `reference` (Nydus-Image)
    is the image that the blob is read from. `peer_url` (Nydus-Peer) is where the client's own upload server
    is: at its own address, or "". `may_fetch` (Nydus-Fetch: 1) says that this host is an owner and fetches
    what it lacks. `peer` is the address of the client, or the name in its certificate.
    """

    kind: Literal["decoded", "encoded", "manifest"]
    blob_id: str
    repository: str
    reference: str | None
    may_fetch: bool
    fetch_class: FetchClass
    peer: str
    namespace: str = ""
    peer_url: str = ""


class ServedFile(Protocol):
    """A file that may be incomplete, read with its descriptor, which stays open as long as somebody has this.

    Ranges are offsets of the file, the end not included.
    """

    @property
    def descriptor(self) -> int:
        """Open for reading."""

    @property
    def size_bytes(self) -> int:
        """The size of the whole file, whatever is there of it."""

    @property
    def media_type(self) -> bytes:
        """What is said of its content."""

    def ready_until(self, offset: int, end: int) -> int:
        """The first byte of [offset, end) that is not there, `end` when all are. Cheap, no checkpoint."""

    def is_arriving(self, offset: int, end: int) -> bool:
        """Whether every byte of [offset, end) that is not there is being fetched right now. Cheap."""

    async def wait_ready(self, offset: int, end: int) -> int:
        """Waits until `ready_until(offset, end)` is above `offset`; returns it. Raises `NotAvailable`."""


class Shelf(Protocol):
    """The blobs of this host."""

    async def open(self, request: BlobRequest) -> ServedFile | None:
        """The file with the bytes that are asked for; None when this host does not serve that blob."""


@dataclass(frozen=True, slots=True)
class Admit:
    """Serve it."""


@dataclass(frozen=True, slots=True)
class Redirect:
    """Another host has it and more room."""

    url: str


@dataclass(frozen=True, slots=True)
class Busy:
    """Come back later."""

    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Paused:
    """This host has been told to send nothing."""


Decision = Admit | Redirect | Busy | Paused


class Admission(Protocol):
    """Decides who is served. Asked once for each body, with the first and the last byte of all its ranges."""

    def admit(self, request: BlobRequest, offset: int, end: int) -> Decision:
        """Whether to send the body; each `Admit` is followed by one `done`, whatever happens."""

    def done(self, request: BlobRequest, offset: int, end: int, sent_bytes: int) -> None:
        """The body is over, complete or not; `sent_bytes` of the file were handed to the kernel."""


Pace = Callable[[int, BlobRequest], Awaitable[None]]
"""Called with the number of bytes before each slice (256 KiB at most); returns when they may be sent."""

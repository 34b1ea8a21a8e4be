"""`python -m tools.bench.serving_host FILE PORT`: the upload server, one complete file, no limits."""

import os
import socket
import sys
from dataclasses import dataclass

import trio

from backend.peers.ranges import CONTENT_TYPE
from backend.peers.served import Admit, BlobRequest, NotAvailable, ServedFile
from backend.peers.server import serve_peers
from backend.peers.server_counters import ServerCounters
from backend.peers.server_options import ServerOptions


@dataclass(frozen=True, slots=True)
class WholeFile:
    """A file with nothing missing."""

    descriptor: int
    size_bytes: int
    media_type: bytes = CONTENT_TYPE

    def ready_until(self, offset: int, end: int) -> int:
        """Everything is there."""
        return end

    def is_arriving(self, offset: int, end: int) -> bool:
        """Nothing is on its way."""
        return False

    async def wait_ready(self, offset: int, end: int) -> int:
        """Not called, as nothing is missing."""
        await trio.lowlevel.checkpoint()
        raise NotAvailable(blob_id="", offset=offset, end=end, why="the file has no such bytes")


@dataclass(frozen=True, slots=True)
class OneFileShelf:
    """Gives the same file for every blob."""

    file: WholeFile

    async def open(self, request: BlobRequest) -> ServedFile | None:
        """The file."""
        return self.file


class EverybodyAdmitted:
    """No limits."""

    def admit(self, request: BlobRequest, offset: int, end: int) -> Admit:
        """Yes."""
        return Admit()

    def done(self, request: BlobRequest, offset: int, end: int, sent_bytes: int) -> None:
        """Nothing to do."""


async def unpaced(size_bytes: int, request: BlobRequest) -> None:
    """As fast as the client takes it."""


def main(arguments: list[str]) -> None:
    """Serves until killed."""
    descriptor = os.open(arguments[0], os.O_RDONLY)
    shelf = OneFileShelf(WholeFile(descriptor, os.fstat(descriptor).st_size))
    with socket.create_server(("127.0.0.1", int(arguments[1])), backlog=128) as listener:
        trio.run(
            serve_peers, listener, shelf, EverybodyAdmitted(), unpaced, ServerOptions(), ServerCounters()
        )


if __name__ == "__main__":
    main(sys.argv[1:])

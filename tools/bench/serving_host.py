"""`python -m tools.bench.serving_host FILE PORT`: the upload server, one complete file, no limits."""

import os
import socket
import sys
from dataclasses import dataclass

import trio

from backend.peers.served import Admit, BlobRequest, ServedFile
from backend.peers.served_cache import DocumentFile
from backend.peers.server import serve_peers
from backend.peers.server_counters import ServerCounters
from backend.peers.server_options import ServerOptions


@dataclass(frozen=True, slots=True)
class OneFileShelf:
    """Gives the same file for every blob."""

    file: DocumentFile

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
    shelf = OneFileShelf(DocumentFile(descriptor, "application/octet-stream"))
    with socket.create_server(("127.0.0.1", int(arguments[1])), backlog=128) as listener:
        trio.run(
            serve_peers, listener, shelf, EverybodyAdmitted(), unpaced, ServerOptions(), ServerCounters()
        )


if __name__ == "__main__":
    main(sys.argv[1:])

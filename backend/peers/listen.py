"""Listening sockets at addresses as people write them: `[ADDRESS]:PORT`."""

import socket


def listen_at(address: str, *, backlog: int = 256, reuse_port: bool = False) -> socket.socket:
    """A socket that does not block. Raises `OSError`, `ValueError`, `OverflowError`."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server(
        (host.strip("[]"), int(port)), family=family, backlog=backlog, reuse_port=reuse_port
    )
    listener.setblocking(False)
    return listener

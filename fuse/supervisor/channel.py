"""Messages with descriptors between the supervisor and an agent: JSON in packets of a unix socket.

A packet is one JSON object with a member "do", and up to `DESCRIPTORS_MAX` descriptors (SCM_RIGHTS). While a
packet waits in the socket its descriptors stay open, so what an agent has sent survives the agent.
"""

import array
import contextlib
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PACKET_MAX_BYTES = 128 << 10
"""Below the default size of a socket's buffer (net.core.wmem_default, 212,992 bytes)."""
DESCRIPTORS_MAX = 8


class DescriptorsLost(OSError):
    """A packet arrived without all of its descriptors: this process may not open more files."""


@dataclass(frozen=True, slots=True)
class Packet:
    """A message: what to do, with which values and descriptors. Whoever receives it owns the descriptors."""

    do: str
    values: dict[str, Any] = field(default_factory=dict)
    descriptors: tuple[int, ...] = ()


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(end: socket.socket, packet: Packet) -> None:
    """Sends a packet, waiting for room. Raises `OSError`: nobody at the other end, or values too large."""
    data = json.dumps({"do": packet.do, **packet.values}, separators=(",", ":")).encode()
    if len(data) > PACKET_MAX_BYTES:
        raise OSError(f"a packet of {len(data)} bytes; at most {PACKET_MAX_BYTES}")
    socket.send_fds(end, [data], list(packet.descriptors))


def receive(end: socket.socket, *, wait: bool = True) -> Packet | None:
    """The next packet; None when the other end is gone.

    Raises `BlockingIOError` when there is none and `wait` is false, `DescriptorsLost`, and `OSError`.
    """
    size = socket.CMSG_SPACE(DESCRIPTORS_MAX * array.array("i").itemsize)
    flags = socket.MSG_CMSG_CLOEXEC | (0 if wait else socket.MSG_DONTWAIT)
    try:
        data, ancillary, received, _ = end.recvmsg(PACKET_MAX_BYTES, size, flags)
    except (ConnectionResetError, BrokenPipeError):
        return None
    descriptors = [fd for _, _, body in ancillary for fd in _descriptors(body)]
    if received & socket.MSG_CTRUNC:
        close_all(descriptors)
        raise DescriptorsLost("too many open files; raise the limit (ulimit -n, LimitNOFILE=)")
    if not data:
        return None
    values = json.loads(data)
    return Packet(values.pop("do"), values, tuple(descriptors))


def close_all(descriptors: Sequence[int]) -> None:
    """Closes descriptors; those that are closed already do not matter."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _descriptors(body: bytes) -> list[int]:
    numbers = array.array("i")
    numbers.frombytes(body[: len(body) - len(body) % numbers.itemsize])
    return list(numbers)

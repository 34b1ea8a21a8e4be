"""Packets of a channel (fuse/supervisor/channel.py) for tasks: whoever waits lets others run."""

import contextlib
import socket

import trio

from fuse.supervisor.channel import Packet, receive, send


async def send_packet(end: socket.socket, packet: Packet) -> None:
    """Sends on a non-blocking channel, waiting for room. Raises `OSError`: nobody at the other end."""
    while True:
        try:
            send(end, packet)
            return
        except BlockingIOError:
            await trio.lowlevel.wait_writable(end)


async def receive_packet(end: socket.socket) -> Packet | None:
    """The next packet of a non-blocking channel; None when the other end is gone. Raises `OSError`."""
    while True:
        with contextlib.suppress(BlockingIOError):
            return receive(end, wait=False)
        await trio.lowlevel.wait_readable(end)

"""The limits of an upload server, each with its name."""

from dataclasses import dataclass

KIB = 1 << 10


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Times are in seconds. Defaults are for hosts of one data centre.

    A slice is 256 KiB of a body at most: `slice_timeout_s` is the time that its client has to take it.
    `first_byte_timeout_s` bounds finding a file and waiting for its first byte, `arrival_timeout_s` the wait
    for the next one once the head was sent.
    """

    head_max_bytes: int = 16 * KIB
    head_timeout_s: float = 10.0
    idle_timeout_s: float = 75.0
    slice_timeout_s: float = 20.0
    first_byte_timeout_s: float = 30.0
    arrival_timeout_s: float = 60.0
    connections_max: int = 1024
    connections_of_peer_max: int = 64
    ranges_max: int = 256
    disk_threads: int = 4

"""The few words of sd_notify(3) and sd_listen_fds(3) that the supervisor speaks."""

import array
import contextlib
import os
import socket

FIRST_PASSED = 3


class ServiceManager:
    """systemd, where it has started us; otherwise everything here does nothing."""

    def __init__(self, address: str | None) -> None:
        """`address` is $NOTIFY_SOCKET."""
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._address = "\0" + address[1:] if address.startswith("@") else address

    @property
    def is_there(self) -> bool:
        """Whether somebody listens."""
        return self._socket is not None

    def close(self) -> None:
        """Closes the socket."""
        if self._socket is not None:
            self._socket.close()

    def notify(self, text: str, *descriptors: int) -> None:
        """Sends a notification. That systemd does not take it must not stop anything."""
        if self._socket is not None:
            # Not by socket.send_fds: it does not heed the address (Python 3.11).
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
            with contextlib.suppress(OSError):
                self._socket.sendmsg([text.encode()], rights if descriptors else [], 0, self._address)

    def store(self, name: str, descriptor: int | None) -> None:
        """Has a descriptor stored under a name, or (None) the name forgotten."""
        if descriptor is None:
            self.notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
        else:
            # Without polling: POLLERR of an inotify-like descriptor must not drop it.
            self.notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", descriptor)


def tell_ready(status: str) -> None:
    """Tells the service manager, where there is one, that this process serves from now on, and how."""
    manager = ServiceManager(os.environ.get("NOTIFY_SOCKET"))
    try:
        manager.notify(f"READY=1\nSTATUS={status}")
    finally:
        manager.close()


def passed_descriptors(environment: "os._Environ[str]") -> dict[str, int]:
    """What an earlier run has stored, by name; takes the variables out of the environment."""
    count = int(environment.pop("LISTEN_FDS", "0"))
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if int(environment.pop("LISTEN_PID", "0")) != os.getpid():
        return {}
    numbers = range(FIRST_PASSED, FIRST_PASSED + count)
    for number in numbers:
        os.set_inheritable(number, False)
    return dict(zip(names, numbers, strict=False))

"""Has the agent of this host mount images for the snapshotter."""

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from backend.prefetch_mode import PrefetchMode
from fuse.agent.client import AgentRefused, call
from fuse.agent.request import (
    MOUNT_TARGET,
    STATUS_TARGET,
    UNMOUNT_TARGET,
    Driver,
    MountRequest,
    UnmountRequest,
)
from fuse.mountpoint import AlreadyMounted, MountBusy, NothingMounted
from fuse.supervisor.listener import short_address

STATUS_TIMEOUT_S = 10.0
LOOK_EVERY_S = 0.1
BEGUN_TIMEOUT_S = 120.0
BEGUN_PAUSE_S = 0.05
"""How often to look whether a mount has come about that somebody else has asked for."""
TRIES = 5
"""The agent may be about to end with its last mount, or be replaced, just when it is asked."""

_PEER = struct.Struct("=3i")
"""struct ucred: process, user, group."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How images are mounted: the fields of `MountRequest` that are the same for all."""

    cache_dir: Path
    driver: Driver = Driver.AUTO
    prefetch: PrefetchMode = PrefetchMode.HINTS
    plain_http: bool | None = None
    ca_file: Path | None = None
    insecure_skip_verify: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    credentials_socket: Path | None = None


@dataclass(slots=True)
class _Listener:
    """Who listens: a descriptor of the process, -1 when another one has its socket now."""

    name: tuple[int, ...]
    process: int

    def is_alive(self, path: Path) -> bool:
        if self.process < 0 or self._has_ended():
            return False
        try:
            return self.name[1:] == _file_identity(path)
        except OSError:
            return False

    def _has_ended(self) -> bool:
        poll = select.poll()  # select(2) takes no descriptor above 1023
        poll.register(self.process, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        if self.process >= 0:
            os.close(self.process)


def _find_listener(path: Path) -> _Listener | None:
    try:
        with socket.socket(socket.AF_UNIX) as probe, short_address(path) as address:
            probe.connect(address)
            # Of the process that called listen(2): the supervisor (unix(7), SO_PEERCRED).
            peer = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        (pid, _, _) = _PEER.unpack(peer)
        name = (pid, *_file_identity(path))
    except OSError:
        return None
    try:
        return _Listener(name, os.pidfd_open(pid))
    except OSError:
        return _Listener(name, -1)


def _file_identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return (status.st_dev, status.st_ino, status.st_ctime_ns)


class _Mounted(msgspec.Struct, frozen=True):
    mountpoint: str
    digest: str
    state: str = ""


class _Status(msgspec.Struct, frozen=True):
    mounts: list[_Mounted]


class AgentMounter:
    """An `ImageMounter`. May be used from any thread."""

    def __init__(
        self, address: Path, options: MountOptions, start_agent: Callable[[], object] | None = None
    ) -> None:
        """`start_agent` makes sure that one runs, where this process may start one."""
        self._socket = address
        self._options = options
        self._start_agent = start_agent
        self._lock = threading.Lock()
        self._seen: _Listener | None = None

    def identity(self) -> object | None:
        """The supervisor and its listening socket: with them go the mounts that are not complete.

        Looked for every time, in microseconds: the kernel reads holes as zeros once nobody watches a mount of
        EROFS, so an agent that was there a moment ago is not good enough.
        """
        with self._lock:
            if self._seen is None or not self._seen.is_alive(self._socket):
                if self._seen is not None:
                    self._seen.close()
                self._seen = _find_listener(self._socket)
            return self._seen.name if self._seen else None

    def wait(self, timeout_s: float) -> None:
        """See `ImageMounter`."""
        deadline = time.monotonic() + timeout_s
        while self._start_agent is None and self.identity() is None and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)

    def mount(self, reference: str, directory: Path) -> None:
        """See `ImageMounter`. A request whose agent dies has no effect, so it is made again."""
        options = self._options
        request = MountRequest(
            reference=reference,
            mountpoint=os.fspath(directory),
            cache_dir=os.fspath(options.cache_dir),
            driver=options.driver,
            prefetch=options.prefetch,
            allow_other=True,
            plain_http=options.plain_http,
            ca_file=os.fspath(options.ca_file) if options.ca_file else None,
            insecure=options.insecure_skip_verify,
            environment=dict(options.environment),
            credentials_socket=os.fspath(options.credentials_socket) if options.credentials_socket else None,
        )
        deadline = time.monotonic() + BEGUN_TIMEOUT_S
        lost = 0
        while True:
            if self._start_agent is not None:
                self._start_agent()
            try:
                call(self._socket, "POST", MOUNT_TARGET, _Mounted, request)
                return
            except AgentRefused as refusal:
                # Begun for somebody who did not live to hear of it: this process, before it was killed.
                is_begun = refusal.exit_code == AlreadyMounted.exit_code
                if is_begun and self.serves(directory):
                    return
                if not is_begun or time.monotonic() >= deadline:
                    raise
                time.sleep(BEGUN_PAUSE_S)
            except (ConnectionError, FileNotFoundError):
                lost += 1
                if lost == TRIES:
                    raise

    def unmount(self, directory: Path) -> None:
        """See `ImageMounter`. Not lazily, where that is possible: then it is over when this returns."""
        for lazy in (False, True):
            request = UnmountRequest(os.fspath(directory), lazy=lazy)
            try:
                call(self._socket, "POST", UNMOUNT_TARGET, dict[str, str], request)
            except AgentRefused as refusal:
                if refusal.exit_code == MountBusy.exit_code and not lazy:
                    continue
                if refusal.exit_code != NothingMounted.exit_code:
                    raise
            return

    def serves(self, directory: Path) -> bool:
        """See `ImageMounter`."""
        if self._start_agent is not None:
            self._start_agent()
        return os.fspath(directory) in {mount.mountpoint for mount in self._mounts()}

    def mounted_digests(self) -> set[str]:
        """See `ImageMounter`; without an agent there are no mounts that go on."""
        return {mount.digest for mount in self._mounts()} if self.identity() is not None else set()

    def _mounts(self) -> list[_Mounted]:
        for _ in range(TRIES - 1):
            with contextlib.suppress(ConnectionError):  # it was killed while it answered
                return self._status().mounts
        return self._status().mounts

    def _status(self) -> _Status:
        return call(self._socket, "GET", STATUS_TARGET, _Status, timeout_s=STATUS_TIMEOUT_S)

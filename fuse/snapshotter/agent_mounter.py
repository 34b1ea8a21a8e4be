"""Has the agent of this host mount images for the snapshotter."""

import os
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
from fuse.mountpoint import AlreadyMounted, NothingMounted
from fuse.supervisor.listener import is_served

STATUS_TIMEOUT_S = 10.0
LOOK_EVERY_S = 0.5
"""So long an agent that has answered is taken to be there, before it is looked for again."""
TRIES = 5
"""The agent may be about to end with its last mount, or be replaced, just when it is asked."""


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


class _Mounted(msgspec.Struct, frozen=True):
    mountpoint: str
    state: str = ""


class _Status(msgspec.Struct, frozen=True):
    mounts: list[_Mounted]


class AgentMounter:
    """An `ImageMounter`. May be used from any thread."""

    def __init__(
        self, socket: Path, options: MountOptions, start_agent: Callable[[], object] | None = None
    ) -> None:
        """`start_agent` makes sure that one runs, where this process may start one."""
        self._socket = socket
        self._options = options
        self._start_agent = start_agent
        self._lock = threading.Lock()
        self._looked_at = 0.0
        self._identity: object | None = None

    def identity(self) -> object | None:
        """The supervisor's listening socket: it lives as long as any of those that hold the mounts do."""
        with self._lock:
            now = time.monotonic()
            if self._identity is None or now - self._looked_at > LOOK_EVERY_S:
                self._identity = self._look()
                self._looked_at = now
            return self._identity

    def _look(self) -> object | None:
        try:
            if not is_served(self._socket):
                return None
            status = self._socket.stat()
        except OSError:
            return None
        return (status.st_dev, status.st_ino, status.st_ctime_ns)

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
        )
        for attempt in range(TRIES):
            if self._start_agent is not None:
                self._start_agent()
            try:
                call(self._socket, "POST", MOUNT_TARGET, _Mounted, request)
                return
            except AgentRefused as refusal:
                if refusal.exit_code == AlreadyMounted.exit_code and attempt:
                    return  # by the request before, whose answer got lost
                raise
            except (ConnectionError, FileNotFoundError):
                if attempt == TRIES - 1:
                    raise

    def unmount(self, directory: Path) -> None:
        """See `ImageMounter`."""
        request = UnmountRequest(os.fspath(directory), lazy=True)
        try:
            call(self._socket, "POST", UNMOUNT_TARGET, dict[str, str], request)
        except AgentRefused as refusal:
            if refusal.exit_code != NothingMounted.exit_code:
                raise

    def serves(self, directory: Path) -> bool:
        """See `ImageMounter`."""
        if self._start_agent is not None:
            self._start_agent()
        status = call(self._socket, "GET", STATUS_TARGET, _Status, timeout_s=STATUS_TIMEOUT_S)
        return os.fspath(directory) in {mount.mountpoint for mount in status.mounts}

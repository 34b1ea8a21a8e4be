"""One mount of the agent, from the request (or from what a dead agent has left) to its end.

Concurrency: `run` is one task. It opens the image, lets a driver mount it, and waits. When the mount is gone
it gives everything back; when it is cancelled it gives nothing back: a successor goes on.
"""

import contextlib
import datetime
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import trio

from backend.credential_service import CredentialSocket
from backend.credentials import AuthFiles, CredentialSource
from backend.fetch_metrics import FetchMetrics
from backend.fetch_pool import FetchOptions
from backend.fetch_statistics import FetchStatistics
from backend.peers.hub import PeerHub
from backend.peers.limits import HostLimits
from backend.prefetch import prefetch
from backend.reference import parse_reference
from backend.registry import RegistryOptions
from backend.shelf import BlobShelf
from backend.store import ImageMetadata, open_store
from fuse.agent.kept import KeptMetadata, KeptMount
from fuse.agent.request import NO_DRIVER, Driver, MountRequest
from fuse.devfuse.driver import adopt_fuse, attach_fuse
from fuse.driver import DriverMount, DriverOptions
from fuse.erofs.driver import KIND_EROFS, ErofsHost, ErofsUnavailable
from fuse.image import OpenedImage, open_image
from fuse.keeper import HeldEntry, Keeper, NotHeld
from fuse.mount_status import SessionStatus, describe
from fuse.mountpoint import FuseUnavailable, MountFailed, prepare_mountpoint, unmount
from rafs.errors import NydusError

log = logging.getLogger(__name__)

FIRST_ANSWER_S = 0.5
"""How long a mount waits for the first answer of a scheduler."""


class NoDriver(NydusError):
    """None of the agent's drivers works here."""

    message = "{directory}: {why}"
    exit_code = NO_DRIVER


def entry_name(mountpoint: Path) -> str:
    """What the supervisor knows a mount by."""
    return f"mount:{mountpoint}"


class LiveMount:
    """See above."""

    def __init__(
        self,
        request: MountRequest,
        keeper: Keeper,
        erofs: ErofsHost,
        shelf: BlobShelf,
        adopted: HeldEntry | None = None,
        peers: PeerHub | None = None,
        limits: HostLimits | None = None,
        metrics: FetchMetrics | None = None,
    ) -> None:
        """`adopted`: what a dead agent has left of this mount; `peers` are asked before the registry."""
        self._limits = limits
        self._metrics = metrics
        self.fetched = FetchStatistics()
        """What was fetched, once it has ended."""
        self.request = request
        self.mountpoint = Path(request.mountpoint)
        self.ended = trio.Event()
        self._keeper = keeper
        self._erofs = erofs
        self._shelf = shelf
        self._adopted = adopted
        self._peers = peers
        self._image: OpenedImage | None = None
        self._mount: DriverMount | None = None
        self._remark = ""
        self._since = datetime.datetime.now(datetime.UTC)
        self._metadata: ImageMetadata | None = None

    def status(self) -> SessionStatus | None:
        """The state at this moment; None before it is mounted."""
        if self._image is None or self._mount is None:
            return None
        mount = self._mount
        return describe(self._image, self.mountpoint, mount.name, self._since, self._remark, mount.state)

    async def run(self, changed: Callable[[], None]) -> None:
        """Mounts, calls `changed`, and again when nothing is left to fetch; returns when the mount is gone.

        Raises, before the first `changed`, what is wrong with image, mount point or drivers.
        """
        try:
            async with open_store(parse_reference(self.request.reference), self._registry_options()) as store:
                if self._adopted is None:
                    path = await trio.to_thread.run_sync(prepare_mountpoint, self.mountpoint)
                    self.mountpoint = path
                    metadata = await store.fetch_metadata(self._cache_dir / "images")
                else:
                    metadata = self._kept(self._adopted)
                self._metadata = metadata
                if self._peers is not None:
                    await self._peers.wait_known(FIRST_ANSWER_S)
                opened = open_image(
                    store,
                    metadata,
                    self._cache_dir,
                    self._shelf,
                    FetchOptions(),
                    self._peers,
                    self._limits,
                    self._metrics,
                )
                async with opened as image:
                    self._image = image
                    try:
                        await self._live(image, changed)
                    finally:
                        self.fetched = image.statistics()
        finally:
            self.ended.set()

    async def _live(self, image: OpenedImage, changed: Callable[[], None]) -> None:
        mount = self._adopt(image) if self._adopted else await self._attach(image)
        self._mount = mount

        def tell_if_complete() -> None:
            if image.is_complete():
                changed()

        with contextlib.ExitStack() as hooks:
            for fetcher in image.fetchers.values():
                fetcher.cached.on_complete.append(tell_if_complete)
                hooks.callback(fetcher.cached.on_complete.remove, tell_if_complete)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(prefetch, image.bootstrap, image.fetchers, self.request.prefetch)
                changed()
                await mount.serve()
                nursery.cancel_scope.cancel()
        await mount.release()
        await self._keeper.release(entry_name(self.mountpoint))

    # -- mounting

    async def _attach(self, image: OpenedImage) -> DriverMount:
        """Mounts with the first driver that works."""
        remarks: list[str] = []
        wanted = self.request.driver
        if wanted in (Driver.AUTO, Driver.EROFS):
            try:
                mount: DriverMount = await self._attach_with(image, KIND_EROFS)
            except ErofsUnavailable as error:
                if wanted is Driver.EROFS:
                    raise
                remarks.append(f"not erofs: {error.fields['why']}")
            else:
                return mount
        try:
            self._remark = "; ".join(remarks)
            return await self._attach_with(image, "fuse")
        except (FuseUnavailable, MountFailed) as error:
            if wanted is Driver.FUSE:
                raise
            remarks.append(f"not fuse: {error}")
            raise NoDriver(directory=self.mountpoint, why="; ".join(remarks)) from error

    async def _attach_with(self, image: OpenedImage, driver: str) -> DriverMount:
        try:
            if driver == KIND_EROFS:
                mount: DriverMount = await self._erofs.attach(
                    image, self.mountpoint, self._options(), self._hold
                )
            else:
                mount = await attach_fuse(image, self.mountpoint, self._options(), self._hold)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._keeper.release(entry_name(self.mountpoint))
            raise
        try:
            await self._keep((), is_mounted=True)
        except NotHeld:
            # Unfelt deaths cannot be promised: better not mounted at all.
            await trio.to_thread.run_sync(lambda: unmount(self.mountpoint, lazy=True))
            await mount.serve()
            await mount.release()
            raise
        return mount

    def _adopt(self, image: OpenedImage) -> DriverMount:
        assert self._adopted is not None
        kept = msgspec.convert(self._adopted.values, KeptMount)
        self._remark, self._since = kept.remark, datetime.datetime.fromisoformat(kept.since)
        values = dict(kept.driver_values)
        if self._adopted.kind == KIND_EROFS:
            return self._erofs.adopt(image, self.mountpoint, values)
        return adopt_fuse(image, self._options(), self._adopted.descriptors)

    # -- what a successor needs

    async def _hold(self, kind: str, values: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        self._driver_kind, self._driver_values = kind, dict(values)
        await self._keep(descriptors, is_mounted=False)

    async def _keep(self, descriptors: Sequence[int], *, is_mounted: bool) -> None:
        assert self._metadata is not None
        kept = KeptMount(
            request=self.request,
            metadata=KeptMetadata.of(self._metadata),
            since=self._since.isoformat(),
            remark=self._remark,
            is_mounted=is_mounted,
            driver_values=self._driver_values,
        )
        values = msgspec.to_builtins(kept)
        await self._keeper.hold(entry_name(self.mountpoint), self._driver_kind, values, descriptors)

    def _kept(self, entry: HeldEntry) -> ImageMetadata:
        return msgspec.convert(entry.values, KeptMount).metadata.restored()

    # -- options

    @property
    def _cache_dir(self) -> Path:
        return Path(self.request.cache_dir)

    def _options(self) -> DriverOptions:
        request = self.request
        return DriverOptions(
            allow_other=request.allow_other,
            passthrough=request.passthrough,
            read_timeout_s=request.read_timeout_s,
        )

    def _registry_options(self) -> RegistryOptions:
        request = self.request
        credentials: CredentialSource = AuthFiles(environment=request.environment)
        if request.credentials_socket:
            credentials = CredentialSocket(Path(request.credentials_socket), credentials)
        return RegistryOptions(
            plain_http=request.plain_http,
            ca_file=Path(request.ca_file) if request.ca_file else None,
            insecure_skip_verify=request.insecure,
            credentials=credentials,
        )

"""The agent's part in the peer cache: one object that has the hub and runs everything around it.

Concurrency: `run` has a task for the announcements, one for the upload server and one for guest images.
"""

import logging
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import trio

from backend.credential_service import CredentialSocket
from backend.credentials import AuthFiles, CredentialSource
from backend.fetch_metrics import FetchMetrics
from backend.http import HttpClient, HttpOptions
from backend.keep_mode import KeepEncoded
from backend.peers.announcer import Announcer
from backend.peers.client import PeerClient
from backend.peers.hub import PeerHub
from backend.peers.identity import normal_address
from backend.peers.limit_control import LimitControl
from backend.peers.listen import listen_at
from backend.peers.tls import REFRESH_S, PeerTls, TlsFiles
from backend.peers.wire import HostInfo
from backend.registry import RegistryOptions
from backend.shelf import BlobShelf
from fuse.agent.guests import GuestImages
from fuse.agent.peer_options import PeerOptions
from fuse.agent.peer_report import PeerStatus
from fuse.agent.uploads import Uploads
from fuse.keeper import Keeper
from fuse.supervisor.holdings import KIND_PEER_LISTENER
from rafs.errors import NydusError

log = logging.getLogger(__name__)


class PeersUnavailable(NydusError):
    """The upload server has no address to listen on."""

    message = "peers: {why}"
    exit_code: ClassVar[int] = 202


@dataclass(slots=True)
class Peering:
    """See above. Made by `open_peering`."""

    options: PeerOptions
    hub: PeerHub
    control: LimitControl
    listener: socket.socket
    shelf: BlobShelf
    tls: PeerTls | None = None
    metrics: FetchMetrics | None = None
    announcer: Announcer | None = field(default=None, init=False)
    uploads: Uploads | None = field(default=None, init=False)
    guests: GuestImages | None = field(default=None, init=False)

    async def run(self) -> None:
        """Takes part until cancelled."""
        options = self.options
        credentials: CredentialSource = AuthFiles()
        if options.credentials_socket:
            path = Path(options.credentials_socket)
            credentials = CredentialSocket(path, credentials, is_required=False)
        registry = RegistryOptions(
            plain_http=options.plain_http,
            ca_file=Path(options.ca_file) if options.ca_file else None,
            insecure_skip_verify=options.insecure,
            credentials=credentials,
        )
        guests = self.guests = GuestImages(
            self.hub,
            Path(options.cache_dir),
            self.shelf,
            registry,
            self.control.limits,
            self.metrics,
            has_certificates=self.tls is not None,
        )
        self.uploads = Uploads(self.hub, self.control, self.listener, options.upload_command, guests.open)
        http_options = HttpOptions(ssl_context=self.tls.client if self.tls else None)
        async with HttpClient(http_options) as http, trio.open_nursery() as nursery:
            self.announcer = Announcer(
                self.hub, options.schedulers, http, self.control, self.tls.client if self.tls else None
            )
            nursery.start_soon(self.announcer.run)
            nursery.start_soon(self.uploads.run)
            nursery.start_soon(guests.run)
            if self.tls is not None:
                nursery.start_soon(self._keep_fresh, self.tls)

    async def _keep_fresh(self, tls: PeerTls) -> None:
        """Takes over certificates that are issued anew; connections with the old one would be refused."""
        while True:
            await trio.sleep(REFRESH_S)
            if tls.refresh():
                self.hub.client.close()

    @property
    def has_scheduler(self) -> bool:
        """Whether a scheduler has answered the last announcement."""
        return self.announcer is not None and bool(self.announcer.scheduler)

    @property
    def guest_count(self) -> int:
        """Images that are open for other hosts only."""
        return len(self.guests) if self.guests is not None else 0

    @property
    def guest_refusals(self) -> dict[str, int]:
        """How often an image was not opened for another host, by reason."""
        return dict(self.guests.refused) if self.guests is not None else {}

    def status(self) -> PeerStatus:
        """The state at this moment."""
        hub, counters = self.hub, self.hub.counters
        return PeerStatus(
            host=hub.own,
            scheduler=self.announcer.scheduler if self.announcer else "",
            members=len(hub.swarm.members),
            enabled=hub.swarm.enabled,
            blobs=len(hub.blobs),
            traffic=counters.traffic(),
            uploads=hub.uploads,
            upload_restarts=self.uploads.restarts if self.uploads else 0,
            degraded=counters.degraded,
            hedges=counters.hedges,
            dead_peers=counters.dead_peers,
            wrong_bytes=counters.wrong_bytes,
            busy_answers=counters.busy_answers,
            by_peer=dict(counters.by_peer),
            refused=counters.refused,
            limits=self.control.status(),
            encoded_bytes=hub.encoded_bytes(),
        )


async def open_peering(
    options: PeerOptions,
    control: LimitControl,
    held: socket.socket | None,
    keeper: Keeper,
    shelf: BlobShelf,
    metrics: FetchMetrics | None = None,
) -> Peering:
    """`held`: the listening socket that an agent before this one has left.

    Raises `PeersUnavailable`, and what `PeerTls` does of certificates that cannot be used.
    """
    tls = PeerTls(TlsFiles.in_directory(Path(options.pki))) if options.pki else None
    listener = held
    if listener is None:
        listener = _listen(options.listen)
        await keeper.hold(KIND_PEER_LISTENER, KIND_PEER_LISTENER, {}, [listener.fileno()])
    address, port = listener.getsockname()[:2]
    if address in ("0.0.0.0", "::"):
        address = await trio.to_thread.run_sync(_own_address, options.schedulers[0])
    shown = f"[{address}]" if ":" in address else address
    if tls is not None and normal_address(address) not in map(normal_address, tls.facts.addresses):
        why = f"the certificate of {tls.facts.name} is not for {address}; issue one with --address {address}"
        raise PeersUnavailable(why=why)
    url = f"{'https' if tls else 'http'}://{shown}:{port}"
    keeps = options.keep_encoded is not KeepEncoded.NEVER
    own = HostInfo(options.host_id or f"{shown}:{port}", url, options.zone, options.labels, keeps)
    hub = PeerHub(own, PeerClient(url, tls.client if tls else None), keep=options.keep_encoded)
    return Peering(options, hub, control, listener, shelf, tls, metrics)


def _listen(address: str) -> socket.socket:
    try:
        return listen_at(address)
    except (OSError, ValueError, OverflowError) as error:
        raise PeersUnavailable(
            why=f"{address}: {error}; choose another address with --peer-listen"
        ) from error


def _own_address(scheduler: str) -> str:
    """The address from which this host reaches a scheduler. No packet is sent."""
    parts = urlsplit(scheduler)
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise PeersUnavailable(why=f"no way to {scheduler}: {error}") from error

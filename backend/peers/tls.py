"""Mutual TLS among the hosts of a cluster: TLS 1.3, and certificates of the cluster's authority only.

There is no session resumption: a resumed session would not look at the certificate again, and so outlive it.
A client checks in the handshake that the certificate has the address that it has called.

Concurrency: a `PeerTls` belongs to one loop. `refresh` changes its two contexts in place, which counts for
connections that begin afterwards; those that are open go on.
"""

import logging
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import trio

from backend.contract import BackendError
from backend.peers.certificate import CertificateFacts, facts_of, utc_now
from backend.peers.identity import CertificateExpired
from backend.peers.pki import AUTHORITY_NAME, HOST_NAME, CertificateUnusable, read_certificate
from backend.peers.tls_failure import CertificateNotYetValid

REFRESH_S = 60.0
WARN_BEFORE = timedelta(days=1)
"""How long before its end a certificate is complained of; a third of its life if that is shorter."""

log = logging.getLogger(__name__)

Signature = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What `nydus-py pki issue` has made for this host."""

    certificate: Path
    """Key and certificate in one file, so that a renewal is seen whole."""
    authority: Path

    @classmethod
    def in_directory(cls, directory: Path) -> "TlsFiles":
        """Under their usual names."""
        return cls(directory / HOST_NAME, directory / AUTHORITY_NAME)


class PeerTls:
    """The two contexts of a host, `server` and `client`, kept up to date with its files."""

    def __init__(self, files: TlsFiles, now: Callable[[], datetime] = utc_now) -> None:
        """Raises `CertificateUnusable`, `CertificateExpired` and `CertificateNotYetValid`."""
        self._files = files
        self._now = now
        self._seen = _signature(files)
        self._facts = _check(files, now())
        self._complained_of = ""
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server.verify_mode = ssl.CERT_REQUIRED
        self.server.num_tickets = 0
        self.client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for context in (self.server, self.client):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.verify_flags |= ssl.VERIFY_X509_STRICT
            _load(context, files)
        self._complain()

    @property
    def facts(self) -> CertificateFacts:
        """What this host's own certificate says."""
        return self._facts

    def refresh(self) -> bool:
        """Takes over files that have changed; whether there were any. Warns of an end that is near.

        Files that cannot be used are complained of once, and the ones before stay in use. An authority
        that is added counts at once; one that is removed only after a restart.
        """
        seen = _signature(self._files)
        changed = seen != self._seen
        self._seen = seen
        if changed:
            changed = self._take_over()
        self._complain()
        return changed

    async def keep_fresh(self, interval_s: float = REFRESH_S) -> None:
        """Calls `refresh` for ever. Run it in a nursery of its owner."""
        while True:
            await trio.sleep(interval_s)
            self.refresh()

    def _take_over(self) -> bool:
        try:
            facts = _check(self._files, self._now())
            for context in (self.server, self.client):
                _load(context, self._files)
        except BackendError as error:
            log.warning("the certificate before stays in use: %s", error)
            return False
        self._facts = facts
        return True

    def _complain(self) -> None:
        """Says once for each certificate that it ends soon, and once that it has."""
        begin, end, now = self._facts.valid_from, self._facts.valid_until, self._now()
        if now < end - min(WARN_BEFORE, (end - begin) / 3):
            return
        verb = "ends" if now < end else "has ended"
        complaint = f"{self._facts.fingerprint} {verb}"
        if complaint != self._complained_of:
            self._complained_of = complaint
            log.warning(
                "%s: the certificate of %s %s on %s; issue a new one with `nydus-py pki issue`",
                self._files.certificate,
                self._facts.name,
                verb,
                f"{end:%Y-%m-%d %H:%M} UTC",
            )


def _check(files: TlsFiles, now: datetime) -> CertificateFacts:
    """The facts of a host's certificate that can be used at `now`, with files that go together."""
    _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), files)
    certificate = read_certificate(files.certificate)
    facts = facts_of(certificate)
    peer = files.certificate
    if now >= facts.valid_until:
        raise CertificateExpired(peer=peer, whose="the", why=f"on {facts.valid_until:%Y-%m-%d %H:%M} UTC")
    if now < facts.valid_from:
        why = f"only from {facts.valid_from:%Y-%m-%d %H:%M} UTC on"
        raise CertificateNotYetValid(peer=peer, whose="the", why=why)
    try:
        certificate.verify_directly_issued_by(read_certificate(files.authority))
    except Exception as error:  # InvalidSignature, ValueError, TypeError: no, whatever the reason
        raise CertificateUnusable(
            path=peer, why=f"not issued by the authority in {files.authority}"
        ) from error
    return facts


def _load(context: ssl.SSLContext, files: TlsFiles) -> None:
    for path, load in (
        (files.certificate, context.load_cert_chain),
        (files.authority, context.load_verify_locations),
    ):
        try:
            load(os.fspath(path))
        except ssl.SSLError as error:
            raise CertificateUnusable(path=path, why="not a key with its certificate in PEM form") from error
        except OSError as error:
            raise CertificateUnusable(path=path, why=error.strerror or str(error)) from error


def _signature(files: TlsFiles) -> Signature:
    """Changes when a file is replaced."""
    found = []
    for path in (files.certificate, files.authority):
        try:
            status = path.stat()
        except OSError:
            found.append((0, 0, 0))
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)

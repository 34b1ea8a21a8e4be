"""Who a peer is, by the certificate it came with, and what that lets it do.

A certificate of the cluster's authority says: the host's name (common name), the scopes it belongs to (URIs
`nydus-py://scope/<scope>`), and the addresses at which it may be reached. It is worth what TLS has
verified, so only take one from a connection whose context is of `backend.peers.tls`.
"""

import ipaddress
import ssl
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from backend.contract import BackendError

SCOPE_URI = "nydus-py://scope/"


class CertificateRefused(BackendError):
    """A connection to or from a peer was refused for its certificate, or for that of this host."""

    message = "{peer}: {why}"
    exit_code: ClassVar[int] = 174


class CertificateExpired(CertificateRefused):
    """A certificate is over. Hosts are issued new ones before that; see the clocks of both too."""

    message = "{peer}: {whose} certificate has expired: {why}"
    exit_code = 175


class NoCertificate(CertificateRefused):
    """A peer came without a certificate; plain HTTP clients cannot talk to a server with mutual TLS."""

    message = "{peer}: no certificate: {why}"
    exit_code = 178


class ScopeMissing(CertificateRefused):
    """A peer asked for something of a scope that its certificate does not have."""

    message = (
        "{peer}: its certificate is not for scope {scope}, but for {has}; issue one with --scope {scope}"
    )
    exit_code = 179


class AddressNotInCertificate(CertificateRefused):
    """A host announced an address that its certificate does not have: perhaps that of another host."""

    message = "{peer}: its certificate is not for address {address}, but for {has}; issue one with --address"
    exit_code = 180


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """What a verified certificate says. Addresses are IP addresses in their usual form, or DNS names."""

    name: str
    scopes: frozenset[str]
    addresses: frozenset[str]
    expires_at: float
    """Seconds since the epoch."""


def peer_identity(certificate: Mapping[str, Any] | None, peer: str = "peer") -> PeerIdentity:
    """The identity in what `getpeercert()` of a connection returned; `peer` is how messages call it.

    Raises `NoCertificate`, and `CertificateRefused` for one without a name.
    """
    if not certificate:
        raise NoCertificate(peer=peer, why="it sent none, or it was not verified")
    names = [value for rdn in certificate.get("subject", ()) for key, value in rdn if key == "commonName"]
    if len(names) != 1 or not names[0]:
        raise CertificateRefused(peer=peer, why="the certificate has no name, or several")
    alternatives = certificate.get("subjectAltName", ())
    return PeerIdentity(
        name=names[0],
        scopes=scopes_of(value for kind, value in alternatives if kind == "URI"),
        addresses=addresses_of(certificate),
        expires_at=float(ssl.cert_time_to_seconds(certificate["notAfter"])),
    )


def scopes_of(uris: Iterable[str]) -> frozenset[str]:
    """The scopes among the URIs of a certificate."""
    return frozenset(uri.removeprefix(SCOPE_URI) for uri in uris if uri.startswith(SCOPE_URI))


def addresses_of(certificate: Mapping[str, Any]) -> frozenset[str]:
    """The addresses and DNS names in what `getpeercert()` returned, in their usual form."""
    return frozenset(_addresses(certificate.get("subjectAltName", ())))


def require_scope(identity: PeerIdentity, scope: str) -> None:
    """Raises `ScopeMissing` unless the peer belongs to `scope`."""
    if scope not in identity.scopes:
        raise ScopeMissing(peer=identity.name, scope=scope, has=_listed(identity.scopes))


def require_address(identity: PeerIdentity, address: str) -> None:
    """Raises `AddressNotInCertificate` unless the peer may be reached at `address` (no port)."""
    if normal_address(address) not in identity.addresses:
        raise AddressNotInCertificate(peer=identity.name, address=address, has=_listed(identity.addresses))


def require_current(identity: PeerIdentity, now: float) -> None:
    """Raises `CertificateExpired` for a connection that is older than its certificate allows.

    `now` is seconds since the epoch.
    """
    if now >= identity.expires_at:
        raise CertificateExpired(
            peer=identity.name, whose="its", why="the connection is older than that; it has to connect anew"
        )


def normal_address(text: str) -> str:
    """An IP address as Python writes it, or a DNS name in lower case without the last dot.

    An IPv4 address that is mapped into IPv6, as sockets for both report it, is the IPv4 address.
    """
    try:
        address = ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return text.lower().removesuffix(".")
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def host_of(url: str) -> str:
    """The address in `http://ADDRESS:PORT`; "" for something else."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _addresses(alternatives: Iterable[tuple[str, str]]) -> Iterator[str]:
    return (normal_address(value) for kind, value in alternatives if kind in ("DNS", "IP Address"))


def _listed(values: Iterable[str]) -> str:
    return ", ".join(sorted(values)) or "none"

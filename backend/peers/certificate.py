"""Certificates of a cluster: what they say, and how they are made. `pki` keeps the files.

Keys are of the curve P-256. A host's certificate serves both ends of a connection, as every host is both.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import ClassVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from backend.contract import BackendError
from backend.peers.identity import SCOPE_URI, normal_address, scopes_of

AUTHORITY_DAYS = 3650
HOST_DAYS = 7
DAYS_MAX = 36500
BACKDATE = timedelta(minutes=5)
"""Certificates begin this long ago: the clock of a host may be behind that of the authority."""

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,58}[A-Za-z0-9])?")  # a common name has 64 characters at most
SCOPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:=/-]{0,127}")
LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
DNS_NAME = re.compile(rf"(?=.{{1,253}}$){LABEL}(\.{LABEL})*")


class NameUnusable(BackendError):
    """A name, a scope, an address or a time cannot go into a certificate."""

    message = "{what} {value!r}: {why}"
    exit_code: ClassVar[int] = 173


@dataclass(frozen=True, slots=True)
class HostWish:
    """What a certificate is to say of a host."""

    name: str
    scopes: Sequence[str] = ()
    addresses: Sequence[str] = ()
    days: int = HOST_DAYS


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What a certificate says."""

    is_authority: bool
    name: str
    cluster: str
    scopes: list[str]
    addresses: list[str]
    valid_from: datetime
    valid_until: datetime
    fingerprint: str
    """SHA-256 of the certificate, hexadecimal."""


def facts_of(certificate: x509.Certificate) -> CertificateFacts:
    """What a certificate says, whoever has signed it."""
    alternatives = _alternatives(certificate)
    addresses = [str(each) for each in alternatives.get_values_for_type(x509.IPAddress)]
    addresses += alternatives.get_values_for_type(x509.DNSName)
    return CertificateFacts(
        is_authority=is_authority(certificate),
        name=_subject(certificate, NameOID.COMMON_NAME),
        cluster=_subject(certificate, NameOID.ORGANIZATION_NAME),
        scopes=sorted(scopes_of(alternatives.get_values_for_type(x509.UniformResourceIdentifier))),
        addresses=addresses,
        valid_from=certificate.not_valid_before_utc,
        valid_until=certificate.not_valid_after_utc,
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
    )


def utc_now() -> datetime:
    """The clock that certificates are dated by."""
    return datetime.now(UTC)


def authority_certificate(
    key: ec.EllipticCurvePrivateKey, cluster: str, days: int, now: datetime
) -> x509.Certificate:
    """The certificate of an authority that signs hosts and no other authority. Raises `NameUnusable`."""
    _check_name("cluster", cluster)
    _check_days(days)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{cluster} CA"),
        ]
    )
    builder = _builder(subject, subject, key.public_key(), key.public_key(), now, now + timedelta(days=days))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
    return builder.sign(key, hashes.SHA256())


def host_certificate(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    wish: HostWish,
    now: datetime,
) -> x509.Certificate:
    """Valid as long as asked, and never longer than that of the authority. Raises `NameUnusable`."""
    _check_name("name", wish.name)
    _check_days(wish.days)
    until = min(now + timedelta(days=wish.days), authority.not_valid_after_utc)
    cluster = _subject(authority, NameOID.ORGANIZATION_NAME)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster),
            x509.NameAttribute(NameOID.COMMON_NAME, wish.name),
        ]
    )
    builder = _builder(subject, authority.subject, public_key, authority_key.public_key(), now, until)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = builder.add_extension(purposes, critical=False)
    alternatives = [*map(_address_name, wish.addresses), *map(_scope_name, wish.scopes)]
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return builder.sign(authority_key, hashes.SHA256())


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    now: datetime,
    until: datetime,
) -> x509.CertificateBuilder:
    identifier = x509.SubjectKeyIdentifier.from_public_key(public_key)
    issuer_identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key)
    return (
        x509.CertificateBuilder(issuer, subject, public_key, x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(until)
        .add_extension(identifier, critical=False)
        .add_extension(issuer_identifier, critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _check_name(what: str, name: str) -> None:
    if NAME.fullmatch(name) is None:
        raise NameUnusable(what=what, value=name, why="takes up to 60 letters, digits, dots and hyphens")


def _check_days(days: int) -> None:
    if not 1 <= days <= DAYS_MAX:
        raise NameUnusable(what="days", value=days, why=f"from 1 to {DAYS_MAX}")


def _address_name(text: str) -> x509.GeneralName:
    address = normal_address(text)
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        if DNS_NAME.fullmatch(address) is None:
            raise NameUnusable(
                what="address", value=text, why="neither an IP address nor a DNS name, without a port"
            ) from None
        return x509.DNSName(address)


def _scope_name(scope: str) -> x509.GeneralName:
    if SCOPE.fullmatch(scope) is None:
        raise NameUnusable(what="scope", value=scope, why="takes up to 128 letters, digits and . _ : = / -")
    if why := _scope_fault(*scope.partition(":")[::2]):
        raise NameUnusable(what="scope", value=scope, why=why)
    return x509.UniformResourceIdentifier(SCOPE_URI + scope)


def _scope_fault(kind: str, argument: str) -> str:
    """Why no scheduler would ever ask for it (`ScopeRule.certificate_scope`): so slips are found here."""
    if kind in ("admin", "cluster"):
        return "nothing may follow" if argument else ""
    if kind == "label":
        return "" if "=" in argument else "write label:NAME=VALUE"
    if kind == "cidr":
        try:
            network = str(ipaddress.ip_network(argument))
        except ValueError as error:
            return str(error)
        return "" if network == argument else f"write cidr:{network}"
    if kind in ("zone", "list"):  # a host may be in no zone
        return "" if argument or kind == "zone" else "write list:NAME"
    return "there is none such; use admin, cluster, zone:NAME, label:NAME=VALUE, cidr:NETWORK or list:NAME"


def _alternatives(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return x509.SubjectAlternativeName([])


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether it may sign others."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _subject(certificate: x509.Certificate, kind: x509.ObjectIdentifier) -> str:
    return ", ".join(str(each.value) for each in certificate.subject.get_attributes_for_oid(kind))

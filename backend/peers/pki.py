"""The cluster's certificate authority: makes it, and issues certificates to hosts.

DIR/ca.pem   the authority's certificate; every host has a copy
DIR/ca.key   its key, 0600; stays where certificates are issued
OUT/host.pem key and certificate of a host, 0600, in one file, so that renewal replaces both in one step
OUT/ca.pem   the copy for the host
"""

import os
from datetime import datetime
from pathlib import Path
from typing import ClassVar

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from backend.contract import BackendError
from backend.peers.certificate import (
    CertificateFacts,
    HostWish,
    authority_certificate,
    facts_of,
    host_certificate,
    is_authority,
)
from backend.peers.identity import CertificateExpired
from backend.publishing import publish_directory, publish_file, reporting_writes, staging_directory

AUTHORITY_NAME = "ca.pem"
AUTHORITY_KEY_NAME = "ca.key"
HOST_NAME = "host.pem"


class CertificateUnusable(BackendError):
    """A file with a certificate or a key is missing, unreadable or not what it should be."""

    message = "{path}: {why}"
    exit_code: ClassVar[int] = 171


class AuthorityExists(BackendError):
    """A new authority would replace something, and the certificates of an old one would be worth nothing."""

    message = "{path}: there is something already; choose a directory that is empty or does not exist"
    exit_code: ClassVar[int] = 172


def create_authority(directory: Path, cluster: str, days: int, now: datetime) -> CertificateFacts:
    """Makes a new authority in `directory`, all of it or nothing.

    Raises `AuthorityExists` when the directory is there and not empty, `NameUnusable`, `CannotWrite`.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = authority_certificate(key, cluster, days, now)
    with staging_directory(directory.absolute().parent) as staging:
        new = staging / "authority"
        with reporting_writes(new):
            new.mkdir(mode=0o755)
        _write(new / AUTHORITY_NAME, _pem(certificate), 0o644)
        _write(new / AUTHORITY_KEY_NAME, _key_pem(key), 0o600)
        if not publish_directory(new, directory):
            raise AuthorityExists(path=directory)
    return facts_of(certificate)


def issue_certificate(directory: Path, wish: HostWish, out: Path, now: datetime) -> CertificateFacts:
    """Issues a host its certificate and puts what it needs into `out`, in place of one it had before.

    Raises `CertificateUnusable` and `CertificateExpired` for the authority in `directory`, `NameUnusable`,
    `CannotWrite`.
    """
    authority, authority_key = _load_authority(directory, now)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = host_certificate(authority, authority_key, key.public_key(), wish, now)
    with staging_directory(out) as staging:
        _write(staging / AUTHORITY_NAME, _pem(authority), 0o644)
        _write(staging / HOST_NAME, _key_pem(key) + _pem(certificate), 0o600)
        publish_file(staging / AUTHORITY_NAME, out / AUTHORITY_NAME)
        publish_file(staging / HOST_NAME, out / HOST_NAME)
    return facts_of(certificate)


def read_certificate(path: Path) -> x509.Certificate:
    """The first certificate of a PEM file, which may have a key as well. Raises `CertificateUnusable`."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())[0]
    except (OSError, ValueError) as error:
        raise CertificateUnusable(path=path, why=_why(error, "no certificate in PEM form")) from error


def _load_authority(directory: Path, now: datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate = read_certificate(directory / AUTHORITY_NAME)
    path = directory / AUTHORITY_KEY_NAME
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise CertificateUnusable(path=path, why=_why(error, "no key in PEM form")) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise CertificateUnusable(path=path, why=f"not the key of {AUTHORITY_NAME}")
    if not is_authority(certificate):
        raise CertificateUnusable(path=directory / AUTHORITY_NAME, why="not the certificate of an authority")
    if now >= certificate.not_valid_after_utc:
        raise CertificateExpired(
            peer=directory, whose="the authority's", why=f"on {certificate.not_valid_after_utc:%Y-%m-%d}"
        )
    return certificate, key


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    """A new file that nobody else could read even for a moment."""
    with reporting_writes(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)


def _why(error: Exception, otherwise: str) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else otherwise

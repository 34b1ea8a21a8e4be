"""What was wrong when a TLS connection between hosts failed, in words for whoever has to mend it.

The side that verifies knows the cause; the other one only gets an alert, with TLS 1.3 often not before it
first reads. Both have their message.
"""

import ssl
from collections.abc import Iterator

from backend.peers.identity import (
    AddressNotInCertificate,
    CertificateExpired,
    CertificateRefused,
    NoCertificate,
)


class CertificateNotYetValid(CertificateRefused):
    """A certificate begins in the future: the clock of one of the two is wrong."""

    message = "{peer}: {whose} certificate is not valid yet: {why}"
    exit_code = 176
    retryable = True


class OtherAuthority(CertificateRefused):
    """A certificate was not issued by the authority of this cluster."""

    message = "{peer}: {whose} certificate is of another authority: {why}"
    exit_code = 177


class HandshakeFailed(CertificateRefused):
    """A TLS connection failed for another reason than its certificates: no TLS at all, or an old version."""

    message = "{peer}: no TLS connection: {why}"
    exit_code = 181
    retryable = True


# OpenSSL's X509_V_ERR_... (x509_vfy.h)
NOT_YET_VALID = 9
HAS_EXPIRED = 10
OTHER_AUTHORITY = frozenset({2, 7, 18, 19, 20, 21, 30})
OTHER_ADDRESS = frozenset({62, 64})

CLOCKS = "compare the clocks of both hosts"


def tls_failure(error: BaseException, peer: str) -> CertificateRefused:
    """The error to raise for a connection to or from `peer` that failed with `error`.

    `error` is an `ssl.SSLError`, or something like trio's `BrokenResourceError` that was caused by one.
    """
    cause = next((each for each in _causes(error) if isinstance(each, ssl.SSLError)), None)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _verification(cause, peer)
    reason = (cause.reason if cause is not None else None) or ""
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return NoCertificate(peer=peer, why="it sent none, and only hosts of the cluster are served")
    if "ALERT" in reason:
        return _alert(reason, peer)
    return HandshakeFailed(peer=peer, why=reason.lower().replace("_", " ") or str(cause or error) or "closed")


def _verification(error: ssl.SSLCertVerificationError, peer: str) -> CertificateRefused:
    """This side has found the peer's certificate wanting."""
    code, why = error.verify_code, error.verify_message
    if code == HAS_EXPIRED:
        return CertificateExpired(peer=peer, whose="its", why=f"issue it a new one, or {CLOCKS}")
    if code == NOT_YET_VALID:
        return CertificateNotYetValid(peer=peer, whose="its", why=CLOCKS)
    if code in OTHER_AUTHORITY:
        return OtherAuthority(peer=peer, whose="its", why=f"{why}; issue it one with this cluster's ca.key")
    if code in OTHER_ADDRESS:
        return AddressNotInCertificate(peer=peer, address=_address(why), has="others")
    return CertificateRefused(peer=peer, why=f"its certificate was refused: {why}")


def _alert(reason: str, peer: str) -> CertificateRefused:
    """The peer has found the certificate of this host wanting, and says so in a word."""
    if "CERTIFICATE_EXPIRED" in reason:
        return CertificateExpired(peer=peer, whose="our", why=f"so it says; issue a new one, or {CLOCKS}")
    if "UNKNOWN_CA" in reason:
        return OtherAuthority(peer=peer, whose="our", why="so it says; compare ca.pem of both hosts")
    if "CERTIFICATE_REQUIRED" in reason:
        return NoCertificate(peer=peer, why="it wants one of this host; see `nydus-py pki issue`")
    if "BAD_CERTIFICATE" in reason:
        return CertificateRefused(
            peer=peer, why=f"it refuses our certificate, which may not be valid yet: {CLOCKS}"
        )
    return HandshakeFailed(peer=peer, why=f"it says {reason.lower().replace('_', ' ')}")


def _address(why: str) -> str:
    """The address in OpenSSL's words: `IP address mismatch, certificate is not valid for '127.0.0.2'.`"""
    return why.partition("'")[2].partition("'")[0] or "called"


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__

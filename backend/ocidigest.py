"""Digests in the text form that registries use: "sha256:" and 64 hexadecimal digits."""

import hashlib
import re
from typing import ClassVar

from backend.contract import BackendError

_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")


class DigestMismatch(BackendError):
    """The bytes are not the ones that the digest names."""

    message = (
        "{where}: expected {expected}, the content is {got}; the source or something on the way is broken"
    )
    exit_code: ClassVar[int] = 40


def is_digest(text: str) -> bool:
    """Whether `text` is a well-formed sha256 digest."""
    return _SHA256.fullmatch(text) is not None


def require_digest(text: str) -> str:
    """`text` itself; raises `ValueError` unless it is a digest, so that it cannot bend a URL or a path."""
    if not is_digest(text):
        raise ValueError(f"not a sha256 digest: {text!r}")
    return text


def digest_of(data: bytes | memoryview) -> str:
    """The digest of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def check_digest(data: bytes | memoryview, expected: str, where: str) -> None:
    """Raises `DigestMismatch` unless `data` is what `expected` names; `where` says whose bytes they are."""
    got = digest_of(data)
    if got != expected:
        raise DigestMismatch(where=where, expected=expected, got=got)

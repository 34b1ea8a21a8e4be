"""What the status of a registry's answer means: one error class for each that a user can act on."""

from email.utils import parsedate_to_datetime
from typing import ClassVar, NoReturn

import msgspec

from backend.contract import BackendError, BlobNotFound
from backend.http import HttpResponse, RegistryProtocolError
from backend.ocidigest import DigestMismatch

_BODY_LIMIT_BYTES = 16 * 1024
_LONGEST_DETAIL = 200
_LONGEST_PAUSE_S = 3600.0


class Unauthorized(BackendError):
    """401: the registry wants a login, or does not take the one it got."""

    message = "{where}: not authorized: {why}; log in with 'skopeo login {host}' or 'docker login {host}'"
    exit_code: ClassVar[int] = 36


class Forbidden(BackendError):
    """403: this user may not do this."""

    message = "{where}: the registry forbids it{why}; check the rights of the user who is logged in"
    exit_code: ClassVar[int] = 37


class _Pausing:
    fields: dict[str, object]

    @property
    def retry_after_s(self) -> float | None:
        """How long the server asked to wait, in seconds."""
        value = self.fields.get("retry_after_s")
        return value if isinstance(value, float) else None


class TooManyRequests(_Pausing, BackendError):
    """429: over a limit of the registry."""

    message = "{where}: the registry limits the rate of requests{why}; try again later or log in"
    exit_code: ClassVar[int] = 38
    retryable = True


class ServerFailed(_Pausing, BackendError):
    """5xx: the registry, or something before it, is in trouble."""

    message = "{where}: the registry failed with status {status}{why}"
    exit_code: ClassVar[int] = 39
    retryable = True


class _RegistryErrorEntry(msgspec.Struct):
    code: str = ""
    message: str = ""


class _RegistryErrors(msgspec.Struct):
    errors: list[_RegistryErrorEntry] = []


async def raise_for_status(response: HttpResponse, *expected: int, host: str) -> None:
    """Returns when the status is one of `expected`; otherwise raises the error that it means."""
    if response.status not in expected:
        await fail(response, host=host)


async def fail(response: HttpResponse, *, host: str) -> NoReturn:
    """Raises the error that the status of `response` means, with the registry's own words if it gave any."""
    status, where = response.status, response.where
    code, detail = await _registry_words(response)
    why = f" ({detail})" if detail else ""
    if status == 401:
        raise Unauthorized(where=where, host=host, why=detail or "a login is needed")
    if status == 403:
        raise Forbidden(where=where, why=why)
    if status == 404:
        raise BlobNotFound(where=where)
    if status == 429:
        raise TooManyRequests(where=where, why=why, retry_after_s=retry_after_s(response))
    if status >= 500 or status == 408:
        raise ServerFailed(where=where, why=why, status=status, retry_after_s=retry_after_s(response))
    if code == "DIGEST_INVALID":
        raise DigestMismatch(where=where, expected="the digest that was announced", got=f"refused{why}")
    raise RegistryProtocolError(where=where, why=f"unexpected status {status}{why}")


def retry_after_s(response: HttpResponse) -> float | None:
    """The Retry-After header in seconds (RFC 9110, 10.2.3: a number, or a date beside the server's own)."""
    return parse_retry_after(response.header("Retry-After") or "", response.header("Date") or "")


def parse_retry_after(value: str, date: str) -> float | None:
    """The pause in seconds that a Retry-After value beside a Date asks for; None when it cannot be read."""
    text = value.strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return min(float(text), _LONGEST_PAUSE_S)
    try:
        pause = parsedate_to_datetime(text) - parsedate_to_datetime(date)
    except (ValueError, TypeError, ArithmeticError, LookupError):  # all of them come out of odd dates
        return None
    return min(max(pause.total_seconds(), 0.0), _LONGEST_PAUSE_S)


async def _registry_words(response: HttpResponse) -> tuple[str, str]:
    """Code and message of the first error in the body (OCI distribution spec, "Error codes")."""
    if response.status == 416:
        return "", ""  # its declared length is the blob's, not the body's: reading it breaks
    try:
        errors = msgspec.json.decode(await response.read(_BODY_LIMIT_BYTES), type=_RegistryErrors).errors
    except (BackendError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "", ""
    if not errors:
        return "", ""
    words = f"{errors[0].code}: {errors[0].message}".strip(": ")
    return errors[0].code, "".join(c if c.isprintable() else " " for c in words)[:_LONGEST_DETAIL]

"""Asks a scheduler: JSON over HTTP."""

import http
import http.client
import ssl
from typing import ClassVar, TypeVar
from urllib.parse import urlsplit

import msgspec

from backend.peers.tls_failure import tls_failure
from rafs.errors import NydusError

TIMEOUT_S = 5.0

T = TypeVar("T")


class SchedulerSilent(NydusError):
    """No scheduler answers there."""

    message = "scheduler {url}: {why}"
    exit_code: ClassVar[int] = 221


def ask_scheduler(
    url: str,
    method: str,
    target: str,
    answer: type[T],
    body: msgspec.Struct | None = None,
    *,
    context: ssl.SSLContext | None = None,
) -> T:
    """One request to the scheduler at `http://HOST:PORT`, `https` with a `context`.

    Raises `SchedulerSilent` and `CertificateRefused`.
    """
    parts = urlsplit(url)
    place = (parts.hostname or "", parts.port or 80)
    connection = (
        http.client.HTTPConnection(*place, timeout=TIMEOUT_S)
        if context is None
        else http.client.HTTPSConnection(*place, timeout=TIMEOUT_S, context=context)
    )
    try:
        connection.request(method, target, msgspec.json.encode(body) if body is not None else None)
        response = connection.getresponse()
        data = response.read()
        if response.status != http.HTTPStatus.OK:
            raise SchedulerSilent(url=url, why=data.decode(errors="replace")[:256])
        return msgspec.json.decode(data, type=answer)
    except ssl.SSLError as error:
        raise tls_failure(error, url) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise SchedulerSilent(url=url, why=str(error) or type(error).__name__) from error
    finally:
        connection.close()

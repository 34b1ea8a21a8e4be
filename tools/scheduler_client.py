"""Asks a scheduler: JSON over HTTP."""

import http
import http.client
import ssl
from typing import ClassVar, TypeVar

import msgspec

from backend.peers.tls_failure import tls_failure
from backend.peers.wire import refusal_text
from rafs.errors import NydusError
from tools.scheduler_url import scheduler_place

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
    """One request to the scheduler at `url`: with TLS if it says so or there is a `context`, never without.

    Raises `SchedulerSilent`, `SchedulerUrlInvalid` and `CertificateRefused`.
    """
    scheme, host, port = scheduler_place(url)
    if context is None and scheme == "https":
        context = ssl.create_default_context()
    connection = (
        http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
        if context is None
        else http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    )
    try:
        connection.request(method, target, msgspec.json.encode(body) if body is not None else None)
        response = connection.getresponse()
        data = response.read()
        if response.status != http.HTTPStatus.OK:
            raise SchedulerSilent(url=url, why=refusal_text(data))
        return msgspec.json.decode(data, type=answer)
    except ssl.SSLError as error:
        raise tls_failure(error, url) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise SchedulerSilent(url=url, why=why) from error
    finally:
        connection.close()

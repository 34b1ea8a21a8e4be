"""Asks a scheduler: JSON over HTTP."""

import http
import http.client
from typing import ClassVar, TypeVar
from urllib.parse import urlsplit

import msgspec

from rafs.errors import NydusError

TIMEOUT_S = 5.0

T = TypeVar("T")


class SchedulerSilent(NydusError):
    """No scheduler answers there."""

    message = "scheduler {url}: {why}"
    exit_code: ClassVar[int] = 153


def ask_scheduler(
    url: str, method: str, target: str, answer: type[T], body: msgspec.Struct | None = None
) -> T:
    """One request to the scheduler at `http://HOST:PORT`. Raises `SchedulerSilent`."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=TIMEOUT_S)
    try:
        connection.request(method, target, msgspec.json.encode(body) if body is not None else None)
        response = connection.getresponse()
        data = response.read()
        if response.status != http.HTTPStatus.OK:
            raise SchedulerSilent(url=url, why=data.decode(errors="replace")[:256])
        return msgspec.json.decode(data, type=answer)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise SchedulerSilent(url=url, why=str(error) or type(error).__name__) from error
    finally:
        connection.close()

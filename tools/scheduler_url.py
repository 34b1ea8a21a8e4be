"""URLs of schedulers as users write them."""

from collections.abc import Iterable
from typing import ClassVar
from urllib.parse import SplitResult, urlsplit

from rafs.errors import NydusError

PORTS = {"http": 80, "https": 443}


class SchedulerUrlInvalid(NydusError):
    """Nothing that a scheduler could be asked at."""

    message = "scheduler {url!r}: {why}; write for example http://sched:8770"
    exit_code: ClassVar[int] = 228


def scheduler_place(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of `http://HOST[:PORT]` or `https://...`. Raises `SchedulerUrlInvalid`."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise SchedulerUrlInvalid(url=url, why=str(error)) from error
    if why := _fault(parts):
        raise SchedulerUrlInvalid(url=url, why=why)
    return parts.scheme, parts.hostname or "", PORTS[parts.scheme] if port is None else port


def check_scheduler_urls(urls: Iterable[str]) -> None:
    """Raises `SchedulerUrlInvalid` for the first that is none."""
    for url in urls:
        scheduler_place(url)


def _fault(parts: SplitResult) -> str:
    if parts.scheme not in PORTS or not parts.netloc:
        return "not http:// or https://"
    if not parts.hostname:
        return "no host"
    if parts.path.strip("/") or parts.query or parts.fragment:
        return "something follows the host"
    return "a name in it is not used" if "@" in parts.netloc else ""

"""Which registries and repositories a pattern of Kubernetes means: `matchImages`, and keys of pull secrets.

The rules are the kubelet's (k8s.io/kubernetes, pkg/credentialprovider, `URLsMatch`): ports are equal, host
names have the same number of labels and each matches as a glob, and the path is a prefix of the repository's.
"""

import fnmatch
from collections.abc import Iterator, Mapping
from typing import TypeVar

from backend.address import split_address
from backend.origin import HUB_ALIASES

Value = TypeVar("Value")

_API_PATHS = ("/v1", "/v2")
"""Docker wrote addresses such as https://index.docker.io/v1/ for a whole registry."""


def matches(pattern: str, host: str, repository: str) -> bool:
    """Whether `pattern` (`[SCHEME://]HOST[:PORT][/PATH]`) covers the repository; never raises."""
    wanted = _split(pattern)
    if wanted is None:
        return False
    labels, port, path = wanted
    names = HUB_ALIASES if host in HUB_ALIASES else (host,)
    for name in names:
        found = _split(f"{name}/{repository}")
        if found is not None and _is_covered(labels, port, path, found):
            return True
    return False


def covering(entries: Mapping[str, Value], host: str, repository: str) -> Iterator[tuple[str, Value]]:
    """The entries whose key covers the repository, the most specific first: in reverse order of the keys."""
    for key in sorted(entries, key=_bare, reverse=True):
        if matches(key, host, repository):
            yield key, entries[key]


def _is_covered(labels: list[str], port: str, path: str, found: tuple[list[str], str, str]) -> bool:
    found_labels, found_port, found_path = found
    return (
        port == found_port
        and len(labels) == len(found_labels)
        and found_path.startswith(path)
        and all(
            glob == label or fnmatch.fnmatchcase(label, glob.replace("[^", "[!"))  # [::1] is no glob
            for glob, label in zip(labels, found_labels, strict=True)
        )
    )


def _split(text: str) -> tuple[list[str], str, str] | None:
    """Labels of the host, port ("" for none) and path, which begins with a slash or is empty."""
    bare = _bare(text)
    authority, slash, path = bare.partition("/")
    if split_address(f"//{authority}") is None and "[" not in authority:
        return None
    head, colon, port = authority.rpartition(":")
    # A colon may also be part of an IPv6 address, which ends with a bracket.
    name, port = (head, port) if colon and port.isdigit() else (authority, "")
    return (name.split("."), port, slash + path if path else "") if name else None


def _bare(text: str) -> str:
    """The text without scheme, slashes at the end, and what docker appended to a registry."""
    bare = text.partition("://")[2] if "://" in text else text
    bare = bare.rstrip("/")
    for suffix in _API_PATHS:
        if bare.endswith(suffix) and bare.count("/") == 1:
            return bare.removesuffix(suffix)
    return bare

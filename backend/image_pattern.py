"""Which registries and repositories a pattern of Kubernetes means: `matchImages`, and keys of pull secrets.

The rules are the kubelet's (k8s.io/kubernetes, pkg/credentialprovider, `URLsMatch`): ports are equal, host
names have the same number of labels and each matches as a glob, and the path is a prefix of the repository's.
"""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

from backend.address import split_address
from backend.origin import HUB_ALIASES

Value = TypeVar("Value")

_API_PATHS = ("/v1", "/v2")
"""Docker wrote addresses such as https://index.docker.io/v1/ for a whole registry."""


def matches(pattern: str, host: str, repository: str) -> bool:
    """Whether `pattern` (`[SCHEME://]HOST[:PORT][/PATH]`) covers the repository; never raises."""
    return _covers(pattern, _targets(host, repository))


def covering(entries: Mapping[str, Value], host: str, repository: str) -> Iterator[tuple[str, Value]]:
    """The entries whose key covers the repository, the most specific first: in reverse order of the keys."""
    targets = _targets(host, repository)
    found = [key for key in entries if _covers(key, targets)]
    for key in sorted(found, key=_bare, reverse=True):
        yield key, entries[key]


def _targets(host: str, repository: str) -> list["_Parts"]:
    """What a pattern may mean to cover the repository; Docker Hub has several names."""
    names = HUB_ALIASES if host in HUB_ALIASES else (host,)
    split = [_split(f"{name}/{repository}") for name in names]
    return [parts for parts in split if parts is not None]


def _covers(pattern: str, targets: "Sequence[_Parts]") -> bool:
    wanted = _split(pattern)
    return wanted is not None and any(_is_covered(wanted, target) for target in targets)


def _is_covered(wanted: "_Parts", found: "_Parts") -> bool:
    return (
        wanted.port == found.port
        and len(wanted.labels) == len(found.labels)
        and found.path.startswith(wanted.path)
        and all(map(_is_label, wanted.labels, found.labels))
    )


def _is_label(glob: str, label: str) -> bool:
    if glob == label:  # also [::1], which is no glob
        return True
    return any(sign in glob for sign in "*?[") and fnmatch.fnmatchcase(label, glob.replace("[^", "[!"))


class _Parts(NamedTuple):
    """Labels of the host, port ("" for none) and path, which begins with a slash or is empty."""

    labels: tuple[str, ...]
    port: str
    path: str


@lru_cache(1 << 15)  # a cluster may have thousands of pull secrets, which are looked through for each image
def _split(text: str) -> _Parts | None:
    bare = _bare(text)
    authority, slash, path = bare.partition("/")
    if split_address(f"//{authority}") is None and "[" not in authority:
        return None
    head, colon, port = authority.rpartition(":")
    # A colon may also be part of an IPv6 address, which ends with a bracket.
    name, port = (head, port) if colon and port.isdigit() else (authority, "")
    return _Parts(tuple(name.split(".")), port, slash + path if path else "") if name else None


def _bare(text: str) -> str:
    """The text without scheme, slashes at the end, and what docker appended to a registry."""
    bare = text.partition("://")[2] if "://" in text else text
    bare = bare.rstrip("/")
    for suffix in _API_PATHS:
        if bare.endswith(suffix) and bare.count("/") == 1:
            return bare.removesuffix(suffix)
    return bare

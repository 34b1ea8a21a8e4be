"""What a registry wants to see: the WWW-Authenticate header (RFC 9110, 11.6.1) and token scopes."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_LONGEST_HEADER = 8192
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'({_TOKEN})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^\s",]+))')
_SCHEME = re.compile(rf"({_TOKEN})(?:[ \t]+|$|(?=,))")
_SEPARATOR = re.compile(r"[ \t]*(?:,[ \t]*)*")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to authenticate. `scheme` is in lower case; an absent parameter is ""."""

    scheme: str
    realm: str = ""
    service: str = ""
    scope: str = ""


def parse_challenges(headers: Iterable[str]) -> tuple[Challenge, ...]:
    """The challenges in these header values. What cannot be understood is left out."""
    found: list[Challenge] = []
    for header in headers:
        if len(header) <= _LONGEST_HEADER:
            found.extend(_parse_header(header))
    return tuple(found)


def _parse_header(header: str) -> list[Challenge]:
    found: list[tuple[str, dict[str, str]]] = []
    position = 0
    while position < len(header):
        separator = _SEPARATOR.match(header, position)
        position = separator.end() if separator else position
        parameter = _PARAMETER.match(header, position)
        if parameter and found:
            name, quoted, plain = parameter.groups()
            value = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain
            found[-1][1].setdefault(name.lower(), value)
            position = parameter.end()
        elif scheme := _SCHEME.match(header, position):
            found.append((scheme[1].lower(), {}))
            position = scheme.end()
        else:
            break
    return [
        Challenge(scheme, given.get("realm", ""), given.get("service", ""), given.get("scope", ""))
        for scheme, given in found
    ]


def pull_scope(repository: str) -> str:
    """The scope for reading a repository."""
    return f"repository:{repository}:pull"


def push_scope(repository: str) -> str:
    """The scope for reading and writing a repository."""
    return f"repository:{repository}:pull,push"


def merge_scopes(*texts: str) -> tuple[str, ...]:
    """Every scope once, sorted; the actions on one resource joined. A text may hold several, by spaces."""
    actions: dict[str, set[str]] = {}
    for scope in " ".join(texts).split():
        resource, _, wanted = scope.rpartition(":")
        actions.setdefault(resource, set()).update(filter(None, wanted.split(",")))
    return tuple(
        f"{resource}:{','.join(sorted(wanted))}" if resource else ",".join(sorted(wanted))
        for resource, wanted in sorted(actions.items())
    )

"""How a user names an image: in a registry, in an OCI layout, in an archive file or in a bare directory.

The spelling is skopeo's: `HOST[:PORT]/REPOSITORY[:TAG|@DIGEST]`, `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]`,
`docker-archive:FILE[:NAME[:TAG]|:@NUMBER]`, `dir:DIR`.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from rafs.errors import NydusError

DEFAULT_TAG = "latest"
_EXAMPLE = "registry.example.com:5000/models/llama:v1, oci:DIR[:TAG], oci-archive:FILE[:TAG] or dir:DIR"

# https://github.com/distribution/reference (regexp.go) and the OCI distribution spec, "Pulling manifests".
_HOST = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*"
    r"|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?"
)
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# The grammar of org.opencontainers.image.ref.name (OCI image spec, annotations.md).
_LAYOUT_NAME = re.compile(
    r"[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*(?:/[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*)*"
)
_LONGEST_REPOSITORY = 255
_NUMBER = re.compile(r"@[0-9]{1,6}")


class InvalidReference(NydusError):
    """The text does not name an image."""

    message = "'{text}' is not an image reference: {why}; expected something like " + _EXAMPLE
    exit_code: ClassVar[int] = 43


@dataclass(frozen=True, slots=True)
class RegistryReference:
    """An image in a registry; `host` carries the port. A digest wins over a tag."""

    host: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{tag}{digest}"

    @property
    def manifest_key(self) -> str:
        """What the registry is asked for: the digest, else the tag, else "latest"."""
        return self.digest or self.tag or DEFAULT_TAG


@dataclass(frozen=True, slots=True)
class LayoutReference:
    """An image in an OCI layout on disk; without a tag, the only one in it."""

    directory: Path
    tag: str | None = None

    def __str__(self) -> str:
        return f"oci:{self.directory}:{self.tag}" if self.tag else f"oci:{self.directory}"


@dataclass(frozen=True, slots=True)
class DirReference:
    """A directory that holds `image.boot` and `blobs/`."""

    directory: Path

    def __str__(self) -> str:
        return f"dir:{self.directory}"


@dataclass(frozen=True, slots=True)
class OciArchiveReference:
    """An image in a tar file of an OCI layout; without a tag, the only one in it."""

    file: Path
    tag: str | None = None

    def __str__(self) -> str:
        return f"oci-archive:{self.file}:{self.tag}" if self.tag else f"oci-archive:{self.file}"


@dataclass(frozen=True, slots=True)
class DockerArchiveReference:
    """An image in a file of `docker save`: by its name, by its number ("@0"), or the only one in it."""

    file: Path
    name: str | None = None

    def __str__(self) -> str:
        return f"docker-archive:{self.file}:{self.name}" if self.name else f"docker-archive:{self.file}"


ArchiveReference = OciArchiveReference | DockerArchiveReference
Reference = RegistryReference | LayoutReference | DirReference | ArchiveReference


def parse_reference(text: str) -> Reference:
    """The image that `text` names; a registry reference without tag and digest gets the tag "latest".

    `parse_reference(str(r)) == r` for every `r` that it returns. Raises `InvalidReference`.
    """
    if not text.isprintable():
        raise InvalidReference(text=repr(text)[1:-1], why="it has characters that cannot be printed")
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "oci":
        return LayoutReference(*_path_and_tag(text, rest, "directory"))
    if colon and scheme == "oci-archive":
        return OciArchiveReference(*_path_and_tag(text, rest, "file"))
    if colon and scheme == "docker-archive":
        return _docker_archive(text, rest)
    if colon and scheme == "dir":
        if not rest:
            raise InvalidReference(text=text, why="no directory after 'dir:'")
        return DirReference(Path(rest))
    return _registry(text, text.removeprefix("docker://"))


def absolute_reference(text: str) -> Reference:
    """The parsed reference, its directory or file absolute; raises `InvalidReference`."""
    reference = parse_reference(text)
    if isinstance(reference, RegistryReference):
        return reference
    if isinstance(reference, ArchiveReference):
        return replace(reference, file=reference.file.absolute())
    return replace(reference, directory=reference.directory.absolute())


def is_tag(text: str) -> bool:
    """Whether `text` can be a tag in a registry."""
    return _TAG.fullmatch(text) is not None


def is_repository(text: str) -> bool:
    """Whether `text` can be the name of a repository in a registry."""
    return len(text) <= _LONGEST_REPOSITORY and _REPOSITORY.fullmatch(text) is not None


def normal_name(name: str) -> str | None:
    """The full form of a docker name: "app" is "docker.io/library/app:latest". None for no such name."""
    host, slash, path = name.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        host, path = "docker.io", name
    repository, _, tag = path.partition(":")
    if host in ("docker.io", "index.docker.io"):
        host, repository = "docker.io", repository if "/" in repository else f"library/{repository}"
    full = f"{host}/{repository}:{tag or DEFAULT_TAG}"
    is_good = _HOST.fullmatch(host) and _REPOSITORY.fullmatch(repository) and is_tag(tag or DEFAULT_TAG)
    return full if is_good and not path.endswith(":") else None


def _path_and_tag(text: str, rest: str, kind: str) -> tuple[Path, str | None]:
    path, colon, tag = rest.partition(":")  # as skopeo does: a path with a colon cannot be named
    if not path:
        raise InvalidReference(text=text, why=f"no {kind} after '{text.partition(':')[0]}:'")
    if colon and not _LAYOUT_NAME.fullmatch(tag) and not is_tag(tag):
        raise InvalidReference(text=text, why=f"'{tag}' is not a tag")
    return Path(path), tag or None


def _docker_archive(text: str, rest: str) -> DockerArchiveReference:
    path, colon, name = rest.partition(":")
    if not path:
        raise InvalidReference(text=text, why="no file after 'docker-archive:'")
    if colon and not _NUMBER.fullmatch(name) and normal_name(name) is None:
        raise InvalidReference(text=text, why=f"'{name}' is neither NAME[:TAG] nor @NUMBER")
    return DockerArchiveReference(Path(path), name or None)


def _registry(text: str, rest: str) -> RegistryReference:
    host, slash, path = rest.partition("/")
    if not slash:
        raise InvalidReference(text=text, why="there is no registry host before a '/'")
    _check_host(text, host)
    path, at, digest = path.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise InvalidReference(text=text, why="the part after '@' is not sha256: and 64 hexadecimal digits")
    repository, colon, tag = path.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise InvalidReference(
            text=text,
            why=f"'{tag}' is not a tag (up to 128 letters, digits, '_', '.', '-', '.' and '-' not first)",
        )
    _check_repository(text, repository)
    if not tag and not digest:
        tag = DEFAULT_TAG
    return RegistryReference(host, repository, tag or None, digest or None)


def _check_host(text: str, host: str) -> None:
    match = _HOST.fullmatch(host)
    if not match:
        raise InvalidReference(text=text, why=f"'{host}' is not a host name")
    if match["port"] and not 0 < int(match["port"]) < 65536:
        raise InvalidReference(text=text, why=f"port {match['port']} is not in 1..65535")
    if not match["port"] and "." not in host and host != "localhost" and not host.startswith("["):
        raise InvalidReference(
            text=text,
            why=f"the registry host '{host}' has no dot and no port (a name like docker.io is needed)",
        )


def _check_repository(text: str, repository: str) -> None:
    if not repository:
        raise InvalidReference(text=text, why="no repository after the host")
    if repository != repository.lower():
        raise InvalidReference(text=text, why="a repository name is in lower case")
    if not _REPOSITORY.fullmatch(repository):
        raise InvalidReference(text=text, why=f"'{repository}' is not a repository name")
    if len(repository) > _LONGEST_REPOSITORY:
        raise InvalidReference(text=text, why=f"the repository name is longer than {_LONGEST_REPOSITORY}")

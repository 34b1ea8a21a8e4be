"""Credentials that came with CRI PullImage requests, in memory alone.

Concurrency: gRPC's threads put them in and the loop reads them; a lock guards the table, for moments only.
"""

import base64
import binascii
import threading
from collections import OrderedDict
from collections.abc import Sequence

import trio

from backend.credentials import Credential
from backend.origin import HUB_ALIASES, api_repository
from backend.reference import normal_name
from fuse.snapshotter import image_auth_pb2 as pb

REPOSITORIES_MAX = 4096
CREDENTIALS_MAX = 4
"""For each repository, the newest: pods may use different ones."""
_REQUEST_MAX_BYTES = 4 << 20

Key = tuple[str, str]


class CriAuths:
    """A `CandidateSource` of what `remember` was given, the newest first."""

    name = "CRI image requests"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Key, list[Credential]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<CriAuths {len(self._known)} repositories>"

    async def candidates(self, host: str, repository: str, *, fresh: bool) -> Sequence[Credential]:
        """See `CandidateSource`; there is nobody to ask for fresh ones."""
        await trio.lowlevel.checkpoint()
        with self._lock:
            return list(self._known.get((host, api_repository(host, repository)), ()))

    def remember(self, key: Key, credential: Credential) -> bool:
        """Takes a credential; whether it was new."""
        with self._lock:
            known = self._known.setdefault(key, [])
            is_new = credential not in known
            if not is_new:
                known.remove(credential)
            known.insert(0, credential)
            del known[CREDENTIALS_MAX:]
            self._known.move_to_end(key)
            if len(self._known) > REPOSITORIES_MAX:
                self._known.popitem(last=False)
            return is_new

    def forget(self, key: Key, credential: Credential) -> None:
        """Drops one that was not good for its pull."""
        with self._lock:
            known = self._known.get(key, [])
            if credential in known:
                known.remove(credential)
            if not known:
                self._known.pop(key, None)


def auth_of_pull(request: bytes) -> tuple[Key, Credential] | None:
    """Repository and credential of an encoded PullImageRequest; None when it has none that can be used.

    Never raises: what containerd makes of the request is not decided here.
    """
    if len(request) > _REQUEST_MAX_BYTES:
        return None
    message = pb.PullImageRequest()
    try:
        message.ParseFromString(request)
    except Exception:  # protobuf's own DecodeError, which is not the same class in all its implementations
        return None
    key = _repository(message.image.image)
    credential = _credential(message.auth)
    if key is None or credential is None or not _is_for(message.auth.server_address, key[0]):
        return None
    return key, credential


def _repository(image: str) -> Key | None:
    name = normal_name(image.partition("@")[0])
    if name is None:
        return None
    host, _, path = name.partition("/")
    return host, path.rpartition(":")[0]


def _credential(auth: pb.AuthConfig) -> Credential | None:
    """In containerd's order (pkg/cri/server, ParseAuth): a token, a pair, an encoded pair."""
    if auth.registry_token:
        is_sendable = auth.registry_token.isascii() and auth.registry_token.isprintable()
        return Credential(registry_token=auth.registry_token) if is_sendable else None
    if auth.identity_token:
        return Credential(identity_token=auth.identity_token)
    if auth.username:
        return Credential(auth.username, auth.password)
    if auth.auth:
        try:
            user, colon, password = base64.b64decode(auth.auth, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return None
        return Credential(user, password.strip("\0")) if colon else None
    return None


def _is_for(server_address: str, host: str) -> bool:
    """Whether the auth is meant for the image's registry, if it says for which one it is."""
    if not server_address:
        return True
    bare = server_address.partition("://")[2] or server_address
    named = bare.partition("/")[0]
    return named == host or {named, host} <= HUB_ALIASES

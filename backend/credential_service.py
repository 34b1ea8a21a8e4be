"""Credentials from one process to another on this host, over a unix socket for their owner alone.

Who has them (the snapshotter) answers; who needs them (an agent) asks when a registry wants a login, and
again with what was refused. Nothing goes through files, nor through what an agent leaves to its successor:
that one knows the socket, and asks for itself.

Concurrency: a `CredentialSocket` serves many tasks; each asks on a connection of its own.
"""

import logging
from pathlib import Path
from typing import ClassVar

import msgspec
import trio

from backend.contract import BackendError
from backend.credentials import Credential, CredentialSource, RenewingSource
from backend.json_api import ApiRequest, Routes
from backend.json_call import CallFailed, call_socket
from rafs.errors import NydusError

log = logging.getLogger(__name__)

CREDENTIALS_TARGET = "/api/v1/credentials"
ASK_TIMEOUT_S = 90.0
"""Longer than a credential provider plugin may take."""


class CredentialServiceSilent(BackendError):
    """The process that has the credentials does not answer, and nothing else knows any."""

    message = "{where}: no answer about credentials for {image}: {why}"
    exit_code: ClassVar[int] = 197
    retryable = True


class CredentialRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which credential is wanted; `refused` is the one that the registry has just not taken."""

    host: str
    repository: str
    refused: Credential | None = None


class CredentialAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What there is, and why there is none if something failed."""

    credential: Credential | None = None
    failure: str = ""


def credential_routes(source: RenewingSource) -> Routes:
    """The service's side, for `serve_api`."""

    async def answer(call: ApiRequest) -> CredentialAnswer:
        request = msgspec.json.decode(call.body, type=CredentialRequest)
        try:
            if request.refused is None:
                return CredentialAnswer(await source.lookup(request.host, request.repository))
            return CredentialAnswer(await source.renewed(request.host, request.repository, request.refused))
        except NydusError as error:
            return CredentialAnswer(failure=str(error))

    return {("POST", CREDENTIALS_TARGET): answer}


class CredentialSocket:
    """A `RenewingSource` that asks the service behind a socket.

    While that one does not answer, what it said last is used, then what `otherwise` knows; only without
    either is there an error, which may be tried again. `is_required` is False where the service need not be
    there at all: then a socket that does not exist means that there is none.
    """

    def __init__(self, path: Path, otherwise: CredentialSource, *, is_required: bool = True) -> None:
        self._path = path
        self._otherwise = otherwise
        self._is_required = is_required
        self._last: dict[tuple[str, str], Credential] = {}
        self._is_silent = False

    def __repr__(self) -> str:
        return f"<CredentialSocket {self._path}>"

    async def lookup(self, host: str, repository: str) -> Credential | None:
        """See `CredentialSource`. Raises `CredentialServiceSilent`, and what `otherwise` raises."""
        return await self._find(CredentialRequest(host, repository))

    async def renewed(self, host: str, repository: str, refused: Credential) -> Credential | None:
        """See `RenewingSource`. Raises as `lookup`."""
        return await self._find(CredentialRequest(host, repository, refused))

    async def _find(self, request: CredentialRequest) -> Credential | None:
        if not self._is_required and not self._path.exists():
            return await self._otherwise.lookup(request.host, request.repository)
        try:
            return await self._ask(request)
        except CallFailed as failure:
            key = (request.host, request.repository)
            if self._last.get(key) == request.refused:
                self._last.pop(key, None)
            found = self._last.get(key)
            if found is None:
                found = await self._otherwise.lookup(request.host, request.repository)
            image = f"{request.host}/{request.repository}"
            if found is None or found == request.refused:
                raise CredentialServiceSilent(where=self._path, image=image, why=str(failure)) from failure
            if not self._is_silent:
                log.warning(
                    "%s: no answer about credentials (%s); those known before are used", image, failure
                )
            self._is_silent = True
            return found

    async def _ask(self, request: CredentialRequest) -> Credential | None:
        try:
            with trio.fail_after(ASK_TIMEOUT_S):
                answer = await call_socket(self._path, CREDENTIALS_TARGET, request, CredentialAnswer)
        except trio.TooSlowError:
            raise CallFailed(f"not within {ASK_TIMEOUT_S:g} s") from None
        self._is_silent = False
        if answer.credential is None:
            if answer.failure:
                raise CallFailed(answer.failure)
            self._last.pop((request.host, request.repository), None)
            return None
        self._last[request.host, request.repository] = answer.credential
        return answer.credential

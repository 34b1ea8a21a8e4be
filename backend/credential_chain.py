"""Several sources of credentials, asked in order, and again when a registry refuses what they gave.

Concurrency: one chain serves many tasks. What was refused is noted between two checkpoints; sources
look after themselves.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from backend.credentials import Credential, CredentialSource
from backend.origin import api_repository
from rafs.errors import NydusError

log = logging.getLogger(__name__)

REFUSED_S = 300.0
"""So long a refused credential is passed over: some registries lock accounts that try too often."""
REPOSITORIES_MAX = 4096


class CandidateSource(Protocol):
    """Has any number of credentials for a repository. Implementations are safe for concurrent use."""

    @property
    def name(self) -> str:
        """What it is called in a log."""
        ...

    async def candidates(self, host: str, repository: str, *, fresh: bool) -> Sequence[Credential]:
        """Credentials in the order in which to try them; with `fresh` none that was kept from before.

        Raises `NydusError` when it cannot be asked.
        """
        ...


class LookedUp:
    """A source that reads again at every lookup, such as `AuthFiles`, as a member of a chain."""

    def __init__(self, name: str, source: CredentialSource) -> None:
        self.name = name
        self._source = source

    async def candidates(self, host: str, repository: str, *, fresh: bool) -> Sequence[Credential]:
        """See `CandidateSource`."""
        credential = await self._source.lookup(host, repository)
        return [] if credential is None else [credential]


class CredentialChain:
    """A `RenewingSource` over the `sources`: the first that has a credential which was not refused wins."""

    def __init__(
        self, sources: Sequence[CandidateSource], clock: Callable[[], float] = trio.current_time
    ) -> None:
        self._sources = sources
        self._clock = clock
        self._refused: OrderedDict[tuple[str, str], list[tuple[float, Credential]]] = OrderedDict()
        self._told: dict[str, str] = {}

    async def lookup(self, host: str, repository: str) -> Credential | None:
        """The first credential. Raises what a source raised when no other one has any."""
        return await self._find(host, api_repository(host, repository))

    async def renewed(self, host: str, repository: str, refused: Credential) -> Credential | None:
        """The next credential; sources whose credentials were all refused are asked anew."""
        repository = api_repository(host, repository)
        self._note(host, repository, refused)
        found = await self._find(host, repository)
        if found is None:
            # All were refused: the next lookup begins again, for the registry may have been the one in error.
            self._refused.pop((host, repository), None)
        return found

    async def _find(self, host: str, repository: str) -> Credential | None:
        failure: NydusError | None = None
        for source in self._sources:
            refused = self._still_refused(host, repository)
            try:
                found = await source.candidates(host, repository, fresh=False)
                if found and all(each in refused for each in found):
                    found = await source.candidates(host, repository, fresh=True)
                self._told.pop(source.name, None)
            except NydusError as error:
                self._tell(source.name, error)
                failure = failure or error
                continue
            for credential in found:
                if credential not in refused:
                    return credential
        if failure is not None:
            raise failure
        return None

    def _note(self, host: str, repository: str, refused: Credential) -> None:
        noted = self._refused.setdefault((host, repository), [])
        noted.append((self._clock() + REFUSED_S, refused))
        self._refused.move_to_end((host, repository))
        if len(self._refused) > REPOSITORIES_MAX:
            self._refused.popitem(last=False)

    def _still_refused(self, host: str, repository: str) -> list[Credential]:
        now = self._clock()
        noted = [each for each in self._refused.get((host, repository), ()) if each[0] > now]
        if (host, repository) in self._refused:
            self._refused[host, repository] = noted
        return [credential for _, credential in noted]

    def _tell(self, name: str, error: NydusError) -> None:
        """Once for each fault, not for each lookup."""
        if self._told.get(name) != str(error):
            self._told[name] = str(error)
            log.warning("credentials: %s: %s; the next source is asked", name, error)

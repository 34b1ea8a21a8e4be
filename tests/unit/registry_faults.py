"""A registry client before a server that fails on command, for the tests of faults."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

from backend.credentials import Credential, FixedCredential, NoCredentials
from backend.ocidigest import digest_of
from backend.reference import RegistryReference
from backend.registry import RegistryClient, RegistryOptions
from backend.retry import RetryPolicy
from tests.contract.fault_server import Asked, FaultServer, Reply, ranged

CONTENT = bytes(range(256)) * 400
DIGEST = digest_of(CONTENT)
BLOB = f"/v2/a/b/blobs/{DIGEST}"
RETRY = RetryPolicy(random=lambda: 0.0)
ALICE = Credential("alice", "open sesame")
PART = (("Content-Range", f"bytes 1000-50999/{len(CONTENT)}"),)


@asynccontextmanager
async def connected(
    server: FaultServer,
    credential: Credential | None = None,
    *,
    plain_http: bool | None = True,
    retry: RetryPolicy = RETRY,
) -> AsyncIterator[RegistryClient]:
    credentials = FixedCredential(server.host, credential) if credential else NoCredentials()
    options = RegistryOptions(plain_http=plain_http, credentials=credentials, retry=retry)
    async with RegistryClient(RegistryReference(server.host, "a/b", "v1"), options) as client:
        yield client


def scripted(*replies: Reply) -> Callable[[Asked], Reply]:
    """Each of `replies` once, then honest answers."""
    remaining: Iterator[Reply] = iter(replies)
    return lambda asked: next(remaining, None) or ranged(asked, CONTENT)


async def read(client: RegistryClient) -> bytes:
    return await client.open_blob(DIGEST, len(CONTENT)).read_range(1000, 50_000)

"""The registry client against Debian's docker-registry."""

import json
import random
from pathlib import Path

import pytest
import trio

from backend.contract import BlobNotFound, ShortRead
from backend.credentials import Credential, FixedCredential, NoCredentials
from backend.http import TlsFailed
from backend.ocidigest import DigestMismatch, digest_of
from backend.reference import RegistryReference
from backend.registry import RegistryClient, RegistryOptions
from backend.retry import RetryPolicy
from backend.status import Unauthorized
from tests.integration.registry_server import USER, RegistryServer, TokenIssuer
from tests.integration.relay import Relay

pytestmark = pytest.mark.needs_registry

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


def content(size_bytes: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def client(server: RegistryServer, repository: str, **options: object) -> RegistryClient:
    settings = {"credentials": NoCredentials(), "ca_file": server.ca_file} | options
    return RegistryClient(
        RegistryReference(server.host, repository, "v1"),
        RegistryOptions(**settings),  # type: ignore[arg-type]
    )


def logged_in(server: RegistryServer) -> FixedCredential:
    return FixedCredential(server.host, USER)


async def push_blob(registry: RegistryClient, path: Path, data: bytes) -> str:
    path.write_bytes(data)
    digest = digest_of(data)
    await registry.upload_blob(path, digest, len(data))
    return digest


async def push_image(registry: RegistryClient, directory: Path, layer: bytes) -> str:
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [digest_of(layer)]},
        }
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": digest_of(config), "size": len(config)},
        "layers": [{"mediaType": LAYER, "digest": digest_of(layer), "size": len(layer)}],
    }
    await push_blob(registry, directory / "layer", layer)
    await push_blob(registry, directory / "config", config)
    return await registry.push_manifest("v1", MANIFEST, json.dumps(manifest).encode())


async def test_an_image_goes_in_and_comes_back(anonymous_registry: RegistryServer, tmp_path: Path) -> None:
    layer = content(100_000)
    async with client(anonymous_registry, "models/llama") as registry:
        digest = await push_image(registry, tmp_path, layer)
        by_tag = await registry.fetch_manifest("v1")
        assert (by_tag.digest, by_tag.media_type) == (digest, MANIFEST)
        assert await registry.fetch_manifest(digest) == by_tag
        assert await registry.fetch_blob(digest_of(layer), 100_000) == layer
        assert await registry.blob_size(digest_of(layer)) == 100_000
        assert await registry.blob_size(digest_of(b"never pushed")) is None


async def test_what_is_not_there_is_named(anonymous_registry: RegistryServer) -> None:
    async with client(anonymous_registry, "models/none") as registry:
        with pytest.raises(BlobNotFound, match="models/none:v9"):
            await registry.fetch_manifest("v9")
        with pytest.raises(BlobNotFound):
            await registry.open_blob(digest_of(b"never pushed")).size()
        with pytest.raises(BlobNotFound):
            await registry.open_blob(digest_of(b"never pushed"), 12).read_range(0, 12)


async def test_ranges_of_a_large_blob_by_many_tasks(
    anonymous_registry: RegistryServer, tmp_path: Path
) -> None:
    data = content(20 << 20)
    counted: list[int] = []
    async with client(anonymous_registry, "models/large") as registry:
        (tmp_path / "blob").write_bytes(data)
        await registry.upload_blob(tmp_path / "blob", digest_of(data), len(data), counted.append)
        assert counted == [8 << 20, 8 << 20, 4 << 20]
        reader = registry.open_blob(digest_of(data), len(data))

        async def check(offset: int, length: int) -> None:
            assert await reader.read_range(offset, length) == data[offset : offset + length]

        async with trio.open_nursery() as nursery:
            for offset in range(0, len(data), 1 << 20):
                nursery.start_soon(check, offset, 300_000)
            nursery.start_soon(check, len(data) - 1, 1)
        with pytest.raises(ShortRead):
            await reader.read_range(len(data) - 1, 2)


async def test_the_registry_itself_ends_before_the_size_that_a_manifest_said(
    anonymous_registry: RegistryServer, tmp_path: Path
) -> None:
    """docker-registry answers 416 with a length that its body does not have: it must not be read."""
    async with client(anonymous_registry, "models/short", retry=RetryPolicy(attempts=1)) as registry:
        digest = await push_blob(registry, tmp_path / "blob", content(1000))
        with pytest.raises(ShortRead):
            await registry.open_blob(digest, 5000).read_range(2000, 10)


async def test_an_empty_blob(anonymous_registry: RegistryServer, tmp_path: Path) -> None:
    async with client(anonymous_registry, "models/empty") as registry:
        digest = await push_blob(registry, tmp_path / "blob", b"")
        assert await registry.blob_size(digest) == 0
        assert await registry.fetch_blob(digest, 0) == b""
        assert await registry.open_blob(digest, 0).read_range(0, 0) == b""


@pytest.mark.parametrize("size_bytes", [1000, 9 << 20])
async def test_a_wrong_digest_is_refused_and_no_blob(
    anonymous_registry: RegistryServer, tmp_path: Path, size_bytes: int
) -> None:
    (tmp_path / "blob").write_bytes(content(size_bytes))
    async with client(anonymous_registry, f"models/wrong{size_bytes}") as registry:
        with pytest.raises(DigestMismatch):
            await registry.upload_blob(tmp_path / "blob", digest_of(b"something else"), size_bytes)
        assert await registry.blob_size(digest_of(b"something else")) is None


async def test_a_blob_is_mounted_from_another_repository(
    anonymous_registry: RegistryServer, tmp_path: Path
) -> None:
    async with client(anonymous_registry, "models/first") as registry:
        digest = await push_blob(registry, tmp_path / "blob", content(1000))
    async with client(anonymous_registry, "models/second") as registry:
        assert await registry.mount_blob(digest, "models/first")
        assert await registry.blob_size(digest) == 1000
        assert not await registry.mount_blob(digest_of(b"never pushed"), "models/first")
    assert not anonymous_registry.begun_uploads("models/second")


@pytest.mark.parametrize("forwarded_bytes", [0, 3 << 20], ids=["before a chunk", "within a chunk"])
async def test_an_upload_goes_on_after_a_reset(
    anonymous_registry: RegistryServer, tmp_path: Path, forwarded_bytes: int
) -> None:
    """Within a chunk docker-registry 2.8 loses its place (its signed offset is another) and begins again."""
    data = content(20 << 20)
    (tmp_path / "blob").write_bytes(data)
    counted: list[int] = []
    repository = f"models/reset{forwarded_bytes}"
    async with trio.open_nursery() as nursery, client(anonymous_registry, repository) as direct:
        relay = Relay(anonymous_registry.host, cut_second_patch_after=forwarded_bytes)
        host = await nursery.start(relay.serve)
        reference = RegistryReference(host, repository, "v1")
        options = RegistryOptions(credentials=NoCredentials(), retry=RetryPolicy(first_delay_s=0))
        async with RegistryClient(reference, options) as registry:
            await registry.upload_blob(tmp_path / "blob", digest_of(data), len(data), counted.append)
        assert await direct.fetch_blob(digest_of(data), len(data)) == data
        nursery.cancel_scope.cancel()
    assert sum(counted) == len(data)
    assert relay.was_cut
    assert relay.begun == (1 if forwarded_bytes == 0 else 2)


@pytest.mark.needs_skopeo
async def test_skopeo_copies_what_was_pushed(anonymous_registry: RegistryServer, tmp_path: Path) -> None:
    layer = content(200_000)
    async with client(anonymous_registry, "models/skopeo") as registry:
        digest = await push_image(registry, tmp_path, layer)
    source = f"docker://{anonymous_registry.host}/models/skopeo:v1"
    command = ["skopeo", "copy", "-q", "--insecure-policy", "--preserve-digests", "--src-tls-verify=false"]
    await trio.run_process([*command, source, f"oci:{tmp_path / 'layout'}:v1"])
    blobs = tmp_path / "layout" / "blobs" / "sha256"
    assert (blobs / digest_of(layer).removeprefix("sha256:")).read_bytes() == layer
    assert (blobs / digest.removeprefix("sha256:")).exists()


async def test_basic_authentication(htpasswd_registry: RegistryServer, tmp_path: Path) -> None:
    layer = content(50_000)
    async with client(htpasswd_registry, "a/b", credentials=logged_in(htpasswd_registry)) as registry:
        await push_image(registry, tmp_path, layer)
        assert await registry.open_blob(digest_of(layer)).read_range(7, 9) == layer[7:16]
    async with client(htpasswd_registry, "a/b") as registry:
        with pytest.raises(Unauthorized, match=htpasswd_registry.host):
            await registry.fetch_manifest("v1")
    wrong = FixedCredential(htpasswd_registry.host, Credential("alice", "wrong battery"))
    async with client(htpasswd_registry, "a/b", credentials=wrong) as registry:
        with pytest.raises(Unauthorized) as caught:
            await registry.fetch_manifest("v1")
    assert "wrong battery" not in str(caught.value) + repr(caught.value)


async def test_tokens_for_pulling_and_pushing(
    token_registry: RegistryServer, issuer: TokenIssuer, tmp_path: Path
) -> None:
    layer = content(9 << 20)
    issuer.requests.clear()
    async with client(token_registry, "t/one", credentials=logged_in(token_registry)) as registry:
        await push_image(registry, tmp_path, layer)
        reader = registry.open_blob(digest_of(layer), len(layer))
        async with trio.open_nursery() as nursery:
            for offset in range(20):
                nursery.start_soon(reader.read_range, offset, 100)
    pull, push = "repository:t/one:pull", "repository:t/one:pull,push"
    assert issuer.requests == [("GET", (push,), "alice"), ("GET", (pull,), "alice")]

    async with client(token_registry, "t/one") as registry:
        assert await registry.fetch_blob(digest_of(layer), len(layer)) == layer
        with pytest.raises(Unauthorized):
            await registry.upload_blob(tmp_path / "config", digest_of(b"x"), 1)


async def test_mounting_asks_for_both_repositories(
    token_registry: RegistryServer, issuer: TokenIssuer, tmp_path: Path
) -> None:
    credentials = logged_in(token_registry)
    async with client(token_registry, "t/from", credentials=credentials) as registry:
        digest = await push_blob(registry, tmp_path / "blob", content(1000))
    async with client(token_registry, "t/to", credentials=credentials) as registry:
        assert await registry.mount_blob(digest, "t/from")
        assert await registry.blob_size(digest) == 1000
    assert ("GET", ("repository:t/from:pull", "repository:t/to:pull,push"), "alice") in issuer.requests


async def test_an_identity_token(token_registry: RegistryServer, issuer: TokenIssuer, tmp_path: Path) -> None:
    credential = Credential(identity_token=issuer.refresh_token)
    fixed = FixedCredential(token_registry.host, credential)
    async with client(token_registry, "t/identity", credentials=fixed) as registry:
        await push_blob(registry, tmp_path / "blob", content(1000))
    assert issuer.requests[-1] == ("POST", ("repository:t/identity:pull,push",), "alice")


async def test_tls_with_and_without_its_authority(tls_registry: RegistryServer, tmp_path: Path) -> None:
    async with client(tls_registry, "a/b") as registry:
        digest = await push_blob(registry, tmp_path / "blob", content(1000))
        assert await registry.open_blob(digest).read_range(0, 1000) == content(1000)
    async with client(tls_registry, "a/b", ca_file=None) as registry:
        with pytest.raises(TlsFailed, match="--ca-file"):
            await registry.blob_size(digest)
    async with client(tls_registry, "a/b", ca_file=None, insecure_skip_verify=True) as registry:
        assert await registry.blob_size(digest) == 1000


async def test_a_file_that_is_no_authority(tls_registry: RegistryServer, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    for name in ("ca.pem", "absent.pem"):
        with pytest.raises(TlsFailed, match=name):
            async with client(tls_registry, "a/b", ca_file=tmp_path / name):
                pass


async def test_tls_is_asked_for_and_not_spoken(anonymous_registry: RegistryServer) -> None:
    async with client(anonymous_registry, "a/b", plain_http=False) as registry:
        with pytest.raises(TlsFailed, match="--plain-http"):
            await registry.fetch_manifest("v1")

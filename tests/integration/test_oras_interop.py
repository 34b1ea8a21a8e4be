"""An image that was pushed to a registry, as `oras` sees it, which shares no code with our client."""

import hashlib
from pathlib import Path

import oras.client
import pytest
import trio

from backend.credentials import NoCredentials
from backend.reference import RegistryReference
from backend.registry import RegistryOptions
from backend.store import NoProgress, open_store
from tests.integration.registry_server import RegistryServer
from tests.sample_image import make_image

pytestmark = pytest.mark.needs_registry


async def test_oras_pulls_what_was_pushed(
    anonymous_registry: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # nobody's logins
    monkeypatch.setenv("NO_PROXY", "*")
    image = make_image(tmp_path / "build")
    reference = RegistryReference(anonymous_registry.host, "interop/oras", "v1")
    async with open_store(reference, RegistryOptions(credentials=NoCredentials())) as store:
        await store.publish(image, NoProgress())
    await trio.to_thread.run_sync(_assert_pulled, str(reference), [blob.blob_id for blob in image.blobs])


def _assert_pulled(name: str, blob_ids: list[str]) -> None:
    client = oras.client.OrasClient(insecure=True)
    try:
        manifest = client.get_manifest(name)
        *blobs, bootstrap = manifest["layers"]
        assert [layer["digest"] for layer in blobs] == [f"sha256:{blob_id}" for blob_id in blob_ids]
        for descriptor in (manifest["config"], *blobs, bootstrap):
            content = client.get_blob(name, descriptor["digest"]).content
            assert len(content) == descriptor["size"]
            assert f"sha256:{hashlib.sha256(content).hexdigest()}" == descriptor["digest"]
    finally:
        client.session.close()

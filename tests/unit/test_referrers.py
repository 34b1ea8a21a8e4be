"""Manifests with a subject, pushed to registries that list them and to registries that do not."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest

from backend.credentials import NoCredentials
from backend.manifest import OCI_INDEX, OCI_MANIFEST, ManifestBroken
from backend.ocidigest import digest_of
from backend.reference import RegistryReference
from backend.referrers import WRITES_MAX, referral_of
from backend.registry import RegistryOptions
from backend.store import CannotPublish, OciStore, open_store
from tests.contract.fault_server import Asked, FaultServer, Reply, fault_server

SUBJECT = digest_of(b"the subject")
TAG = SUBJECT.replace(":", "-")
KIND = "application/vnd.nydus.image.manifest.v1+json"


def manifest(subject: str = SUBJECT) -> bytes:
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": KIND,
        "config": {"mediaType": "text/plain", "digest": digest_of(b""), "size": 0},
        "layers": [],
        "subject": {"mediaType": OCI_MANIFEST, "digest": subject, "size": 11},
        "annotations": {"who": "a test"},
    }
    return json.dumps(document).encode()


class Registry:
    """Manifests by key. `lists` says whether it knows of referrers, `keeps` whether its lists last."""

    def __init__(self, *, lists: bool = False, keeps: bool = True) -> None:
        self.lists = lists
        self.keeps = keeps
        self.manifests: dict[str, bytes] = {}

    def answer(self, asked: Asked) -> Reply:
        key = asked.path.rpartition("/")[2]
        if asked.method == "PUT":
            if self.keeps or key != TAG:
                self.manifests[key] = asked.body
            listed = (("OCI-Subject", SUBJECT),) if self.lists else ()
            return Reply(201, listed)
        if key not in self.manifests:
            return Reply(404)
        return Reply(200, (("Content-Type", OCI_INDEX),), self.manifests[key])


@asynccontextmanager
async def store_at(answer: Callable[[Asked], Reply]) -> AsyncIterator[tuple[FaultServer, OciStore]]:
    options = RegistryOptions(plain_http=True, credentials=NoCredentials())
    async with (
        fault_server(answer) as server,
        open_store(RegistryReference(server.host, "a/b", "v1"), options) as store,
    ):
        yield server, cast(OciStore, store)


async def test_a_registry_that_lists_referrers_gets_no_list() -> None:
    registry = Registry(lists=True)
    async with store_at(registry.answer) as (_, store):
        digest = await store.put_manifest(OCI_MANIFEST, manifest(), as_reference=True)
    assert sorted(registry.manifests) == [digest, "v1"]


async def test_the_list_is_made_before_the_tag_is_set() -> None:
    registry = Registry()
    async with store_at(registry.answer) as (server, store):
        digest = await store.put_manifest(OCI_MANIFEST, manifest(), as_reference=True)
        puts = [asked.path.rpartition("/")[2] for asked in server.asked if asked.method == "PUT"]
    assert puts == [digest, TAG, "v1"]
    assert json.loads(registry.manifests[TAG]) == {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [
            {
                "mediaType": OCI_MANIFEST,
                "digest": digest,
                "size": len(manifest()),
                "annotations": {"who": "a test"},
                "artifactType": KIND,
            }
        ],
    }


async def test_other_entries_stay_as_they_are_and_none_comes_twice() -> None:
    registry = Registry()
    other = {"mediaType": OCI_MANIFEST, "digest": digest_of(b"signature"), "size": 9, "x-unknown": [1, 2]}
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [other], "annotations": {"a": "b"}}
    registry.manifests[TAG] = json.dumps(index).encode()
    async with store_at(registry.answer) as (server, store):
        digest = await store.put_manifest(OCI_MANIFEST, manifest(), as_reference=False)
        first = registry.manifests[TAG]
        await store.put_manifest(OCI_MANIFEST, manifest(), as_reference=False)
        writes = [asked for asked in server.asked if asked.method == "PUT" and asked.path.endswith(TAG)]
    found = json.loads(first)
    assert found["manifests"][0] == other
    assert [entry["digest"] for entry in found["manifests"]] == [other["digest"], digest]
    assert found["annotations"] == {"a": "b"}
    assert (registry.manifests[TAG], len(writes)) == (first, 1)


async def test_a_list_that_others_overwrite_is_written_again_but_not_for_ever() -> None:
    registry = Registry(keeps=False)
    async with store_at(registry.answer) as (server, store):
        with pytest.raises(CannotPublish, match="overwrite"):
            await store.put_manifest(OCI_MANIFEST, manifest(), as_reference=True)
        writes = [asked for asked in server.asked if asked.method == "PUT" and asked.path.endswith(TAG)]
    assert len(writes) == WRITES_MAX
    assert "v1" not in registry.manifests


@pytest.mark.parametrize(
    "content", [b"[]", b"{", b'{"schemaVersion": 2, "layers": []}', b'{"schemaVersion": 2, "manifests": [3]}']
)
async def test_a_tag_that_names_something_else_is_left_alone(content: bytes) -> None:
    registry = Registry()
    registry.manifests[TAG] = content
    async with store_at(registry.answer) as (_, store):
        with pytest.raises(ManifestBroken, match=TAG):
            await store.put_manifest(OCI_MANIFEST, manifest(), as_reference=True)
    assert registry.manifests[TAG] == content
    assert "v1" not in registry.manifests


def test_a_subject_that_cannot_be_one() -> None:
    with pytest.raises(ManifestBroken, match="subject"):
        referral_of(OCI_MANIFEST, manifest("sha256:../../v1"), "here")
    assert referral_of(OCI_MANIFEST, b"{}", "here") is None

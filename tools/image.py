"""Opening an image for the verbs that read one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from backend.reference import absolute_reference
from backend.store import ImageMetadata, ImageStore, open_store
from rafs.bootstrap import Bootstrap
from tools.settings import Settings


@dataclass(frozen=True, slots=True)
class OpenImage:
    """An image whose metadata is here and whose blobs can be asked for."""

    store: ImageStore
    metadata: ImageMetadata
    bootstrap: Bootstrap


@asynccontextmanager
async def open_image(text: str, settings: Settings) -> AsyncIterator[OpenImage]:
    """The image `text` names, its metadata fetched (or found in the cache) and mapped.

    Raises `InvalidReference`, `BackendError`s, and `FormatError` for a bootstrap that is none.
    """
    async with open_store(absolute_reference(text), settings.registry_options()) as store:
        metadata = await store.fetch_metadata(settings.images_dir)
        # Not closed: an error on its way out may still hold views of the map; it goes with the last of them.
        yield OpenImage(store, metadata, Bootstrap.open(metadata.bootstrap_path))

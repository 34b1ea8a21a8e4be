"""Publishing: blobs, then bootstrap layer and config, the manifest last. Only what is missing travels."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from backend.bootstrap_layer import BOOTSTRAP_NAME, LayerFile, blob_meta_name, pack_layer
from backend.contract import BlobReader
from backend.growing import GrowingFile
from backend.manifest import (
    NYDUS_BLOB,
    OCI_CONFIG,
    OCI_MANIFEST,
    Descriptor,
    blob_descriptor,
    bootstrap_descriptor,
    build_config,
    build_manifest,
)
from backend.ocidigest import digest_of
from backend.platforms import this_platform
from backend.publishing import reporting_writes
from backend.reference import Reference, parse_reference
from backend.store import (
    BlobFile,
    BlobOutcome,
    BlobTarget,
    CannotPublish,
    GrowingTarget,
    ImageFiles,
    OciStore,
    OpenOrigin,
    PublishProgress,
    PublishResult,
)

FOLLOWED_FROM_BYTES = 16 << 20


class Transfer:
    """Moves blobs into one target, the cheapest way each, and counts.

    Used by one task at a time, but for `follow_blob`.
    """

    def __init__(self, target: BlobTarget, where: str, progress: PublishProgress) -> None:
        self._target = target
        self._where = where
        self._progress = progress
        self._outcomes: list[BlobOutcome] = []
        self._done: set[str] = set()
        self._sent_bytes = 0

    def result(self, digest: str) -> PublishResult:
        """What has been done, once the manifest with that digest is there. Only data blobs are counted."""
        return PublishResult(
            digest,
            self._outcomes.count(BlobOutcome.UPLOADED),
            self._outcomes.count(BlobOutcome.SKIPPED),
            self._sent_bytes,
            self._outcomes.count(BlobOutcome.MOUNTED),
        )

    async def send_blob(self, blob: BlobFile, open_origin: OpenOrigin, *, may_link: bool = False) -> None:
        """Brings a blob of an image over, from its file or from the image that has it; once."""
        descriptor = blob_descriptor(blob.blob_id, blob.size_bytes)
        if descriptor.digest in self._done:
            return
        origin, is_counted = parse_reference(blob.source) if blob.source else None, not blob.table_of
        if await self._is_there(descriptor, origin, is_counted=is_counted):
            return
        if blob.path is not None:
            await self._send_file(descriptor, blob.path, may_link=may_link)
        elif blob.source is not None:
            async with open_origin(blob.source) as store:
                await self._send_stream(descriptor, store.open_blob(blob.blob_id, blob.size_bytes))
        else:
            why = f"blob {blob.blob_id} has neither a file nor another image that holds it"
            raise CannotPublish(where=self._where, why=why)
        self._finish(descriptor, BlobOutcome.UPLOADED, is_counted=is_counted)

    async def follow_blob(self, growing: GrowingFile, media_type: str = NYDUS_BLOB) -> None:
        """Sends a blob while it is being made, where the target can take it so; `send_blob` does the rest.

        Not a blob that turns out to be small: it may be there already, which is known at its end.
        """
        if not isinstance(self._target, GrowingTarget) or not await growing.wait_for(FOLLOWED_FROM_BYTES):
            return
        await self._target.put_growing(growing, self._count)
        identity = await growing.identity()
        descriptor = Descriptor(media_type, identity.digest, identity.size_bytes)
        self._finish(descriptor, BlobOutcome.UPLOADED, is_counted=media_type == NYDUS_BLOB)

    async def send_content(self, descriptor: Descriptor, source: OciStore, *, is_counted: bool) -> None:
        """Brings a blob of any kind over from another store; only a counted one shows in the result."""
        if await self._is_there(descriptor, source.reference, is_counted=is_counted):
            return
        await self._send_stream(descriptor, source.open_content(descriptor.digest, descriptor.size_bytes))
        self._finish(descriptor, BlobOutcome.UPLOADED, is_counted=is_counted)

    async def send_part(self, descriptor: Descriptor, path: Path, *, may_link: bool = False) -> None:
        """Brings a layer that is no data blob or a config over, which the result does not count as a blob."""
        if descriptor.digest in self._done:
            return
        if not await self._is_there(descriptor, None, is_counted=False):
            await self._send_file(descriptor, path, may_link=may_link)
            self._finish(descriptor, BlobOutcome.UPLOADED, is_counted=False)

    async def _is_there(
        self, descriptor: Descriptor, origin: Reference | None, *, is_counted: bool = True
    ) -> bool:
        self._progress.blob_started(descriptor.digest, descriptor.size_bytes)
        if await self._target.has_blob(descriptor.digest, descriptor.size_bytes):
            self._finish(descriptor, BlobOutcome.SKIPPED, is_counted=is_counted)
            return True
        if origin is not None and await self._target.mount_blob(descriptor.digest, origin):
            self._finish(descriptor, BlobOutcome.MOUNTED, is_counted=is_counted)
            return True
        return False

    async def _send_file(self, descriptor: Descriptor, path: Path, *, may_link: bool) -> None:
        await self._target.put_file(descriptor, path, self._count, may_link=may_link)

    async def _send_stream(self, descriptor: Descriptor, reader: BlobReader) -> None:
        try:
            await self._target.put_stream(descriptor, reader, self._count)
        finally:
            with trio.CancelScope(shield=True):
                await reader.aclose()

    def _count(self, count: int) -> None:
        self._sent_bytes += count
        self._progress.bytes_sent(count)

    def _finish(self, descriptor: Descriptor, outcome: BlobOutcome, *, is_counted: bool = True) -> None:
        self._done.add(descriptor.digest)
        if is_counted:
            self._outcomes.append(outcome)
        self._progress.blob_finished(descriptor.digest, outcome)


@dataclass(frozen=True, slots=True)
class ImageDescription:
    """What an image says of itself beside its content.

    `make_config` gives the config, from the descriptors of the data blobs and the diff ID of the bootstrap.
    """

    make_config: Callable[[Sequence[Descriptor], str], bytes]
    config_media_type: str = OCI_CONFIG
    annotations: dict[str, str] = field(default_factory=dict)
    subject: Descriptor | None = None


async def publish_oci_image(
    store: OciStore, image: ImageFiles, open_origin: OpenOrigin, progress: PublishProgress
) -> PublishResult:
    """`ImageStore.publish` for stores that keep images the OCI way."""
    transfer = Transfer(store, str(store.reference), progress)
    target = image.platform or this_platform()
    description = ImageDescription(lambda blobs, diff_id: build_config(target, blobs, diff_id))
    manifest = await send_image(transfer, image, description, open_origin)
    return transfer.result(await store.put_manifest(OCI_MANIFEST, manifest, as_reference=True))


async def send_image(
    transfer: Transfer, image: ImageFiles, description: ImageDescription, open_origin: OpenOrigin
) -> bytes:
    """Brings everything of an image over but its manifest, which is returned: then it can be published."""
    for blob in image.blobs:
        await transfer.send_blob(blob, open_origin, may_link=image.gives_blobs_away)
    blobs = [blob_descriptor(blob.blob_id, blob.size_bytes, blob.table_of) for blob in image.blobs]
    with (
        reporting_writes(Path(tempfile.gettempdir())),
        tempfile.TemporaryDirectory(prefix="nydus-py-") as name,
    ):
        layer_path, config_path = Path(name) / "layer", Path(name) / "config"
        layer = await trio.to_thread.run_sync(pack_layer, _layer_files(image), layer_path)
        bootstrap = bootstrap_descriptor(layer.digest, layer.size_bytes, _reference_blob_ids(image.blobs))
        await transfer.send_part(bootstrap, layer_path)
        config_data = description.make_config(blobs, layer.diff_id)
        config_path.write_bytes(config_data)
        config = Descriptor(description.config_media_type, digest_of(config_data), len(config_data))
        await transfer.send_part(config, config_path)
    return build_manifest(config, blobs, bootstrap, description.annotations, description.subject)


def _layer_files(image: ImageFiles) -> list[LayerFile]:
    tables = [LayerFile(blob_meta_name(blob.blob_id), blob.meta) for blob in image.blobs if not blob.table_of]
    return [LayerFile(BOOTSTRAP_NAME, image.bootstrap), *tables]


def _reference_blob_ids(blobs: Sequence[BlobFile]) -> list[str]:
    return [blob.blob_id for blob in blobs if blob.source is not None]

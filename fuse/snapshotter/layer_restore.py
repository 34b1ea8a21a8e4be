"""Layers whose files were left out, because a mounted image has them, fetched after all.

That becomes necessary when another image shares a layer and has no Nydus variant, or when lazy mounts stop
working in the middle of a pull: then the layer is downloaded, verified and unpacked here.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import trio

from backend.ocidigest import DigestMismatch
from backend.pieces import pump
from backend.reference import RegistryReference, parse_reference
from backend.registry import RegistryClient, RegistryOptions
from fuse.snapshotter.directories import remove_tree, reporting_disk
from fuse.snapshotter.layer_tar import unpack_layer
from fuse.snapshotter.records import SourceLayer

log = logging.getLogger(__name__)

_PREFIX = "unpacking-"


class LayerRestorer:
    """Fetches layers. Its method may run several times at once."""

    def __init__(self, options: RegistryOptions) -> None:
        self._options = options

    async def restore(self, layer: SourceLayer, lower: Sequence[Path], place: Path) -> Path:
        """A new directory in `place` with the files of the layer; who calls gives it its name.

        `lower` as in `unpack_layer`. Raises what a registry does, `LayerNotUnpacked`, `NoRoom`,
        `SnapshotError`.
        """
        log.info("%s: layer %s is fetched whole", layer.reference, layer.digest)
        for left in place.glob(f"{_PREFIX}*"):  # by a process that was killed
            with contextlib.suppress(OSError):  # it goes with the snapshot
                remove_tree(left)
        with reporting_disk(place), tempfile.TemporaryFile(dir=place) as packed:
            await self._download(layer, cast("BinaryIO", packed))
            packed.seek(0)
            target = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
            try:
                os.chmod(target, 0o755)
                unpack: Callable[[], None] = lambda: unpack_layer(  # noqa: E731
                    cast("BinaryIO", packed), layer.digest, target, lower, layer.diff_id
                )
                await trio.to_thread.run_sync(unpack)
            except BaseException:
                with contextlib.suppress(OSError):
                    remove_tree(target)
                raise
        return target

    async def _download(self, layer: SourceLayer, output: BinaryIO) -> None:
        reference = parse_reference(layer.reference)
        assert isinstance(reference, RegistryReference)
        digest = hashlib.sha256()

        def store(piece: bytes) -> None:
            digest.update(piece)
            output.write(piece)

        async def take(piece: bytes) -> None:
            await trio.to_thread.run_sync(store, piece)

        async with RegistryClient(reference, self._options) as client:
            reader = client.open_blob(layer.digest, layer.size_bytes)
            try:
                await pump(reader, layer.size_bytes, take)
            finally:
                with trio.CancelScope(shield=True):
                    await reader.aclose()
        found = f"sha256:{digest.hexdigest()}"
        if found != layer.digest:
            where = f"{layer.reference}, layer of {layer.size_bytes} bytes"
            raise DigestMismatch(where=where, expected=layer.digest, got=found)

"""Writes a file of `docker save` for one image: layers as plain tars, which is what docker loads everywhere.

A layer is stored under its diff ID, which is known at its end; so the header of a member is written last.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from backend.compression import compression_of
from backend.contract import BlobReader
from backend.docker_listing import LISTING_NAME, SavedImage
from backend.inflate import GzipBroken, GzipInflater
from backend.manifest import (
    DOCKER_CONFIG,
    OCI_CONFIG,
    Descriptor,
    ImageManifest,
    ManifestBroken,
    diff_ids_of,
    shown,
)
from backend.ocidigest import DigestMismatch, check_digest
from backend.pieces import pump
from backend.source_image import CONFIG_SIZE_MAX_BYTES, TAR_TYPES
from backend.store import CannotPublish
from backend.tar_writer import TarMember, TarWriter


class DockerArchiveWriter:
    """One image on its way into a file; `where` is what errors name it by. `close` comes always."""

    def __init__(self, final: Path, where: str) -> None:
        self._where = where
        self._writer = TarWriter(final)
        self._diff_ids: dict[str, str] = {}  # of layers by their digest
        self._configs: dict[str, bytes] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._diff_ids or digest in self._configs

    async def add(self, descriptor: Descriptor, reader: BlobReader, on_bytes: Callable[[int], None]) -> None:
        """Takes a config, or a layer, which is stored as a plain tar.

        Raises `CannotPublish` for anything else, `DigestMismatch`, `ManifestBroken` for a config of
        extraordinary size, `CannotWrite` and what the reader raises.
        """
        if descriptor.media_type in (OCI_CONFIG, DOCKER_CONFIG):
            await self._add_config(descriptor, reader)
            on_bytes(descriptor.size_bytes)
        elif descriptor.media_type in TAR_TYPES:
            await self._add_layer(descriptor, reader, on_bytes)
        else:
            raise self._cannot(f"docker has no use for a blob of type '{shown(descriptor.media_type)}'")

    async def finish(self, manifest: ImageManifest, image_name: str | None) -> None:
        """Makes what was added the image of that name, and gives the file its own.

        Raises `CannotPublish` when the layers are not those of the config, and `CannotWrite`.
        """
        config = self._configs[manifest.config.digest]
        diff_ids = tuple(self._diff_ids.get(layer.digest, "a layer elsewhere") for layer in manifest.layers)
        if diff_ids != diff_ids_of(config, self._where):
            raise self._cannot("its layers are not those that its config names")
        config_name = f"{manifest.config.hex}.json"
        names = (image_name,) if image_name else ()
        listing = (SavedImage(config_name, names, tuple(map(_layer_name, diff_ids))),)
        await self._writer.add(config_name, config)
        await self._writer.add(LISTING_NAME, msgspec.json.encode(listing))
        await self._writer.finish()
        self.close()

    def close(self) -> None:
        """Forgets and removes what was not finished."""
        self._diff_ids.clear()
        self._configs.clear()
        self._writer.close()

    async def _add_config(self, descriptor: Descriptor, reader: BlobReader) -> None:
        if descriptor.size_bytes > CONFIG_SIZE_MAX_BYTES:
            raise ManifestBroken(where=self._where, why=f"a config of {descriptor.size_bytes} bytes")
        data = await reader.read_range(0, descriptor.size_bytes)
        check_digest(data, descriptor.digest, f"{self._where}, config")
        self._configs[descriptor.digest] = data

    async def _add_layer(
        self, descriptor: Descriptor, reader: BlobReader, on_bytes: Callable[[int], None]
    ) -> None:
        async with self._writer.member() as member:
            layer = _PlainLayer(member)

            async def take(piece: bytes) -> None:
                await trio.to_thread.run_sync(layer.feed, piece)
                on_bytes(len(piece))

            await pump(reader, descriptor.size_bytes, take)
            if layer.digest != descriptor.digest:
                raise DigestMismatch(where=self._where, expected=descriptor.digest, got=layer.digest)
            fault = layer.fault_at_end()
            if fault is not None:
                raise self._cannot(f"layer {descriptor.digest}: {fault}")
            self._diff_ids[descriptor.digest] = member.digest
            await trio.to_thread.run_sync(member.seal, _layer_name(member.digest))

    def _cannot(self, why: str) -> CannotPublish:
        return CannotPublish(where=self._where, why=why)


class _PlainLayer:
    """A layer that is written as a plain tar, whatever its media type says of its compression.

    Faults are told at the end: bytes that were altered on the way are to be called that.
    """

    def __init__(self, member: TarMember) -> None:
        self._member = member
        self._encoded = hashlib.sha256()
        self._inflater: GzipInflater | None = None
        self._is_started = False
        self._fault: str | None = None

    @property
    def digest(self) -> str:
        """Of the layer as it came."""
        return f"sha256:{self._encoded.hexdigest()}"

    def feed(self, piece: bytes) -> None:
        """The next bytes as they come. Blocks. Raises `CannotWrite`."""
        self._encoded.update(piece)
        if not self._is_started:
            self._is_started = True
            compression = compression_of(piece)
            if compression == "gzip":
                self._inflater = GzipInflater()
            elif compression is not None:
                self._fault = f"it is compressed with {compression}; only gzip is undone for docker"
        if self._fault is None:
            self._write(piece)

    def fault_at_end(self) -> str | None:
        """Why the layer, which is over now, cannot be stored; None when it can."""
        if self._fault is None and self._inflater is not None and not self._inflater.is_complete:
            return "the gzip stream ends early"
        return self._fault

    def _write(self, piece: bytes) -> None:
        if self._inflater is None:
            self._member.write(piece)
            return
        try:
            for plain in self._inflater.feed(piece):
                self._member.write(plain)
        except GzipBroken as error:
            self._fault = str(error)


def _layer_name(diff_id: str) -> str:
    return diff_id.removeprefix("sha256:") + ".tar"

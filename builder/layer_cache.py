"""Layers that were converted on this host: what they are made of, found again by what they were made from.

A directory for each: the layer's bootstrap, the chunk tables of its blobs, a record, and its own blob's bytes
until they are in the target. It appears by a rename, whole.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import trio

from backend.bootstrap_layer import BOOTSTRAP_NAME, blob_meta_name
from backend.metadata_index import find_damage, write_index
from backend.publishing import (
    CannotWrite,
    publish_directory,
    reporting_writes,
    staging_directory,
    write_atomically,
)
from backend.store import BlobFile
from builder.build import BuiltImage
from builder.journal import is_in_use
from builder.options import BuildOptions

log = logging.getLogger(__name__)

RECORD_NAME = "layer.json"
OTHERS_PAUSE_S = 0.2
"""Between looks whether another conversion is done with a layer."""
_KEY = re.compile(r"[0-9a-f]{32}(?=$|\.lock$|\.work$)")
_LOCK = ".lock"
_WORK = ".work"
_FORMAT = 3
"""Of the layer bootstraps and records; layers made in another one are not found."""


class LayerBlob(msgspec.Struct, frozen=True, omit_defaults=True):
    """A blob of a layer; `source` is the image that holds it when it came from a chunk dictionary.

    With `table_of` it is the chunk table of that gzip layer, and has none of its own.
    """

    blob_id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]
    source: str = ""
    table_of: str = ""


class LayerRecord(msgspec.Struct, frozen=True):
    """What is known of a converted layer: `diff_id` is the digest of its tar, as it was found.

    `holders` are references of images that have its blobs.
    """

    blobs: tuple[LayerBlob, ...]
    bytes_in: int
    diff_id: str
    holders: tuple[str, ...] = ()


@dataclass(slots=True)
class ConvertedLayer:
    """A layer in the cache."""

    directory: Path
    blobs: tuple[LayerBlob, ...]
    bytes_in: int
    diff_id: str
    holders: list[str] = field(default_factory=list)
    is_new: bool = False

    @property
    def bootstrap(self) -> Path:
        """The layer's own bootstrap, with the marks of `builder.layer_marks`."""
        return self.directory / BOOTSTRAP_NAME

    def holder(self, blob: LayerBlob) -> str | None:
        """An image that has a blob, by what is known."""
        return blob.source or (self.holders[0] if self.holders else None)

    def prefer_holder(self, reference: str) -> None:
        """Has blobs taken from that image's repository, where they are not here."""
        self.holders[:] = [reference, *(holder for holder in self.holders if holder != reference)]

    def blob_file(self, blob: LayerBlob) -> BlobFile:
        """A blob as it is published: from its file here, or from an image that has it."""
        path = self.directory / blob.blob_id
        return BlobFile(
            blob.blob_id,
            blob.size_bytes,
            path if path.exists() else None,
            self.directory / blob_meta_name(blob.table_of or blob.blob_id),
            self.holder(blob),
            blob.table_of,
        )

    @property
    def tables(self) -> list[Path]:
        """The chunk tables of its data blobs."""
        return [self.directory / blob_meta_name(blob.blob_id) for blob in self.blobs if not blob.table_of]

    def note_holder(self, reference: str) -> None:
        """Its blobs are in that image's repository now: their bytes here go. Raises `CannotWrite`."""
        if reference != next(iter(self.holders), None):
            self.prefer_holder(reference)
            record = LayerRecord(self.blobs, self.bytes_in, self.diff_id, tuple(self.holders[:8]))
            with staging_directory(self.directory) as staging:
                write_atomically(self.directory / RECORD_NAME, msgspec.json.encode(record), staging)
        for blob in self.blobs:
            (self.directory / blob.blob_id).unlink(missing_ok=True)


class LayerCache:
    """The directory of all converted layers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def key(
        self, layer_digest: str, options: BuildOptions, dictionaries: Sequence[str], *, is_kept: bool
    ) -> str:
        """Names the layer as made from that source in that way; `dictionaries` are digests of bootstraps.

        With `is_kept` the source itself is the blob.
        """
        how = (
            _FORMAT,
            layer_digest,
            options.chunk_size,
            options.batch_size,
            options.compression.value,
            options.level,
            options.digester.value,
            *dictionaries,
            *(("kept",) if is_kept else ()),
        )
        return hashlib.sha256(repr(how).encode()).hexdigest()[:32]

    @asynccontextmanager
    async def locked(self, key: str) -> AsyncIterator[None]:
        """Keeps other conversions from a layer, from the look for it until its blobs are in the target.

        Waits for one that has it; what that makes will do. Raises `CannotWrite`.
        """
        with reporting_writes(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        while (lock := self._take_lock(key)) is None:  # noqa: ASYNC110  # another process has it
            await trio.sleep(OTHERS_PAUSE_S)
        try:
            os.utime(lock)  # the time of the last use
            yield
        finally:
            os.close(lock)

    def work_dir(self, key: str) -> Path:
        """Where that layer is made."""
        return self.directory / f"{key}{_WORK}"

    def all_keys(self) -> set[str]:
        """Of all that is here, whole or not."""
        if not self.directory.is_dir():
            return set()
        names = (_KEY.match(path.name) for path in self.directory.iterdir())
        return {name[0] for name in names if name is not None}

    def last_use_s(self, key: str) -> float:
        """When it was locked last, in seconds of the clock that files have."""
        for path in (self._lock_path(key), self.directory / key, self.work_dir(key)):
            with contextlib.suppress(FileNotFoundError):
                return path.stat().st_mtime
        return 0.0

    def size_bytes(self, key: str) -> int:
        """What it takes on the disk, roughly: the sizes of its files."""
        files = [*(self.directory / key).rglob("*"), *self.work_dir(key).rglob("*")]
        size = 0
        for path in files:
            with contextlib.suppress(FileNotFoundError):
                size += path.stat().st_size
        return size

    def discard(self, key: str) -> bool:
        """Removes a layer and what killed conversions left of it; False where it is in use.

        Raises `CannotWrite`.
        """
        lock = self._take_lock(key)
        if lock is None:
            return False
        try:
            # A process that outlived its conversion may be at work yet.
            if is_in_use(self.work_dir(key)):
                return False
            shutil.rmtree(self.work_dir(key), ignore_errors=True)
            self.forget(key)
            with reporting_writes(self.directory):
                self._lock_path(key).unlink(missing_ok=True)
        finally:
            os.close(lock)
        return True

    def _lock_path(self, key: str) -> Path:
        return self.directory / f"{key}{_LOCK}"

    def _take_lock(self, key: str) -> int | None:
        """A descriptor that holds the lock; None where somebody else has it, or has just removed its file."""
        path = self._lock_path(key)
        with reporting_writes(path):
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if _is_locked(lock) and os.fstat(lock).st_nlink:
            return lock
        os.close(lock)
        return None

    def find(self, key: str) -> ConvertedLayer | None:
        """A layer made earlier; None for one that is not there or not whole."""
        directory = self.directory / key
        try:
            record = msgspec.json.decode((directory / RECORD_NAME).read_bytes(), type=LayerRecord)
        except (OSError, msgspec.DecodeError):
            return None
        holders = list(record.holders)
        layer = ConvertedLayer(directory, record.blobs, record.bytes_in, record.diff_id, holders)
        files = [layer.bootstrap, *layer.tables]
        missing = [f"{file.name}: not there" for file in files if not file.is_file()]
        if damage := next(iter(missing), None) or find_damage(directory):
            log.warning("%s is damaged and is made again: %s", directory, damage)
            return None
        return layer

    def add(self, key: str, built: BuiltImage, holders: tuple[str, ...] = ()) -> ConvertedLayer:
        """Takes a layer's files out of its work directory, which goes; `holders` have its blob already.

        Raises `CannotWrite`.
        """
        blobs = tuple(
            LayerBlob(blob.blob_id, blob.size_bytes, blob.source or "", blob.table_of)
            for blob in built.files.blobs
        )
        record = LayerRecord(blobs, built.statistics.bytes_in, built.diff_id, holders)
        with staging_directory(self.directory) as staging:
            unpacked = staging / key
            with reporting_writes(unpacked):
                unpacked.mkdir()
                built.files.bootstrap.rename(unpacked / BOOTSTRAP_NAME)
                for blob in built.files.blobs:
                    if not blob.table_of:
                        shutil.copyfile(blob.meta, unpacked / blob_meta_name(blob.blob_id))
                write_index(unpacked)
                for blob in built.files.blobs:
                    if blob.path is not None:
                        blob.path.rename(unpacked / blob.blob_id)
                (unpacked / RECORD_NAME).write_bytes(msgspec.json.encode(record))
            layer = self._settle(key, unpacked)
        shutil.rmtree(self.work_dir(key), ignore_errors=True)
        layer.is_new = True
        return layer

    def adopt(self, key: str, unpacked: Path, record: LayerRecord) -> ConvertedLayer:
        """Takes a directory with a layer's bootstrap and chunk tables. Raises `CannotWrite`."""
        with reporting_writes(unpacked):
            write_index(unpacked)
            (unpacked / RECORD_NAME).write_bytes(msgspec.json.encode(record))
        return self._settle(key, unpacked)

    def _settle(self, key: str, unpacked: Path) -> ConvertedLayer:
        self.forget(key)
        publish_directory(unpacked, self.directory / key)
        layer = self.find(key)
        if layer is None:
            raise CannotWrite(where=self.directory / key, why="a layer's files are not all there")
        return layer

    def forget(self, key: str) -> None:
        """Removes a layer."""
        shutil.rmtree(self.directory / key, ignore_errors=True)


def _is_locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

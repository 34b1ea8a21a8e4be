"""The snapshotter: snapshots as containerd has them, over layers that were unpacked and images that are
mounted.

Concurrency: every method may be called from any thread, and waits for what it needs. The ledger orders
changes; nothing else is held while a directory is made or an image is mounted.
"""

import fcntl
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from fuse.snapshotter.cache_files import CacheUsage
from fuse.snapshotter.directories import Directories, Usage, disk_usage
from fuse.snapshotter.failures import (
    ImageUnavailable,
    RootUnusable,
    SnapshotError,
    SnapshotExists,
    SnapshotUnfit,
)
from fuse.snapshotter.filters import Field, Filters
from fuse.snapshotter.image_mounts import ImageMounter, ImageMounts
from fuse.snapshotter.label_changes import change_labels
from fuse.snapshotter.layer_labels import read_labels
from fuse.snapshotter.ledger import SNAPSHOT_REF, Ledger
from fuse.snapshotter.mounts import Mount, OverlayOptions, mounts_of
from fuse.snapshotter.pulls import LazyLayer, Planning, Pulls
from fuse.snapshotter.records import Kind, Snapshot, SourceLayer
from rafs.errors import NydusError

IDS_AT_ONCE = 64
TRIES = 3


class Restoring(Protocol):
    """What fetches a layer whose files were left out, for threads that may wait."""

    def restore(self, layer: SourceLayer, lower: Sequence[Path], place: Path) -> Path:
        """See `LayerRestorer.restore`."""
        ...


class Snapshotter:
    """See above."""

    def __init__(
        self,
        root: Path,
        mounter: ImageMounter,
        planning: Planning,
        restoring: Restoring,
        cache_dir: Path,
        overlay: OverlayOptions | None = None,
    ) -> None:
        """Opens the root, or makes it. Raises `RootUnusable`."""
        self._directories = Directories(root)
        self._root_lock = _lock_root(root)
        self._ledger = Ledger(root / "snapshots.db")
        self._overlay = OverlayOptions.of_this_host() if overlay is None else overlay
        self._images = ImageMounts(self._ledger, self._directories, mounter, cache_dir)
        self._pulls = Pulls(planning, self._mount_image, self._images.drop)
        self._restoring = restoring
        self._cache = CacheUsage(cache_dir)
        self._lock = threading.Lock()
        self._making: set[int] = set()
        self._restore_locks: dict[int, threading.Lock] = {}
        self._numbers: Iterator[int] = iter(())

    def close(self) -> None:
        """Closes the ledger. Mounts stay."""
        self._ledger.close()
        os.close(self._root_lock)

    def recover(self) -> None:
        """Goes on with what a process before has left: rubbish goes, images are mounted again."""
        self._images.drop_unused(kept_s=0.0)
        self._sweep()
        self._images.restore()

    # -- new snapshots

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """A new active snapshot.

        Raises `SnapshotExists` for a key in use; also when the layer that `labels` ask for is there, which
        tells containerd that it need not be fetched. `SnapshotMissing` without the parent, `RequestInvalid`
        for one that is not committed, `ImageUnavailable`, `NoRoom`, `SnapshotError`.
        """
        ref = labels.get(SNAPSHOT_REF)
        if ref and self._ledger.find(key) is None:
            self._take_layer(ref, parent, labels)
        return self._create(Kind.ACTIVE, key, parent, labels)

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """A new read-only snapshot. Raises as `prepare`."""
        return self._create(Kind.VIEW, key, parent, labels)

    def _take_layer(self, ref: str, parent: str, labels: Mapping[str, str]) -> None:
        """Raises `SnapshotExists` if the layer needs no unpacking, and returns otherwise."""
        if self._ledger.find_layer(ref, parent) is not None:
            raise SnapshotExists(name=ref)
        depth = len(self._ledger.chain(parent)) if parent else 0
        for _ in range(TRIES):
            lazy = self._pulls.decide(read_labels(labels), ref, depth)
            if lazy is None:
                return
            try:
                self._add_layer(lazy, ref, parent, labels)
            except SnapshotUnfit:
                continue  # the last snapshot of its image has just been removed, and the image with it
            raise SnapshotExists(name=ref)
        raise ImageUnavailable(reference=ref, why="it is removed again and again while it is pulled")

    def _add_layer(self, lazy: LazyLayer, ref: str, parent: str, labels: Mapping[str, str]) -> None:
        with self._new_number() as number:
            self._directories.create(number, None, has_work=False)
            try:
                self._ledger.add_layer(
                    number, ref, parent, labels, lazy.layer.blob_id, lazy.layer.source, lazy.image_id
                )
            except SnapshotExists:
                self._directories.discard(number)  # another pull was faster
            except BaseException:
                self._directories.discard(number)
                raise

    def _create(self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        if self._ledger.find(key) is not None:
            raise SnapshotExists(name=key)
        chain = self._ledger.chain(parent) if parent else []
        lower = self._lower(chain)
        with self._new_number() as number:
            owner = lower[0] if lower else None
            self._directories.create(number, owner, has_work=kind is Kind.ACTIVE)
            try:
                self._ledger.add(number, kind, key, parent, labels)
            except BaseException:
                self._directories.discard(number)
                raise
        return mounts_of(Snapshot(number, key, kind), lower, self._directories, self._overlay)

    def mounts(self, key: str) -> list[Mount]:
        """The mounts of an active snapshot or a view.

        Raises `SnapshotMissing`, `SnapshotUnfit`, and as above.
        """
        chain = self._ledger.chain(key)
        if chain[0].kind is Kind.COMMITTED:
            raise SnapshotUnfit(name=key, why="it is committed, and not active or a view")
        return mounts_of(chain[0], self._lower(chain[1:]), self._directories, self._overlay)

    # -- what is below

    def _lower(self, chain: Sequence[Snapshot]) -> list[Path]:
        """The directories of committed snapshots, the topmost first, every one of them usable now."""
        if chain and chain[0].blob_id and chain[0].image_id is None:
            raise SnapshotUnfit(name=chain[0].name, why="it is a blob of a Nydus image and has no files")
        used: list[Snapshot] = []
        base: list[Path] = []
        for snapshot in chain:
            if snapshot.image_id is not None:
                base = [self._images.ensure(self._ledger.image(snapshot.image_id))]
                break
            used.append(snapshot)
        lower = base
        for snapshot in reversed(used):
            if snapshot.source is not None:
                self._restore(snapshot, snapshot.source, lower)
            lower = [self._directories.files(snapshot.id), *lower]
        return lower

    def _restore(self, snapshot: Snapshot, source: SourceLayer, lower: Sequence[Path]) -> None:
        """Fetches the files of a layer that were left out, once."""
        with self._lock:
            lock = self._restore_locks.setdefault(snapshot.id, threading.Lock())
        with lock:
            if self._ledger.get(snapshot.name).source is None:
                return
            try:
                filled = self._restoring.restore(source, lower, self._directories.place(snapshot.id))
            except SnapshotError:
                raise
            except NydusError as error:
                why = f"layer {source.digest} has no files here and cannot be fetched: {error}"
                raise ImageUnavailable(reference=source.reference, why=why) from error
            self._directories.replace_files(snapshot.id, filled)
            self._ledger.set_restored(snapshot.id, *disk_usage(self._directories.files(snapshot.id)))

    # -- changes

    def commit(self, name: str, key: str, labels: Mapping[str, str]) -> None:
        """Makes an active snapshot a committed one.

        Raises `SnapshotMissing`, `SnapshotExists`, `SnapshotUnfit`.
        """
        usage = disk_usage(self._directories.files(self._ledger.get(key).id))
        self._ledger.commit(key, name, labels, *usage)

    def remove(self, key: str) -> None:
        """Forgets a snapshot; `cleanup` frees its space. Raises `SnapshotMissing`, `SnapshotUnfit`."""
        gone = self._ledger.remove(key)
        self._directories.doom(gone.id)
        with self._lock:
            self._restore_locks.pop(gone.id, None)
        if gone.image_id is not None:
            self._images.drop(gone.image_id)

    def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot:
        """Changes labels, all or those that `paths` name. Raises `SnapshotMissing`, `RequestInvalid`."""
        return self._ledger.relabel(name, lambda old: change_labels(old, labels, paths))

    def cleanup(self) -> None:
        """Frees what removed snapshots and unfinished pulls have left."""
        self._images.drop_unused()
        self._sweep()

    # -- questions

    def stat(self, key: str) -> Snapshot:
        """A snapshot. Raises `SnapshotMissing`."""
        return self._ledger.get(key)

    def list(self, filters: Sequence[str]) -> list[Snapshot]:
        """Those that one of the filters means, all without any. Raises `RequestInvalid`."""
        wanted = Filters(filters)
        return [snapshot for snapshot in self._ledger.everything() if wanted.match(_fields(snapshot))]

    def usage(self, key: str) -> Usage:
        """What a snapshot itself takes on the disk. For layers of images: in the cache.

        Raises `SnapshotMissing`.
        """
        snapshot = self._ledger.get(key)
        if snapshot.kind is Kind.ACTIVE:
            return disk_usage(self._directories.files(snapshot.id))
        if snapshot.image_id is not None:
            return self._cache.of_image(self._ledger.image(snapshot.image_id).digest)
        if snapshot.blob_id:
            return self._cache.of_blob(snapshot.blob_id)
        return Usage(snapshot.size_bytes, snapshot.inodes)

    # -- inside

    def _mount_image(self, reference: str) -> int:
        return self._images.provide(reference).id

    def _sweep(self) -> None:
        def known() -> set[int]:
            with self._lock:
                making = set(self._making)
            return making | self._ledger.ids()

        self._directories.sweep(known)

    @contextmanager
    def _new_number(self) -> Iterator[int]:
        """A number for a directory that is being made, which is no rubbish meanwhile."""
        with self._lock:
            number = next(self._numbers, None)
            if number is None:
                first = self._ledger.new_id(IDS_AT_ONCE)
                self._numbers = iter(range(first + 1, first + IDS_AT_ONCE))
                number = first
            self._making.add(number)
        try:
            yield number
        finally:
            with self._lock:
                self._making.discard(number)


def _lock_root(root: Path) -> int:
    """The lock that keeps a second process off; it ends with this one, however that ends."""
    lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise RootUnusable(where=root, why="another snapshotter uses it") from error
    return lock


def _fields(snapshot: Snapshot) -> Field:
    """The fields of a snapshot, as filters name them."""

    def field(path: tuple[str, ...]) -> str | None:
        match path:
            case ("name", *_):
                return snapshot.name
            case ("parent", *_):
                return snapshot.parent
            case ("kind", *_):
                return snapshot.kind.name.lower()
            case ("labels", *rest):
                return snapshot.labels.get(".".join(rest))
        return None

    return field

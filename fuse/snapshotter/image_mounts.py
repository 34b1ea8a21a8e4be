"""Images as directories: each is mounted by the agent, once, for all snapshots that need it.

The agent and its supervisor keep a mount alive whatever happens to this process. Should both of them be gone,
or the host have been started again, the image is mounted anew from the metadata and the cache on this host;
the registry is not asked for what is there.

Concurrency: methods may be called from any thread. Each image has a lock of its own, so that one that does
not answer keeps nobody waiting but those who want it.
"""

import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fuse.mount_table import find_mount
from fuse.mountpoint import is_dead
from fuse.snapshotter.cache_files import forget_image
from fuse.snapshotter.directories import Directories, detach_mounts
from fuse.snapshotter.failures import ImageUnavailable
from fuse.snapshotter.ledger import Ledger
from fuse.snapshotter.records import ImageRecord
from rafs.errors import NydusError

log = logging.getLogger(__name__)

UNUSED_KEPT_S = 900.0
"""An image that was mounted for a pull which never came to its end is kept so long."""
RESTORED_AT_ONCE = 4
AGENT_WITHIN_S = 60.0


class ImageMounter(Protocol):
    """Who mounts images."""

    def identity(self) -> object | None:
        """Something that changes when the mounts of before may be gone; None when nobody is there."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Returns when somebody is there or will come when asked, at the latest after so many seconds."""
        ...

    def mount(self, reference: str, directory: Path) -> None:
        """Mounts an image. Raises `NydusError`, `OSError`."""
        ...

    def unmount(self, directory: Path) -> None:
        """Unmounts it, also when it is in use. Raises `NydusError`, `OSError`."""
        ...

    def mounted_digests(self) -> set[str]:
        """Of the manifests of all images that are mounted on this host. Raises `NydusError`, `OSError`."""
        ...

    def serves(self, directory: Path) -> bool:
        """Whether a mount there is one that reads are answered for. Raises `NydusError`, `OSError`."""
        ...


@dataclass(slots=True)
class _State:
    lock: threading.Lock = field(default_factory=threading.Lock)
    served_by: object | None = None
    used_at: float = field(default_factory=time.monotonic)


class ImageMounts:
    """See above."""

    def __init__(
        self, ledger: Ledger, directories: Directories, mounter: ImageMounter, cache_dir: Path
    ) -> None:
        """`cache_dir` is that of the mounts."""
        self._cache_dir = cache_dir
        self._ledger = ledger
        self._directories = directories
        self._mounter = mounter
        self._states: dict[int, _State] = {}
        self._lock = threading.Lock()
        self._freeing = threading.Lock()

    def provide(self, reference: str) -> ImageRecord:
        """The image of that exact name, mounted. Raises as `ensure`."""
        image = self._ledger.find_image(reference)
        if image is None:
            image = self._ledger.add_image(self._ledger.new_id(), reference)
        self.ensure(image)
        return image

    def ensure(self, image: ImageRecord) -> Path:
        """Where the files of the image are, now. Raises `ImageUnavailable`, `NoRoom`."""
        state = self._state(image.id)
        state.used_at = time.monotonic()
        path = self._directories.files(image.id)
        if self._is_served(state, path):
            return path
        with state.lock:
            if not self._is_served(state, path):
                self._mount(image, path, state)
        return path

    def _is_served(self, state: _State, path: Path) -> bool:
        return (
            state.served_by is not None
            and state.served_by == self._mounter.identity()
            and _is_mounted(path)
            and not is_dead(path)
        )

    def _mount(self, image: ImageRecord, path: Path, state: _State) -> None:
        state.served_by = None
        try:
            if find_mount(path) is not None and not (not is_dead(path) and self._mounter.serves(path)):
                log.warning("%s: nobody serves its mount any more, it is mounted again", image.reference)
                detach_mounts(path)
            if find_mount(path) is None:
                if not path.exists():
                    self._directories.create(image.id, None, has_work=False)
                self._mounter.mount(image.reference, path)
            state.served_by = self._mounter.identity()
        except OSError as error:
            why = f"the agent does not answer: {error.strerror or error}"
            raise ImageUnavailable(reference=image.reference, why=why) from error
        except NydusError as error:
            raise ImageUnavailable(reference=image.reference, why=str(error)) from error

    def drop(self, number: int) -> None:
        """Unmounts an image that no snapshot needs any more. One that is needed stays."""
        state = self._state(number)
        with state.lock:
            if not self._ledger.drop_image(number):
                return
            self._detach(number)
            with self._lock:
                self._states.pop(number, None)
        self.free_cache()

    def drop_unused(self, kept_s: float = UNUSED_KEPT_S) -> None:
        """Drops what no snapshot needs, and no pull has asked for within `kept_s`."""
        due = time.monotonic() - kept_s
        for image in self._ledger.images():
            if kept_s <= 0 or self._state(image.id).used_at <= due:
                self.drop(image.id)
        self.free_cache()

    def restore(self) -> None:
        """Mounts all images, some at a time. One that cannot be mounted is said in the log, and is tried
        again when somebody wants it.
        """
        images = self._ledger.images()
        if images:
            self._mounter.wait(AGENT_WITHIN_S)  # after a start of the host it may come later than we do
        with ThreadPoolExecutor(RESTORED_AT_ONCE, "restore-images") as workers:
            list(workers.map(self._restore_one, images))

    def _restore_one(self, image: ImageRecord) -> None:
        try:
            self.ensure(image)
        except NydusError as error:
            log.warning("not mounted again, others are not concerned: %s", error)

    def _detach(self, number: int) -> None:
        path = self._directories.files(number)
        try:
            if find_mount(path) is not None:
                self._mounter.unmount(path)
        except (OSError, NydusError) as error:
            log.info("%s: detached without the agent: %s", path, error)
        try:
            detach_mounts(path)
        except NydusError as error:
            log.warning("%s", error)
        self._directories.doom(number)

    def free_cache(self) -> None:
        """What only images that were dropped have in the cache goes; else the disk would never get it back.

        What somebody has mounted, also by other means than this, stays until the next time.
        """
        with self._freeing:
            released = self._ledger.released()
            if not released:
                return
            try:
                mounted = self._mounter.mounted_digests()
                ours = {image.digest for image in self._ledger.images()}
                for digest in released:
                    if digest not in mounted | ours:
                        forget_image(self._cache_dir, digest, mounted | ours)
                    if digest not in mounted:
                        self._ledger.forget_released(digest)
            except (OSError, NydusError) as error:
                log.info("the cache of removed images stays for now: %s", error)

    def _state(self, number: int) -> _State:
        with self._lock:
            return self._states.setdefault(number, _State())


def _is_mounted(path: Path) -> bool:
    try:
        return os.lstat(path).st_dev != os.lstat(path.parent).st_dev
    except OSError:
        return False

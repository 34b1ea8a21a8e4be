"""The stage that compares drivers with each other, with ext4, and with the kernel's EROFS without us.

All read the same decoded cache files, but for ext4, which has a copy of the source, and the lazy one, which
begins with an empty cache and a source in a local directory: what is compared is the way to the reader, not
the network.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fuse.erofs.mount_api import mount_erofs
from fuse.mountpoint import unmount
from tools.bench import ledger as q
from tools.bench import observe
from tools.bench.goals import (
    DRIVER_EROFS,
    DRIVER_EROFS_LAZY,
    DRIVER_FUSE,
    DRIVER_PYFUSE3,
    EROFS_ALONE,
    EXT4,
)
from tools.bench.nydus import Nydus
from tools.bench.process import run_measured
from tools.bench.reading import Reading, require_same
from tools.bench.rounds import interleave
from tools.bench.volumes import Volume, kernel_volume, make_ext4

SETTLE_S = 1.0
RANDOM_READS_FACTOR = 10
"""A sample of `Profile.random_reads` takes the fastest of these drivers 50 ms, which is too short."""

Tell = Callable[[str], None]
OUR_DRIVERS = ((DRIVER_EROFS, "erofs"), (DRIVER_FUSE, "fuse"), (DRIVER_PYFUSE3, "pyfuse3"))


@dataclass(frozen=True, slots=True)
class DriverContest:
    """The volumes of one source tree."""

    scene: str
    place: Path
    source: Path
    nydus: Nydus
    files: int
    tell: Tell

    def volumes(self) -> list[Volume]:
        """Builds the image, fills the cache, and makes ext4. Raises `CommandFailed`."""
        self.tell(f"{self.scene}: building, and filling the cache")
        environment = self.nydus.environment()
        command = self.nydus.command("build", self.source, self._reference, "--compressor", "none")
        run_measured(command, environment=environment)
        self.nydus.forget()
        with self.nydus.mounted(self._reference, self._mountpoint, (), ("--driver", "erofs")) as root:
            read_all = 'find "$0" -type f -exec cat {} + > /dev/null'
            run_measured(["sh", "-c", read_all, root], timeout_s=600)
        self.tell(f"{self.scene}: making the ext4 image")
        size = sum(path.lstat().st_size for path in self.source.rglob("*"))
        image = self._named(".ext4")
        make_ext4(self.source, image, size, self.files)
        ours = [Volume(name, self._attach(self.nydus, driver)) for name, driver in OUR_DRIVERS]
        alone = Volume(EROFS_ALONE, lambda prefix: self._alone())
        lazy = Volume(DRIVER_EROFS_LAZY, lambda prefix: self._lazy(prefix))
        return [*ours, alone, lazy, kernel_volume(EXT4, "ext4", image, self._named(".mnt-ext4"))]

    @property
    def _reference(self) -> str:
        return f"dir:{self._named('.image')}"

    @property
    def _mountpoint(self) -> Path:
        return self._named(".mnt")

    def _named(self, suffix: str) -> Path:
        return self.place / f"{self.source.name}{suffix}"

    def _attach(
        self, nydus: Nydus, driver: str
    ) -> Callable[[Sequence[str]], contextlib.AbstractContextManager[Path]]:
        options = ("--driver", driver)
        return lambda prefix: nydus.mounted(self._reference, self._mountpoint, prefix, options)

    @contextlib.contextmanager
    def _lazy(self, prefix: Sequence[str]) -> Iterator[Path]:
        empty = Nydus(self._named(".lazy-cache"), self.nydus.run_dir)
        empty.forget()
        try:
            with self._attach(empty, "erofs")(prefix) as root:
                yield root
        finally:
            empty.forget()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[Path]:
        """The same bootstrap and the same cache files, mounted by the kernel; no mark, no process of ours."""
        directory = self._named(".mnt-alone")
        directory.mkdir(exist_ok=True)
        (bootstrap,) = (self.nydus.cache_dir / "images").glob("*/image.boot")
        devices = [
            os.open(path, os.O_RDONLY) for path in (self.nydus.cache_dir / "blobs").glob("*.blob.data")
        ]
        try:
            mount_erofs(bootstrap, devices, directory)
            yield directory
        finally:
            for device in devices:
                os.close(device)
            if os.path.ismount(directory):
                unmount(directory)


@contextlib.contextmanager
def settled(volume: Volume, prefix: Sequence[str] = ()) -> Iterator[Path]:
    """A volume some time after it was mounted: how a driver reads is compared, not how it starts."""
    with volume.attach(prefix) as root:
        time.sleep(SETTLE_S)
        yield root


def compare_large(scene: str, reading: Reading, volumes: Sequence[Volume], source: Path, names: Path) -> None:
    """One large file: sequentially, mapped, and at random. Raises `ContentsDiffer`.

    cold: all caches of the kernel empty. remounted: without the file's own pages, with those below it.
    """
    ledger, seed = reading.ledger, reading.profile.seed
    reads = RANDOM_READS_FACTOR * reading.profile.random_reads
    (name,) = (path.name for path in source.iterdir())
    expected = observe.file_digest(source / name)

    def measure(volume: Volume, number: int) -> None:
        reading.tell(f"{scene}: {volume.name}, round {number + 1}")

        def note(quantity: q.Quantity, sample: float) -> None:
            ledger.add(scene, volume.name, quantity, sample)

        with settled(volume) as root:
            reading.page_cache.drop()
            note(q.RATE_COLD, observe.sequential_rate(root / name))
            note(q.RATE_WARM, observe.sequential_rate(root / name))
        with settled(volume) as root:
            reading.page_cache.drop()
            note(q.MAPPED, observe.mapped_rate(root / name))
        with settled(volume) as root:
            note(q.RATE_REMOUNTED, observe.sequential_rate(root / name))
        for quantity, prefix in ((q.RANDOM, ()), (q.RANDOM_PINNED, observe.PINNED)):
            with settled(volume, prefix) as root:
                note(quantity, observe.random_rate(root / name, reads, seed, pinned=bool(prefix)))
                if number == 0 and not prefix:
                    require_same(scene, volume, observe.file_digest(root / name), expected)

    interleave(scene, volumes, reading.rounds, measure, ledger)


def compare_tree(scene: str, reading: Reading, volumes: Sequence[Volume], source: Path, names: Path) -> None:
    """A tree: listing it, with attributes, and reading every file. Raises `ContentsDiffer`."""
    ledger = reading.ledger
    expected = observe.tree_digest(source, names)

    def measure(volume: Volume, number: int) -> None:
        reading.tell(f"{scene}: {volume.name}, round {number + 1}")

        def note(quantity: q.Quantity, sample: float) -> None:
            ledger.add(scene, volume.name, quantity, sample)

        with settled(volume) as root:
            reading.page_cache.drop()
            note(q.FIND_SIZES, observe.find_size_time_s(root))
            note(q.FIND_WARM, observe.find_time_s(root))
            note(q.FIND_WARM, observe.find_time_s(root))
        with settled(volume) as root:
            reading.page_cache.drop()
            note(q.READ_ALL_COLD, observe.read_all_time_s(root, names))
            note(q.READ_ALL_WARM, observe.read_all_time_s(root, names))
            note(q.READ_ALL_PINNED, observe.read_all_time_s(root, names, pinned=True))
            if number == 0:
                require_same(scene, volume, observe.tree_digest(root, names), expected)

    interleave(scene, volumes, reading.rounds, measure, ledger)

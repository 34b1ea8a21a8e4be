"""The stages that read what is mounted: contents, and metadata. What was read is verified."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rafs.errors import NydusError
from tools.bench import ledger as q
from tools.bench import observe
from tools.bench.ledger import NYDUS, Ledger
from tools.bench.nydus import Nydus
from tools.bench.page_cache import PageCache
from tools.bench.profile import Profile
from tools.bench.rounds import interleave
from tools.bench.volumes import Volume

Tell = Callable[[str], None]


class ContentsDiffer(NydusError):
    """A mount does not show what was put into the image; then no number of this run counts."""

    message = "{what}: the contents differ from the source: sha256 {found}, not {expected}"
    exit_code: ClassVar[int] = 106


@dataclass(frozen=True, slots=True)
class Reading:
    """What the stages share."""

    nydus: Nydus
    page_cache: PageCache
    profile: Profile
    rounds: int
    ledger: Ledger
    tell: Tell


def compare_reads(scene: str, reading: Reading, volumes: Sequence[Volume], source: Path) -> None:
    """Reads one file sequentially and at random from every volume. Raises `ContentsDiffer`.

    cold: after a remount, all caches of the kernel empty (where that is allowed). warm: once more. remounted:
    without the file's own pages, but with those of the image or the cache of nydus-py below in memory.
    empty cache: nydus-py fetches, verifies and decodes everything first.
    """
    ledger, seed = reading.ledger, reading.profile.seed
    expected = observe.file_digest(source)

    def measure(volume: Volume, number: int) -> None:
        reading.tell(f"{scene}: {volume.name}, round {number + 1}")

        def note(quantity: q.Quantity, sample: float) -> None:
            ledger.add(scene, volume.name, quantity, sample)

        memory: int | None = None
        if volume.name == NYDUS:
            reading.nydus.forget()
            with volume.attach(()) as root:
                note(q.RATE_EMPTY, observe.sequential_rate(root / source.name))
                memory = reading.nydus.memory_bytes(root)
        with volume.attach(()) as root:
            reading.page_cache.drop()
            note(q.RATE_COLD, observe.sequential_rate(root / source.name))
            note(q.RATE_WARM, observe.sequential_rate(root / source.name))
            note(q.RATE_WARM, observe.sequential_rate(root / source.name))
        with volume.attach(()) as root:
            note(q.RATE_REMOUNTED, observe.sequential_rate(root / source.name))
        for quantity, prefix in ((q.RANDOM, ()), (q.RANDOM_PINNED, observe.PINNED)):
            with volume.attach(prefix) as root:
                reads = reading.profile.random_reads
                rate = observe.random_rate(root / source.name, reads, seed, pinned=bool(prefix))
                note(quantity, rate)
                if number == 0:
                    require_same(scene, volume, observe.file_digest(root / source.name), expected)

        if memory is not None:
            note(q.SERVER_MEMORY, memory)

    interleave(scene, volumes, reading.rounds, measure, ledger)


def compare_metadata(
    scene: str, reading: Reading, volumes: Sequence[Volume], source: Path, names: Path
) -> None:
    """Lists the tree and asks for the attributes of every file, cold and warm. Raises `ContentsDiffer`."""
    ledger = reading.ledger
    expected = observe.tree_digest(source, names)

    def measure(volume: Volume, number: int) -> None:
        reading.tell(f"{scene}: {volume.name}, round {number + 1}")
        for cold, warm, run in (
            (q.FIND_COLD, q.FIND_WARM, observe.find_time_s),
            (q.STAT_COLD, q.STAT_WARM, lambda root: observe.stat_time_s(root, names)),
        ):
            with volume.attach(()) as root:
                reading.page_cache.drop()
                ledger.add(scene, volume.name, cold, run(root))
                ledger.add(scene, volume.name, warm, run(root))
        if number == 0:
            with volume.attach(()) as root:
                require_same(scene, volume, observe.tree_digest(root, names), expected)

    interleave(scene, volumes, reading.rounds, measure, ledger)


def require_same(scene: str, volume: Volume, found: str, expected: str) -> None:
    """Raises `ContentsDiffer` unless what was read is what was put in."""
    if found != expected:
        raise ContentsDiffer(what=f"{scene}: {volume.name}", found=found, expected=expected)

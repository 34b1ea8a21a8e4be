"""What was measured: samples of a quantity, of a subject, in a scene; and what could not be measured."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quantity:
    """Something with a unit that is better when it is low, or high."""

    name: str
    unit: str
    higher_is_better: bool = False

    def best(self, samples: tuple[float, ...]) -> float:
        """The sample that other work on the machine disturbed least."""
        return max(samples) if self.higher_is_better else min(samples)


WALL = Quantity("wall", "s")
ON_DISK = Quantity("wall + sync", "s")
CPU = Quantity("CPU", "s")
PEAK_PSS = Quantity("peak PSS", "B")
PEAK_RSS = Quantity("sum of RSS", "B")
SIZE = Quantity("size", "B")
COMPRESSION = Quantity("of input", "x")
USABLE = Quantity("usable", "s")
USABLE_AGAIN = Quantity("usable again", "s")
FETCHED = Quantity("fetched to mount", "B")
FETCHED_FOR_READ = Quantity("fetched for a 4 KiB read", "B")
RATE_EMPTY = Quantity("empty cache", "MB/s", higher_is_better=True)
RATE_COLD = Quantity("cold", "MB/s", higher_is_better=True)
RATE_REMOUNTED = Quantity("remounted", "MB/s", higher_is_better=True)
RATE_WARM = Quantity("warm", "MB/s", higher_is_better=True)
RANDOM = Quantity("random 4 KiB", "IOPS", higher_is_better=True)
RANDOM_PINNED = Quantity("same, one CPU", "IOPS", higher_is_better=True)
FIND_COLD = Quantity("find cold", "s")
FIND_WARM = Quantity("find warm", "s")
STAT_COLD = Quantity("stat cold", "s")
STAT_WARM = Quantity("stat warm", "s")
MAPPED = Quantity("mapped", "MB/s", higher_is_better=True)
FIND_SIZES = Quantity("find + stat", "s")
READ_ALL_COLD = Quantity("read all cold", "s")
READ_ALL_WARM = Quantity("read all warm", "s")
READ_ALL_PINNED = Quantity("same, one CPU", "s")
SERVER_MEMORY = Quantity("server memory", "B")

NYDUS = "nydus-py"


@dataclass(frozen=True, slots=True)
class Series:
    """All samples of one quantity of one subject in one scene, in the unit of the quantity."""

    scene: str
    subject: str
    quantity: Quantity
    samples: tuple[float, ...]

    @property
    def best(self) -> float:
        """The best sample."""
        return self.quantity.best(self.samples)


@dataclass(frozen=True, slots=True)
class Missing:
    """Something that was not measured, and why. `failed`: it could have been, but went wrong."""

    what: str
    why: str
    failed: bool


class Ledger:
    """Collects samples in the order in which scenes, subjects and quantities first appear."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, str, Quantity], list[float]] = {}
        self._missing: list[Missing] = []

    def add(self, scene: str, subject: str, quantity: Quantity, sample: float) -> None:
        """Notes one sample."""
        self._samples.setdefault((scene, subject, quantity), []).append(sample)

    def miss(self, what: str, why: str, *, failed: bool = False) -> None:
        """Notes that `what` is not measured; the same note once."""
        note = Missing(what, why, failed)
        if note not in self._missing:
            self._missing.append(note)

    @property
    def missing(self) -> tuple[Missing, ...]:
        """What was not measured."""
        return tuple(self._missing)

    @property
    def failed(self) -> bool:
        """Whether something went wrong."""
        return any(note.failed for note in self._missing)

    def series(self) -> Iterator[Series]:
        """Everything measured."""
        for (scene, subject, quantity), samples in self._samples.items():
            yield Series(scene, subject, quantity, tuple(samples))

    def best(self, scene: str, subject: str, quantity: Quantity) -> float | None:
        """The best sample; None when there is none."""
        samples = self._samples.get((scene, subject, quantity))
        return quantity.best(tuple(samples)) if samples else None

    def scenes(self) -> list[str]:
        """The scenes with samples."""
        return list(dict.fromkeys(scene for scene, _, _ in self._samples))

    def subjects(self, scene: str) -> list[str]:
        """The subjects measured in a scene."""
        return list(dict.fromkeys(subject for where, subject, _ in self._samples if where == scene))

    def quantities(self, scene: str) -> list[Quantity]:
        """The quantities measured in a scene."""
        return list(dict.fromkeys(quantity for where, _, quantity in self._samples if where == scene))

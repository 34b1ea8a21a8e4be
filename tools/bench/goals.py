"""The numbers to reach, and whether they were."""

from dataclasses import dataclass

from tools.bench import ledger as q
from tools.bench.ledger import NYDUS, Ledger, Quantity

BUILD_TREE = "build: tree of small files"
BUILD_WEIGHTS = "build: weights"
BUILD_TEXT = "build: one file of text and code"
CONVERT = "convert: image of the tree and the weights"
INDEX_LAYER = "index: the tree as a gzip layer"
MOUNT_TREE = "mount from a registry: tree of small files"
MOUNT_WEIGHTS = "mount from a registry: weights"
READ = "read: weights, 1 MiB at a time"
METADATA = "metadata: tree of small files"

DRIVERS_LARGE = "drivers: weights"
DRIVERS_TREE = "drivers: tree of small files"

DRIVER_EROFS = "nydus-py erofs"
DRIVER_EROFS_LAZY = "nydus-py erofs, lazy"
DRIVER_FUSE = "nydus-py fuse"
DRIVER_PYFUSE3 = "nydus-py pyfuse3"
EROFS_ALONE = "erofs without us"
TAR_ZSTD = "tar | zstd -3 -T0"
ZSTD = "zstd -3 -T0"
GUNZIP = "gunzip"
SQUASHFS = "mksquashfs zstd"
SQUASHFS_3 = "mksquashfs zstd -3"
EXT4 = "ext4"
SKOPEO_TAR = "skopeo copy + tar -x"

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on a quantity of nydus-py: on its ratio to `beat`, or on itself when `beat` is None.

    The bound is an upper one, or a lower one where higher is better. `subject` is what has to reach it.
    """

    scene: str
    quantity: Quantity
    beat: str | None
    bound: float
    subject: str = NYDUS


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal beside what was measured; `value` and `met` are None when it was not."""

    goal: Goal
    value: float | None
    met: bool | None


GOALS = (
    Goal(BUILD_TREE, q.WALL, TAR_ZSTD, 1.5),
    Goal(BUILD_TREE, q.SIZE, SQUASHFS_3, 1.1),
    Goal(BUILD_TREE, q.SIZE, SQUASHFS, 1.1),
    Goal(BUILD_TREE, q.PEAK_PSS, None, 300e6),
    Goal(BUILD_WEIGHTS, q.WALL, ZSTD, 1.1),
    Goal(BUILD_WEIGHTS, q.PEAK_PSS, None, 300e6),
    Goal(CONVERT, q.WALL, SKOPEO_TAR, 1.5),
    Goal(CONVERT, q.PEAK_PSS, None, 400e6),
    Goal(INDEX_LAYER, q.WALL, GUNZIP, 1.2),
    Goal(INDEX_LAYER, q.PEAK_PSS, None, 400e6),
    Goal(MOUNT_TREE, q.USABLE, None, 1.0),
    Goal(MOUNT_WEIGHTS, q.FETCHED_FOR_READ, None, 2.0 * MIB),
    Goal(READ, q.RATE_WARM, EXT4, 0.5),
    Goal(READ, q.RATE_REMOUNTED, EXT4, 0.5),
    Goal(METADATA, q.FIND_COLD, EXT4, 4.0),
    # The kernel's EROFS as it would be without us; times are bounded from above, rates from below.
    Goal(DRIVERS_LARGE, q.RATE_COLD, EROFS_ALONE, 0.95, DRIVER_EROFS),
    Goal(DRIVERS_LARGE, q.RANDOM, EROFS_ALONE, 0.95, DRIVER_EROFS),
    Goal(DRIVERS_LARGE, q.MAPPED, EROFS_ALONE, 0.95, DRIVER_EROFS),
    Goal(DRIVERS_TREE, q.FIND_SIZES, EROFS_ALONE, 1 / 0.95, DRIVER_EROFS),
    Goal(DRIVERS_TREE, q.READ_ALL_COLD, EROFS_ALONE, 1 / 0.95, DRIVER_EROFS),
    Goal(DRIVERS_LARGE, q.RATE_COLD, EROFS_ALONE, 0.6, DRIVER_EROFS_LAZY),
    Goal(DRIVERS_LARGE, q.MAPPED, EROFS_ALONE, 0.6, DRIVER_EROFS_LAZY),
    Goal(DRIVERS_TREE, q.READ_ALL_COLD, EROFS_ALONE, 1 / 0.6, DRIVER_EROFS_LAZY),
    Goal(DRIVERS_TREE, q.READ_ALL_WARM, EXT4, 1 / 0.8, DRIVER_FUSE),
    Goal(DRIVERS_TREE, q.FIND_WARM, EXT4, 1 / 0.8, DRIVER_FUSE),
    Goal(DRIVERS_LARGE, q.RANDOM_PINNED, DRIVER_PYFUSE3, 3.0, DRIVER_FUSE),
    Goal(DRIVERS_LARGE, q.RATE_REMOUNTED, EXT4, 0.6, DRIVER_FUSE),
    Goal(DRIVERS_LARGE, q.RATE_COLD, EXT4, 0.6, DRIVER_FUSE),
)


def judge(goal: Goal, ledger: Ledger) -> Verdict:
    """Compares the best samples with the goal."""
    value = ledger.best(goal.scene, goal.subject, goal.quantity)
    if goal.beat is not None:
        other = ledger.best(goal.scene, goal.beat, goal.quantity)
        value = value / other if value is not None and other else None
    if value is None:
        return Verdict(goal, None, None)
    met = value >= goal.bound if goal.quantity.higher_is_better else value <= goal.bound
    return Verdict(goal, value, met)

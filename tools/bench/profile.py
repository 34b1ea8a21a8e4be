"""How much to measure."""

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Profile:
    """Sizes of the inputs, and how often everything is measured.

    `random_reads`: reads of 4 KiB in one sample. `seed` decides every byte of the inputs on one machine.
    """

    name: str
    files: int
    tree_size_bytes: int
    file_size_bytes: int
    random_reads: int
    rounds: int = 3
    seed: int = 1


FULL = Profile(
    "full", files=100_000, tree_size_bytes=1024 * MIB, file_size_bytes=1024 * MIB, random_reads=10_000
)
SMALL = Profile(
    "small", files=5_000, tree_size_bytes=64 * MIB, file_size_bytes=64 * MIB, random_reads=2_000, rounds=1
)

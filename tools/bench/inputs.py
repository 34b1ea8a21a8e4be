"""The inputs: a tree of small files, a weights file and a file of text and code, made once per directory."""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tools.bench.corpus import Corpus
from tools.bench.profile import Profile
from tools.bench.weights import write_weights

# Sizes of small files are log-normal: their mean is about 3.6 times their median, as in trees of software.
SIGMA = 1.6
LARGEST_BYTES = 16 << 20
FILES_PER_DIRECTORY = 100
DIRECTORIES_PER_DIRECTORY = 10
MODIFIED_NS = 1_700_000_000_123_456_789
SUFFIXES = ("py", "pyc", "so", "json", "txt", "h", "md", "html", "mo", "js")
VERSION = 1


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where the inputs are. `names` lists the files of the tree, relative, one per line."""

    tree: Path
    names: Path
    weights_dir: Path
    text_dir: Path
    tree_size_bytes: int
    remark: str | None

    @property
    def weights(self) -> Path:
        """The weights file, alone in its directory."""
        return self.weights_dir / "model.safetensors"

    @property
    def text(self) -> Path:
        """The file of text and code, alone in its directory."""
        return self.text_dir / "text.bin"


class _Made(msgspec.Struct):
    """What is noted when the inputs are complete."""

    tree_size_bytes: int
    remark: str | None


def make_inputs(directory: Path, profile: Profile, tell: Callable[[str], None]) -> Inputs:
    """Makes the inputs in `directory`, or finds those that an earlier run has finished there."""
    place = directory / f"inputs-v{VERSION}-{profile.name}-{profile.seed}"
    marker = place / "finished.json"
    if marker.exists():
        tell("inputs: those of an earlier run")
    else:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        made = _make(place, profile, tell)
        marker.write_bytes(msgspec.json.encode(made))
    made = msgspec.json.decode(marker.read_bytes(), type=_Made)
    tree, names, weights, text = (place / name for name in ("tree", "names", "weights", "text"))
    return Inputs(tree, names, weights, text, made.tree_size_bytes, made.remark)


def _make(place: Path, profile: Profile, tell: Callable[[str], None]) -> _Made:
    tell(f"inputs: {profile.files} small files")
    corpus = Corpus.of_machine()
    size = write_tree(place / "tree", place / "names", profile, corpus)
    tell("inputs: the two large files")
    return _Made(size, _write_files(place, profile, corpus))


def file_sizes(count: int, total_bytes: int, seed: int) -> list[int]:
    """`count` log-normal sizes in bytes; their sum is `total_bytes` but for rounding and the cap."""
    rng = random.Random(f"sizes {seed}")
    drawn = [rng.lognormvariate(0, SIGMA) for _ in range(count)]
    scale = total_bytes / sum(drawn)
    return [min(int(size * scale), LARGEST_BYTES) for size in drawn]


def tree_path(number: int) -> str:
    """The relative path of the file `number`: three levels, ten directories in each, 100 files in a leaf."""
    leaf = number // FILES_PER_DIRECTORY
    upper = leaf // DIRECTORIES_PER_DIRECTORY
    return f"package-{upper:03d}/part-{leaf:05d}/file_{number:06d}.{SUFFIXES[number % len(SUFFIXES)]}"


def write_tree(root: Path, names: Path, profile: Profile, corpus: Corpus) -> int:
    """Writes the tree and the list of its files; returns the sum of the sizes in bytes."""
    rng = random.Random(f"contents {profile.seed}")
    sizes = file_sizes(profile.files, profile.tree_size_bytes, profile.seed)
    paths = [tree_path(number) for number in range(profile.files)]
    for path, size in zip(paths, sizes, strict=True):
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(corpus.cut(size, rng))
        os.utime(target, ns=(MODIFIED_NS, MODIFIED_NS))
    names.write_text("".join(f"{path}\n" for path in paths))
    return sum(sizes)


def _write_files(place: Path, profile: Profile, corpus: Corpus) -> str | None:
    for name in ("weights", "text"):
        (place / name).mkdir()
    remark = write_weights(place / "weights" / "model.safetensors", profile.file_size_bytes, profile.seed)
    rng = random.Random(f"text {profile.seed}")
    with (place / "text" / "text.bin").open("wb") as file:
        left = profile.file_size_bytes
        while left:
            left -= file.write(corpus.cut(min(left, 8 << 20), rng, piece_max_bytes=8 << 20))
    return remark

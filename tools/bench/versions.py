"""`python -m tools.bench.versions`: what is fetched of an image on a host that holds another one like it.

Images are built without a chunk dictionary and read from end to end, every byte compared with its source;
bytes are counted by the registry that sent them.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from rafs.errors import NydusError
from tools.bench.corpus import Corpus
from tools.bench.inputs import tree_path, write_tree
from tools.bench.nydus import Nydus
from tools.bench.origin import Origin, running_registry
from tools.bench.process import run_measured
from tools.bench.profile import Profile
from tools.bench.reading import ContentsDiffer
from tools.output import talk
from tools.sizes import format_size

MIB = 1 << 20
LARGE_FILES = 5
FULL = Profile("versions", files=30_000, tree_size_bytes=192 * MIB, file_size_bytes=48 * MIB, random_reads=0)
SMALL = Profile(
    "small versions", files=3_000, tree_size_bytes=24 * MIB, file_size_bytes=8 * MIB, random_reads=0
)


@dataclass(frozen=True, slots=True)
class Variant:
    """An image that is like the first one. `bound`: of its bytes, the share that may be fetched."""

    name: str
    bound: float | None
    change: Callable[[Path, Profile, Corpus], None]


class _Status(msgspec.Struct):
    """The part of a status that is of interest here."""

    image_size_bytes: int
    fetched_bytes: int
    fetched_requests: int
    copied_bytes: int


def rewrite_files(root: Path, profile: Profile, corpus: Corpus, numbers: Sequence[int]) -> None:
    """Gives small files other contents of the same size."""
    rng = random.Random(f"changed {profile.seed}")
    for number in numbers:
        path = root / tree_path(number)
        path.write_bytes(corpus.cut(path.stat().st_size, rng))


def rewrite_large(root: Path, corpus: Corpus, size_bytes: int) -> None:
    """Gives the last of the large files other bytes in its middle."""
    path = large_path(root, LARGE_FILES - 1)
    with path.open("r+b") as file:
        file.seek((path.stat().st_size - size_bytes) // 2)
        file.write(corpus.cut(size_bytes, random.Random("changed large")))


def large_path(root: Path, number: int) -> Path:
    """The large file `number`."""
    return root / "models" / f"part-{number}.bin"


def _same(root: Path, profile: Profile, corpus: Corpus) -> None:
    """Other metadata, the same contents."""
    (root / "VERSION").write_text("2\n")


def _one_percent(root: Path, profile: Profile, corpus: Corpus) -> None:
    """An update: one part of one package, and a range of a large file; 1 % of the bytes of each kind."""
    first = profile.files // 2
    rewrite_files(root, profile, corpus, range(first, first + profile.files // 100))
    rewrite_large(root, corpus, LARGE_FILES * profile.file_size_bytes // 100)


def _scattered(root: Path, profile: Profile, corpus: Corpus) -> None:
    """The same amount, but every hundredth file: each batch has one of them."""
    rewrite_files(root, profile, corpus, range(0, profile.files, 100))
    rewrite_large(root, corpus, LARGE_FILES * profile.file_size_bytes // 100)


def _one_fifth(root: Path, profile: Profile, corpus: Corpus) -> None:
    """Another image with four fifths of the same: a fifth of the packages and one large file differ."""
    first = profile.files // 2
    rewrite_files(root, profile, corpus, range(first, first + profile.files // 5))
    rewrite_large(root, corpus, profile.file_size_bytes)


VARIANTS = (
    Variant("same contents", 0.0, _same),
    Variant("1 % changed", 0.02, _one_percent),
    Variant("80 % shared", 0.22, _one_fifth),
    Variant("1 % changed, scattered", None, _scattered),
)


def make_tree(root: Path, profile: Profile, corpus: Corpus) -> None:
    """The first version."""
    write_tree(root, root.with_suffix(".names"), profile, corpus)
    rng = random.Random(f"large {profile.seed}")
    for number in range(LARGE_FILES):
        path = large_path(root, number)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(corpus.cut(profile.file_size_bytes, rng))


@dataclass(frozen=True, slots=True)
class Bench:
    """What all rounds share."""

    directory: Path
    origin: Origin
    options: tuple[str, ...]

    def reference(self, name: str) -> str:
        """Where an image is pushed to."""
        return f"{self.origin.address}/{name}:latest"

    def build(self, name: str, source: Path) -> None:
        """Builds and pushes an image."""
        run_measured(self.host("build").command("build", source, self.reference(name)))

    def host(self, name: str) -> Nydus:
        """A host with a cache of its own."""
        return Nydus(self.directory / name / "cache", self.directory / name / "run")

    def read(self, host: Nydus, name: str, source: Path) -> _Status:
        """Mounts an image, compares all of it with `source`; what it says of itself then."""
        mountpoint = self.directory / "mnt"
        with host.mounted(self.reference(name), mountpoint, options=self.options):
            compare_trees(source, mountpoint)
            status = run_measured(
                host.command("status", mountpoint, "--json"), environment=host.environment()
            )
        (answer,) = msgspec.json.decode(status.output, type=list[_Status])
        return answer


def compare_trees(source: Path, mountpoint: Path) -> None:
    """Reads every file of both. Raises `ContentsDiffer`."""
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        if path.read_bytes() != (mountpoint / path.relative_to(source)).read_bytes():
            raise ContentsDiffer(what=path, found="other bytes", expected="of the source")


def measure(bench: Bench, profile: Profile) -> bool:
    """Prints a line for each variant; whether all bounds were kept."""
    corpus = Corpus.of_machine()
    first, other = bench.directory / "v1", bench.directory / "v2"
    talk(f"making {profile.files} files and {LARGE_FILES} large ones")
    make_tree(first, profile, corpus)
    bench.build("v1", first)
    host = bench.host("host")
    talk("reading the first version, into an empty cache")
    start = time.perf_counter()
    bench.read(host, "v1", first)
    print(f"first version, empty cache: {time.perf_counter() - start:.1f} s")
    kept = True
    for number, variant in enumerate(VARIANTS):
        name = f"v2-{number}"
        shutil.copytree(first, other)
        variant.change(other, profile, corpus)
        bench.build(name, other)
        # Each on a copy of the host that has seen the first version only.
        each = bench.host(name)
        shutil.copytree(host.cache_dir, each.cache_dir)
        before = bench.origin.sent_bytes()
        start = time.perf_counter()
        status = bench.read(each, name, other)
        took_s = time.perf_counter() - start
        sent = bench.origin.sent_bytes() - before
        share = status.fetched_bytes / status.image_size_bytes
        verdict = (
            "" if variant.bound is None else ("  kept" if share <= variant.bound + 0.0001 else "  MISSED")
        )
        kept = kept and not verdict.endswith("MISSED")
        print(
            f"{variant.name}: fetched {format_size(status.fetched_bytes)} of "
            f"{format_size(status.image_size_bytes)} = {share:.2%} in {status.fetched_requests} requests, "
            f"copied {format_size(status.copied_bytes)}, sent with metadata {format_size(sent)}, "
            f"{took_s:.1f} s{verdict}"
        )
        shutil.rmtree(other)
        shutil.rmtree(each.cache_dir)
    return kept


@contextmanager
def _work_dir(given: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="versions-", dir=given) as name:
        yield Path(name)


def main(arguments: Sequence[str]) -> int:
    """Runs it; 1 when a bound was missed."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.versions", description=__doc__)
    parser.add_argument("--small", action="store_true", help="3,000 files and 40 MiB: a look, not a result")
    parser.add_argument(
        "--dir", type=Path, help="work below this directory (default: that for temporary files)"
    )
    parser.add_argument("--driver", default="auto", help="as for mount")
    options = parser.parse_args(arguments)
    with _work_dir(options.dir) as directory, running_registry(directory / "registry") as origin:
        bench = Bench(directory, origin, (f"--driver={options.driver}",))
        return 0 if measure(bench, SMALL if options.small else FULL) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except NydusError as error:
        sys.exit(str(error))

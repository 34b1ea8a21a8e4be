"""Who builds: nydus-py, and the programs beside which it is measured, with their command lines."""

import shlex
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from tools.bench.goals import GUNZIP, SQUASHFS, SQUASHFS_3, TAR_ZSTD, ZSTD
from tools.bench.ledger import NYDUS
from tools.bench.nydus import Nydus

EROFS_LZ4 = "mkfs.erofs lz4"
EROFS_LZ4HC = "mkfs.erofs lz4hc"
EROFS_PLAIN = "mkfs.erofs plain"


@dataclass(frozen=True, slots=True)
class Contestant:
    """A command that makes `output`, a file or a directory. It is measured `rounds_max` times at most."""

    name: str
    programs: tuple[str, ...]
    output: Path
    command: tuple[str, ...]
    environment: dict[str, str] | None = None
    rounds_max: int = 100

    def clear(self) -> None:
        """Removes what an earlier round has made."""
        if self.output.is_dir():
            shutil.rmtree(self.output)
        else:
            self.output.unlink(missing_ok=True)

    def size_bytes(self) -> int:
        """The size of what was made."""
        if not self.output.is_dir():
            return self.output.stat().st_size
        statuses = (path.lstat() for path in self.output.rglob("*"))
        return sum(status.st_size for status in statuses if stat.S_ISREG(status.st_mode))


def nydus_builder(nydus: Nydus, source: Path, results: Path) -> Contestant:
    """nydus-py with its defaults, into a local directory."""
    output = results / "nydus"
    command = tuple(nydus.command("build", source, f"dir:{output}"))
    return Contestant(NYDUS, (), output, command, nydus.environment())


def tar_zstd(source: Path, results: Path) -> Contestant:
    """What a layer of an ordinary image is made with."""
    output = results / "tar.zst"
    pipe = shlex.join(["tar", "-C", str(source), "-cf", "-", "."])
    pipe += f" | zstd -q -3 -T0 -f -o {shlex.quote(str(output))}"
    return Contestant(TAR_ZSTD, ("tar", "zstd"), output, ("bash", "-o", "pipefail", "-c", pipe))


def zstd(source: Path, results: Path) -> Contestant:
    """zstd over one file."""
    output = results / "file.zst"
    command = ("zstd", "-q", "-3", "-T0", "-f", str(source), "-o", str(output))
    return Contestant(ZSTD, ("zstd",), output, command)


def erofs(source: Path, results: Path, name: str, *options: str, rounds_max: int = 100) -> Contestant:
    """An EROFS image; erofs-utils 1.5 of Debian 12 knows lz4 and lz4hc, not zstd."""
    output = results / f"{name.replace(' ', '-')}.img"
    command = ("mkfs.erofs", "--quiet", *options, str(output), str(source))
    return Contestant(name, ("mkfs.erofs",), output, command, rounds_max=rounds_max)


def squashfs(source: Path, results: Path, name: str, *options: str, rounds_max: int = 100) -> Contestant:
    """A squashfs image compressed with zstd."""
    output = results / f"{name.replace(' ', '-')}.img"
    command = ("mksquashfs", str(source), str(output), "-noappend", "-no-progress", "-quiet", "-comp", "zstd")
    return Contestant(name, ("mksquashfs",), output, (*command, *options), rounds_max=rounds_max)


def tree_builders(nydus: Nydus, tree: Path, results: Path) -> list[Contestant]:
    """Everyone who makes something of the tree. mksquashfs without an option uses zstd level 15."""
    return [
        nydus_builder(nydus, tree, results),
        tar_zstd(tree, results),
        squashfs(tree, results, SQUASHFS_3, "-Xcompression-level", "3"),
        squashfs(tree, results, SQUASHFS, rounds_max=1),
        erofs(tree, results, EROFS_LZ4, "-zlz4"),
        erofs(tree, results, EROFS_LZ4HC, "-zlz4hc", rounds_max=1),
        erofs(tree, results, EROFS_PLAIN, rounds_max=1),
    ]


def layer_builders(nydus: Nydus, layer: Path, results: Path) -> list[Contestant]:
    """Who goes through a gzip layer: nydus-py to index it, gunzip to unpack it into a file."""
    output, unpacked = results / "in-place", results / "layer.tar"
    index = tuple(nydus.command("build", "--no-copy", layer, f"dir:{output}"))
    gunzip = ("bash", "-c", f"gunzip -c {shlex.quote(str(layer))} > {shlex.quote(str(unpacked))}")
    return [
        Contestant(NYDUS, (), output, index, nydus.environment()),
        Contestant(GUNZIP, ("gunzip",), unpacked, gunzip),
    ]


def file_builders(nydus: Nydus, file: Path, results: Path, *, images: bool) -> list[Contestant]:
    """Everyone who makes something of one large file; with `images`, those that can be mounted as well."""
    builders = [nydus_builder(nydus, file.parent, results), zstd(file, results)]
    if images:
        builders += [
            squashfs(file.parent, results, SQUASHFS_3, "-Xcompression-level", "3", rounds_max=1),
            erofs(file.parent, results, EROFS_LZ4, "-zlz4", rounds_max=1),
            erofs(file.parent, results, EROFS_PLAIN, rounds_max=1),
        ]
    return builders

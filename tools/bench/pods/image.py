"""The image of the benchmark: a shell, and an application of many files of which a start reads some.

The files are in directories as packages are, and the layers have them in that order. A start reads most files
of some packages, as an interpreter does with what it imports, and one of the large files.
"""

import gzip
import hashlib
import io
import random
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import msgspec

from tools.bench.corpus import Corpus

APPLICATION_LAYERS = 4
LARGE_SHARE = 0.4
"""Of the bytes: a few large files, as shared objects and weights are."""
LARGE_FILES = 16
FILES_PER_PACKAGE = 100
READ_PER_PACKAGE = 60
APPLETS = ("sh", "cat", "sleep", "sha256sum", "wc")
FIRST_OUTPUT = "ready"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@dataclass(frozen=True, slots=True)
class AppShape:
    """Files and bytes of the application; of the small files, `reads` are read before it says ready."""

    files: int
    size_bytes: int
    reads: int
    seed: int = 1


@dataclass(frozen=True, slots=True)
class AppImage:
    """An image in an OCI layout. `start` is what its containers run; `size_bytes` is that of all files."""

    layout: Path
    tag: str
    start: tuple[str, ...]
    files: int
    size_bytes: int


def write_app_image(layout: Path, shape: AppShape, corpus: Corpus) -> AppImage:
    """Makes the image; the same shape on the same machine gives the same bytes."""
    rng = random.Random(shape.seed)
    sizes = list(_sizes(shape, rng))
    writer = _LayoutWriter(layout)
    writer.add_layer(_base())
    share = -(-len(sizes) // APPLICATION_LAYERS)
    for number in range(APPLICATION_LAYERS):
        part = sizes[number * share : (number + 1) * share]
        writer.add_layer(_application(part, corpus, rng, number))
    writer.add_layer(_start_script(_wanted([name for name, _ in sizes], shape.reads, rng)))
    start = ("/bin/sh", "/start.sh")
    writer.finish("app", start)
    return AppImage(layout, "app", start, len(sizes), sum(size for _, size in sizes))


def write_sandbox_image(layout: Path) -> str:
    """An image that only sleeps, in the same layout; its tag."""
    writer = _LayoutWriter(layout)
    writer.add_layer(_base())
    writer.finish("sandbox", ("/bin/sleep", "1000000"))
    return "sandbox"


def _sizes(shape: AppShape, rng: random.Random) -> Iterator[tuple[str, int]]:
    large = int(shape.size_bytes * LARGE_SHARE) // LARGE_FILES
    for number in range(LARGE_FILES):
        yield f"app/lib/lib{number}.so", large
    count = shape.files - LARGE_FILES
    weights = [rng.lognormvariate(0, 1.2) for _ in range(count)]
    scale = shape.size_bytes * (1 - LARGE_SHARE) / sum(weights)
    for number, weight in enumerate(weights):
        package = number // FILES_PER_PACKAGE
        yield f"app/p{package:03}/m{number:05}.py", max(1, int(weight * scale))


def _wanted(names: Sequence[str], reads: int, rng: random.Random) -> list[str]:
    """What a start reads: a large file, and `reads` small ones of as few packages as that takes."""
    packages: dict[str, list[str]] = {}
    for name in names[LARGE_FILES:]:
        packages.setdefault(name.rpartition("/")[0], []).append(name)
    count = min(-(-reads // READ_PER_PACKAGE), len(packages))
    chosen = rng.sample(sorted(packages), count)
    small = [name for package in chosen for name in packages[package][:READ_PER_PACKAGE]]
    return [names[0], *small[:reads]]


Entry = tuple[tarfile.TarInfo, bytes]


def _entry(name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, link: str = "") -> Entry:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname, member.mtime = kind, len(data), link, 1_700_000_000
    member.mode = 0o755
    return member, data


def _base() -> Iterator[Entry]:
    program = shutil.which("busybox")
    assert program is not None, "busybox-static is not installed"
    yield _entry("bin/busybox", Path(program).read_bytes())
    for name in APPLETS:
        yield _entry(f"bin/{name}", kind=tarfile.SYMTYPE, link="busybox")


def _application(
    part: Sequence[tuple[str, int]], corpus: Corpus, rng: random.Random, number: int
) -> Iterator[Entry]:
    for name, size in part:
        yield _entry(name, corpus.cut(size, rng))
    yield _entry(f"app/layer{number}", str(number).encode())


def _start_script(wanted: Sequence[str]) -> Iterator[Entry]:
    names = "\n".join(f"/{name}" for name in wanted)
    yield _entry("start.list", names.encode())
    script = f"while read f; do cat $f; done </start.list | sha256sum >/dev/null\necho {FIRST_OUTPUT}\n"
    yield _entry("start.sh", f"{script}exec sleep 100000\n".encode())


class _LayoutWriter:
    """Writes one image into an OCI layout, layer by layer."""

    def __init__(self, layout: Path) -> None:
        self._layout = layout
        self._blobs = layout / "blobs" / "sha256"
        self._blobs.mkdir(parents=True, exist_ok=True)
        (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self._layers: list[dict[str, object]] = []
        self._diff_ids: list[str] = []

    def add_layer(self, entries: Iterator[Entry]) -> None:
        """A gzip layer."""
        path = self._layout / "layer.new"
        plain = hashlib.sha256()
        with (
            path.open("wb") as file,
            gzip.GzipFile(fileobj=file, mode="wb", compresslevel=5, mtime=0) as packed,
            tarfile.open(fileobj=cast("BinaryIO", _Tee(packed, plain)), mode="w|") as archive,
        ):
            for member, data in entries:
                archive.addfile(member, io.BytesIO(data))
        with path.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        self._diff_ids.append(f"sha256:{plain.hexdigest()}")
        self._layers.append(
            {
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": f"sha256:{digest}",
                "size": path.stat().st_size,
            }
        )
        path.rename(self._blobs / digest)

    def finish(self, tag: str, command: Sequence[str]) -> None:
        """Config, manifest and an entry in the index."""
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": list(command), "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": self._diff_ids},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self._put("application/vnd.oci.image.config.v1+json", config),
            "layers": self._layers,
        }
        entry = self._put(OCI_MANIFEST, manifest)
        entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
        index = self._layout / "index.json"
        known = msgspec.json.decode(index.read_bytes())["manifests"] if index.exists() else []
        index.write_bytes(msgspec.json.encode({"schemaVersion": 2, "manifests": [*known, entry]}))

    def _put(self, media_type: str, document: object) -> dict[str, object]:
        data = msgspec.json.encode(document)
        digest = hashlib.sha256(data).hexdigest()
        (self._blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


class _Tee:
    """A file that digests what it is given."""

    def __init__(self, target: gzip.GzipFile, digest: "hashlib._Hash") -> None:
        self._target = target
        self._digest = digest

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._target.write(data)

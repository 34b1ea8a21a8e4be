"""The registry on a link of its own, and the images in it."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tools.bench.nydus import Nydus
from tools.bench.origin import Origin, running_registry
from tools.bench.peers.network import REGISTRY_ADDRESS, Link, Network, share_fairly
from tools.bench.peers.node import started_node
from tools.bench.peers.rate import Rate

PORT = 5000
REPOSITORY = "bench"


class _Blob(msgspec.Struct):
    id: str
    size_bytes: int


class _Report(msgspec.Struct):
    """The part of an `inspect` that is of interest here."""

    chunks: int
    blobs: list[_Blob]


@dataclass(frozen=True, slots=True)
class Image:
    """An image in the registry, with the file that it was made of. `blobs`: id and encoded size."""

    reference: str
    file: Path
    chunks: int
    blobs: tuple[tuple[str, int], ...]

    @property
    def size_bytes(self) -> int:
        """What its blobs have together, encoded: F of the bounds."""
        return sum(size for _, size in self.blobs)


@dataclass(frozen=True, slots=True)
class RegistryNode:
    """A running registry."""

    origin: Origin
    link: Link
    nydus: Nydus

    def push(self, file: Path, tag: str) -> Image:
        """Builds an image of the directory of `file`, inside the node, where no link is in the way."""
        reference = f"{self.origin.address}/{REPOSITORY}:{tag}"
        environment = self.nydus.environment()
        run = self.link.node.run
        run(*self.nydus.command("--plain-http", "build", file.parent, reference), environment=environment)
        said = run(
            *self.nydus.command("--plain-http", "inspect", "--json", reference), environment=environment
        )
        report = msgspec.json.decode(said, type=_Report)
        return Image(
            reference, file, report.chunks, tuple((blob.id, blob.size_bytes) for blob in report.blobs)
        )

    def blob_url(self, blob_id: str) -> str:
        """Where everybody can download a blob."""
        return f"http://{self.origin.address}/v2/{REPOSITORY}/blobs/sha256:{blob_id}"

    def sent(self) -> Counter[str]:
        """Payload sent so far, by what is behind the last slash of the path; see `Origin.sent`."""
        sent: Counter[str] = Counter()
        for path, size in self.origin.sent().items():
            sent[path.rpartition("/")[2]] += size
        return sent


def blob_bytes(sent: Counter[str], image: Image) -> int:
    """What of `sent` is of the blobs of an image; the rest is manifests and bootstraps."""
    return sum(sent[f"sha256:{blob_id}"] for blob_id, _ in image.blobs)


@contextlib.contextmanager
def registry_on(
    network: Network, directory: Path, rate: Rate, receivers: Sequence[str]
) -> Iterator[RegistryNode]:
    """Runs a registry that sends with `rate`, shared fairly between the addresses `receivers`."""
    with started_node("registry") as node:
        link = network.connect(node, REGISTRY_ADDRESS, rate)
        share_fairly(link, rate, receivers)
        listen = f"{REGISTRY_ADDRESS}:{PORT}"
        nydus = Nydus(directory / "build-cache", directory / "build-run")
        with running_registry(directory / "registry", listen, node.enter()) as origin:
            yield RegistryNode(origin, link, nydus)

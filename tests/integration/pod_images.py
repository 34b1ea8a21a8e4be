"""Container images that run: busybox and what a test adds, in a registry, ordinary and converted."""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from tests.integration.cli_machine import Machine
from tests.oci_images import OCI_INDEX, OCI_MANIFEST, Layer, Layout

APPLETS = ("sh", "sleep", "cat", "ls", "stat", "find", "sha256sum", "touch", "dd", "id", "head", "wc")
CONFIG = {"Cmd": ["/bin/sleep", "1000000"], "Env": ["PATH=/bin"]}


def busybox() -> bytes:
    """The static program of Debian's busybox-static."""
    path = shutil.which("busybox")
    assert path is not None
    return Path(path).read_bytes()


def base_layer() -> Layer:
    """A shell and its friends."""
    layer = Layer().directory("bin").add("bin/busybox", busybox(), mode=0o755)
    for name in APPLETS:
        layer.symlink(f"bin/{name}", "busybox")
    return layer.directory("tmp", mode=0o1777).directory("etc").add("etc/below", b"of the base\n")


def upper_layer() -> Layer:
    """Files, and marks that hide some of the base."""
    layer = Layer().directory("etc").add("etc/hello", b"hello\n", uid=1000, gid=70000, mode=0o640)
    layer.add("etc/large", bytes(range(256)) * 8192)
    # containerd takes owner and mode of a hard link from its own header.
    layer.add("etc/also", kind=tarfile.LNKTYPE, link="etc/hello", uid=1000, gid=70000, mode=0o640)
    layer.directory("srv").symlink("srv/link", "/etc/hello").whiteout("etc/below")
    return layer


@dataclass(frozen=True, slots=True)
class PodImages:
    """A place for images: a repository of a registry."""

    host: str
    machine: Machine
    authorization: str = ""

    def name(self, repository: str, tag: str = "v1") -> str:
        """The full name of an image."""
        return f"{self.host}/{repository}:{tag}"

    def push(self, repository: str, layers: Sequence[Layer | bytes], tag: str = "v1") -> str:
        """An ordinary image; its name."""
        layout = Layout(self.machine.directory / f"layout-{repository.replace('/', '-')}-{tag}")
        made = layout.image(list(layers), config=CONFIG)
        manifest = json.loads(made.data)
        for part in (manifest["config"], *manifest["layers"]):
            self.put_blob(repository, part["digest"], layout.read(part["digest"]))
        self.put_manifest(repository, tag, made.media_type, made.data)
        return self.name(repository, tag)

    def put_manifest(self, repository: str, tag: str, media_type: str, data: bytes) -> None:
        """Stores a manifest or an index."""
        self._put(f"http://{self.host}/v2/{repository}/manifests/{tag}", data, media_type)

    def get_manifest(self, repository: str, tag: str) -> dict[str, Any]:
        """A manifest or an index."""
        found = json.loads(self.get_raw_manifest(repository, tag))
        assert isinstance(found, dict)
        return found

    def get_raw_manifest(self, repository: str, key: str) -> bytes:
        """The same, as it is; `key` is a tag or a digest."""
        kinds = f"{OCI_MANIFEST}, {OCI_INDEX}"
        request = Request(f"http://{self.host}/v2/{repository}/manifests/{key}", headers={"Accept": kinds})
        with self._open(request) as answer:
            return bytes(answer.read())

    def manifest_digest(self, repository: str, tag: str) -> str:
        """The digest of what a tag names."""
        return f"sha256:{hashlib.sha256(self.get_raw_manifest(repository, tag)).hexdigest()}"

    def get_blob(self, repository: str, digest: str) -> bytes:
        """A whole blob."""
        with self._open(Request(f"http://{self.host}/v2/{repository}/blobs/{digest}")) as answer:
            return bytes(answer.read())

    def put_blob(self, repository: str, digest: str, data: bytes) -> None:
        """Stores a blob."""
        begin = Request(f"http://{self.host}/v2/{repository}/blobs/uploads/", data=b"", method="POST")
        with self._open(begin) as answer:
            place = answer.headers["Location"]
        self._put(f"{place}&digest={digest}", data, "application/octet-stream")

    def _put(self, url: str, data: bytes, media_type: str) -> None:
        request = Request(url, data=data, method="PUT", headers={"Content-Type": media_type})
        with self._open(request) as answer:
            assert answer.status == 201

    def _open(self, request: Request) -> Any:
        if self.authorization:
            request.add_header("Authorization", self.authorization)
        return urlopen(request)

    def convert(self, source: str, tag: str, *options: str) -> str:
        """Converts an image, beside it under another tag; the name."""
        target = f"{source.rpartition(':')[0]}:{tag}"
        self.machine.nydus("convert", *options, source, target)
        return target


@dataclass(frozen=True, slots=True)
class PodImageSet:
    """The same files in every form. `index` and `referrer` are names of ordinary images with a Nydus variant;
    `sharing` has the layers of `index`, another one on top, and no variant.
    """

    place: PodImages
    plain: str
    nydus: str
    no_copy: str
    index: str
    referrer: str
    sharing: str

    def names(self) -> list[str]:
        """Of all of them."""
        return [self.nydus, self.no_copy, self.index, self.referrer, self.sharing, self.plain]


def make_pod_images(host: str, directory: Path, mark: str = "mark") -> PodImageSet:
    """Pushes all of them to a registry. With another `mark` they are other images."""
    directory.mkdir(exist_ok=True)
    place = PodImages(host, Machine(directory))

    def layers(*names: str) -> list[Layer]:
        own = [Layer().directory(f"srv/{name}") for name in names]
        return [base_layer(), upper_layer().directory(f"srv/{mark}"), *own]

    plain = place.push("pods/plain", layers())
    index = place.push("pods/index", layers("index"))
    place.machine.nydus("convert", "--both", index, index)
    referrer = place.push("pods/referrer", layers("referrer"))
    place.convert(referrer, "nydus", "--with-referrer")
    sharing = place.push("pods/sharing", layers("sharing"))
    return PodImageSet(
        place,
        plain,
        place.convert(plain, "nydus"),
        place.convert(plain, "no-copy", "--no-copy"),
        index,
        referrer,
        sharing,
    )

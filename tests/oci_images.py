"""Container images made for tests: layers entry by entry, images in an OCI layout, no tool needed."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MTIME = 1_700_000_000
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"


class Layer:
    """One layer: a PAX tar that is written entry by entry. Every method returns the layer itself."""

    def __init__(self, format: int = tarfile.PAX_FORMAT) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.TarFile(
            fileobj=self._buffer, mode="w", format=format, encoding="utf-8", errors="surrogateescape"
        )

    def add(
        self,
        name: str,
        data: bytes = b"",
        *,
        kind: bytes = tarfile.REGTYPE,
        mode: int | None = None,
        uid: int = 0,
        gid: int = 0,
        mtime: float = MTIME,
        link: str = "",
        device: tuple[int, int] = (0, 0),
        xattrs: Mapping[str, bytes] | None = None,
    ) -> "Layer":
        """An entry of any kind."""
        member = tarfile.TarInfo(name)
        member.type, member.uid, member.gid, member.mtime, member.linkname = kind, uid, gid, mtime, link
        member.mode = mode if mode is not None else 0o755 if kind == tarfile.DIRTYPE else 0o644
        member.devmajor, member.devminor = device
        member.pax_headers = {
            f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape")
            for key, value in (xattrs or {}).items()
        }
        member.size = len(data) if kind == tarfile.REGTYPE else 0
        self._tar.addfile(member, io.BytesIO(data))
        return self

    def directory(self, name: str, **more: Any) -> "Layer":
        """A directory."""
        return self.add(name, kind=tarfile.DIRTYPE, **more)

    def symlink(self, name: str, target: str, **more: Any) -> "Layer":
        """A symbolic link."""
        return self.add(name, kind=tarfile.SYMTYPE, link=target, mode=0o777, **more)

    def hardlink(self, name: str, target: str) -> "Layer":
        """A hard link."""
        return self.add(name, kind=tarfile.LNKTYPE, link=target)

    def whiteout(self, path: str) -> "Layer":
        """Hides a path of lower layers."""
        folder, _, name = path.rpartition("/")
        return self.add(f"{folder}/.wh.{name}" if folder else f".wh.{name}")

    def opaque(self, directory: str) -> "Layer":
        """Hides everything that lower layers have in a directory."""
        return self.add(f"{directory}/.wh..wh..opq" if directory else ".wh..wh..opq")

    def tar(self) -> bytes:
        """The layer as a plain tar."""
        self._tar.close()
        return self._buffer.getvalue()


@dataclass(frozen=True)
class Blob:
    """Content with its media type."""

    media_type: str
    data: bytes
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of the bytes as they are."""
        return f"sha256:{hashlib.sha256(self.data).hexdigest()}"

    def descriptor(self, **more: Any) -> dict[str, Any]:
        """A descriptor, as a manifest has it."""
        made: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": len(self.data)}
        if self.annotations:
            made["annotations"] = dict(self.annotations)
        return made | more


def gzipped(tar: bytes) -> Blob:
    """A layer as registries have most of them."""
    return Blob(OCI_LAYER + "+gzip", gzip.compress(tar, 6, mtime=0))


class Layout:
    """An OCI layout that is filled blob by blob."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: list[dict[str, Any]] = []
        (path / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def put(self, blob: Blob) -> Blob:
        """Stores a blob."""
        (self.path / "blobs" / "sha256" / blob.digest.removeprefix("sha256:")).write_bytes(blob.data)
        return blob

    def read(self, digest: str) -> bytes:
        """A blob that is in it."""
        return (self.path / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()

    def put_json(self, media_type: str, value: object) -> Blob:
        """Stores a document."""
        return self.put(Blob(media_type, json.dumps(value).encode()))

    def tag(self, document: Blob, tag: str) -> None:
        """Gives a manifest or an index a name."""
        names = {"org.opencontainers.image.ref.name": tag}
        self._entries.append(document.descriptor(annotations=names))
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": self._entries}
        (self.path / "index.json").write_text(json.dumps(index))

    def image(
        self,
        layers: Sequence[Layer | bytes | tuple[bytes, Blob]],
        *,
        tag: str | None = None,
        architecture: str = "amd64",
        config: Mapping[str, Any] | None = None,
    ) -> Blob:
        """An image of layers: each is a `Layer` or a tar (both gzipped here), or a tar and its blob."""
        pairs = [_pair(layer) for layer in layers]
        document = {
            "architecture": architecture,
            "os": "linux",
            "config": dict(config or {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]}),
            "rootfs": {
                "type": "layers",
                "diff_ids": [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar, _ in pairs],
            },
            "history": [{"created_by": f"layer {number}"} for number in range(len(pairs))],
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self.put_json(OCI_CONFIG, document).descriptor(),
            "layers": [self.put(blob).descriptor() for _, blob in pairs],
        }
        made = self.put_json(OCI_MANIFEST, manifest)
        if tag is not None:
            self.tag(made, tag)
        return made


def _pair(layer: Layer | bytes | tuple[bytes, Blob]) -> tuple[bytes, Blob]:
    if isinstance(layer, tuple):
        return layer
    tar = layer if isinstance(layer, bytes) else layer.tar()
    return tar, gzipped(tar)


def manifest_of(directory: Path, digest: str) -> dict[str, Any]:
    """A document of the layout in a directory."""
    found = json.loads((directory / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes())
    assert isinstance(found, dict)
    return found

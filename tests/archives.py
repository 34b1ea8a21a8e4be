"""Archive files made for tests, honest ones and others, member by member."""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Archive:
    """A tar that is filled member by member. Every method returns the archive itself."""

    def __init__(self, format: int = tarfile.USTAR_FORMAT) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._buffer, mode="w", format=format)  # noqa: SIM115

    def file(self, name: str, data: bytes, **headers: Any) -> "Archive":
        """A regular file; `headers` are pax records, true or not."""
        return self.entry(name, tarfile.REGTYPE, data=data, headers=headers)

    def entry(
        self,
        name: str,
        kind: bytes,
        *,
        link: str = "",
        data: bytes = b"",
        headers: dict[str, str] | None = None,
    ) -> "Archive":
        """An entry of any kind."""
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, link, len(data)
        member.pax_headers = dict(headers or {})
        self._tar.addfile(member, io.BytesIO(data))
        return self

    def document(self, name: str, value: object) -> "Archive":
        """A JSON file."""
        return self.file(name, json.dumps(value).encode())

    def data(self) -> bytes:
        """The whole file."""
        self._tar.close()
        return self._buffer.getvalue()

    def write(self, path: Path) -> Path:
        """The whole file, at `path`."""
        path.write_bytes(self.data())
        return path


def sha256(data: bytes) -> str:
    """The digest in its text form."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def saved_layer_image(layer: bytes, config: bytes) -> Archive:
    """An image of one layer, as it is, with that config."""
    listed = {"Config": "config.json", "RepoTags": ["app:v1"], "Layers": ["layer.tar"]}
    archive = Archive().file("layer.tar", layer).file("config.json", config)
    return archive.document("manifest.json", [listed])


def saved_config(layers: Sequence[bytes]) -> bytes:
    """The config of an image of these layers, which are plain tars."""
    diff_ids = [sha256(layer) for layer in layers]
    document = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    return json.dumps(document).encode()


def saved_image(layers: Sequence[bytes], *names: str) -> Archive:
    """What `docker save` makes of one image with these layers and names."""
    archive = Archive()
    config = saved_config(layers)
    paths = []
    for number, layer in enumerate(layers):
        paths.append(f"{number}/layer.tar")
        archive.file(paths[-1], layer)
    archive.file("config.json", config)
    listed = {"Config": "config.json", "RepoTags": list(names), "Layers": paths}
    return archive.document("manifest.json", [listed])

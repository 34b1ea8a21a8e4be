"""The stage that converts: an image in a registry, against fetching and unpacking it."""

import hashlib
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tools.bench.contestants import Contestant
from tools.bench.goals import SKOPEO_TAR
from tools.bench.ledger import NYDUS
from tools.bench.nydus import Nydus
from tools.bench.process import run_measured

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
CONFIG = "application/vnd.oci.image.config.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"


def make_image(layout: Path, trees: Sequence[Path]) -> None:
    """An ordinary image in an OCI layout, with a gzipped layer for each tree. Made once."""
    if (layout / "index.json").exists():
        return
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    layers, diff_ids = [], []
    for tree in trees:
        packed, plain = blobs / "packing", hashlib.sha256()
        tar = ["tar", "-C", str(tree), "--sort=name", "-cf", "-", "."]
        with packed.open("wb") as output, subprocess.Popen(tar, stdout=subprocess.PIPE) as made:
            gzip = subprocess.Popen(["gzip", "-1n"], stdin=subprocess.PIPE, stdout=output)
            assert made.stdout is not None
            assert gzip.stdin is not None
            while piece := made.stdout.read(1 << 20):
                plain.update(piece)
                gzip.stdin.write(piece)
            gzip.stdin.close()
            gzip.wait()
        with packed.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        packed.rename(blobs / digest)
        layers.append(_descriptor(LAYER, digest, (blobs / digest).stat().st_size))
        diff_ids.append(f"sha256:{plain.hexdigest()}")
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": _put(blobs, CONFIG, config),
        "layers": layers,
    }
    entry = _put(blobs, MANIFEST, manifest)
    entry["annotations"] = {"org.opencontainers.image.ref.name": "v1"}
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}
    (layout / "index.json").write_bytes(msgspec.json.encode(index))


def push_image(layout: Path, reference: str) -> None:
    """Brings the image into a registry. Raises `CommandFailed`."""
    push = ["skopeo", "copy", "-q", "--insecure-policy", "--dest-tls-verify=false"]
    run_measured([*push, f"oci:{layout}:v1", f"docker://{reference}"])


def converters(nydus: Nydus, reference: str, results: Path) -> list[Contestant]:
    """nydus-py, from the registry into the registry with nothing in its cache, and what a host does today."""
    command = tuple(nydus.command("convert", reference, f"{reference}-nydus"))
    layout, root = results / "skopeo", results / "skopeo/root"
    copy = ["skopeo", "copy", "-q", "--insecure-policy", "--src-tls-verify=false"]
    copy += [f"docker://{reference}", f"oci:{layout}:v1"]
    blobs = f"{shlex.quote(str(layout))}/blobs/sha256/*"
    unpack = f"tar -xzf $blob -C {shlex.quote(str(root))}"
    is_layer = 'test "$(head -c 2 $blob | od -An -tx1)" = " 1f 8b"'
    script = (
        f"{shlex.join(copy)} && mkdir {shlex.quote(str(root))} && for blob in {blobs}; do"
        f" if {is_layer}; then {unpack}; fi; done"
    )
    return [
        Contestant(NYDUS, (), nydus.cache_dir, command, nydus.environment()),
        Contestant(SKOPEO_TAR, ("skopeo", "tar"), layout, ("bash", "-o", "pipefail", "-c", script)),
    ]


def _put(blobs: Path, media_type: str, value: object) -> dict[str, object]:
    data = msgspec.json.encode(value)
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return _descriptor(media_type, digest, len(data))


def _descriptor(media_type: str, digest: str, size_bytes: int) -> dict[str, object]:
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": size_bytes}

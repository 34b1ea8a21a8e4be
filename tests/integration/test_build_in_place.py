"""Gzip layers that stay as they are: indexed, stored under their own digest, mounted and read."""

import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
import urllib.request
from pathlib import Path

import pytest

from builder.options import BuildOptions
from builder.tar_tree import InvalidArchive
from builder.zran_layer import index_layer
from rafs.blobmeta import BlobMeta
from rafs.bootstrap import Bootstrap
from rafs.check import check_blob_meta, check_bootstrap, check_extent, extents_of
from tests.gzip_streams import make_content
from tests.integration.cli_machine import Machine
from tests.integration.kernel_drivers import need_erofs_events
from tests.integration.registry_server import RegistryServer

MIB = 1 << 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many small files, a file over many contexts, one of zeros, an empty one, a hard link."""
    root = tmp_path_factory.mktemp("source")
    for name in ("json", "email", "asyncio"):
        shutil.copytree(Path(os.__file__).parent / name, root / name)
    (root / "noise.bin").write_bytes(os.urandom(12 * MIB + 17))
    (root / "text").write_bytes(make_content(5, 200))
    (root / "zeros").write_bytes(bytes(20 * MIB))
    (root / "empty").touch()
    os.link(root / "text", root / "json" / "text-again")
    (root / "link").symlink_to("text")
    return root


@pytest.fixture(scope="module", params=["tar czf", "members", "gzip -9"])
def layer(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as a layer, packed in three ways."""
    path = tmp_path_factory.mktemp("layer") / "layer.tar.gz"
    if request.param == "tar czf":
        subprocess.run(["tar", "-C", source, "-czf", path, "."], check=True)
        return path
    tar = subprocess.run(["tar", "-C", source, "-cf", "-", "."], check=True, capture_output=True).stdout
    if request.param == "gzip -9":
        path.write_bytes(subprocess.run(["gzip", "-9"], input=tar, check=True, capture_output=True).stdout)
        return path
    size = 128 << 10
    path.write_bytes(b"".join(gzip.compress(tar[at : at + size], 6) for at in range(0, len(tar), size)))
    return path


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.needs_registry
@pytest.mark.needs_root
@pytest.mark.needs_fuse
@pytest.mark.slow
def test_a_layer_is_mounted_from_a_registry(
    machine: Machine, source: Path, layer: Path, anonymous_registry: RegistryServer, mountpoint: Path
) -> None:
    need_erofs_events()
    reference = f"{anonymous_registry.host}/in-place/image:v1"
    machine.nydus("build", "--no-copy", layer, reference)
    digest = hashlib.sha256(layer.read_bytes()).hexdigest()
    url = f"http://{anonymous_registry.host}/v2/in-place/image/blobs/sha256:{digest}"
    with urllib.request.urlopen(url) as response:
        assert response.read() == layer.read_bytes()
    assert machine.json("check", "--deep", reference)["faults"] == []
    for driver in ("erofs", "fuse", "pyfuse3"):
        host = Machine(machine.directory / driver)
        host.directory.mkdir()
        host.nydus("mount", "--driver", driver, reference, mountpoint)
        with (mountpoint / "noise.bin").open("rb", buffering=0) as file:
            file.seek(5 * MIB + 12288)
            read, expected = file.read(4096), (source / "noise.bin").read_bytes()[5 * MIB + 12288 :][:4096]
        assert read == expected
        (status,) = host.statuses(mountpoint)
        assert isinstance(status["fetched_bytes"], int)
        assert 0 < status["fetched_bytes"] <= 2 * MIB
        compared = subprocess.run(
            ["diff", "-r", "--no-dereference", source, mountpoint], capture_output=True, check=False
        )
        assert (compared.returncode, compared.stdout, compared.stderr) == (0, b"", b"")
        assert (mountpoint / "text").stat().st_ino == (mountpoint / "json/text-again").stat().st_ino
        host.nydus("umount", mountpoint)


def test_a_directory_has_all_that_an_image_needs(machine: Machine, layer: Path) -> None:
    before = layer.stat()
    target = f"dir:{machine.directory / 'image'}"
    machine.nydus("build", "--no-copy", layer, target)
    assert machine.json("check", "--deep", target)["faults"] == []
    machine.nydus("copy", target, f"oci:{machine.directory / 'layout'}:v1")
    copied = machine.json("check", "--deep", f"oci:{machine.directory / 'layout'}:v1")
    assert (copied["faults"], copied["blobs_unread"]) == ([], 0)
    after = layer.stat()
    assert (after.st_ino, after.st_nlink, after.st_mtime_ns) == (before.st_ino, 1, before.st_mtime_ns)


def test_contexts_have_the_size_that_they_should(layer: Path, tmp_path: Path) -> None:
    with layer.open("rb") as file:
        made = index_layer(file, "layer", tmp_path, BuildOptions())
    assert made.meta is not None
    assert made.digest == hashlib.sha256(layer.read_bytes()).hexdigest()
    bootstrap, meta = Bootstrap(made.bootstrap.read_bytes()), BlobMeta(made.meta.read_bytes())
    assert list(check_bootstrap(bootstrap)) == []
    digests, blob, data = bootstrap.chunk_digests(0), bootstrap.blobs[0], layer.read_bytes()
    assert list(check_blob_meta(blob, meta, digests)) == []
    for chunks in extents_of(meta):
        extent = meta.extent(chunks[0])
        assert extent.compressed_size <= MIB + (200 << 10)
        encoded = data[extent.compressed_offset :][: extent.compressed_size]
        assert list(check_extent(blob, meta, digests, chunks, encoded)) == []
    again = tmp_path / "again"
    again.mkdir()
    with layer.open("rb") as file:
        index_layer(file, "layer", again, BuildOptions())
    assert (again / "image.boot").read_bytes() == (tmp_path / "image.boot").read_bytes()


def test_a_layer_without_content(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "empty.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("directory")
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
    target = f"dir:{tmp_path / 'image'}"
    report = machine.json("build", "--no-copy", path, target)
    assert (report["inodes"], report["chunks"], report["blobs_uploaded"]) == (2, 0, 0)
    assert machine.json("check", "--deep", target)["faults"] == []


def test_a_sparse_entry_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sparse").write_bytes(b"")
    os.truncate(tmp_path / "sparse", MIB)
    tar = tmp_path / "layer.tar.gz"
    subprocess.run(["tar", "-C", tmp_path, "-Sczf", tar, "sparse"], check=True)
    with tar.open("rb") as file, pytest.raises(InvalidArchive, match="sparse entry"):
        index_layer(file, "layer", tmp_path, BuildOptions())


def test_what_is_no_gzip_file_is_one_line(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "layer.tar"
    path.write_bytes(b"plain" * 1000)
    code, line = machine.failure("build", "--no-copy", path, f"dir:{tmp_path / 'image'}")
    assert (code, "not a sound gzip stream" in line) == (66, True)
    assert not (tmp_path / "image" / "image.boot").exists()

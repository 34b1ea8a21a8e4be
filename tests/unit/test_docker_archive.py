"""Images in files of `docker save`: the manifest that is made for them, and the files that are written."""

import gzip
import json
import tarfile
from pathlib import Path
from typing import cast

import pytest
import zstandard

from backend.contract import BackendError, BlobNotFound
from backend.copy import copy_image
from backend.docker_archive import DockerArchiveStore
from backend.layout_index import NoSuchTag, SeveralImages
from backend.manifest import LAYER_GZIP, LAYER_TAR, LAYER_ZSTD, ManifestBroken, NotNydusImage
from backend.ocidigest import DigestMismatch
from backend.publishing import STAGING_PREFIX
from backend.reference import Reference, parse_reference
from backend.source_image import NotContainerImage
from backend.store import CannotPublish, NoProgress, PublishResult, open_store
from backend.tar_index import ArchiveBroken
from tests.archives import Archive, saved_config, saved_image, sha256
from tests.oci_images import OCI_LAYER, Blob, Layer, Layout, gzipped
from tests.sample_image import make_image

LAYERS = [Layer().add("a", b"a" * 9000).tar(), Layer().add("b", b"b").tar()]


async def manifest_of(path: Path, name: str = "") -> dict[str, object]:
    async with open_store(parse_reference(f"docker-archive:{path}{name}")) as store:
        made = await cast(DockerArchiveStore, store).get_manifest()
    assert made.digest == sha256(made.data)
    found = json.loads(made.data)
    assert isinstance(found, dict)
    return found


async def copy(source: str, target: str) -> PublishResult:
    references: list[Reference] = [parse_reference(source), parse_reference(target)]
    async with open_store(references[0]) as origin, open_store(references[1]) as to:
        return await copy_image(origin, to, NoProgress())


async def test_a_manifest_is_made(tmp_path: Path) -> None:
    path = saved_image(LAYERS, "app:v1").write(tmp_path / "a.tar")
    config = saved_config(LAYERS)
    assert await manifest_of(path) == {
        "schemaVersion": 2,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": sha256(config),
            "size": len(config),
        },
        "layers": [{"mediaType": LAYER_TAR, "digest": sha256(layer), "size": len(layer)} for layer in LAYERS],
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
    }
    async with open_store(parse_reference(f"docker-archive:{path}")) as store:
        archive = cast(DockerArchiveStore, store)
        reader = archive.open_content(sha256(LAYERS[1]), None)  # before anybody asked for the manifest
        assert await reader.read_range(0, len(LAYERS[1])) == LAYERS[1]
        assert await archive.open_content(sha256(config), None).size() == len(config)
        with pytest.raises(BlobNotFound):
            await archive.open_content(sha256(b"nope"), None).size()
        with pytest.raises(BlobNotFound):
            await archive.get_manifest(sha256(b"nope"))
        with pytest.raises(NotNydusImage):
            await archive.fetch_metadata(tmp_path / "images")


async def test_layers_that_are_links_compressed_or_there_twice(tmp_path: Path) -> None:
    plain, packed = LAYERS[0], gzip.compress(LAYERS[1])
    zstd = zstandard.compress(LAYERS[1])
    archive = Archive().file("x.tar", plain).file("gz.tar", packed).file("z.tar", zstd)
    archive.entry("1/layer.tar", tarfile.SYMTYPE, link="../x.tar")
    archive.entry("2/layer.tar", tarfile.LNKTYPE, link="x.tar")
    archive.file("c", saved_config([plain, plain, LAYERS[1], LAYERS[1]]))
    paths = ["1/layer.tar", "2/layer.tar", "gz.tar", "z.tar"]
    path = archive.document("manifest.json", [{"Config": "c", "Layers": paths}]).write(tmp_path / "a.tar")
    layers = cast(list[dict[str, object]], (await manifest_of(path))["layers"])
    assert [(layer["mediaType"], layer["digest"]) for layer in layers] == [
        (LAYER_TAR, sha256(plain)),
        (LAYER_TAR, sha256(plain)),
        (LAYER_GZIP, sha256(packed)),
        (LAYER_ZSTD, sha256(zstd)),
    ]


def _two(*names: list[str] | None) -> Archive:
    archive = Archive()
    listing = []
    for number, tags in enumerate(names):
        layer = Layer().add(str(number), b"x").tar()
        archive.file(f"{number}.tar", layer).file(f"{number}.json", saved_config([layer]))
        listing.append({"Config": f"{number}.json", "RepoTags": tags, "Layers": [f"{number}.tar"]})
    return archive.document("manifest.json", listing)


async def test_a_name_or_a_number_chooses(tmp_path: Path) -> None:
    path = _two(["app:v1", "r.x/app:v1"], ["docker.io/library/app:latest"], None).write(tmp_path / "a.tar")
    digests = [sha256(saved_config([Layer().add(str(n), b"x").tar()])) for n in range(3)]
    for name, number in {
        ":app:v1": 0,
        ":docker.io/library/app:v1": 0,
        ":r.x/app:v1": 0,
        ":app": 1,
        ":@1": 1,
        ":@2": 2,
    }.items():
        config = cast(dict[str, object], (await manifest_of(path, name))["config"])
        assert config["digest"] == digests[number], name
    found = "it has app:v1, r.x/app:v1, docker.io/library/app:latest, @2"
    with pytest.raises(SeveralImages, match=f"say which image is meant; {found}"):
        await manifest_of(path)
    for name in (":app:v2", ":@3"):
        with pytest.raises(NoSuchTag, match=f"no such image in it; {found}"):
            await manifest_of(path, name)


def _listing(value: object, *more: tuple[str, bytes]) -> Archive:
    archive = Archive().document("manifest.json", value)
    for name, data in more:
        archive.file(name, data)
    return archive


ONE = {"Config": "c", "Layers": ["l"]}
NONE = {"Config": "c", "Layers": []}


@pytest.mark.parametrize(
    ("archive", "kind", "why"),
    [
        (Archive().file("f", b""), ArchiveBroken, "not made by docker save"),
        (_listing({}), ArchiveBroken, "Expected `array`"),
        (_listing([]), NoSuchTag, "it has none"),
        (_listing([{"Config": 1}]), ArchiveBroken, "Expected `str`"),
        (_listing([NONE]), ArchiveBroken, "names c, which is not in it"),
        (_listing([{"Config": "../c", "Layers": []}]), ArchiveBroken, "names ../c, which is not in it"),
        (
            _listing([ONE], ("c", saved_config([]))),
            ArchiveBroken,
            "1 layers and 0",
        ),
        (
            _listing([ONE], ("c", saved_config([b"x"]))),
            ArchiveBroken,
            "names l, which is not in it",
        ),
        (
            _listing([ONE], ("c", saved_config([b"x"])), ("l", b"y")),
            DigestMismatch,
            f"expected {sha256(b'x')}, the content is {sha256(b'y')}",
        ),
        (
            _listing([ONE], ("c", saved_config([b"x"])), ("l", b"BZh91AY")),
            ArchiveBroken,
            "compressed with bzip2",
        ),
        (_listing([NONE], ("c", b"{")), ManifestBroken, "config"),
        (
            _listing([ONE | {"Layers": ["l"] * 10_000}]),
            ArchiveBroken,
            "10000 layers, more than 1024",
        ),
        (_listing([NONE] * 2000), ArchiveBroken, "2000 images, more than 1024"),
        (_listing([[]] * 100_000), ArchiveBroken, "Expected `object`"),
        (Archive().file("manifest.json", b"[" * 100_000), ArchiveBroken, "manifest.json: "),
        (Archive().file("manifest.json", bytes(5 << 20)), ArchiveBroken, "more than 4194304"),
    ],
)
async def test_bad_archives(tmp_path: Path, archive: Archive, kind: type[BackendError], why: str) -> None:
    with pytest.raises(kind) as caught:
        await manifest_of(archive.write(tmp_path / "a.tar"))
    assert why in str(caught.value)


async def test_a_copy_has_plain_layers_and_comes_back(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    plain = Blob(OCI_LAYER, LAYERS[1])
    two_members = Blob(OCI_LAYER + "+gzip", gzip.compress(LAYERS[0][:3000]) + gzip.compress(LAYERS[0][3000:]))
    pairs = [(LAYERS[0], gzipped(LAYERS[0])), (LAYERS[1], plain), (LAYERS[0], two_members)]
    layout.image(pairs, tag="v1")
    path = tmp_path / "a.tar"
    result = await copy(f"oci:{layout.path}:v1", f"docker-archive:{path}:app")
    assert (result.digest, result.blobs_uploaded) == ("", 3)
    with tarfile.open(path) as archive:
        (listed,) = json.loads(archive.extractfile("manifest.json").read())  # type: ignore[union-attr]
        layers = [archive.extractfile(name).read() for name in listed["Layers"]]  # type: ignore[union-attr]
        assert len(archive.getnames()) == 4, "a layer that is the same plain tar is there once"
    assert listed["RepoTags"] == ["docker.io/library/app:latest"]
    assert layers == [LAYERS[0], LAYERS[1], LAYERS[0]]
    found = cast(list[dict[str, object]], (await manifest_of(path, ":app"))["layers"])
    assert [layer["digest"] for layer in found] == [sha256(layer) for layer in layers]
    await copy(f"docker-archive:{path}", f"docker-archive:{tmp_path / 'b.tar'}:app")
    assert path.read_bytes() == (tmp_path / "b.tar").read_bytes()


async def test_of_an_index_the_image_of_this_platform(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    made = {
        arch: layout.image([Layer().add(arch, b"")], architecture=arch)
        for arch in ("amd64", "arm64", "s390x")
    }
    entries = [blob.descriptor(platform={"os": "linux", "architecture": arch}) for arch, blob in made.items()]
    index = layout.put_json(
        "application/vnd.oci.image.index.v1+json", {"schemaVersion": 2, "manifests": entries}
    )
    layout.tag(index, "all")
    await copy(f"oci:{layout.path}:all", f"docker-archive:{tmp_path / 'a.tar'}")
    assert len(cast(list[object], (await manifest_of(tmp_path / "a.tar"))["layers"])) == 1


async def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    target = f"docker-archive:{tmp_path / 'a.tar'}"
    layout = Layout(tmp_path / "layout")
    cut = Blob(OCI_LAYER + "+gzip", gzip.compress(LAYERS[0])[:-20])
    broken = Blob(OCI_LAYER + "+gzip", gzip.compress(LAYERS[0])[:30] + b"?" * 100)
    zstd = Blob(OCI_LAYER + "+zstd", zstandard.compress(LAYERS[0]))
    other = gzipped(LAYERS[1])
    for tag, blob, why in (
        ("cut", cut, "the gzip stream ends early"),
        ("broken", broken, "layer sha256:"),
        ("zstd", zstd, "compressed with zstd; only gzip is undone"),
        ("other", other, "not those that its config names"),
    ):
        layout.image([(LAYERS[0], blob)], tag=tag)
        with pytest.raises(CannotPublish, match=why):
            await copy(f"oci:{layout.path}:{tag}", target)
    layout.image([LAYERS[0]], tag="v1")
    with pytest.raises(CannotPublish, match="give a name"):
        await copy(f"oci:{layout.path}:v1", f"{target}:@0")
    image = make_image(tmp_path / "build")
    async with open_store(parse_reference(f"oci:{layout.path}:nydus")) as store:
        await store.publish(image, NoProgress())
    with pytest.raises(NotContainerImage, match="already a Nydus image"):
        await copy(f"oci:{layout.path}:nydus", target)
    async with open_store(parse_reference(target)) as store:
        with pytest.raises(CannotPublish, match="use oci-archive"):
            await store.publish(image, NoProgress())
    assert not (tmp_path / "a.tar").exists()
    assert not list(tmp_path.glob(f"{STAGING_PREFIX}*"))


async def test_a_layer_that_was_altered_is_called_that(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    blob = gzipped(LAYERS[0])
    layout.image([(LAYERS[0], blob)], tag="v1")
    path = layout.path / "blobs/sha256" / blob.digest.removeprefix("sha256:")
    path.write_bytes(b"?" + blob.data[1:])
    with pytest.raises(DigestMismatch):
        await copy(f"oci:{layout.path}:v1", f"docker-archive:{tmp_path / 'a.tar'}")


async def test_a_file_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.image([LAYERS[0]], tag="v1")
    path = tmp_path / "a.tar"
    path.touch()  # an empty one is taken, as skopeo does
    await copy(f"oci:{layout.path}:v1", f"docker-archive:{path}:app:v1")
    before = path.read_bytes()
    with pytest.raises(CannotPublish, match="the file is there already"):
        await copy(f"oci:{layout.path}:v1", f"docker-archive:{path}:app:v2")
    assert path.read_bytes() == before

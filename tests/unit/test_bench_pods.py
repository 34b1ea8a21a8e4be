"""The parts of the benchmark of pods that need no pod."""

import hashlib
import json
import tarfile
from pathlib import Path

import pytest

from tools.bench.corpus import Corpus
from tools.bench.pods.__main__ import Outcome, parse, table
from tools.bench.pods.containerd import ContainerdSetup
from tools.bench.pods.image import LARGE_FILES, AppShape, write_app_image, write_sandbox_image
from tools.bench.pods.measure import Calls, Cold, Together

SHAPE = AppShape(files=400, size_bytes=1 << 20, reads=90)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    file = tmp_path / "text"
    file.write_bytes(b"some text " * 1000)
    return Corpus([(file, 10_000)])


@pytest.mark.skipif(
    not Path("/usr/bin/busybox").exists() and not Path("/bin/busybox").exists(), reason="no busybox"
)
def test_the_image_has_what_its_manifest_says(tmp_path: Path, corpus: Corpus) -> None:
    layout = tmp_path / "layout"
    app = write_app_image(layout, SHAPE, corpus)
    assert write_sandbox_image(layout) == "sandbox"
    index = json.loads((layout / "index.json").read_bytes())
    assert [entry["annotations"]["org.opencontainers.image.ref.name"] for entry in index["manifests"]] == [
        "app",
        "sandbox",
    ]

    def blob(digest: str) -> Path:
        return layout / "blobs/sha256" / digest.removeprefix("sha256:")

    manifest = json.loads(blob(index["manifests"][0]["digest"]).read_bytes())
    config = json.loads(blob(manifest["config"]["digest"]).read_bytes())
    names: set[str] = set()
    for layer, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
        path = blob(layer["digest"])
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        with tarfile.open(path) as archive:
            names |= set(archive.getnames())
        assert diff_id.startswith("sha256:")
    assert app.files == SHAPE.files
    assert 0.9 * SHAPE.size_bytes < app.size_bytes < 1.1 * SHAPE.size_bytes
    with tarfile.open(blob(manifest["layers"][-1]["digest"])) as archive:
        member = archive.extractfile("start.list")
        assert member is not None
        wanted = member.read().decode().split()
    assert len(wanted) == SHAPE.reads + 1
    assert {name.lstrip("/") for name in wanted} <= names
    assert len({name.split("/")[2] for name in wanted}) == 3  # two packages and a large file
    assert sum(name.startswith("app/lib/") for name in names) == LARGE_FILES


def test_the_table_says_everything() -> None:
    outcome = Outcome(
        files=3,
        size_bytes=1 << 20,
        rate="100mbit",
        load=(1.0, 2.0, 3.0),
        drivers=["erofs"],
        cold={"lazy": Cold(0.5, 0.1, 0.4, 1 << 20), "pulled": Cold(9.0, 0.5, 0.5, 1 << 24)},
        warm_s={"lazy": [0.2, 0.3, 0.25], "pulled": [0.2, 0.2, 0.25]},
        calls=Calls(200, 1.5, 0.5, 0.9),
        together=Together(50, 3.0, 1 << 20, 1 << 20),
    )
    text = "\n".join(table(outcome))
    assert "10.0 times as fast" in text
    assert "+25.0%" in text
    assert "Prepare 1.50 ms" in text
    assert "1.00 times what one needs" in text


def test_options_have_the_sizes_of_the_goal() -> None:
    options = parse([])
    assert (options.files, options.size, str(options.rate)) == (30_000, 512 << 20, "100000000bit")
    assert (options.snapshots, options.containers) == (200, 50)


def test_containerd_is_told_everything(tmp_path: Path) -> None:
    setup = ContainerdSetup(tmp_path, "reg.test/pause:v1", "overlayfs", has_annotations=False)
    assert setup.command() == ["containerd", "-c", str(tmp_path / "config.toml")]
    text = (tmp_path / "config.toml").read_text()
    assert 'sandbox_image = "reg.test/pause:v1"' in text
    assert "disable_snapshot_annotations = true" in text
    setup.trust_registry("reg.test:5000")
    assert "http://reg.test:5000" in (tmp_path / "certs.d/reg.test:5000/hosts.toml").read_text()

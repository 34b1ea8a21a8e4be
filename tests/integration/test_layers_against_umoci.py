"""What a stack of layers means: the merged tree against the one that umoci unpacks."""

import os
import random
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import blake3
import pytest

from builder.build import Build
from builder.layer_tree import LayerTree
from builder.merge import LayerMerge, LayersUnfit
from builder.options import BuildOptions
from builder.prefetch_patterns import PrefetchPatterns
from builder.tar_tree import InvalidArchive
from rafs.bootstrap import Bootstrap
from tests.oci_images import Layer, Layout
from tests.tree_compare import describe_tree

pytestmark = pytest.mark.needs_root

CHUNK_BYTES = 4096
NAMES = ("a", "b", "c", "d", "usr", "lib")
TARGETS = ("lib", "lib/b", "/lib/b", "../lib", "nowhere", "../../..", "/")
"""Of links, none of which is in lib: links without end are what umoci and Linux treat differently."""


def merged(layers: list[Layer], folder: Path) -> dict[str, dict[str, Any]]:
    """What our merge makes of layers, in the words of `describe_tree`."""
    options = BuildOptions(chunk_size=CHUNK_BYTES, batch_size=CHUNK_BYTES, threads=1)
    bootstraps = []
    for number, layer in enumerate(layers):
        tar = folder / f"{number}.tar"
        tar.write_bytes(layer.tar())
        with Build(folder / f"{number}.work", options, tar_tree=LayerTree) as build:
            bootstraps.append(build.run(tar).files.bootstrap)
    with LayerMerge(folder) as merge:
        for path in bootstraps:
            merge.add(path)
        image = merge.write(folder / "merged", PrefetchPatterns(()))
    with Bootstrap.open(image.bootstrap) as bootstrap:
        return _describe_bootstrap(bootstrap)


def _describe_bootstrap(bootstrap: Bootstrap) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    first: dict[int, str] = {}
    for path, inode in bootstrap.walk():
        name = os.fsdecode(path)
        facts: dict[str, Any] = {
            "mode": oct(inode.mode),
            "owner": (inode.uid, inode.gid),
            "mtime": inode.mtime_s * 1_000_000_000 + inode.mtime_ns,
            "xattrs": {os.fsdecode(key): value for key, value in bootstrap.xattrs(inode).items()},
        }
        if inode.is_symlink:
            facts["target"] = bootstrap.readlink(inode)
        elif inode.is_file:
            refs = bootstrap.chunk_refs(inode)
            facts["content"] = [bootstrap.chunk_digests(ref.blob_index)[ref.chunk_index] for ref in refs]
            facts["link"] = first.setdefault(inode.nid, name)
        elif not inode.is_dir and not stat.S_ISFIFO(inode.mode):
            facts["device"] = inode.rdev
        found[name] = facts
    return found


def unpacked_by_umoci(layers: list[Layer], folder: Path) -> dict[str, dict[str, Any]] | None:
    """What umoci makes of the same layers; None where it fails."""
    if shutil.which("umoci") is None:
        pytest.skip("not installed: umoci")
    Layout(folder / "oci").image(layers, tag="v1")
    command = ["umoci", "unpack", "--image", str(folder / "oci:v1"), str(folder / "bundle")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return None
    root = folder / "bundle/rootfs"
    found = describe_tree(root)
    for name, facts in found.items():
        if "content" in facts:
            data = (root / name.lstrip("/")).read_bytes()
            chunks = (data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES))
            facts["content"] = [blake3.blake3(chunk).digest() for chunk in chunks]
    return found


def assert_same(layers: list[Layer], folder: Path, *, with_times: bool = True) -> None:
    """Both make the same tree. The time of a directory that no layer describes is umoci's own."""
    wanted, ours = unpacked_by_umoci(layers, folder), merged(layers, folder)
    assert wanted is not None
    for tree in (wanted, ours):
        del tree["/"]
        for facts in tree.values():
            if not with_times or facts["mode"].startswith("0o4"):
                del facts["mtime"]
    assert ours == wanted


def busy_layers() -> list[Layer]:
    """Every kind of entry, and every way in which layers change each other."""
    lowest = Layer()
    for name in ("bin", "data", "data/sub", "opq", "opq/in", "swap", "deep/er"):
        lowest.directory(name)
    lowest.add("data/gone", b"bye").add("data/sub/x", b"1").add("opq/a", b"a").add("opq/in/b", b"b")
    lowest.add("data/old", b"old").add("swap/f", b"f").add("becomes-dir", b"file").add("keep", b"k" * 9000)
    lowest.symlink("link-to-data", "data").symlink("becomes-file", "data")
    middle = Layer()
    middle.add("data/orig", b"hard" * 10).hardlink("data/hard1", "data/orig").hardlink("data/h2", "data/orig")
    middle.symlink("data/sl", "../etc/passwd").symlink("data/dangling", "/no/where")
    middle.symlink("data/" + "s" * 100, "t" * 300)
    middle.add("data/null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666)
    middle.add("data/blk", kind=tarfile.BLKTYPE, device=(7, 0)).add("data/fifo", kind=tarfile.FIFOTYPE)
    capability = b"\x01\x00\x00\x02\x00\x20\x00\x00" + bytes(12)
    xattrs = {"user.k": "v\u00e9".encode(), "security.capability": capability, "trusted.t": b"1"}
    middle.add("data/caps", b"\x7fELF", mode=0o4755, xattrs=xattrs)
    middle.add("data/" + "/".join(["d" * 200] * 3) + "/" + "n" * 250, b"long")
    middle.add("data/\u00fcn\u00efcode \n\u65e5", b"u").add("data/mtime", b"m", mtime=1_700_000_000.125)
    middle.hardlink("link-to-keep", "keep").directory("becomes-dir").add("becomes-dir/f", b"in")
    middle.add("link-to-data/through", b"through a link").add("becomes-file", b"now a file")
    middle.add("opq/in/late", b"hidden by the next layer").add("owned", b"o", uid=1000, gid=70_000)
    highest = Layer()
    highest.whiteout("data/gone").whiteout("data/sub").add("opq/new", b"new").opaque("opq")
    highest.add("data/old", b"new").whiteout("swap").directory("swap", mode=0o700).add("swap/g", b"g")
    highest.hardlink("old-link", "data/orig").whiteout("never-was").add("implied/er/f", b"i")
    highest.add("keep", b"k" * 4096 + b"changed" * 500).add(
        "deep/er/f", b"attributes of the directories stay"
    )
    return [lowest, middle, highest]


def test_every_kind_of_entry_and_of_change(tmp_path: Path) -> None:
    assert_same(busy_layers(), tmp_path)


@pytest.mark.slow
def test_very_many_layers(tmp_path: Path) -> None:
    layers = []
    for number in range(128):
        layer = Layer().add(f"d/{number % 7}/f{number % 31}", b"%d" % number * 50)
        layers.append(layer.whiteout(f"d/{(number + 3) % 7}") if number % 5 == 0 else layer)
    assert_same(layers, tmp_path)


@pytest.mark.parametrize("seed", range(int(os.environ.get("LAYER_SEEDS", "40"))))
def test_random_layers(tmp_path: Path, seed: int) -> None:
    """Where umoci fails (a file where a directory is needed), ours need only be sound."""
    chance, files = random.Random(seed), set[str]()
    layers = [_random_layer(chance, files) for _ in range(chance.randint(1, 4))]
    wanted = unpacked_by_umoci(layers, tmp_path)
    try:
        ours = merged(layers, tmp_path)
    except (InvalidArchive, LayersUnfit):
        assert wanted is None
        return
    if wanted is None:
        return
    for tree in (wanted, ours):
        del tree["/"]
        for facts in tree.values():
            del facts["mtime"]
    assert ours == wanted


def _random_layer(chance: random.Random, files: set[str]) -> Layer:
    layer = Layer()
    for _ in range(chance.randint(1, 8)):
        path = "/".join(chance.choice(NAMES) for _ in range(chance.randint(1, 3)))
        kind = chance.random()
        if kind < 0.3:
            files.add(path)
            data = bytes([chance.randint(0, 255)]) * chance.randint(0, 9000)
            layer.add(path, data, mode=chance.choice((0o644, 0o755, 0o4755)), uid=chance.randint(0, 3))
        elif kind < 0.5:
            layer.directory(path, mode=chance.choice((0o755, 0o700, 0o1777)))
        elif kind < 0.65:
            if "lib" not in path:
                files.discard(path)
                layer.symlink(path, chance.choice(TARGETS))
        elif kind < 0.75 and files:
            layer.hardlink(path, chance.choice(sorted(files)))
        elif kind < 0.9:
            layer.whiteout(path)
        else:
            layer.opaque(path)
    return layer


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Layer().add("../escape", b"x"), "leads out of the tree"),
        (Layer().add("a/../../b", b"x"), "leads out of the tree"),
        (Layer().hardlink("l", "../../etc/passwd"), "leads out of the tree"),
        (Layer().add("x/.wh.", b""), "names nothing"),
        (Layer().add(".wh.x/f", b""), "lies in a whiteout"),
        (Layer().symlink("l", "l").add("l/f", b""), "too many symbolic links"),
    ],
)
def test_hostile_layers(tmp_path: Path, layer: Layer, why: str) -> None:
    with pytest.raises(InvalidArchive, match=why):
        merged([layer], tmp_path)


def test_a_link_to_a_file_that_no_layer_has(tmp_path: Path) -> None:
    with pytest.raises(LayersUnfit, match=r"layer 2: '/l' is a hard link to 'gone', which is no file"):
        merged([Layer().add("f", b"x"), Layer().hardlink("l", "gone")], tmp_path)


def test_links_that_point_out_of_the_tree_stay_inside(tmp_path: Path) -> None:
    """An absolute link, or one with `..` above the root, leads to the image's own root."""
    layers = [Layer().directory("etc").symlink("up", "../../../etc").symlink("abs", "/etc")]
    tree = merged([*layers, Layer().add("up/one", b"1").add("abs/two", b"2")], tmp_path)
    assert {"/etc/one", "/etc/two"} <= set(tree)


def test_marks_of_overlayfs_in_a_layer_are_not_taken_over(tmp_path: Path) -> None:
    evil = {"trusted.overlay.redirect": b"/etc", "trusted.nydus-py.link": b"f", "user.fine": b"1"}
    tree = merged([Layer().add("f", b"x").add("g", b"y", xattrs=evil)], tmp_path)
    assert tree["/g"]["xattrs"] == {"user.fine": b"1"}
    assert tree["/g"]["link"] == "/g"

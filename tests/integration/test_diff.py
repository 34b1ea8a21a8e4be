"""`nydus-py diff` against what a comparison of the trees themselves says."""

import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cli_machine import Machine
from tests.integration.test_mount_pyfuse3 import noise
from tests.tree_compare import describe_tree

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


def build(machine: Machine, tree: Path, *options: str) -> str:
    """An image of a tree; its reference."""
    target = f"dir:{machine.directory}/{tree.name}-image{len(options)}"
    machine.nydus("build", tree, target, *options)
    return target


def make_tree(root: Path, seed: int, count: int) -> Path:
    """Some files, links and directories."""
    chance = random.Random(seed)
    for number in range(count):
        path = root / f"d{number % 5}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 7 == 0:
            path.symlink_to(f"t{chance.randint(0, 9)}")
        else:
            path.write_bytes(noise(chance.randint(0, 20_000), number))
            os.utime(path, ns=(0, number * 1_000_000_007))
    for folder in [root, *root.iterdir()]:
        os.utime(folder, ns=(0, 5))
    return root


def change_tree(root: Path, seed: int) -> None:
    """Does something to one file in five."""
    chance = random.Random(seed)
    for path in sorted(root.glob("d*/*")):
        what = chance.randint(0, 19)
        if what == 0:
            path.unlink()
        elif what == 1 and not path.is_symlink():
            path.write_bytes(b"changed")
        elif what == 2 and not path.is_symlink():
            path.chmod(0o600)
        elif what == 3:
            path.with_name(path.name + "-new").write_bytes(noise(5000, seed))
    for folder in [root, *root.iterdir()]:
        os.utime(folder, ns=(0, 5))


def wanted_changes(old: Path, new: Path) -> dict[str, str]:
    """What a comparison on disk finds."""
    before, after = describe_tree(old), describe_tree(new)
    found = dict.fromkeys(before.keys() - after.keys(), "removed")
    found |= dict.fromkeys(after.keys() - before.keys(), "added")
    for name in before.keys() & after.keys():
        if _content(before[name]) != _content(after[name]):
            found[name] = "content"
        elif before[name] != after[name]:
            found[name] = "metadata"
    return found


def _content(facts: dict[str, Any]) -> tuple[object, ...]:
    return facts["mode"][:-4], facts.get("content"), facts.get("target"), facts.get("device")


@pytest.mark.parametrize("seed", range(3))
def test_the_list_is_what_a_comparison_of_the_trees_finds(
    tmp_path: Path, machine: Machine, seed: int
) -> None:
    old, new = make_tree(tmp_path / "old", seed, 200), make_tree(tmp_path / "new", seed, 200)
    change_tree(new, seed)
    report = machine.json("diff", build(machine, old), build(machine, new))
    files = report["files"]
    assert isinstance(files, list)
    assert {file["path"]: file["change"] for file in files} == wanted_changes(old, new)


def test_bytes_to_fetch_are_those_of_what_is_new(tmp_path: Path, machine: Machine) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "large").write_bytes(noise(8 * MIB))
    (tmp_path / "new" / "moved").write_bytes(noise(8 * MIB)[MIB : 3 * MIB])
    (tmp_path / "new" / "fresh").write_bytes(noise(2 * MIB, 1))
    old, new = build(machine, tmp_path / "old"), build(machine, tmp_path / "new")
    report = machine.json("diff", "-q", old, new)
    assert (report["fetch_chunks"], report["fetch_decoded_bytes"], report["fetch_bytes"]) == (
        2,
        2 * MIB,
        2 * MIB,
    )
    assert (report["total_bytes"], report["added"], report["files"]) == (10 * MIB, 2, [])
    assert machine.json("diff", new, old)["fetch_bytes"] == 0
    same = machine.nydus("diff", new, new)
    assert same.splitlines()[0] == "0 added, 0 removed, 0 with other content, 0 with other metadata"


def test_images_cut_in_other_ways_are_said_to_be_so(tmp_path: Path, machine: Machine) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "f").write_bytes(noise(3 * MIB))
    one = build(machine, tmp_path / "tree")
    other = build(machine, tmp_path / "tree", "--digester", "sha256")
    report = machine.json("diff", one, other)
    assert (report["is_comparable"], report["fetch_bytes"]) == (False, 3 * MIB)

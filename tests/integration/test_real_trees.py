"""Trees of this machine go through a build, a check and an unpacking, and come out as they were."""

import shutil
from pathlib import Path

import pytest

from rafs.bootstrap import Bootstrap
from rafs.check import check_bootstrap
from tests.builder_support import read_tree
from tests.integration.cli_machine import Machine

FILES_MAX = 3000
BYTES_MAX = 100 << 20
TREES = [Path("/usr/lib/python3"), Path("/usr/share/doc"), Path("/usr/share/zoneinfo")]


def _copy_some(root: Path, copy: Path) -> None:
    """The first files of a tree, in the order of their names, with everything on the way to them."""
    files, size = 0, 0

    def leave_out(folder: str, names: list[str]) -> list[str]:
        nonlocal files, size
        left = []
        for name in sorted(names):
            status = Path(folder, name).lstat()
            files, size = files + 1, size + status.st_size
            if files > FILES_MAX or size > BYTES_MAX:
                left.append(name)
        return left

    shutil.copytree(root, copy, symlinks=True, ignore=leave_out)


def _round_trip(machine: Machine, source: Path, *flags: str) -> Path:
    """Where the image of `source` was unpacked; its tables have no fault."""
    image, out = machine.directory / "image", machine.directory / "out"
    machine.nydus("build", source, f"dir:{image}", *flags)
    (boot,) = image.glob("*.boot")
    with Bootstrap.open(boot) as bootstrap:
        assert list(check_bootstrap(bootstrap)) == []
    machine.nydus("unpack", f"dir:{image}", out)
    return out


@pytest.mark.needs_root
@pytest.mark.parametrize("root", TREES, ids=str)
@pytest.mark.slow
def test_a_tree_of_this_machine(tmp_path: Path, root: Path) -> None:
    if not root.is_dir():
        pytest.skip(f"no {root}")
    _copy_some(root, tmp_path / "src")
    expected = read_tree(tmp_path / "src")
    assert len(expected) > 1
    assert read_tree(_round_trip(Machine(tmp_path), tmp_path / "src")) == expected


def test_weights_in_the_safetensors_format(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    safetensors = pytest.importorskip("safetensors.numpy")
    random = numpy.random.default_rng(7)
    tensors = {
        "embedding": random.standard_normal((1000, 256)).astype(numpy.float32),
        "layer.0": random.standard_normal((512, 512)).astype(numpy.float16),
        "mask": numpy.zeros((3, 1 << 19), numpy.uint8),
        "tied": numpy.ones((1,), numpy.int64),
    }
    (tmp_path / "src").mkdir()
    safetensors.save_file(tensors, tmp_path / "src" / "model.safetensors", {"format": "np"})
    out = _round_trip(Machine(tmp_path), tmp_path / "src", "--chunk-size", "64KiB")
    found = safetensors.load_file(out / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert numpy.array_equal(found[name], tensor)

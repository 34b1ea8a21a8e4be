"""dump.erofs and fsck.erofs read what the writer writes, and see the same tree."""

import stat
import subprocess
from pathlib import Path

import pytest

from rafs.bootstrap import Bootstrap
from rafs.inode_table import Attributes
from tests.mounted_tree import assert_content, assert_metadata, names_below, on_disk
from tests.posix_tree import posix_tree
from tests.rafs_image import ImageMaker, MadeImage, Options, walk_nodes

pytestmark = pytest.mark.needs_erofs_utils

DUMP_TYPES = {
    stat.S_IFREG: "regular file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink file",
}


@pytest.fixture(scope="module", params=[1, 3])
def image(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[MadeImage, Path]:
    folder = tmp_path_factory.mktemp("erofs-tools")
    path = folder / "image.boot"
    made = ImageMaker(posix_tree(), Options(blob_count=request.param)).make(path)
    made.write_devices(folder)
    return made, path


def run(program: str, image: tuple[MadeImage, Path], *arguments: str) -> str:
    made, path = image
    # One option a device, in device order.
    devices = [f"--device={path.parent / f'{entry.blob_id}.{entry.index}.data'}" for entry in made.entries]
    command = [program, *devices, *arguments, str(path)]
    done = subprocess.run(command, capture_output=True, check=False)
    output = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert done.returncode == 0, output
    return output


def test_dump_erofs_reads_the_superblock(image: tuple[MadeImage, Path]) -> None:
    output = run("dump.erofs", image, "-s")
    bootstrap = Bootstrap(image[0].bootstrap)
    lines = dict(line.split(":", 1) for line in output.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    assert fields["Filesystem magic number"] == "0xE0F5E1E2"
    assert fields["Filesystem root nid"] == "128"
    assert fields["Filesystem inode count"] == str(bootstrap.inode_count)
    # It adds the blocks of the devices to those of the image, which for RAFS are the same ones.
    assert fields["Filesystem blocks"] == str(2 * bootstrap.superblock.blocks)


def test_dump_erofs_agrees_on_each_inode(image: tuple[MadeImage, Path]) -> None:
    bootstrap = Bootstrap(image[0].bootstrap)
    for _, inode in bootstrap.walk():
        if not (inode.is_dir or inode.is_file or inode.is_symlink):
            continue  # dump.erofs 1.5 looks for data in devices, too
        output = run("dump.erofs", image, f"--nid={inode.nid}")
        assert f"Links: {inode.nlink} " in output
        assert f"Uid: {inode.uid}   Gid: {inode.gid}" in output
        assert f"Xattr size: {inode.xattr_size}" in output
        assert f"Access: {inode.mode & 0o777:04o}/" in output
        assert DUMP_TYPES[stat.S_IFMT(inode.mode)] in output


@pytest.mark.needs_root
def test_fsck_erofs_extracts_the_same_tree(image: tuple[MadeImage, Path], tmp_path: Path) -> None:
    target = tmp_path / "tree"
    run("fsck.erofs", image, f"--extract={target}", "--preserve")
    expected = dict(walk_nodes(posix_tree()))
    assert names_below(target) == set(expected)
    for path, node in expected.items():
        where = on_disk(target, path)
        assert_content(where, node)
        if path != b"/" and _survives_extraction(node.attributes):
            assert_metadata(where, node.attributes, node)


def test_fsck_erofs_finds_nothing(image: tuple[MadeImage, Path]) -> None:
    assert "error" not in run("fsck.erofs", image, "-d3").replace("No errors", "")


def _survives_extraction(attributes: Attributes) -> bool:
    """fsck.erofs 1.5 leaves symbolic links as they come and loses setuid; ext4 has no earlier times."""
    kept = not stat.S_ISLNK(attributes.mode) and not attributes.mode & (stat.S_ISUID | stat.S_ISGID)
    return kept and attributes.mtime_s >= -(1 << 31)

"""Verbs that make and read images, on layouts and directories: no registry, no mount."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rafs.content import WrongChunk
from tools.cat import NotAFile
from tools.check import ImageFaulty
from tools.main import run

PAYLOAD = bytes(range(256)) * 5000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small tree with one file of several chunks, small files, a duplicate, a link and odd names."""
    root = tmp_path / "source"
    (root / "sub" / "empty").mkdir(parents=True)
    (root / "big.bin").write_bytes(os.urandom(300_000) + PAYLOAD)
    (root / "copy.bin").write_bytes((root / "big.bin").read_bytes())
    (root / "sub" / "config.json").write_text('{"layers": 3}\n')
    (root / "sub" / "empty.txt").touch()
    (root / "link").symlink_to("sub/config.json")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9")).write_bytes(b"latin-1 name")
    os.mkfifo(root / "fifo")
    return root


@pytest.fixture
def nydus(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> "Nydus":
    return Nydus(tmp_path / "cache", capfdbinary)


class Nydus:
    """Runs command lines in this process."""

    def __init__(self, cache_dir: Path, capture: pytest.CaptureFixture[bytes]) -> None:
        self._cache_dir = cache_dir
        self._capture = capture

    def __call__(self, *arguments: str | Path) -> bytes:
        """Standard output of a command line that succeeds without a word on standard error."""
        code, out, err = self.try_run(*arguments)
        assert (code, err) == (0, "")
        return out

    def json(self, *arguments: str | Path) -> object:
        """What it reports as JSON."""
        return json.loads(self(*arguments, "--json"))

    def failure(self, *arguments: str | Path) -> tuple[int, str]:
        """Exit code and the one line of a command line that fails and gives no data."""
        code, out, err = self.try_run(*arguments)
        assert out == b""
        (line,) = err.splitlines()
        return code, line

    def try_run(self, *arguments: str | Path) -> tuple[int, bytes, str]:
        """Exit code, standard output and standard error."""
        code = run(["--cache-dir", str(self._cache_dir), *map(str, arguments)])
        captured = self._capture.readouterr()
        return code, captured.out, captured.err.decode()


@pytest.fixture
def layout(tmp_path: Path, source: Path, nydus: Nydus) -> str:
    reference = f"oci:{tmp_path / 'layout'}:v1"
    nydus("build", source, reference, "--chunk-size", "64KiB", "--threads", "2")
    return reference


def test_build_reports(tmp_path: Path, source: Path, nydus: Nydus) -> None:
    target = f"dir:{tmp_path / 'image'}"
    report = nydus.json("build", source, target, "--compressor", "lz4", "--digester", "sha256")
    assert isinstance(report, dict)
    assert report["reference"] == target
    assert report["files"] == 5
    assert report["bytes_unique"] < report["bytes_in"]
    assert report["bytes_out"] > 0
    assert report["digest"].startswith("sha256:")
    assert (tmp_path / "image" / "image.boot").stat().st_size == report["bootstrap_size_bytes"]


def test_a_finished_build_leaves_nothing_in_the_work_directory(
    tmp_path: Path, layout: str, nydus: Nydus
) -> None:
    assert list((tmp_path / "cache" / "build").iterdir()) == []


def test_a_second_build_sends_nothing_new(source: Path, layout: str, nydus: Nydus) -> None:
    report = nydus.json("build", source, layout, "--chunk-size", "64KiB")
    assert isinstance(report, dict)
    assert (report["blobs_uploaded"], report["blobs_skipped"], report["bytes_uploaded"]) == (0, 1, 0)


def test_ls(layout: str, nydus: Nydus) -> None:
    assert nydus("ls", layout).splitlines() == [
        b"big.bin", b"caf\xe9", b"copy.bin", b"fifo", b"link", b"sub",
    ]  # fmt: skip
    assert nydus("ls", layout, "/sub/config.json").splitlines() == [b"/sub/config.json"]
    assert nydus("ls", "-R", layout, "sub/").splitlines() == [
        b"/sub", b"/sub/config.json", b"/sub/empty", b"/sub/empty.txt",
    ]  # fmt: skip


def test_ls_long(source: Path, layout: str, nydus: Nydus) -> None:
    lines = {line.split()[-1]: line for line in nydus("ls", "-l", layout).splitlines()}
    link = next(line for line in lines.values() if b" link -> sub/config.json" in line)
    assert link.startswith(b"lrwxrwxrwx   1 ")
    fields = lines[b"big.bin"].split()
    assert int(fields[4]) == (source / "big.bin").stat().st_size
    assert lines[b"fifo"].startswith(b"p")


def test_ls_json(source: Path, layout: str, nydus: Nydus) -> None:
    rows = nydus.json("ls", "-R", layout)
    assert isinstance(rows, list)
    by_path = {row["path"]: row for row in rows}
    assert by_path["/"]["type"] == "directory"
    assert by_path["/caf\\xe9"]["size"] == len(b"latin-1 name")
    assert by_path["/link"]["target"] == "sub/config.json"
    status = (source / "big.bin").stat()
    big = by_path["/big.bin"]
    assert big["mtime_s"] * 10**9 + big["mtime_ns"] == status.st_mtime_ns
    assert big["mode"] == f"{status.st_mode & 0o7777:04o}"


def test_cat_gives_every_byte(source: Path, layout: str, nydus: Nydus) -> None:
    for name in ("big.bin", "copy.bin", "sub/config.json", "sub/empty.txt"):
        assert nydus("cat", layout, f"/{name}") == (source / name).read_bytes()


def test_inspect(layout: str, nydus: Nydus) -> None:
    report = nydus.json("inspect", layout)
    assert isinstance(report, dict)
    assert report["chunk_size_bytes"] == 64 << 10
    assert report["inodes"] == 10
    assert [blob["chunks"] for blob in report["blobs"]] == [report["chunks"]]
    assert b"digest     sha256:" in nydus("inspect", layout)


def test_copy_keeps_the_digest_and_sends_nothing_twice(tmp_path: Path, layout: str, nydus: Nydus) -> None:
    target = f"oci:{tmp_path / 'second'}:copy"
    original = nydus.json("inspect", layout)
    first, second = nydus.json("copy", layout, target), nydus.json("copy", layout, target)
    assert isinstance(original, dict)
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert first["digest"] == original["digest"]
    assert (first["blobs_uploaded"], second["blobs_uploaded"]) == (1, 0)
    assert second["bytes_uploaded"] == 0


def test_a_tar_stream_is_a_source(tmp_path: Path, layout: str, source: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.add(source / "sub", arcname="sub")
    target = f"oci:{tmp_path / 'from-tar'}:v1"
    command = [sys.executable, "-m", "tools.main", "--cache-dir", str(tmp_path / "cache")]
    subprocess.run([*command, "build", "-", target], input=stream.getvalue(), check=True, capture_output=True)
    shown = subprocess.run([*command, "cat", target, "/sub/config.json"], check=True, capture_output=True)
    assert shown.stdout == b'{"layers": 3}\n'


def test_chunks_of_another_image_are_not_stored_again(
    tmp_path: Path, source: Path, layout: str, nydus: Nydus
) -> None:
    (source / "new.txt").write_text("only this is new")
    target = f"oci:{tmp_path / 'layout'}:v2"
    report = nydus.json("build", source, target, "--chunk-size", "64KiB", "--chunk-dict", layout)
    assert isinstance(report, dict)
    assert report["bytes_out"] < 16 << 10
    assert nydus("cat", target, "/big.bin") == (source / "big.bin").read_bytes()


def test_a_corrupted_blob_is_named(bare_image: Path, nydus: Nydus) -> None:
    (blob,) = (bare_image / "blobs").iterdir()
    flip_bit(blob, 100)
    code, line = nydus.failure("cat", f"dir:{bare_image}", "/big.bin")
    assert code == WrongChunk.exit_code
    assert line.startswith(f"nydus-py: blob {blob.name}: chunk 0 at offset 0:")


@pytest.mark.parametrize("how", [[], ["--deep"]])
def test_a_sound_image_has_no_faults(layout: str, nydus: Nydus, how: list[str]) -> None:
    report = nydus.json("check", layout, *how)
    assert isinstance(report, dict)
    assert report["faults"] == []
    assert (report["bytes_read"] > 0) == bool(how)
    assert nydus("check", layout, *how).endswith(b": no faults\n")


@pytest.fixture
def bare_image(tmp_path: Path, source: Path, nydus: Nydus) -> Path:
    """An image directory whose blob holds the chunks as they are, one after the other."""
    directory = tmp_path / "image"
    nydus("build", source, f"dir:{directory}", "--compressor", "none", "--batch-size", "0")
    return directory


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def faults_of(nydus: Nydus, *arguments: str) -> list[dict[str, object]]:
    """The faults of an image that must have some."""
    code, out, err = nydus.try_run("check", "--json", *arguments)
    assert code == ImageFaulty.exit_code
    assert len(err.splitlines()) == 1
    faults = json.loads(out)["faults"]
    assert isinstance(faults, list)
    assert faults
    return faults


def test_a_deep_check_names_the_broken_chunk(bare_image: Path, nydus: Nydus) -> None:
    (blob,) = (bare_image / "blobs").iterdir()
    flip_bit(blob, 100)
    nydus("check", f"dir:{bare_image}")
    digest, checksum, *whole = faults_of(nydus, "--deep", f"dir:{bare_image}")
    assert [fault["expectation"] for fault in whole if "of the whole blob" in str(fault["expectation"])]
    assert digest["file"] == f"blob {blob.name}"
    assert str(digest["record"]).startswith("chunk 0 of blob")
    assert "digest" in str(digest["expectation"])
    assert "CRC-32C" in str(checksum["expectation"])


def test_a_check_names_record_and_offset_of_a_broken_bootstrap(bare_image: Path, nydus: Nydus) -> None:
    flip_bit(bare_image / "image.boot", 1024)
    (fault,) = faults_of(nydus, f"dir:{bare_image}")
    assert (fault["file"], fault["record"], fault["offset_bytes"]) == ("bootstrap", "EROFS superblock", 1024)


def layout_blobs(layout: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a layout's blobs, and its only manifest."""
    directory = Path(layout.removeprefix("oci:").removesuffix(":v1"))
    (entry,) = json.loads((directory / "index.json").read_bytes())["manifests"]
    blobs = directory / "blobs" / "sha256"
    return blobs, json.loads((blobs / entry["digest"].removeprefix("sha256:")).read_bytes())


def rewrite_config(layout: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Gives the image another config, and a manifest that names it."""
    blobs, manifest = layout_blobs(layout)
    config = json.loads((blobs / manifest["config"]["digest"].removeprefix("sha256:")).read_bytes())
    change(config)
    manifest["config"] |= store_json(blobs, config)
    index_path = blobs.parent.parent / "index.json"
    index = json.loads(index_path.read_bytes())
    index["manifests"][0] |= store_json(blobs, manifest)
    index_path.write_text(json.dumps(index))


def store_json(blobs: Path, document: object) -> dict[str, object]:
    data = json.dumps(document).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def test_a_check_compares_the_config_with_its_digest(layout: str, nydus: Nydus) -> None:
    blobs, manifest = layout_blobs(layout)
    flip_bit(blobs / manifest["config"]["digest"].removeprefix("sha256:"), 20)
    (fault,) = faults_of(nydus, layout)
    assert fault["file"] == "config"
    assert str(fault["expectation"]).startswith(f"digest {manifest['config']['digest']}, found sha256:")


@pytest.mark.parametrize("number", [0, 1])
def test_a_check_compares_diff_ids_with_the_layers(layout: str, nydus: Nydus, number: int) -> None:
    wrong = "sha256:" + "0" * 64
    rewrite_config(layout, lambda config: config["rootfs"]["diff_ids"].__setitem__(number, wrong))
    (fault,) = faults_of(nydus, layout)
    assert (fault["file"], fault["record"]) == ("config", f"diff ID {number}")
    assert str(fault["expectation"]).endswith(f"found '{wrong}'")


def test_a_check_counts_diff_ids(layout: str, nydus: Nydus) -> None:
    rewrite_config(layout, lambda config: config["rootfs"]["diff_ids"].pop())
    (fault,) = faults_of(nydus, layout)
    assert fault["expectation"] == "2 diff IDs, one for each layer, found 1"


def test_a_check_reads_the_chunk_table_at_the_end_of_a_blob(layout: str, nydus: Nydus) -> None:
    blobs, manifest = layout_blobs(layout)
    blob = blobs / manifest["layers"][0]["digest"].removeprefix("sha256:")
    flip_bit(blob, blob.stat().st_size - 4096)
    (fault,) = faults_of(nydus, layout)
    assert fault["file"] == f"blob.meta of {blob.name}"
    assert str(fault["record"]).startswith("chunk table at the end of blob")


def test_a_deep_check_hashes_the_whole_blob(layout: str, nydus: Nydus) -> None:
    """A byte that belongs to no record: the padding of the header."""
    blobs, manifest = layout_blobs(layout)
    blob = blobs / manifest["layers"][0]["digest"].removeprefix("sha256:")
    flip_bit(blob, blob.stat().st_size - 100)
    nydus("check", layout)
    (fault,) = faults_of(nydus, "--deep", layout)
    assert (fault["file"], fault["record"], fault["offset_bytes"]) == (f"blob {blob.name}", "blob", 0)
    assert str(fault["expectation"]).startswith(f"sha256:{blob.name} of the whole blob, found sha256:")


def test_a_deep_check_reads_blobs_of_a_faulty_image(layout: str, nydus: Nydus) -> None:
    blobs, manifest = layout_blobs(layout)
    rewrite_config(layout, lambda config: config["rootfs"]["diff_ids"].pop())
    flip_bit(blobs / manifest["layers"][0]["digest"].removeprefix("sha256:"), 100)
    files = [str(fault["file"]) for fault in faults_of(nydus, "--deep", layout)]
    assert files[0] == "config"
    assert set(files[1:]) == {f"blob {manifest['layers'][0]['digest'].removeprefix('sha256:')}"}


def test_a_check_misses_a_truncated_blob(bare_image: Path, nydus: Nydus) -> None:
    (blob,) = (bare_image / "blobs").iterdir()
    nydus("check", f"dir:{bare_image}")
    blob.write_bytes(blob.read_bytes()[:-1])
    code, out, err = nydus.try_run("check", f"dir:{bare_image}")
    assert code != 0
    assert len(err.splitlines()) == 1
    assert code != 1, out


def test_unpack_gives_the_tree_back(tmp_path: Path, source: Path, layout: str, nydus: Nydus) -> None:
    target = tmp_path / "unpacked"
    nydus("unpack", layout, target)
    compared = subprocess.run(
        ["diff", "-r", "--no-dereference", "-x", "fifo", source, target], capture_output=True, check=False
    )
    assert (compared.returncode, compared.stdout) == (0, b"")
    assert (target / "big.bin").stat().st_mtime_ns == (source / "big.bin").stat().st_mtime_ns
    assert (target / "fifo").is_fifo()


def test_unpack_gives_a_tar_stream(source: Path, layout: str, nydus: Nydus) -> None:
    with tarfile.open(fileobj=io.BytesIO(nydus("unpack", layout, "-"))) as archive:
        assert {member.name for member in archive} >= {"big.bin", "sub/config.json", "fifo", "link"}
        content = archive.extractfile("big.bin")
        assert content is not None
        assert content.read() == (source / "big.bin").read_bytes()


def test_unpack_does_not_touch_a_directory_with_something_in_it(
    tmp_path: Path, layout: str, nydus: Nydus
) -> None:
    target = tmp_path / "taken"
    target.mkdir()
    (target / "mine").touch()
    code, line = nydus.failure("unpack", layout, target)
    assert code == 56
    assert "not an empty directory" in line
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_unpack_that_fails_leaves_nothing(tmp_path: Path, bare_image: Path, nydus: Nydus) -> None:
    (blob,) = (bare_image / "blobs").iterdir()
    flip_bit(blob, 100)
    code, _ = nydus.failure("unpack", f"dir:{bare_image}", tmp_path / "unpacked")
    assert code == WrongChunk.exit_code
    assert not (tmp_path / "unpacked").exists()
    assert list(tmp_path.glob(".nydus-py-unpack-*")) == []


def test_what_cannot_be_shown_is_one_line(tmp_path: Path, layout: str, nydus: Nydus) -> None:
    assert nydus.failure("cat", layout, "/sub") == (
        NotAFile.exit_code,
        "nydus-py: /sub: not a regular file in the image",
    )
    assert nydus.failure("cat", layout, "/nope")[0] == 13
    assert nydus.failure("ls", layout, "/big.bin/x")[0] == 14
    code, line = nydus.failure("inspect", f"oci:{tmp_path / 'layout'}:v9")
    assert "no such image" in line
    assert code != 1


def test_a_missing_source_leaves_nothing_behind(tmp_path: Path, nydus: Nydus) -> None:
    code, line = nydus.failure("build", tmp_path / "nope", f"oci:{tmp_path / 'layout'}:v1")
    assert code == 50
    assert line.endswith("nope: no such file or directory")
    assert not (tmp_path / "layout").exists()
    assert not (tmp_path / "cache").exists()


def test_a_reader_that_stops_early_is_no_error(tmp_path: Path, layout: str) -> None:
    command = [sys.executable, "-m", "tools.main", "--cache-dir", str(tmp_path / "cache")]
    with subprocess.Popen([*command, "cat", layout, "/big.bin"], stdout=-1, stderr=-1) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (1, 141)

"""`nydus-py diff` on layouts and directories."""

import json
import os
from pathlib import Path

import pytest

from tools.main import run


class Diff:
    """Runs command lines in this process."""

    def __init__(self, cache_dir: Path, capture: pytest.CaptureFixture[str]) -> None:
        self._cache_dir = cache_dir
        self._capture = capture

    def __call__(self, *arguments: str | Path) -> str:
        code = run(["--cache-dir", str(self._cache_dir), *map(str, arguments)])
        captured = self._capture.readouterr()
        assert (code, captured.err) == (0, "")
        return captured.out


@pytest.fixture
def nydus(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Diff:
    return Diff(tmp_path / "cache", capfd)


@pytest.fixture
def images(tmp_path: Path, nydus: Diff) -> tuple[str, str]:
    """Two versions of a tree, the second in another kind of store."""
    root = tmp_path / "tree"
    root.mkdir()
    (root / "kept").write_bytes(os.urandom(100_000))
    (root / "gone").write_bytes(b"gone")
    (root / "text").write_bytes(b"text")
    (root / "tool").write_bytes(b"tool")
    first, second = f"oci:{tmp_path / 'layout'}:v1", f"dir:{tmp_path / 'bare'}"
    nydus("build", root, first)
    times = os.stat(root)
    (root / "gone").unlink()
    (root / "new").write_bytes(b"new")
    (root / "text").write_bytes(b"TEXT")
    (root / "tool").chmod(0o755)
    for path in (root / "text", root):
        os.utime(path, ns=(0, times.st_mtime_ns))
    nydus("build", root, second)
    nydus("build", root, first.replace(":v1", ":v2"))
    return first, second


def test_text(images: tuple[str, str], nydus: Diff) -> None:
    lines = nydus("diff", *images).splitlines()
    assert [line for line in lines if line[:2] in ("A ", "D ")] == ["D /gone", "A /new"]
    assert "M /tool (mode)" in lines
    assert any(line.startswith("M /text (content") for line in lines)
    assert any(line.startswith("files      1 added, 1 removed, ") for line in lines)
    assert any(line.startswith("to fetch   2 of 4 chunks") for line in lines)
    quiet = nydus("diff", "-q", *images).splitlines()
    assert quiet == lines[-len(quiet) :]
    assert quiet[0].startswith("files ")


def test_json(images: tuple[str, str], nydus: Diff) -> None:
    report = json.loads(nydus("diff", "--json", *images))
    changes = {file["path"]: (file["change"], file["type"]) for file in report["files"]}
    assert changes["/gone"] == ("removed", "file")
    assert changes["/new"] == ("added", "file")
    summary = report["summary"]
    assert (summary["added"], summary["removed"]) == (1, 1)
    assert summary["changed"] == len(report["files"]) - 2
    assert (summary["fetch_chunks"], summary["fetch_decoded_bytes"]) == (2, 7)
    assert summary["comparable_by_chunk"] is True
    quiet = json.loads(nydus("diff", "--json", "-q", *images))
    assert quiet == {"files": [], "summary": summary}


def test_only_a_bootstrap_layer_that_differs_travels(images: tuple[str, str], nydus: Diff) -> None:
    first, second = images[0], images[0].replace(":v1", ":v2")
    assert json.loads(nydus("diff", "--json", first, first))["summary"]["fetch_bootstrap_bytes"] == 0
    report = json.loads(nydus("diff", "--json", first, second))
    assert report["summary"]["fetch_bootstrap_bytes"] > 0

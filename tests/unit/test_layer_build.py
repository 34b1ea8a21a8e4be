"""A layer's process: what it leaves behind when it does not begin."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from backend.fileblob import FileBlobReader
from backend.manifest import LAYER_TAR, Descriptor
from builder import layer_build
from builder.layer_build import LayerProcessDied, build_layer
from builder.layer_process import LayerTask
from builder.options import BuildOptions
from tests.oci_images import Blob, Layer


@pytest.fixture
def layer(tmp_path: Path) -> tuple[Path, Descriptor]:
    """A layer in a file."""
    blob = Blob(LAYER_TAR, Layer().add("f", b"f" * 1_000_000).tar())
    (tmp_path / "layer").write_bytes(blob.data)
    return tmp_path / "layer", Descriptor(LAYER_TAR, blob.digest, len(blob.data))


async def test_one_that_dies_at_once_is_said_to_have_died(
    tmp_path: Path, layer: tuple[Path, Descriptor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it has read its task, and before it has read the layer."""

    def start(socket_number: int) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], stdin=subprocess.PIPE)
        process.wait()
        return process

    monkeypatch.setattr(layer_build, "_start", start)
    before = len(os.listdir("/proc/self/fd"))
    path, descriptor = layer
    reader = FileBlobReader(path, trio.CapacityLimiter(1))
    task = LayerTask("a layer", tmp_path / "work", BuildOptions(threads=1))
    with pytest.raises(LayerProcessDied, match="a layer: its build ended with status 3"):
        await build_layer(task, descriptor, reader, lambda path: None, lambda counters: None)
    await reader.aclose()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_one_that_cannot_be_started_leaves_no_descriptor(
    tmp_path: Path, layer: tuple[Path, Descriptor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(socket_number: int) -> "subprocess.Popen[bytes]":
        raise BlockingIOError(11, "no more processes")

    monkeypatch.setattr(layer_build, "_start", start)
    before = len(os.listdir("/proc/self/fd"))
    path, descriptor = layer
    reader = FileBlobReader(path, trio.CapacityLimiter(1))
    task = LayerTask("a layer", tmp_path / "work", BuildOptions(threads=1))
    with pytest.raises(BlockingIOError):
        await build_layer(task, descriptor, reader, lambda path: None, lambda counters: None)
    await reader.aclose()
    assert len(os.listdir("/proc/self/fd")) == before

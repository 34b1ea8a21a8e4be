"""Bootstraps that would make a merge use memory without end."""

import os
import struct
from pathlib import Path

import pytest

from builder import merge
from builder.merge import LayerMerge, LayersUnfit
from rafs.bootstrap import Bootstrap
from tests.builder_support import build, put

NLINK_OFFSET = 44  # in an extended inode


def test_names_that_share_the_addresses_of_a_file(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    first = put(tree, b"file", bytes(4096 * 2000))
    for number in range(300):
        os.link(first, tree / str(number))
    boot = build(tree, tmp_path / "work").files.bootstrap
    with LayerMerge(tmp_path) as honest:
        honest.add(boot)
    with Bootstrap.open(boot) as image:
        at = image.resolve(b"/file").offset_bytes + NLINK_OFFSET
    data = bytearray(boot.read_bytes())
    assert struct.unpack_from("<I", data, at) == (301,)
    struct.pack_into("<I", data, at, 1)
    forged = tmp_path / "forged"
    forged.write_bytes(data)
    with LayerMerge(tmp_path) as running, pytest.raises(LayersUnfit, match="more chunks than"):
        running.add(forged)


def test_blobs_that_claim_chunks_which_nothing_describes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "tree", b"file", b"one chunk")
    boot = build(tmp_path / "tree", tmp_path / "work").files.bootstrap
    with Bootstrap.open(boot) as image:
        at = image.extended.blob_table_offset + 72
    data = bytearray(boot.read_bytes())
    assert struct.unpack_from("<I", data, at) == (1,)
    struct.pack_into("<I", data, at, 100_000)
    boot.write_bytes(data)
    monkeypatch.setattr(merge, "CLAIMED_CHUNKS_MAX", 10_000)
    with LayerMerge(tmp_path) as running, pytest.raises(LayersUnfit, match="100000 chunks"):
        running.add(boot)

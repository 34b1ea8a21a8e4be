"""`cat` of a file whose size and chunks do not agree."""

import struct
from pathlib import Path

import pytest

from rafs.bootstrap import Bootstrap
from rafs.record import FormatError
from tests.integration.cli_machine import Machine


@pytest.mark.parametrize(("size", "where"), [(8204, 12), (3, 0)])
def test_a_size_that_is_not_that_of_the_chunks(tmp_path: Path, size: int, where: int) -> None:
    """A part of a file, or more than it, may not pass for it."""
    machine = Machine(tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "file").write_bytes(b"twelve bytes")
    image = tmp_path / "image"
    machine.nydus("build", tmp_path / "src", f"dir:{image}", "--chunk-size", "16KiB")
    (boot,) = image.glob("*.boot")
    _set_size(boot, b"/file", size)
    done = machine.run("cat", f"dir:{image}", "/file")
    assert done.returncode == FormatError.exit_code
    (line,) = done.stderr.splitlines()
    assert f"content of /file at offset {where}: " in line
    assert f"the file has {size} bytes" in line


def _set_size(boot: Path, path: bytes, size: int) -> None:
    """Writes `i_size` of an inode; it begins at the same byte in both forms of one."""
    raw = bytearray(boot.read_bytes())
    with Bootstrap(bytes(raw)) as bootstrap:
        at = bootstrap.resolve(path).offset_bytes
        assert bootstrap.resolve(path).size == struct.unpack_from("<I", raw, at + 8)[0]
    struct.pack_into("<I", raw, at + 8, size)
    boot.write_bytes(raw)

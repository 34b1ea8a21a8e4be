"""Unpacks bootstrap layers: the input as a layer, and as a tar, its checksum put right, in good gzip."""

import hashlib
import tempfile
from pathlib import Path

from isal import igzip_lib

from backend.bootstrap_layer import LayerFile, LayerUnpacker, blob_id_of, blob_meta_name, pack_layer
from tests.hostile import value_or_error

_CHECKSUM = slice(148, 156)


def _layer() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file, layer = Path(folder) / "file", Path(folder) / "layer"
        file.write_bytes(b"content")
        pack_layer([LayerFile("image.boot", file), LayerFile(blob_meta_name("0a" * 32), file)], layer)
        return layer.read_bytes()


SEEDS = (_layer(), igzip_lib.decompress(_layer(), flag=igzip_lib.DECOMP_GZIP))


def exercise(data: bytes) -> None:
    """Only errors of this project may come up; nothing is left that does not belong there."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "layer"
        directory.mkdir()
        _unpack(data, directory)
        _unpack(igzip_lib.compress(_with_checksum(data), flag=igzip_lib.COMP_GZIP), directory)


def _unpack(layer: bytes, directory: Path) -> None:
    unpacker = LayerUnpacker(directory, "fuzz")
    try:
        with value_or_error():
            for at in range(0, len(layer), 300):
                unpacker.feed(layer[at : at + 300])
            unpacker.finish(f"sha256:{hashlib.sha256(layer).hexdigest()}")
    finally:
        unpacker.close()
    for path in directory.iterdir():
        assert path.name == "image.boot" or blob_id_of(path.name), path.name
        path.unlink()
    assert [path.name for path in directory.parent.iterdir()] == ["layer"]


def _with_checksum(data: bytes) -> bytes:
    """`data` with the checksum of its first tar header put right (summed with blanks in its place)."""
    header = bytearray(data[:512].ljust(512, b"\0"))
    header[_CHECKSUM] = b" " * 8
    header[_CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_bootstrap_layer")

"""Fuzzes bootstrap layers: the input as a layer, and as a tar, its checksum put right, in good gzip."""

import hashlib
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["backend.bootstrap_layer"]):
    from isal import igzip_lib

    from backend.bootstrap_layer import LayerBroken, LayerUnpacker, blob_id_of

CHECKSUM = slice(148, 156)


def unpack(layer: bytes, directory: Path) -> None:
    """Unpacks one layer; what it leaves must have one of the names that belong there, and is removed."""
    unpacker = LayerUnpacker(directory, "fuzz")
    try:
        with suppress(LayerBroken):
            for at in range(0, len(layer), 300):
                unpacker.feed(layer[at : at + 300])
            unpacker.finish(f"sha256:{hashlib.sha256(layer).hexdigest()}")
    finally:
        unpacker.close()
    for path in directory.iterdir():
        assert path.name == "image.boot" or blob_id_of(path.name), path.name
        path.unlink()
    assert [path.name for path in directory.parent.iterdir()] == ["layer"]


def with_checksum(data: bytes) -> bytes:
    """`data` with the checksum of its first tar header put right (summed with blanks in its place)."""
    header = bytearray(data[:512].ljust(512, b"\0"))
    header[CHECKSUM] = b" " * 8
    header[CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


def main() -> None:
    """Runs until the fuzzer is told to stop."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        directory = Path(name) / "layer"
        directory.mkdir()

        def fuzz(data: bytes) -> None:
            unpack(data, directory)
            unpack(igzip_lib.compress(with_checksum(data), flag=igzip_lib.COMP_GZIP), directory)

        atheris.Setup(sys.argv, fuzz)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

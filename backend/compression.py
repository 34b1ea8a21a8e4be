"""What a stream is compressed with, by how it starts."""

START_BYTES = 6
_MAGICS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}


def compression_of(start: bytes) -> str | None:
    """The compression of a stream that starts so (`START_BYTES` bytes are enough); None for none known."""
    return next((name for magic, name in _MAGICS.items() if start.startswith(magic)), None)

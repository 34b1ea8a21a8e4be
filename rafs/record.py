"""What all on-disk records share: how a slice is taken from hostile bytes, and the error when it is wrong."""

from typing import ClassVar

from rafs.errors import NydusError

Buffer = bytes | bytearray | memoryview

BLOCK_SIZE = 4096
"""Bytes in a block of metadata and in the grid on which decoded chunks lie (`blkszbits` 12)."""


class FormatError(NydusError):
    """Bytes that break the format: where, which record, and what was expected instead.

    Attributes `offset_bytes`, `record` and `expectation` let a checker report without parsing text.
    """

    message = "{record} at offset {offset}: {expectation}"
    exit_code: ClassVar[int] = 10

    def __init__(self, record: str, offset_bytes: int, expectation: str) -> None:
        super().__init__(record=record, offset=offset_bytes, expectation=expectation)
        self.record = record
        self.offset_bytes = offset_bytes
        self.expectation = expectation


def take(data: Buffer, offset_bytes: int, size_bytes: int, record: str) -> Buffer:
    """The slice of `size_bytes` at `offset_bytes`; raises `FormatError` when `data` is shorter."""
    if offset_bytes < 0 or size_bytes < 0 or offset_bytes + size_bytes > len(data):
        raise FormatError(
            record, offset_bytes, f"needs {size_bytes} bytes, the source has {len(data)} in all"
        )
    return data[offset_bytes : offset_bytes + size_bytes]


def expect(condition: bool, record: str, offset_bytes: int, expectation: str) -> None:
    """Raises `FormatError` unless `condition` holds."""
    if not condition:
        raise FormatError(record, offset_bytes, expectation)


def round_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` (a power of two) that is not below `value`."""
    return (value + alignment - 1) & ~(alignment - 1)


def decode_hex_id(raw: Buffer, record: str, offset_bytes: int) -> str:
    """A blob ID: 64 lower-case hexadecimal digits, or 64 `x` in a bootstrap inside its own blob."""
    text = bytes(raw).decode("ascii", "replace")
    valid = len(text) == 64 and (all(c in "0123456789abcdef" for c in text) or text == "x" * 64)
    expect(valid, record, offset_bytes, f"a blob ID of 64 hexadecimal characters, found {text!r}")
    return text

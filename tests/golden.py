"""The worked examples of docs/format.md, so that the page and the code cannot drift apart."""

import re
from pathlib import Path

_PAGE = Path(__file__).resolve().parents[1] / "docs" / "format.md"
_BLOCK = re.compile(r"^```hex ([a-z0-9-]+) (\d+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def golden(name: str) -> bytes:
    """The bytes of the example of that name, whole."""
    return GOLDEN[name]


def _read_page() -> dict[str, bytes]:
    examples = {}
    for name, size, rows in _BLOCK.findall(_PAGE.read_text(encoding="utf-8")):
        data = bytes.fromhex("".join(row[6:] for row in rows.splitlines()))
        examples[name] = data.ljust(int(size), b"\0")
    return examples


GOLDEN = _read_page()

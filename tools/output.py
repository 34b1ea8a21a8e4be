"""What a verb writes to standard output: text for people, or JSON for programs."""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, TypeVar

import msgspec
import typer

T = TypeVar("T")

JsonOption = Annotated[bool, typer.Option("--json", help="Report as JSON on standard output.")]


def emit(value: T, *, as_json: bool, render: Callable[[T], Iterable[str]]) -> None:
    """Writes `value`, a dataclass or a list of them, as one JSON document or as the lines of `render`."""
    if as_json:
        write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
    else:
        write_bytes("".join(f"{line}\n" for line in render(value)).encode(errors="surrogateescape"))


def write_bytes(data: bytes) -> None:
    """Writes `data` to standard output as it is."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def talk(line: str) -> None:
    """Tells the user something that is not data, on standard error."""
    print(line, file=sys.stderr, flush=True)


def mounted_line(reference: str, mountpoint: str, driver: str, remark: str) -> str:
    """What a user is told of a new mount: which driver was taken, and why not a better one."""
    return f"{reference} is mounted at {mountpoint} ({driver}{f'; {remark}' if remark else ''})"


def json_name(name: bytes) -> str:
    """A file name for JSON, which knows no bytes: those that are not UTF-8 become `\\xNN`."""
    return name.decode("utf-8", "backslashreplace")


def shown_name(name: bytes) -> str:
    """A file name for a line of text: on a terminal with `?` for control characters."""
    text = os.fsdecode(name)
    if sys.stdout.isatty():
        text = "".join(sign if sign.isprintable() else "?" for sign in text)
    return text

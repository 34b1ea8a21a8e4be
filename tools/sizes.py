"""Sizes as users write and read them: `1MiB`, `64k`, `1.5 GiB`."""

import typer

from backend.sizes import parse_size

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size_option(option: str, text: str) -> int:
    """The value of a command line option in bytes; raises the usage error that names the option."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def format_size(size_bytes: float) -> str:
    """`size_bytes` in the largest unit that leaves at least 1, with at most one decimal."""
    value, unit = float(size_bytes), UNITS[0]
    for larger in UNITS[1:]:
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"

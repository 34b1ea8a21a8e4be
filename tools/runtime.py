"""The one place that starts trio."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

T = TypeVar("T")


def run_async(main: Callable[[], Awaitable[T]]) -> T:
    """Runs `main` to its end in a trio loop and returns what it returns."""
    return trio.run(main)

"""How an exception ends the process: one line on standard error and an exit code.

A traceback is shown with --debug, and for a fault of our own.
"""

import os
import sys
import traceback
from collections.abc import Iterator
from typing import ClassVar

from rafs.errors import NydusError

EXIT_FAULT = 1
EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141


class SystemFault(NydusError):
    """The operating system refused something: a full disk, a missing file, a missing right."""

    message = "{where}{why}"
    exit_code: ClassVar[int] = 90


def report_failure(error: BaseException, *, debug: bool) -> int:
    """Writes what a user should know about `error` to standard error and returns the exit code."""
    if any(isinstance(leaf, BrokenPipeError) for leaf in leaves(error)):
        # Who read our output has seen enough; the interpreter must not complain of it at its end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED
    known = known_error(error)
    if known is None:
        if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves(error)):
            print("nydus-py: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        traceback.print_exception(error)
        print("nydus-py: this is a fault of nydus-py; please report it with the lines above", file=sys.stderr)
        return EXIT_FAULT
    if debug:
        traceback.print_exception(error)
    print(f"nydus-py: {one_line(str(known))}", file=sys.stderr)
    return known.exit_code


def known_error(error: BaseException) -> NydusError | None:
    """The error that a user can act on, out of groups of exceptions too; None for a fault of ours."""
    found = list(leaves(error))
    for leaf in found:
        if isinstance(leaf, NydusError):
            return leaf
    if any(isinstance(leaf, KeyboardInterrupt) for leaf in found):
        return None
    for leaf in found:
        if isinstance(leaf, OSError) and leaf.strerror:
            where = f"{leaf.filename}: " if leaf.filename else ""
            return SystemFault(where=where, why=leaf.strerror)
    return None


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions in a group, however deep, or the exception itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def one_line(text: str) -> str:
    """`text` without line breaks, whatever a server or a file name put into it."""
    return " ".join(text.split())

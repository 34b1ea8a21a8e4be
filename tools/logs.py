"""Configures the log: once, here; every other module only asks `logging` for its logger."""

import enum
import logging
from typing import TextIO

# At INFO these report every request; a user asks for that with --log-level debug.
TALKATIVE = ("httpx", "httpcore")


class LogLevel(enum.StrEnum):
    """How much to log."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class ProgramHandler(logging.StreamHandler):  # type: ignore[type-arg] # not subscriptable at run time
    """Writes the log of the program; a class of its own to be found again."""


def configure_logging(level: LogLevel, stream: TextIO) -> None:
    """Sends log records of `level` and above to `stream`, in place of where they went before."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, ProgramHandler):
            root.removeHandler(handler)
    handler = ProgramHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(handler)
    root.setLevel(level.name)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.DEBUG if level is LogLevel.DEBUG else logging.WARNING)

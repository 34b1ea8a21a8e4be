"""Tells of failing requests without flooding the log."""

import logging
from collections.abc import Hashable

from fuse.errno_map import is_fault


class FailureLog:
    """Logs the first failure of each kind: a fault of ours with its traceback, anything else as a warning."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._told: set[tuple[Hashable, type[BaseException]]] = set()

    def note(self, what: str, error: Exception, kind: Hashable = None) -> None:
        """`what` failed with `error`; `kind` tells apart what is to be told separately, else `what` does."""
        key = (what if kind is None else kind, type(error))
        if key in self._told:
            return
        self._told.add(key)
        if is_fault(error):
            self._log.error("fault in %s", what, exc_info=error)
        else:
            self._log.warning("%s failed: %s; further failures of this kind are counted only", what, error)

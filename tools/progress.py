"""Progress bars on standard error, where that is a terminal; silence elsewhere.

Nothing here decides anything: a verb behaves the same whether or not somebody looks.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from backend.store import BlobOutcome

if TYPE_CHECKING:
    from rich.progress import Progress


class Bar(Protocol):
    """One line that fills up. Counts are bytes unless the bar was opened otherwise."""

    def advance(self, count: int) -> None:
        """That many more are done."""

    def extend(self, count: int) -> None:
        """That many more are to be done."""

    def move_to(self, done: int, total: int | None) -> None:
        """`done` of `total` are done; None for a total that is not known."""

    def note(self, text: str) -> None:
        """Says something at the end of the line."""


class SilentBar:
    """A bar that nobody looks at."""

    def advance(self, count: int) -> None:
        """Ignored."""

    def extend(self, count: int) -> None:
        """Ignored."""

    def move_to(self, done: int, total: int | None) -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""


class RichBar:
    """A bar on a terminal."""

    def __init__(self, progress: "Progress", title: str) -> None:
        self._progress = progress
        self._total: int | None = None
        self._task = progress.add_task(title, total=None, note="")

    def advance(self, count: int) -> None:
        """See `Bar`."""
        self._progress.advance(self._task, count)

    def extend(self, count: int) -> None:
        """See `Bar`."""
        self._total = (self._total or 0) + count
        self._progress.update(self._task, total=self._total)

    def move_to(self, done: int, total: int | None) -> None:
        """See `Bar`."""
        self._progress.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        """See `Bar`."""
        self._progress.update(self._task, note=text)


class TransferProgress:
    """Shows on a bar how publishing or copying goes on; see `backend.store.PublishProgress`."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._uploaded = 0
        self._skipped = 0
        self._sent_of_blob = 0
        self._size_of_blob = 0

    def blob_started(self, digest: str, size_bytes: int) -> None:
        """Makes room on the bar."""
        self._bar.extend(size_bytes)
        self._sent_of_blob, self._size_of_blob = 0, size_bytes

    def bytes_sent(self, count: int) -> None:
        """Moves the bar."""
        self._sent_of_blob += count
        self._bar.advance(count)

    def blob_finished(self, digest: str, outcome: BlobOutcome) -> None:
        """Counts the blob; one that did not have to travel fills its part of the bar at once."""
        if outcome is BlobOutcome.UPLOADED:
            self._uploaded += 1
        else:
            self._skipped += 1
        self._bar.advance(max(self._size_of_blob - self._sent_of_blob, 0))
        self._bar.note(f"{self._uploaded} sent, {self._skipped} already there")


@contextmanager
def progress_bar(title: str) -> Iterator[Bar]:
    """A bar for the duration of the block; removed from the screen at its end."""
    if not sys.stderr.isatty():
        yield SilentBar()
        return
    # rich costs a tenth of a second that a pipe need not pay.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield RichBar(progress, title)

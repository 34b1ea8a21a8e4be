"""Progress bars: on a terminal only, and what they count."""

import io

import pytest

from backend.store import BlobOutcome
from tools.progress import SilentBar, TransferProgress, progress_bar


class Terminal(io.StringIO):
    """A standard error that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


class RecordingBar(SilentBar):
    """Adds up what it is told."""

    def __init__(self) -> None:
        self.done = self.total = 0
        self.notes: list[str] = []

    def advance(self, count: int) -> None:
        self.done += count

    def extend(self, count: int) -> None:
        self.total += count

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_pipe_gets_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    with progress_bar("building") as bar:
        bar.extend(10)
        bar.advance(10)
        bar.note("done")
        bar.move_to(1, 2)
    assert stderr.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("building") as bar:
        bar.extend(2048)
        bar.advance(1024)
        bar.note("half of it")
    assert "building" in stderr.getvalue()
    assert "half of it" in stderr.getvalue()


def test_a_blob_that_is_there_already_fills_its_part_of_the_bar() -> None:
    bar = RecordingBar()
    progress = TransferProgress(bar)
    progress.blob_started("sha256:1", 100)
    progress.bytes_sent(60)
    progress.bytes_sent(40)
    progress.blob_finished("sha256:1", BlobOutcome.UPLOADED)
    progress.blob_started("sha256:2", 50)
    progress.blob_finished("sha256:2", BlobOutcome.SKIPPED)
    progress.blob_started("sha256:3", 7)
    progress.blob_finished("sha256:3", BlobOutcome.MOUNTED)
    assert (bar.done, bar.total) == (157, 157)
    assert bar.notes[-1] == "1 sent, 2 already there"

"""Files of a host below a root directory: written in one step each, and noted in the ledger before.

Whatever point this is killed at, the ledger knows at least what is there, so that the next run goes on and
`--remove` finds everything.
"""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from backend.publishing import publish_file, reporting_writes, staging_directory
from tools.installation.ledger import LEDGER_PATH, Entry, Ledger, below, fingerprint

FILE_MODE = 0o644


@dataclass(frozen=True, slots=True)
class Change:
    """One line of the report. `did`: wrote, updated, edited, unchanged, kept, removed, restored, cleaned."""

    path: str
    did: str
    why: str = ""


@dataclass(slots=True)
class Host:
    """See above. With `is_dry` nothing is written and the report is the same."""

    root: Path
    ledger: Ledger
    is_dry: bool = False
    changes: list[Change] = field(default_factory=list)

    @classmethod
    def open(cls, root: Path, *, is_dry: bool) -> "Host":
        """The host below `root`. Raises `LedgerUnreadable`."""
        return cls(root, Ledger.read(root), is_dry)

    def read(self, path: str) -> bytes | None:
        """The content of a file; None where there is none. Raises `CannotWrite` for what is no file."""
        place = below(self.root, path)
        with reporting_writes(place):
            try:
                return place.read_bytes()
            except FileNotFoundError:
                return None

    def report(self, path: str, did: str, why: str = "") -> None:
        """Adds a line."""
        self.changes.append(Change(path, did, why))

    def write(self, entry: Entry, data: bytes, copy: tuple[str, bytes] | None = None) -> None:
        """Makes `data` the content of the entry's file; `copy`, a path and bytes, is kept before that."""
        if self.is_dry:
            return
        place = below(self.root, entry.path)
        missing = self._missing(os.path.dirname(entry.path))
        self.ledger.directories += missing
        self.ledger.entries[entry.path] = entry
        self._save()
        self._make(missing)
        if copy is not None:
            self._store(below(self.root, copy[0]), copy[1], _mode(place))
        self._store(place, data, _mode(place))

    def remove(self, path: str) -> None:
        """Takes a file away, and its entry."""
        if not self.is_dry:
            with reporting_writes(below(self.root, path)):
                below(self.root, path).unlink(missing_ok=True)
            self.forget(path)

    def enabled(self, unit: str) -> list[str]:
        """The links by which `systemctl enable` has a unit started."""
        # Not by a pattern with the name: that passes over links whose target is gone.
        links = [place / unit for place in sorted(self.root.glob("etc/systemd/system/*.wants"))]
        return [f"/{link.relative_to(self.root)}" for link in links if link.is_symlink()]

    def unlink(self, path: str) -> None:
        """Takes away what is in no ledger."""
        if not self.is_dry:
            with reporting_writes(below(self.root, path)):
                below(self.root, path).unlink(missing_ok=True)

    def restore(self, entry: Entry, data: bytes) -> None:
        """Gives a file the content that it had before, and takes backup and entry away."""
        if self.is_dry:
            return
        place = below(self.root, entry.path)
        self._store(place, data, _mode(place))
        if entry.backup:
            with reporting_writes(place):
                below(self.root, entry.backup).unlink(missing_ok=True)
        self.forget(entry.path)

    def forget(self, path: str) -> None:
        """Takes an entry away; the file stays."""
        if not self.is_dry:
            self.ledger.entries.pop(path, None)
            self._save()

    def end(self) -> None:
        """After a removal: takes the ledger away, and the directories that were made and are empty."""
        if self.is_dry or self.ledger.entries:
            return
        below(self.root, LEDGER_PATH).unlink(missing_ok=True)
        for directory in (*reversed(self.ledger.directories), os.path.dirname(LEDGER_PATH)):
            with contextlib.suppress(OSError):  # not empty, or gone: it is somebody else's now
                below(self.root, directory).rmdir()

    def _save(self) -> None:
        missing = self._missing(os.path.dirname(LEDGER_PATH))
        self.ledger.directories += missing
        self._make(missing)
        self._store(below(self.root, LEDGER_PATH), self.ledger.encoded(), FILE_MODE)

    def _missing(self, path: str) -> list[str]:
        """The directories on the way that are not there and not noted yet, the outermost first."""
        missing: list[str] = []
        while path not in ("", "/") and not below(self.root, path).is_dir():
            missing.insert(0, path)
            path = os.path.dirname(path)
        return [each for each in missing if each not in self.ledger.directories]

    def _make(self, directories: list[str]) -> None:
        for each in directories:
            with reporting_writes(below(self.root, each)):
                below(self.root, each).mkdir(exist_ok=True)

    def _store(self, place: Path, data: bytes, mode: int) -> None:
        with reporting_writes(place):
            place.parent.mkdir(parents=True, exist_ok=True)
        place = place.resolve()  # through a link, whose target is what its user has
        with staging_directory(place.parent) as staging:
            staged = staging / place.name
            with reporting_writes(place):
                staged.write_bytes(data)
                staged.chmod(mode)
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    owner = place.stat()
                    os.chown(staged, owner.st_uid, owner.st_gid)
            publish_file(staged, place)


def changed_since(entry: Entry, data: bytes | None) -> bool:
    """Whether somebody else has changed or removed what was written."""
    return data is None or fingerprint(data) != entry.sha256


def _mode(place: Path) -> int:
    try:
        return place.stat().st_mode & 0o7777
    except FileNotFoundError:
        return FILE_MODE

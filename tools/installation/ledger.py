"""What was installed: kept beside the configuration, so that it can be taken away exactly."""

import hashlib
from pathlib import Path
from typing import ClassVar

import msgspec

from rafs.errors import NydusError

LEDGER_PATH = "/etc/nydus-py/installed.json"
BACKUP_SUFFIX = ".before-nydus-py"
REPLACED_SUFFIX = ".replaced-by-nydus-py"


class LedgerUnreadable(NydusError):
    """What was installed before cannot be told."""

    message = "{path}: {why}; what is installed cannot be told from the rest"
    exit_code: ClassVar[int] = 226


class Setting(msgspec.Struct, frozen=True):
    """A value in somebody else's TOML file; `before` is None for a key that was not there."""

    keys: list[str]
    value: str | bool | list[str]
    before: str | bool | list[str] | None = None


class Entry(msgspec.Struct, frozen=True):
    """A file, by its path on the host. `sha256` is of what was written.

    `backup`: what was there before. `settings`: those that were put into it, for a file of others.
    """

    path: str
    sha256: str
    backup: str | None = None
    settings: list[Setting] = []


class Ledger(msgspec.Struct):
    """All of it; `directories` were made for it, in that order."""

    entries: dict[str, Entry] = {}
    directories: list[str] = []

    @classmethod
    def read(cls, root: Path) -> "Ledger":
        """That of the host below `root`; an empty one where nothing is installed."""
        path = below(root, LEDGER_PATH)
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise LedgerUnreadable(path=path, why=error.strerror) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise LedgerUnreadable(path=path, why=str(error)) from error

    def encoded(self) -> bytes:
        """As it is kept."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


def below(root: Path, path: str) -> Path:
    """A path of the host, as seen from here."""
    return root / path.lstrip("/")


def fingerprint(data: bytes) -> str:
    """What tells whether somebody changed a file."""
    return hashlib.sha256(data).hexdigest()

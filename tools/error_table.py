"""Writes docs/errors.md: every error of the project with its exit code, errno and message.

`python -m tools.error_table > docs/errors.md`, or `make docs`.
"""

import errno
import importlib
import pkgutil
from dataclasses import dataclass

from rafs.errors import NydusError

PACKAGES = ("rafs", "backend", "builder", "fuse", "tools")

HEADER = """\
# Exit codes

One code for each class of error; 0 is success and 2 wrong usage. `make docs` writes this page from the code.
130 is an interrupt by Ctrl-C. 1 is a fault of nydus-py itself: it comes with a traceback, please report it.

| exit code | error | errno | again? | message |
|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """One error class as a reader of the table sees it."""

    exit_code: int
    name: str
    module: str
    errno_name: str
    retryable: bool
    message: str

    def markdown(self) -> str:
        """The row of the table."""
        message = self.message.replace("|", "\\|").replace("\n", " ")
        again = "yes" if self.retryable else "no"
        name = f"`{self.module}.{self.name}`"
        return f"| {self.exit_code} | {name} | {self.errno_name} | {again} | `{message}` |\n"


def error_rows() -> list[ErrorRow]:
    """Every subclass of `NydusError` in the project, by exit code and name."""
    for package in PACKAGES:
        _import_all(package)
    rows = [_row(error) for error in _subclasses(NydusError)]
    return sorted(rows, key=lambda row: (row.exit_code, row.module, row.name))


def render() -> str:
    """The text of docs/errors.md."""
    return HEADER + "".join(row.markdown() for row in error_rows())


def _import_all(package: str) -> None:
    """Imports the modules of `package` that may define an error."""
    root = importlib.import_module(package)
    for found in pkgutil.walk_packages(root.__path__, f"{package}."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)


def _subclasses(error: type[NydusError]) -> set[type[NydusError]]:
    found = {sub for sub in error.__subclasses__() if sub.__module__.partition(".")[0] in PACKAGES}
    for sub in tuple(found):
        found |= _subclasses(sub)
    return found


def _row(error: type[NydusError]) -> ErrorRow:
    errno_name = errno.errorcode.get(error.errno, str(error.errno))
    module = error.__module__
    return ErrorRow(error.exit_code, error.__qualname__, module, errno_name, error.retryable, error.message)


if __name__ == "__main__":
    print(render(), end="")

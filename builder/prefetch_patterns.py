"""Which files are laid out first and named in the prefetch table."""

import fnmatch
import os
import re
import stat
from collections.abc import Iterator, Sequence

from builder.options import InvalidOption
from rafs.inode_table import InodeTable


class PrefetchPatterns:
    """Patterns of absolute paths in the image: a path with all below it, or a glob (`*` crosses `/`)."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """Raises `InvalidOption` for a pattern that does not start with `/`."""
        self._rules: list[tuple[bytes, re.Pattern[bytes]]] = []
        for pattern in patterns:
            if not pattern.startswith("/"):
                raise InvalidOption(
                    option="--prefetch", why=f"{pattern!r} is not an absolute path in the image"
                )
            plain = os.fsencode(pattern.rstrip("/"))
            self._rules.append((plain + b"/", re.compile(os.fsencode(fnmatch.translate(pattern)))))

    def __bool__(self) -> bool:
        return bool(self._rules)

    def rank(self, path: bytes) -> int | None:
        """Number of the first pattern that the absolute `path` matches, or None."""
        for number, (prefix, glob) in enumerate(self._rules):
            if (path + b"/").startswith(prefix) or glob.match(path):
                return number
        return None

    def select(self, table: InodeTable) -> list[int]:
        """The rows of regular files that match by any of their names, in the order of the patterns, then of
        the tree.
        """
        if not self._rules:
            return []
        best: dict[int, int] = {}
        for row, target in enumerate(table.target):
            if not stat.S_ISREG(table.mode[row]):
                continue
            rank = self.rank(table.path(row))
            if rank is not None:
                best[target] = min(rank, best.get(target, rank))
        return sorted(best, key=lambda row: (best[row], row))


def first_ones_first(rows: Sequence[int], chosen: Sequence[int]) -> Iterator[int]:
    """All rows, the chosen ones before the others, each in its given order."""
    yield from chosen
    taken = set(chosen)
    yield from (row for row in rows if row not in taken)


class PrefetchPaths:
    """The very files that an image names already, first ones first."""

    def __init__(self, paths: Sequence[bytes]) -> None:
        self._paths = paths

    def __bool__(self) -> bool:
        return bool(self._paths)

    def select(self, table: InodeTable) -> list[int]:
        """The rows of those files."""
        wanted = set(self._paths)
        rows = {path: row for row in range(len(table)) if (path := table.path(row)) in wanted}
        return [table.target[rows[path]] for path in self._paths if path in rows]

"""Which files a prefetch pattern means."""

import stat

import pytest

from builder.options import InvalidOption
from builder.prefetch_patterns import PrefetchPatterns, first_ones_first
from rafs.inode_table import Attributes, InodeTable

FILE = Attributes(stat.S_IFREG | 0o644)
DIRECTORY = Attributes(stat.S_IFDIR | 0o755)


def _table() -> InodeTable:
    """/etc (1) with /etc/a (4) and /etc/b (5); /usr (2) with /usr/link (6), a name of /etc/b; /z (3)."""
    table = InodeTable(DIRECTORY)
    table.begin_children(0)
    for name, attributes in ((b"etc", DIRECTORY), (b"usr", DIRECTORY), (b"z", FILE)):
        table.add_child(0, name, attributes)
    table.begin_children(1)
    for name in (b"a", b"b"):
        table.add_child(1, name, FILE)
    table.begin_children(2)
    table.link(table.add_child(2, b"link", FILE), 5)
    return table


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("/etc", b"/etc/a", True),
        ("/etc/", b"/etc/a", True),
        ("/etc", b"/etc", True),
        ("/etc", b"/etcetera", False),
        ("/", b"/anything", True),
        ("/*.json", b"/deep/config.json", True),
        ("/*.json", b"/config.json5", False),
        ("/a[bc]", b"/ab", True),
        ("/\udcff", b"/\xff/below", True),
        ("/é*", "/été".encode(), True),
        ("/a[b", b"/a[b", True),
    ],
)
def test_pattern(pattern: str, path: bytes, matches: bool) -> None:
    assert (PrefetchPatterns([pattern]).rank(path) == 0) is matches


def test_the_first_matching_pattern_counts() -> None:
    patterns = PrefetchPatterns(["/b", "/a", "/*"])
    assert [patterns.rank(path) for path in (b"/a", b"/b", b"/c", b"c")] == [1, 0, 2, None]


def test_relative_patterns_are_refused() -> None:
    with pytest.raises(InvalidOption, match="'etc' is not an absolute path"):
        PrefetchPatterns(["etc"])


def test_rows_come_in_the_order_of_patterns_then_of_the_tree() -> None:
    assert PrefetchPatterns(["/z", "/etc"]).select(_table()) == [3, 4, 5]


def test_a_hard_link_matches_by_any_of_its_names() -> None:
    assert PrefetchPatterns(["/usr", "/etc"]).select(_table()) == [5, 4]


def test_no_pattern_selects_nothing() -> None:
    assert PrefetchPatterns([]).select(_table()) == []
    assert not PrefetchPatterns([])


def test_chosen_rows_first() -> None:
    assert list(first_ones_first([1, 2, 3, 4], [3, 1])) == [3, 1, 2, 4]

"""Patterns of images, as the kubelet has them, and its durations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.go_duration import parse_duration
from backend.image_pattern import covering, matches


@pytest.mark.parametrize(
    ("pattern", "host", "repository", "expected"),
    [
        # Those of the kubelet's documentation.
        ("123456789.dkr.ecr.us-east-1.amazonaws.com", "123456789.dkr.ecr.us-east-1.amazonaws.com", "a", True),
        ("*.azurecr.io", "team.azurecr.io", "a/b", True),
        ("gcr.io", "gcr.io", "a", True),
        ("*.*.registry.io", "a.b.registry.io", "x", True),
        ("*.*.registry.io", "a.registry.io", "x", False),
        ("registry.io:8080/path", "registry.io:8080", "path/x", True),
        ("registry.io:8080/path", "registry.io", "path/x", False),
        ("registry.io", "registry.io:8080", "path/x", False),
        ("registry.io/path", "registry.io", "other", False),
        ("*.io", "a.b.io", "x", False),
        ("app*.k8s.io", "app7.k8s.io", "x", True),
        ("app[0-4].k8s.io", "app7.k8s.io", "x", False),
        ("app[^0-4].k8s.io", "app7.k8s.io", "x", True),
        ("https://registry.io/v1/", "registry.io", "x", True),
        ("registry.io/v2", "registry.io", "x", True),
        ("https://index.docker.io/v1/", "docker.io", "library/busybox", True),
        ("docker.io/library", "docker.io", "library/busybox", True),
        ("127.0.0.1:5000", "127.0.0.1:5000", "a", True),
        ("", "registry.io", "x", False),
        ("//", "registry.io", "x", False),
        ("[::1]:5000", "[::1]:5000", "x", True),
    ],
)
def test_what_a_pattern_covers(pattern: str, host: str, repository: str, expected: bool) -> None:
    assert matches(pattern, host, repository) is expected


@given(st.text(max_size=40), st.text(max_size=20), st.text(max_size=20))
def test_no_pattern_raises(pattern: str, host: str, repository: str) -> None:
    matches(pattern, host, repository)


def test_the_most_specific_key_comes_first() -> None:
    entries = {"r.io": 1, "r.io/a": 2, "r.io/a/b": 3, "*.io": 4, "other.io": 5}
    assert [value for _, value in covering(entries, "r.io", "a/b")] == [3, 2, 1, 4]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("0s", 0), ("12h", 43200), ("1h30m", 5400), ("1.5s", 1.5), ("250ms", 0.25), (".5m", 30)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "1", "h", "-1s", "1s ", "1x", "1h30", "1" * 100 + "s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)

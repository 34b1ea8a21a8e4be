"""How references are parsed and printed."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backend.reference import (
    DirReference,
    InvalidReference,
    LayoutReference,
    Reference,
    RegistryReference,
    parse_reference,
)

DIGEST = "sha256:" + "0123456789abcdef" * 4

HOSTS = st.one_of(
    st.from_regex(r"[a-z0-9]{1,5}(-[a-z0-9]{1,3})?\.[a-z]{2,3}(:[1-9][0-9]{0,3})?", fullmatch=True),
    st.sampled_from(
        ["localhost", "localhost:5000", "127.0.0.1:5000", "registry:80", "[::1]:5000", "[fe80::1]"]
    ),
)
REPOSITORIES = st.from_regex(
    r"[a-z0-9]{1,8}((\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}(/[a-z0-9]{1,8}){0,3}", fullmatch=True
)
TAGS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True)
DIGESTS = st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True)
DIRECTORIES = st.text(
    st.characters(exclude_categories=["C", "Z"], exclude_characters=":"), min_size=1, max_size=30
).map(Path)
REFERENCES: st.SearchStrategy[Reference] = st.one_of(
    st.builds(RegistryReference, HOSTS, REPOSITORIES, TAGS),
    st.builds(RegistryReference, HOSTS, REPOSITORIES, st.none(), DIGESTS),
    st.builds(RegistryReference, HOSTS, REPOSITORIES, TAGS, DIGESTS),
    st.builds(LayoutReference, DIRECTORIES, st.none() | TAGS),
    st.builds(DirReference, DIRECTORIES),
)


@given(REFERENCES)
def test_what_is_printed_is_parsed_again(reference: Reference) -> None:
    assert parse_reference(str(reference)) == reference


@given(st.text(max_size=60) | st.from_regex(r"(oci:|dir:|docker://)?[a-z.:/@\[\]-]{0,40}", fullmatch=True))
@example("")
@example("/")
@example("oci:")
@example("\x1b[31m/x")
def test_any_text_is_a_reference_or_one_line_of_complaint(text: str) -> None:
    try:
        reference = parse_reference(text)
    except InvalidReference as error:
        complaint = str(error)
    else:
        complaint = "expected something like"
        assert parse_reference(str(reference)) == reference
    assert "expected something like" in complaint
    assert complaint.isprintable()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:5000/models/llama:v1", RegistryReference("127.0.0.1:5000", "models/llama", "v1")),
        ("localhost/a", RegistryReference("localhost", "a", "latest")),
        ("docker.io/library/alpine", RegistryReference("docker.io", "library/alpine", "latest")),
        (f"r.example.com/a/b@{DIGEST}", RegistryReference("r.example.com", "a/b", None, DIGEST)),
        (f"r.example.com/a/b:v1@{DIGEST}", RegistryReference("r.example.com", "a/b", "v1", DIGEST)),
        ("docker://r.example.com/a:1", RegistryReference("r.example.com", "a", "1")),
        ("[::1]:5000/a/b", RegistryReference("[::1]:5000", "a/b", "latest")),
        ("oci:/srv/layout", LayoutReference(Path("/srv/layout"))),
        ("oci:layout:v1", LayoutReference(Path("layout"), "v1")),
        (
            "oci:layout:docker.io/library/alpine:3",
            LayoutReference(Path("layout"), "docker.io/library/alpine:3"),
        ),
        ("dir:/srv/with:colon", DirReference(Path("/srv/with:colon"))),
        ("dir:.", DirReference(Path("."))),
    ],
)
def test_good_ones(text: str, expected: Reference) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no registry host"),
        ("llama", "no registry host"),
        ("models/llama", "no dot and no port"),
        ("r.example.com/", "no repository"),
        ("r.example.com/Models/x", "lower case"),
        ("r.example.com/a//b", "not a repository name"),
        ("r.example.com/a:", "not a tag"),
        ("r.example.com/a:-v1", "not a tag"),
        ("r.example.com/a:" + "x" * 129, "not a tag"),
        ("r.example.com/a@sha256:abc", "64 hexadecimal"),
        ("r.example.com/a@", "64 hexadecimal"),
        ("r.example.com/" + "a" * 256, "longer than 255"),
        ("r.example.com:0/a", "port 0"),
        ("r.example.com:70000/a", "port 70000"),
        ("-r.example.com/a", "not a host name"),
        ("user@r.example.com/a", "not a host name"),
        ("https://r.example.com/a", "not a host name"),
        ("oci:", "no directory"),
        ("oci::v1", "no directory"),
        ("oci:x:", "not a tag"),
        ("dir:", "no directory"),
        ("r.example.com/a\n", "cannot be printed"),
    ],
)
def test_bad_ones_say_why(text: str, why: str) -> None:
    with pytest.raises(InvalidReference, match=why):
        parse_reference(text)


def test_a_digest_wins_over_a_tag() -> None:
    assert RegistryReference("h.x", "a", "v1", DIGEST).manifest_key == DIGEST
    assert RegistryReference("h.x", "a", "v1").manifest_key == "v1"
    assert RegistryReference("h.x", "a").manifest_key == "latest"

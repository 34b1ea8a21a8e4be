"""How references are parsed and printed."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backend.reference import (
    DirReference,
    DockerArchiveReference,
    InvalidReference,
    LayoutReference,
    OciArchiveReference,
    Reference,
    RegistryReference,
    absolute_reference,
    normal_name,
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
    st.builds(OciArchiveReference, DIRECTORIES, st.none() | TAGS),
    st.builds(DockerArchiveReference, DIRECTORIES, st.none() | REPOSITORIES | st.just("@0")),
)


@given(REFERENCES)
def test_what_is_printed_is_parsed_again(reference: Reference) -> None:
    assert parse_reference(str(reference)) == reference


@given(
    st.text(max_size=60)
    | st.from_regex(
        r"(oci:|oci-archive:|docker-archive:|dir:|docker://)?[a-z.:/@\[\]-]{0,40}", fullmatch=True
    )
)
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
        ("oci-archive:a.tar", OciArchiveReference(Path("a.tar"))),
        ("oci-archive:/srv/a.tar:v1", OciArchiveReference(Path("/srv/a.tar"), "v1")),
        ("docker-archive:a.tar", DockerArchiveReference(Path("a.tar"))),
        ("docker-archive:a.tar:app:v1", DockerArchiveReference(Path("a.tar"), "app:v1")),
        ("docker-archive:a.tar:r.x:5000/app", DockerArchiveReference(Path("a.tar"), "r.x:5000/app")),
        ("docker-archive:a.tar:@1", DockerArchiveReference(Path("a.tar"), "@1")),
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
        ("oci-archive:", "no file after 'oci-archive:'"),
        ("oci-archive:a.tar:", "not a tag"),
        ("docker-archive::app", "no file after 'docker-archive:'"),
        ("docker-archive:a.tar:", "neither NAME"),
        ("docker-archive:a.tar:@x", "neither NAME"),
        ("docker-archive:a.tar:App", "neither NAME"),
        (f"docker-archive:a.tar:app@{DIGEST}", "neither NAME"),
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


def test_files_become_absolute_too() -> None:
    for text in ("oci-archive:a.tar:v1", "docker-archive:a.tar:app:v1"):
        reference = absolute_reference(text)
        assert str(reference) == text.replace("a.tar", str(Path.cwd() / "a.tar"))


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("app", "docker.io/library/app:latest"),
        ("app:v1", "docker.io/library/app:v1"),
        ("me/app", "docker.io/me/app:latest"),
        ("docker.io/app:v1", "docker.io/library/app:v1"),
        ("index.docker.io/app", "docker.io/library/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("r.x:5000/a/b:v1", "r.x:5000/a/b:v1"),
        ("", None),
        ("app:", None),
        ("App", None),
        ("a//b", None),
        ("app:-v1", None),
    ],
)
def test_names_that_docker_shortens(name: str, full: str | None) -> None:
    assert normal_name(name) == full

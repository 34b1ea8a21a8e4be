"""Parses image references; what is taken gives its own text back and can be connected to."""

from backend.origin import is_loopback, origin_of
from backend.reference import RegistryReference, parse_reference
from tests.hostile import value_or_error

_DIGEST = "sha256:" + "0123456789abcdef" * 4
SEEDS = tuple(
    text.encode()
    for text in (
        "registry.example.com:5000/models/llama:v1",
        f"docker.io/library/alpine@{_DIGEST}",
        f"docker://localhost/a/b:v1@{_DIGEST}",
        "[::1]:5000/a:v1",
        "oci:some/layout:v1.0+x",
        "oci-archive:some/file.tar:v1",
        "docker-archive:some/file.tar:docker.io/library/app:v1",
        "docker-archive:some/file.tar:@0",
        "dir:some/where",
    )
)


def exercise(data: bytes) -> None:
    """Only errors of this project may come up."""
    with value_or_error():
        reference = parse_reference(data.decode("utf-8", "surrogateescape"))
        assert parse_reference(str(reference)) == reference
        if isinstance(reference, RegistryReference):
            assert reference.manifest_key
            is_loopback(reference.host)
            origin_of(f"https://{reference.host}")


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_reference")

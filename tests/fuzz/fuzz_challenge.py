"""Reads what a registry's headers say, one header to a line: challenges, ranges, pauses, addresses."""

from backend.address import display_url, split_address
from backend.challenge import merge_scopes, parse_challenges
from backend.origin import is_loopback, origin_of
from backend.registry_blob import parse_content_range
from backend.status import parse_retry_after
from backend.upload import parse_last_byte
from tests.hostile import value_or_error

_DATE = "Wed, 21 Oct 2015 07:28:00 GMT"
SEEDS = tuple(
    text.encode()
    for text in (
        'Bearer realm="https://[::1]:5000/token",service="s",scope="repository:a/b:pull,push"',
        'Negotiate, Basic realm="a\\"b"\nBearer realm=https://a.example/t?x=1',
        "bytes 0-99/1000\nbytes 5-9/*",
        "bytes=0-4095\n0-0",
        f"120\n{_DATE}",
        "Wed, 21 Oct 2015 07:28:00 +0130",
    )
)


def exercise(data: bytes) -> None:
    """Only errors of this project may come up; what is taken is in its bounds."""
    lines = data.decode("latin-1").split("\n")
    for challenge in parse_challenges(lines):
        assert challenge.scheme
        merge_scopes(challenge.scope)
        _address(challenge.realm)
    for line in lines[:20]:
        _address(line)
        _ranges(line)
        for pause_s in (parse_retry_after(line, _DATE), parse_retry_after(_DATE, line)):
            assert pause_s is None or 0 <= pause_s <= 1e4


def _address(text: str) -> None:
    is_loopback(text)
    assert display_url(text)
    with value_or_error():
        _, host, port = origin_of(text)
        assert host == host.lower()
        assert 0 <= port < 1 << 16
        assert split_address(text)


def _ranges(text: str) -> None:
    last = parse_last_byte(text)
    assert last is None or last >= 0
    found = parse_content_range(text)
    assert found is None or (found[0] >= 0 and found[1] >= 0)


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_challenge")

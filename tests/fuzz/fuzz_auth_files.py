"""Looks credentials up in an auth file of docker or podman."""

import base64
import json
import tempfile
from pathlib import Path

import trio

from backend.credentials import AuthFiles
from tests.hostile import value_or_error

_HOST = "r.example.com:5000"
_AUTH = base64.b64encode(b"bob:pw").decode()
SEEDS = tuple(
    json.dumps(config).encode()
    for config in (
        {"auths": {_HOST: {"auth": _AUTH}, "https://index.docker.io/v1/": {"identitytoken": "t"}}},
        {"auths": {f"https://{_HOST}/v1/": {"username": "bob", "password": "pw"}, "https://[::1]/": {}}},
        {"auths": {f"{_HOST}/a": {"registrytoken": "t"}, "docker.io": None}, "psFormat": "x"},
        {"credHelpers": {"https://[::1]:5000/": "not-there"}, "auths": {_HOST: {"auth": _AUTH}}},
    )
)


def exercise(data: bytes) -> None:
    """Only errors of this project may come up; what is found can be sent."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "auth.json"
        path.write_bytes(data)
        # No programs can be found: a helper that the input names is never run.
        source = AuthFiles({"REGISTRY_AUTH_FILE": str(path)}, Path(folder), run_dir=Path(folder))
        for host in (_HOST, "docker.io"):
            with value_or_error():
                found = trio.run(source.lookup, host, "a/b")
                if found is not None:
                    assert found.basic().isascii()
                    assert found.registry_token.isascii()


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_auth_files")

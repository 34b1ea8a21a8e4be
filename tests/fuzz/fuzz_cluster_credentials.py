"""What a cluster gives to a host: provider configurations and answers, secrets, changes, requests to pull."""

import base64
import json
import tempfile
from pathlib import Path

from backend import kube_api, kubelet_providers, pull_secrets
from backend.bounded_process import Finished
from backend.credentials import Credential
from backend.image_pattern import covering
from backend.kubelet_config import Provider, read_providers
from fuse.snapshotter.cri_auths import auth_of_pull
from tests.hostile import value_or_error

_AUTH = base64.b64encode(b"bob:pw").decode()
_TEXT = base64.b64encode(json.dumps({"auths": {"*.example.com/a": {"auth": _AUTH}}}).encode()).decode()
_SECRET = {"metadata": {"name": "n", "namespace": "d"}, "data": {".dockerconfigjson": _TEXT}}
_API = "credentialprovider.kubelet.k8s.io/v1"
_PROVIDER = Provider(Path("/plugin"), ("*.example.com",), 60.0, _API)
_PLUGIN = {
    "name": "ecr",
    "matchImages": ["*.example.com"],
    "defaultCacheDuration": "1h30m",
    "apiVersion": _API,
    "env": [{"name": "A", "value": "b"}],
}
_ANSWER = {
    "apiVersion": _API,
    "kind": "CredentialProviderResponse",
    "cacheKeyType": "Image",
    "cacheDuration": "5m",
    "auth": {"*.example.com": {"username": "u", "password": "p"}},
}
_CONFIG = {
    "apiVersion": "kubelet.config.k8s.io/v1",
    "kind": "CredentialProviderConfig",
    "providers": [_PLUGIN],
}
_PAGE = {"metadata": {"resourceVersion": "5", "continue": "x"}, "items": [_SECRET]}
_EVENTS = ({"type": "ADDED", "object": _SECRET}, {"type": "ERROR", "object": {"code": 410}})
SEEDS = (
    *(json.dumps(value).encode() for value in (_SECRET, _ANSWER, _CONFIG, _PAGE)),
    b"".join(json.dumps(event).encode() + b"\n" for event in _EVENTS),
    # A PullImageRequest of bob for r.example.com/team/app:v1.
    bytes.fromhex("0a1b0a19722e6578616d706c652e636f6d2f7465616d2f6170703a763112090a03626f6212027077"),
)


def exercise(data: bytes) -> None:
    """Only errors of this project may come up; what is found can be sent."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(data)
        with value_or_error():
            for provider in read_providers(path, Path(folder)):
                assert provider.program.parent == Path(folder)
                provider.serves("r.example.com", "a/b")
    with value_or_error():
        answer = kubelet_providers._decoded(_PROVIDER, Finished(0, data))
        assert kubelet_providers._cache_s(answer, _PROVIDER) >= 0
        _look(kubelet_providers._credentials(answer))
    secrets: dict[tuple[str, str], dict[str, Credential]] = {}
    with value_or_error():
        pull_secrets._put(secrets, "kubernetes.io/dockerconfigjson", data)
    for auths in secrets.values():
        _look(auths)
    for piece in (data, data[:7]):
        with value_or_error():
            for line in kube_api._Lines("/secrets").feed(piece):
                kube_api._decode(line, kube_api._Event, "/secrets")
    with value_or_error():
        kube_api._decode(data, kube_api._List, "/secrets")
    found = auth_of_pull(data)
    assert found is None or found[1].basic()


def _look(auths: dict[str, Credential]) -> None:
    for _, credential in covering(auths, "r.example.com", "a/b"):
        assert credential.basic().isascii()


if __name__ == "__main__":
    from tests.fuzz.driver import run

    run("fuzz_cluster_credentials")

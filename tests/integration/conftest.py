"""What integration tests share: a mount point, and registries that last from first use to the end."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.integration.cli_machine import unmount_anyway
from tests.integration.pod_images import PodImageSet, make_pod_images
from tests.integration.registry_server import RegistryServer, TokenIssuer, registry_server, token_issuer


def _need_registry() -> None:
    if shutil.which("docker-registry") is None:
        pytest.skip("not installed: docker-registry")


@pytest.fixture(scope="session")
def anonymous_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A registry that everybody may write to, on plain HTTP."""
    _need_registry()
    with registry_server(tmp_path_factory.mktemp("anonymous-registry")) as server:
        yield server


@pytest.fixture(scope="session")
def htpasswd_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A registry with basic authentication for `registry_server.USER`."""
    _need_registry()
    with registry_server(tmp_path_factory.mktemp("htpasswd-registry"), htpasswd=True) as server:
        yield server


@pytest.fixture(scope="session")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenIssuer]:
    """The token server that `token_registry` sends its clients to."""
    with token_issuer(tmp_path_factory.mktemp("issuer")) as server:
        yield server


@pytest.fixture(scope="session")
def token_registry(tmp_path_factory: pytest.TempPathFactory, issuer: TokenIssuer) -> Iterator[RegistryServer]:
    """A registry with bearer tokens: everybody may pull, `registry_server.USER` may push."""
    _need_registry()
    with registry_server(tmp_path_factory.mktemp("token-registry"), issuer=issuer) as server:
        yield server


@pytest.fixture(scope="session")
def tls_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A registry on TLS, its certificate signed by an authority of its own (`ca_file`)."""
    _need_registry()
    with registry_server(tmp_path_factory.mktemp("tls-registry"), authority=trustme.CA()) as server:
        yield server


@pytest.fixture(scope="session")
def pod_images(anonymous_registry: RegistryServer, tmp_path_factory: pytest.TempPathFactory) -> PodImageSet:
    """Container images in every form, in `anonymous_registry`."""
    return make_pod_images(anonymous_registry.host, tmp_path_factory.mktemp("pod-images"))


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """An empty directory that nothing is mounted on afterwards."""
    directory = tmp_path / "mnt"
    directory.mkdir()
    try:
        yield directory
    finally:
        unmount_anyway(directory)

"""Pods of images that want a login: where snapshotter and agent get it, again and again."""

import base64
import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.integration.cli_machine import Machine
from tests.integration.containerd_host import (
    ContainerdHost,
    containerd_host,
    trust_registry,
    wait_until,
)
from tests.integration.pod_images import PodImages, base_layer, upper_layer
from tests.integration.pull_secret_api import secret_api
from tests.integration.registry_server import USER, RegistryServer
from tests.integration.test_snapshotter_pods import LARGE_SHA256
from tools.bench.pods import cri_pb2 as cri
from tools.bench.pods.cri import Cri, CriError, Pod

pytestmark = [pytest.mark.needs_containerd, pytest.mark.needs_registry, pytest.mark.needs_fuse]


@pytest.fixture(scope="module")
def place(anonymous_registry: RegistryServer, tmp_path_factory: pytest.TempPathFactory) -> PodImages:
    return PodImages(anonymous_registry.host, Machine(tmp_path_factory.mktemp("credential-images")))


@pytest.fixture(scope="module")
def public(place: PodImages) -> str:
    """What holds pods: without the files that tests read in the other image."""
    return place.convert(place.push("login/sandbox", [base_layer()]), "nydus")


@pytest.fixture(scope="module")
def original(place: PodImages) -> str:
    return place.convert(place.push("login/app", [base_layer(), upper_layer()]), "nydus")


def login_file(directory: Path, host: str) -> Path:
    path = directory / "auth.json"
    auth = base64.b64encode(f"{USER.username}:{USER.password}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return path


@pytest.fixture
def private(
    place: PodImages,
    original: str,
    htpasswd_registry: RegistryServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """The same image where a login is needed, under a name of its own for each test."""
    target = f"{htpasswd_registry.host}/login/{tmp_path.name.replace('_', '-').lower()}:v1"
    with monkeypatch.context() as patch:
        patch.setenv("REGISTRY_AUTH_FILE", str(login_file(tmp_path, htpasswd_registry.host)))
        place.machine.nydus("copy", original, target)
    (tmp_path / "auth.json").unlink()
    return target


@pytest.fixture
def host(public: str, private: str, place: PodImages) -> Iterator[ContainerdHost]:
    with containerd_host(public) as host:
        for registry in (place.host, private.partition("/")[0]):
            trust_registry(host, registry)
        yield host


@pytest.fixture
def pod(host: ContainerdHost, public: str) -> Iterator[Pod]:
    host.cri.pull(public)
    pod = host.cri.run_pod()
    yield pod
    pod.remove()


def restart_with(host: ContainerdHost, *options: str) -> None:
    host.kill_snapshotter(signal.SIGTERM)
    host.snapshotter_options = options
    host.start_snapshotter()
    wait_until("containerd reaches it again", lambda: is_reached(host))


def restart_with_proxy(host: ContainerdHost) -> None:
    place = host.directory
    restart_with(host, "--cri-listen", f"{place}/cri.sock", "--containerd", f"{place}/c.sock")


def is_reached(host: ContainerdHost) -> bool:
    try:
        host.ctr("snapshots", "--snapshotter", host.snapshotter, "ls")
    except AssertionError:
        return False
    return True


@contextlib.contextmanager
def through_proxy(host: ContainerdHost) -> Iterator[Cri]:
    path = host.directory / "cri.sock"
    assert os.stat(path).st_mode & 0o777 == 0o600
    with grpc.insecure_channel(
        f"unix://{path}", options=[("grpc.default_authority", "localhost")]
    ) as channel:
        yield Cri(channel, host.directory / "logs")


def agent_pid(host: ContainerdHost) -> int:
    (pid,) = {status["pid"] for status in host.machine.statuses()}
    assert isinstance(pid, int)
    return pid


def kill_agent_process(host: ContainerdHost) -> None:
    """The agent alone: its supervisor starts another one."""
    pid = agent_pid(host)
    os.kill(pid, signal.SIGKILL)
    wait_until("another agent serves", lambda: agent_pid(host) != pid)


def files_with(secret: bytes, *directories: Path) -> list[Path]:
    forms = (secret, base64.b64encode(f"{USER.username}:".encode() + secret))
    found = []
    for directory in directories:
        for path in directory.rglob("*"):
            if path.is_file() and not path.is_symlink():
                data = path.read_bytes()
                found += [path for form in forms if form in data]
    return found


def test_credentials_of_a_cri_request_reach_agents_and_no_disk(
    host: ContainerdHost, pod: Pod, private: str
) -> None:
    restart_with_proxy(host)
    with through_proxy(host) as proxy:
        with pytest.raises(CriError, match="PullImage: "):
            proxy.pull(private)
        with pytest.raises(CriError, match="PullImage: "):
            proxy.pull(private, USER.username, "wrong")
        before = host.content()
        proxy.pull(private, USER.username, USER.password)
        fetched = [json.loads(host.ctr("content", "get", each)) for each in host.content() - before]
        assert all("layers" in each or "rootfs" in each for each in fetched)
        container = pod.start(private, "/bin/sleep", "1000")
        assert pod.run(container, "/bin/cat", "/etc/hello") == "hello\n"
        kill_agent_process(host)
        # Nothing of it is here yet, and the agent of the mount has gone.
        assert pod.run(container, "/bin/sha256sum", "/etc/large").split()[0] == LARGE_SHA256
    assert files_with(USER.password.encode(), host.directory) == []


@pytest.mark.slow
def test_the_proxy_passes_everything_on(host: ContainerdHost, public: str) -> None:
    restart_with_proxy(host)
    with through_proxy(host) as proxy:
        for service, method, request, answer in (
            ("Image", "ImageFsInfo", cri.Empty(), cri.ImageFsInfoResponse),
            ("Runtime", "Version", cri.VersionRequest(), cri.VersionRequest),
        ):
            direct = host.cri.call(service, method, request, answer)
            passed = proxy.call(service, method, request, answer)
            if method == "Version":
                # Fields that the test's own messages do not know are there, too.
                assert passed.SerializeToString() == direct.SerializeToString()
                assert b"containerd" in passed.SerializeToString()
            else:
                assert len(passed.image_filesystems) == len(direct.image_filesystems)
        with pytest.raises(CriError) as direct_error:
            host.cri.pull(f"{public}-none")
        with pytest.raises(CriError) as passed_error:
            proxy.pull(f"{public}-none")
        assert str(passed_error.value) == str(direct_error.value)
        with pytest.raises(CriError, match="UNIMPLEMENTED"):
            proxy.call("Image", "NoSuchMethod", cri.Empty())
        host.kill_containerd(signal.SIGTERM)
        with pytest.raises(CriError, match="UNAVAILABLE"):
            proxy.call("Image", "ImageFsInfo", cri.Empty(), cri.ImageFsInfoResponse)
        host.start_containerd()
        wait_until("it reaches containerd again", lambda: _answers(proxy))


def _answers(proxy: Cri) -> bool:
    try:
        proxy.call("Image", "ImageFsInfo", cri.Empty(), cri.ImageFsInfoResponse)
    except CriError:
        return False
    return True


@pytest.mark.slow
def test_a_provider_plugin_is_asked_again_when_its_credentials_are_refused(
    host: ContainerdHost, pod: Pod, private: str, tmp_path: Path
) -> None:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    write_plugin(plugins / "tell", tmp_path / "runs")
    (tmp_path / "config.yaml").write_text(
        "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n"
        f"- name: tell\n  matchImages: ['{private.partition('/')[0]}']\n  defaultCacheDuration: 12h\n"
        "  apiVersion: credentialprovider.kubelet.k8s.io/v1\n"
    )
    restart_with(
        host,
        "--image-credential-provider-config",
        f"{tmp_path}/config.yaml",
        "--image-credential-provider-bin-dir",
        f"{plugins}",
    )
    # containerd has credentials of its own; the snapshotter has those of the plugin alone.
    before = host.content()
    host.cri.pull(private, USER.username, USER.password)
    fetched = [json.loads(host.ctr("content", "get", each)) for each in host.content() - before]
    assert all("layers" in each or "rootfs" in each for each in fetched)
    container = pod.start(private, "/bin/sleep", "1000")
    assert pod.run(container, "/bin/sha256sum", "/etc/large").split()[0] == LARGE_SHA256
    assert (tmp_path / "runs").read_text().split() == ["asked", "asked"]


def write_plugin(path: Path, runs: Path) -> None:
    """The first time it gives a password that has expired, as it keeps for 12 hours; then the right one."""
    path.write_text(
        "#!/bin/sh\n"
        'host=$(sed -n \'s/.*"image":"\\([^/]*\\)\\/.*/\\1/p\')\n'
        f'password=expired; [ -e {runs} ] && password="{USER.password}"\n'
        f"echo asked >>{runs}\n"
        'printf \'{"apiVersion":"credentialprovider.kubelet.k8s.io/v1","kind":"CredentialProviderResponse",'
        '"cacheKeyType":"Registry","auth":{"%s":{"username":"%s","password":"%s"}}}\' '
        f'"$host" {USER.username} "$password"\n'
    )
    path.chmod(0o755)


@pytest.mark.slow
def test_a_pull_secret_is_enough_and_comes_again_after_everything_was_killed(
    host: ContainerdHost, pod: Pod, private: str, tmp_path: Path
) -> None:
    registry = private.partition("/")[0]
    with secret_api(tmp_path / "account") as api:
        api.add("old", registry, USER.username, "of another year")
        api.add("pull", f"{registry}/login", USER.username, USER.password)
        config = tmp_path / "config.toml"
        places = f'kube_api = "{api.url}"\nservice_account_dir = "{api.account}"\n'
        config.write_text(f"[credentials]\npull_secrets = true\n{places}")
        restart_with(host, "--config", str(config))
        host.cri.pull(private, USER.username, USER.password)
        container = pod.start(private, "/bin/sleep", "1000")
        api.rotate("second")
        host.kill_snapshotter()
        kill_agent_process(host)
        host.start_snapshotter()
        assert pod.run(container, "/bin/sha256sum", "/etc/large").split()[0] == LARGE_SHA256
    assert files_with(USER.password.encode(), host.directory) == []

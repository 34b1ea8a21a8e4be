"""The files of deploy/: what reads them in earnest takes them."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tools.main import VERBS, run
from tools.peer_config import CredentialSection, read_config

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = ("1.29", "1.33", "latest")
UNITS = sorted(path.name for path in (DEPLOY / "systemd").iterdir())


def need(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"not installed: {program}")
    return path


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            yield path.name, document


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = [document for _, document in documents() if document["kind"] == kind]
    return found


@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_are_what_kubernetes_has_schemas_for(version: str) -> None:
    wanted = kubernetes_validate.latest_version() if version == "latest" else version
    kinds = set()
    for name, document in documents():
        if document["kind"] != "Kustomization":
            kubernetes_validate.validate(document, wanted, strict=True)
            kinds.add(document["kind"])
        assert "metadata" in document or name == "kustomization.yaml"
    assert {"DaemonSet", "ConfigMap", "ClusterRole", "ClusterRoleBinding", "Deployment", "Service"} <= kinds


def test_a_manifest_that_is_wrong_is_noticed() -> None:
    wrong = of_kind("DaemonSet")
    wrong["spec"]["template"]["spec"]["hostNetwork"] = "yes"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_they_are_put_together_by_kubectl() -> None:
    kubectl = need("kubectl")
    done = subprocess.run(
        [kubectl, "kustomize", str(DEPLOY / "kubernetes")], capture_output=True, text=True, check=True
    )
    images = re.findall(r"image: (\S+)", done.stdout)
    assert len(images) == 4
    assert set(images) == {"registry.example.com/nydus-py:0.1.0"}


def test_pods_use_what_is_there() -> None:
    """Names, volumes and options fit together: no schema knows that."""
    spec = of_kind("DaemonSet")["spec"]["template"]["spec"]
    volumes = {volume["name"] for volume in spec["volumes"]}
    containers = [*spec["initContainers"], *spec["containers"]]
    for container in containers:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert container["args"][0] in VERBS
        assert set(container["resources"]) == {"requests", "limits"}
    assert spec["serviceAccountName"] == of_kind("ServiceAccount")["metadata"]["name"]
    config = of_kind("ConfigMap")
    assert {"name": config["metadata"]["name"]} in [volume.get("configMap") for volume in spec["volumes"]]
    service, deployment = of_kind("Service"), of_kind("Deployment")
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    port = service["spec"]["ports"][0]["port"]
    host = f"http://{service['metadata']['name']}.{service['metadata']['namespace']}.svc:{port}"
    assert host in config["data"]["config.toml"]


@pytest.mark.parametrize("container", [0, 1, 2])
def test_options_in_the_manifests_exist(container: int, capfd: pytest.CaptureFixture[str]) -> None:
    spec = of_kind("DaemonSet")["spec"]["template"]["spec"]
    args = [*spec["initContainers"], *spec["containers"]][container]["args"]
    assert_options_exist(args, capfd)


def assert_options_exist(args: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    verb = next(word for word in args if word in VERBS)
    assert run([verb, "--help"]) == 0
    shown = capfd.readouterr().out
    assert run(["--help"]) == 0
    shown += capfd.readouterr().out
    for word in args:
        if word.startswith("--"):
            assert word.partition("=")[0] in shown, word


def test_the_configurations_can_be_read(tmp_path: Path) -> None:
    text = of_kind("ConfigMap")["data"]["config.toml"]
    example = (DEPLOY / "config.toml").read_text()
    # Every line of the example that is commented out is a key, too.
    everything = re.sub(r"(?m)^# (?=\w+ = )", "", example)
    for number, each in enumerate((text, example, everything)):
        path = tmp_path / f"{number}.toml"
        path.write_text(each)
        file = read_config(path)
        assert isinstance(file.credentials, CredentialSection)
    assert file.credentials.pull_secret_namespaces == ["team-a"]
    assert file.peers.scheduler == ["http://scheduler.example.com:8770"]


@pytest.fixture
def units(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    """The units as they are installed, with a program that exists."""
    program = tmp_path / "nydus-py"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    host = tmp_path / "host"
    host.mkdir()
    assert run(["install", "--root", str(host), "--program", str(program), "--scheduler"]) == 0
    capfd.readouterr()
    return host / "etc/systemd/system"


def test_systemd_takes_the_units(units: Path) -> None:
    analyze = need("systemd-analyze")
    files = sorted(units.iterdir())
    assert [path.name for path in files] == UNITS
    done = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
    )
    # Whatever is not understood is said there, and ignored.
    ours = [line for line in done.stderr.splitlines() if "nydus-py" in line]
    assert (done.returncode, ours) == (0, [])


def test_systemd_would_complain(units: Path) -> None:
    analyze = need("systemd-analyze")
    wrong = units / UNITS[0]
    wrong.write_text(wrong.read_text().replace("MemoryMax=", "MemoryMaximum="))
    done = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", str(wrong)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "MemoryMaximum" in done.stderr


@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit.endswith(".service")])
def test_units_have_limits_and_options_that_exist(unit: str, capfd: pytest.CaptureFixture[str]) -> None:
    text = (DEPLOY / "systemd" / unit).read_text()
    for key in ("MemoryMax", "MemoryHigh", "CPUQuota", "TasksMax", "Restart"):
        assert f"\n{key}=" in text
    for command in re.findall(r"(?m)^Exec\w+=\S+ (.*)$", text):
        assert_options_exist(command.split(), capfd)


def test_the_agents_unit_leaves_alone_what_outlives_the_supervisor() -> None:
    text = (DEPLOY / "systemd/nydus-py-agent.service").read_text()
    assert "\nKillMode=process\n" in text
    assert "\nOOMPolicy=continue\n" in text
    assert re.search(r"\nFileDescriptorStoreMax=[1-9]", text)
    # Each of these would hide its mounts from everybody else.
    assert not re.search(
        r"(?m)^(Private|Protect|ReadOnly|ReadWrite|Inaccessible|TemporaryFile|BindPaths)", text
    )


def snapshot_root() -> Path:
    """Where the snapshotter's unit keeps snapshots, and images are mounted."""
    text = (DEPLOY / "systemd/nydus-py-snapshotter.service").read_text()
    (root,) = re.findall(r"(?m)^ExecStart=.* --root (\S+)$", text)
    return Path(root)


def test_units_wait_for_the_disk_that_snapshots_are_on() -> None:
    """One of its own may come late (nofail); below it, the root would be made in what it then hides."""
    text = (DEPLOY / "systemd/nydus-py-snapshotter.service").read_text()
    (disk,) = re.findall(r"(?m)^RequiresMountsFor=(\S+)$", text)
    assert snapshot_root().is_relative_to(disk)
    # The agent serves images elsewhere, too, and needs only the order.
    unit = f"{disk.strip('/').replace('/', '-')}.mount"
    after = re.findall(r"(?m)^After=(.*)$", (DEPLOY / "systemd/nydus-py-agent.service").read_text())
    assert unit in " ".join(after).split()


def test_who_mounts_and_who_detaches_does_it_for_the_host() -> None:
    """From a volume that only receives mounts nothing is detached elsewhere: the host keeps a dead one."""
    spec = of_kind("DaemonSet")["spec"]["template"]["spec"]
    root = os.fspath(snapshot_root())
    assert root in [volume.get("hostPath", {}).get("path") for volume in spec["volumes"]]
    for container in spec["containers"]:
        (volume,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == root]
        assert volume["mountPropagation"] == "Bidirectional", container["name"]
        # Kubernetes allows it to no other container.
        assert container["securityContext"]["privileged"] is True
    assert f"--root={root}" in spec["containers"][1]["args"]


DEBIAN = """\
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "example.com/pause:9"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/my/cni"
"""


def test_containerd_takes_the_drop_in_and_keeps_the_rest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    containerd = need("containerd")
    root = tmp_path / "host"
    (root / "etc/containerd").mkdir(parents=True)
    main = root / "etc/containerd/config.toml"
    main.write_text(DEBIAN)
    assert run(["install", "--root", str(root), "--without", "systemd"]) == 0
    capfd.readouterr()
    # As if that root were the host's.
    main.write_text(main.read_text().replace('imports = ["', f'imports = ["{root}'))
    done = subprocess.run(
        [containerd, "-c", str(main), "config", "dump"], capture_output=True, text=True, check=True
    )
    dumped = done.stdout
    assert re.search(r'\[proxy_plugins.nydus-py\]\n\s+address = "/run/nydus-py/snapshotter.sock"', dumped)
    assert '\n      snapshotter = "nydus-py"\n' in dumped
    assert "disable_snapshot_annotations = false" in dumped
    assert 'config_path = "/etc/containerd/certs.d"' in dumped
    assert 'sandbox_image = "example.com/pause:9"' in dumped
    assert 'bin_dir = "/my/cni"' in dumped


def test_the_containerfile_copies_what_there_is() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    copied = set()
    for line in re.findall(r"(?m)^COPY (?!--from)(.*)$", text):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources), line
        copied.update(sources)
    project = (ROOT / "pyproject.toml").read_text()
    packages = ast.literal_eval(re.search(r"(?m)^packages = (\[.*\])$", project)[1])  # type: ignore[index]
    assert {*packages, "deploy", "pyproject.toml", "README.md", "LICENSE"} == copied


def test_a_wheel_has_the_files_and_installs_from_them(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            copy = installed / "tools/deploy" / path.relative_to(DEPLOY)
            assert copy.read_bytes() == path.read_bytes()
    host = tmp_path / "host"
    host.mkdir()
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); import tools.main; "
    code += "assert 'installed' in tools.main.__file__; tools.main.main()"
    # -P: not the packages of this directory.
    command = [sys.executable, "-P", "-c", code, "install", "--root", str(host)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    unit = (host / "etc/systemd/system/nydus-py-agent.service").read_text()
    assert unit == (DEPLOY / "systemd/nydus-py-agent.service").read_text()

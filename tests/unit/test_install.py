"""`nydus-py install` in directories that stand for hosts: what it writes and what it leaves alone."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import tomlkit

from backend.publishing import DiskFull, publish_file
from tests.integration.cli_machine import Machine
from tools.main import run

DEBIAN = """\
version = 2

[plugins]
  # where Debian has them
  [plugins."io.containerd.grpc.v1.cri"]
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"
      conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.internal.v1.opt"]
    path = "/var/lib/containerd/opt"
"""
MAIN = "etc/containerd/config.toml"
AGENT = "etc/systemd/system/nydus-py-agent.service"
HOSTS = "etc/containerd/certs.d/_default/hosts.toml"
DROPIN = "etc/containerd/conf.d/nydus-py.toml"


class HostTree:
    """The files of a host."""

    def __init__(self, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self._capfd = capfd

    def write(self, path: str, text: str, mode: int = 0o644) -> Path:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(mode)
        return place

    def text(self, path: str) -> str:
        return (self.root / path).read_text()

    def tree(self) -> dict[str, object]:
        """Everything, with modes and contents."""
        return {
            str(path.relative_to(self.root)): (
                path.lstat().st_mode,
                path.read_bytes() if path.is_file() else b"",
            )
            for path in sorted(self.root.rglob("*"))
        }

    def install(self, *options: str, code: int = 0) -> str:
        assert run(["install", "--root", str(self.root), *options]) == code
        out = self._capfd.readouterr()
        return out.err if code else out.out

    def report(self, *options: str) -> dict[str, str]:
        """What was done, by path."""
        changes = json.loads(self.install("--json", *options))["changes"]
        return {change["path"].lstrip("/"): change["did"] for change in changes}

    def cri(self) -> dict[str, dict[str, object]]:
        document = tomlkit.parse(self.text(MAIN)).unwrap()
        found = document["plugins"]["io.containerd.grpc.v1.cri"]
        assert isinstance(found, dict)
        return found


@pytest.fixture
def host(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> HostTree:
    root = tmp_path / "host"
    root.mkdir()
    return HostTree(root, capfd)


def test_a_round_trip_leaves_everything_as_it_was(host: HostTree) -> None:
    host.write(MAIN, DEBIAN, 0o640)
    host.write("etc/systemd/system/other.service", "[Unit]\n")
    before = host.tree()
    done = host.report("--scheduler")
    assert done[MAIN] == "edited"
    assert {did for path, did in done.items() if path != MAIN} == {"wrote"}
    assert host.cri() == {
        "cni": {"bin_dir": "/usr/lib/cni", "conf_dir": "/etc/cni/net.d"},
        "containerd": {"snapshotter": "nydus-py", "disable_snapshot_annotations": False},
        "registry": {"config_path": "/etc/containerd/certs.d"},
    }
    assert "# where Debian has them" in host.text(MAIN)
    assert (host.root / MAIN).stat().st_mode & 0o777 == 0o640
    assert tomlkit.parse(host.text(MAIN))["imports"] == [f"/{DROPIN}"]
    host.install("--remove")
    assert host.tree() == before
    assert host.install("--remove") == "nothing is installed\n"


def test_units_that_were_enabled_are_so_no_more(host: HostTree) -> None:
    host.report()
    wants = host.root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir()
    for name in ("nydus-py-agent.service", "other.service"):
        (wants / name).symlink_to(f"/etc/systemd/system/{name}")
    done = host.report("--remove")
    assert done["etc/systemd/system/multi-user.target.wants/nydus-py-agent.service"] == "removed"
    assert [path.name for path in wants.iterdir()] == ["other.service"]


def test_on_a_host_without_anything(host: HostTree) -> None:
    host.report()
    assert host.cri()["containerd"]["snapshotter"] == "nydus-py"
    host.install("--remove")
    assert host.tree() == {}


def test_again_changes_nothing(host: HostTree) -> None:
    host.write(MAIN, DEBIAN)
    host.report()
    before = host.tree()
    again = host.report()
    assert set(again.values()) == {"unchanged", "kept"}
    assert host.tree() == before


def test_a_dry_run_says_the_same_and_writes_nothing(host: HostTree) -> None:
    host.write(MAIN, DEBIAN)
    before = host.tree()
    planned = host.report("--dry-run")
    text = host.install("--dry-run")
    assert f"would edit /{MAIN}" in text
    assert f"would write /{AGENT}" in text
    assert host.tree() == before
    assert host.report() == planned
    installed = host.tree()
    host.install("--remove", "--dry-run")
    assert host.tree() == installed


def test_the_units_start_the_program_that_is_named(host: HostTree) -> None:
    host.report("--program", "/opt/nydus-py/bin/nydus-py", "--mirror", "https://127.0.0.1:9999")
    assert "\nExecStart=/opt/nydus-py/bin/nydus-py agent\n" in host.text(AGENT)
    assert "\nExecReload=/opt/nydus-py/bin/nydus-py agent --upgrade\n" in host.text(AGENT)
    assert '[host."https://127.0.0.1:9999"]' in host.text(HOSTS)


def test_files_of_others_are_not_replaced(host: HostTree) -> None:
    host.write(HOSTS, "# mine\n")
    host.write(AGENT, "# mine, too\n")
    before = host.tree()
    failure = host.install(code=225)
    assert f"/{HOSTS} is not ours" in failure
    assert f"/{AGENT} is not ours" in failure
    assert host.tree() == before
    done = host.report("--without", "mirror", "--force")
    assert done[AGENT] == "updated"
    assert HOSTS not in done
    host.install("--remove")
    assert host.tree() == before


def test_what_the_user_has_changed_is_not_replaced_nor_removed(host: HostTree) -> None:
    host.report()
    host.write(AGENT, host.text(AGENT).replace("MemoryMax=3G", "MemoryMax=9G"))
    assert "was changed by somebody" in host.install(code=225)
    assert "MemoryMax=9G" in host.text(AGENT)
    host.report("--force")
    assert "MemoryMax=3G" in host.text(AGENT)
    assert "MemoryMax=9G" in host.text(f"{AGENT}.replaced-by-nydus-py")
    host.write(AGENT, "# changed again\n")
    assert host.report("--remove")[AGENT] == "kept"
    assert host.text(AGENT) == "# changed again\n"
    assert host.report("--remove", "--force")[AGENT] == "removed"
    assert not (host.root / AGENT).exists()


def test_the_configuration_of_the_user_stays(host: HostTree) -> None:
    host.write("etc/nydus-py/config.toml", "[peers]\n")
    assert host.report()["etc/nydus-py/config.toml"] == "kept"
    host.install("--remove")
    assert host.text("etc/nydus-py/config.toml") == "[peers]\n"


def test_containerds_file_that_was_changed_since_keeps_the_change(host: HostTree) -> None:
    host.write(MAIN, DEBIAN)
    host.report()
    host.write(MAIN, host.text(MAIN).replace("/usr/lib/cni", "/opt/cni/bin"))
    assert host.report()[MAIN] == "unchanged"
    assert host.report("--remove")[MAIN] == "cleaned"
    left = tomlkit.parse(host.text(MAIN)).unwrap()
    wanted = tomlkit.parse(DEBIAN.replace("/usr/lib/cni", "/opt/cni/bin")).unwrap()
    assert left == wanted
    assert not list(host.root.rglob("*nydus-py*"))


def test_settings_that_were_taken_out_are_put_in_again(host: HostTree) -> None:
    host.write(MAIN, DEBIAN)
    host.report()
    host.write(MAIN, DEBIAN + "\n[debug]\n  level = 'info'\n")
    assert host.report()[MAIN] == "edited"
    assert host.cri()["containerd"]["snapshotter"] == "nydus-py"
    host.install("--remove")
    assert host.text(MAIN) == DEBIAN + "\n[debug]\n  level = 'info'\n"


def test_a_snapshotter_of_before_comes_back(host: HostTree) -> None:
    text = DEBIAN + '\n[plugins."io.containerd.grpc.v1.cri".containerd]\nsnapshotter = "stargz"\n'
    host.write(MAIN, text)
    host.report()
    host.write(MAIN, host.text(MAIN) + "\n# a remark\n")
    host.report("--remove")
    assert host.cri()["containerd"] == {"snapshotter": "stargz"}


def test_drop_ins_go_where_they_are_read_from(host: HostTree) -> None:
    host.write(MAIN, 'version = 2\nimports = ["/etc/containerd/drop-ins/*.toml"]\n')
    host.write("etc/containerd/drop-ins/a.toml", "version = 2\n")
    done = host.report()
    assert "etc/containerd/drop-ins/nydus-py.toml" in done
    assert tomlkit.parse(host.text(MAIN))["imports"] == ["/etc/containerd/drop-ins/*.toml"]


def test_the_settings_go_where_the_section_counts(host: HostTree) -> None:
    """containerd takes a plugin's section from the last file that has one."""
    host.write(MAIN, 'imports = ["/etc/containerd/more/*.toml"]\n' + DEBIAN)
    other = host.write("etc/containerd/more/cri.toml", DEBIAN)
    done = host.report()
    assert done["etc/containerd/more/cri.toml"] == "edited"
    assert MAIN not in done
    assert "nydus-py" in other.read_text()
    host.install("--remove")
    assert other.read_text() == DEBIAN


def test_a_star_in_imports_is_part_of_one_name(host: HostTree) -> None:
    host.write(MAIN, 'imports = ["/etc/c*/*.toml"]\n' + DEBIAN)
    host.report()
    # That pattern does not reach into conf.d.
    assert tomlkit.parse(host.text(MAIN))["imports"] == ["/etc/c*/*.toml", f"/{DROPIN}"]


def test_two_stars_in_imports_are_one_as_for_containerd(host: HostTree) -> None:
    host.write(MAIN, 'imports = ["/etc/containerd/**/**.toml"]\n' + DEBIAN)
    host.write("etc/containerd/a/.cri.toml", DEBIAN)
    host.write("etc/containerd/a/deeper/cri.toml", DEBIAN)
    assert host.report()["etc/containerd/a/.cri.toml"] == "edited"
    assert "nydus-py" not in host.text("etc/containerd/a/deeper/cri.toml")


def test_a_place_of_hosts_toml_that_is_set_is_used(host: HostTree) -> None:
    text = '\n[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "/etc/docker/certs.d"\n'
    host.write(MAIN, DEBIAN + text)
    assert "etc/docker/certs.d/_default/hosts.toml" in host.report()


def test_mirrors_of_the_old_kind_exclude_hosts_toml(host: HostTree) -> None:
    text = '\n[plugins."io.containerd.grpc.v1.cri".registry.mirrors."x.io"]\nendpoint = ["http://y"]\n'
    host.write(MAIN, DEBIAN + text)
    report = host.install()
    assert "no mirror is set up" in report
    assert not (host.root / HOSTS).exists()
    assert "config_path" not in host.text(MAIN)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[plugins", "not TOML"),
        ("root = '/x'\n", "version 1"),
        ("version = 9\n", "version 9"),
        ("version = [2]\n", "version [2]"),
        ("version = 2\nimports = 'x'\n", "not a list"),
        ("version = 2\nplugins = 'x'\n", "not a table"),
        ("version = 2\n[plugins.'io.containerd.grpc.v1.cri']\ncontainerd = 1\n", "not a table"),
    ],
)
def test_a_configuration_of_containerd_that_cannot_be_used(host: HostTree, text: str, why: str) -> None:
    host.write(MAIN, text)
    before = host.tree()
    assert why in host.install(code=227)
    assert host.tree() == before
    host.report("--without", "containerd", "--without", "mirror")


def test_version_3_has_other_names(host: HostTree) -> None:
    host.write(MAIN, "version = 3\n")
    host.report()
    images = tomlkit.parse(host.text(MAIN)).unwrap()["plugins"]["io.containerd.cri.v1.images"]
    assert images["snapshotter"] == "nydus-py"
    assert images["registry"] == {"config_path": "/etc/containerd/certs.d"}
    assert "version = 3" in host.text(DROPIN)


def test_a_file_behind_a_link_is_changed_where_it_is(host: HostTree) -> None:
    host.write("etc/containerd/real.toml", DEBIAN)
    (host.root / MAIN).symlink_to("real.toml")
    host.report()
    assert (host.root / MAIN).is_symlink()
    host.install("--remove")
    assert host.text("etc/containerd/real.toml") == DEBIAN
    assert (host.root / MAIN).is_symlink()


def test_a_ledger_that_cannot_be_read_stops_it(host: HostTree) -> None:
    host.report()
    host.write("etc/nydus-py/installed.json", "{")
    assert "cannot be told" in host.install("--remove", code=226)


@pytest.mark.parametrize(
    "options",
    [
        ("--without", "nothing"),
        ("--root", "/does/not/exist"),
        ("--program", "/opt/my programs/nydus-py"),
        ("--mirror", 'http://x"]\nserver = "http://evil'),
        ("--mirror", "127.0.0.1:8771"),
    ],
)
def test_wrong_usage(options: tuple[str, ...]) -> None:
    assert run(["install", *options]) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_without_the_right_to_write(host: HostTree) -> None:
    host.root.chmod(0o555)
    assert "cannot write" in host.install(code=110)


def test_a_path_that_cannot_be_is_found_before_anything_is_changed(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    root = tmp_path / "host"
    (root / "etc/containerd/certs.d").mkdir(parents=True)
    (root / "etc/containerd/certs.d/_default").write_text("a file, where a directory is wanted\n")
    code, line = machine.failure("install", "--root", root)
    assert (code, "certs.d/_default" in line) == (110, True)
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["_default"]


def test_one_that_was_killed_in_the_middle_is_gone_on_with_or_removed(
    host: HostTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger is written first: whatever point it dies at, all that is there is known."""
    host.write(MAIN, DEBIAN)
    before = host.tree()
    for last in range(1, 20):
        steps = 0

        def publish(staged: Path, final: Path, last: int = last) -> None:
            nonlocal steps
            steps += 1
            if steps > last:
                raise KeyboardInterrupt
            publish_file(staged, final)

        with monkeypatch.context() as patch:
            patch.setattr("tools.installation.host.publish_file", publish)
            killed = run(["install", "--root", str(host.root)]) != 0
        if not killed:
            break
        host.report("--remove")
        assert host.tree() == before, last
        with monkeypatch.context() as patch:
            steps = 0
            patch.setattr("tools.installation.host.publish_file", publish)
            run(["install", "--root", str(host.root)])
        host.report()
        host.report("--remove")
        assert host.tree() == before, last
    assert not killed


@pytest.mark.needs_root
def test_a_full_disk_leaves_what_can_be_removed(host: HostTree, capfd: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(host.root)], check=True)
    try:
        host.write(MAIN, DEBIAN)
        before = host.tree()
        for blocks in range(40):
            subprocess.run(["mount", "-o", f"remount,size={(3 + blocks) * 4}k", str(host.root)], check=True)
            code = run(["install", "--root", str(host.root)])
            capfd.readouterr()
            assert code in (0, DiskFull.exit_code)
            subprocess.run(["mount", "-o", "remount,size=1m", str(host.root)], check=True)
            host.report("--remove")
            assert host.tree() == before, blocks
            if code == 0:
                break
        assert code == 0
        assert blocks > 3
    finally:
        subprocess.run(["umount", str(host.root)], check=True)

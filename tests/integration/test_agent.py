"""Command line, supervisor and agent together: which driver is taken, and who may die unnoticed."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuse.mount_table import find_mount
from fuse.supervisor.main import LOG_NAME
from tests.integration.cli_machine import Machine, kill_all, processes_of, unmount_anyway
from tests.integration.kernel_drivers import need_erofs_events
from tests.stress.chaos import make_source, run_chaos, serving_agent

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]

LARGE_BYTES = 24 << 20
DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("agent") / "source"
    make_source(root, LARGE_BYTES)
    return root


@pytest.fixture(scope="module")
def image(source: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    reference = f"dir:{tmp_path_factory.mktemp('image')}"
    Machine(tmp_path_factory.mktemp("builder")).nydus("build", source, reference)
    return reference


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A host whose supervisor and agent are gone afterwards."""
    host = Machine(tmp_path)
    (tmp_path / "mnt").mkdir()
    yield host
    unmount_anyway(tmp_path / "mnt")
    kill_all(tmp_path / "run")


@pytest.fixture(params=["erofs", "fuse"])
def driver(request: pytest.FixtureRequest) -> str:
    if request.param == "erofs":
        need_erofs_events()
    return str(request.param)


def processes(machine: Machine) -> list[int]:
    """Supervisor, template and agent of a machine."""
    return processes_of(machine.directory / "run")


def same(source: Path, mount: Path) -> bool:
    """Whether both trees are equal, with cold caches."""
    Path("/proc/sys/vm/drop_caches").write_text("3")
    return subprocess.run(["diff", "-r", source, mount], check=False).returncode == 0


def test_auto_takes_erofs_and_says_so(machine: Machine, image: str) -> None:
    need_erofs_events()
    done = machine.run("mount", image, machine.directory / "mnt")
    assert done.returncode == 0
    assert done.stderr.endswith(f"is mounted at {machine.directory / 'mnt'} (erofs)\n")
    (status,) = machine.statuses(machine.directory / "mnt")
    assert (status["driver"], status["driver_remark"]) == ("erofs", "")
    machine.nydus("umount", machine.directory / "mnt")
    wait_until(lambda: processes(machine) == [])


def test_auto_says_why_it_did_not_take_erofs(machine: Machine, image: str) -> None:
    need_erofs_events()
    cache = machine.directory / "cache"
    cache.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", cache], check=True)
    try:
        done = machine.run("mount", image, machine.directory / "mnt")
        assert "(fuse; not erofs: the file system of" in done.stderr
        (status,) = machine.statuses(machine.directory / "mnt")
        assert status["driver"] == "fuse"
        assert "put the cache on ext4" in str(status["driver_remark"])
        code, line = machine.failure("mount", "--driver", "erofs", image, machine.directory / "mnt")
        assert (code, "mounted here already" in line) == (75, True)
        machine.nydus("umount", machine.directory / "mnt")
        code, line = machine.failure("mount", "--driver", "erofs", image, machine.directory / "mnt")
        assert (code, "put the cache on ext4" in line) == (86, True)
    finally:
        unmount_anyway(machine.directory / "mnt")
        subprocess.run(["umount", "-l", cache], check=True)


def test_an_upgrade_replaces_the_agent_under_an_open_file(
    machine: Machine, image: str, source: Path, driver: str
) -> None:
    mount = machine.directory / "mnt"
    machine.nydus("mount", "--driver", driver, image, mount)
    before = serving_agent(machine)
    with (mount / "large.bin").open("rb") as stream:
        half = stream.read(LARGE_BYTES // 2)
        done = machine.run("agent", "--upgrade")
        assert (done.returncode, f"agent {before} is replaced by" in done.stderr) == (0, True)
        assert half + stream.read() == (source / "large.bin").read_bytes()
    assert serving_agent(machine) != before
    assert same(source, mount)
    machine.nydus("umount", mount)


def test_a_killed_supervisor_is_started_again_by_the_agent(
    machine: Machine, image: str, source: Path, driver: str
) -> None:
    mount = machine.directory / "mnt"
    machine.nydus("mount", "--driver", driver, image, mount)
    agent = serving_agent(machine)
    supervisor = int(Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: "starts" in log(machine).rpartition("the supervisor has died")[2])
    assert same(source, mount)
    assert agent is not None
    os.kill(agent, signal.SIGKILL)
    assert same(source, mount)
    assert machine.statuses(mount)[0]["pid"] != agent
    machine.nydus("umount", mount)


def test_a_complete_mount_of_erofs_outlives_everybody(machine: Machine, image: str, source: Path) -> None:
    need_erofs_events()
    mount = machine.directory / "mnt"
    machine.nydus("mount", "--driver", "erofs", image, mount)
    assert same(source, mount)
    wait_until(lambda: read_record(machine).get("is_complete") is True)
    for pid in processes(machine):
        os.kill(pid, signal.SIGSTOP)  # or one of them would start another
    for pid in processes(machine):
        os.kill(pid, signal.SIGKILL)
    assert same(source, mount)
    (status,) = machine.statuses(mount)
    assert status["state"] == "unattended"
    machine.nydus("umount", mount)
    assert machine.statuses() == []


def test_an_incomplete_mount_that_lost_everybody_is_taken_down(machine: Machine, image: str) -> None:
    need_erofs_events()
    mount = machine.directory / "mnt"
    machine.nydus("mount", "--driver", "erofs", image, mount)
    for pid in processes(machine):
        os.kill(pid, signal.SIGSTOP)
    for pid in processes(machine):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: processes(machine) == [])
    (status,) = machine.statuses(mount)
    assert status["state"] == "dead"  # its reads would give zeros: it must not stay
    assert find_mount(mount) is None


def test_being_told_to_end_unmounts_first_and_serves_what_is_busy(
    machine: Machine, image: str, source: Path, driver: str
) -> None:
    mount = machine.directory / "mnt"
    machine.nydus("mount", "--driver", driver, image, mount)
    agent = serving_agent(machine)
    supervisor = int(Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1])
    with (mount / "large.bin").open("rb") as stream:
        os.kill(supervisor, signal.SIGTERM)
        wait_until(lambda: "it is served on until then" in log(machine))
        assert stream.read() == (source / "large.bin").read_bytes()
    wait_until(lambda: processes(machine) == [])
    assert find_mount(mount) is None


def test_a_terminal_may_interrupt_all_at_once(machine: Machine, image: str) -> None:
    """Ctrl-C reaches the agent and the template, too: they died with tracebacks, and others unmounted."""
    mount = machine.directory / "mnt"
    command = machine.command("agent")
    with subprocess.Popen(
        command, env=machine.environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as agent:
        try:
            wait_until(lambda: serving_agent(machine) is not None)
            machine.nydus("mount", image, mount)
        finally:
            os.killpg(agent.pid, signal.SIGINT)
            _, said = agent.communicate(timeout=DEADLINE_S)
    assert agent.returncode == 0
    assert find_mount(mount) is None
    assert "Traceback" not in said
    assert " ended with " not in said


def test_an_idle_agent_takes_no_time_and_little_memory(machine: Machine, image: str, driver: str) -> None:
    machine.nydus("mount", "--driver", driver, "--prefetch", "none", image, machine.directory / "mnt")
    agent = serving_agent(machine)
    ticks = [int(t) for t in Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[11:13]]
    time.sleep(1.5)  # nothing happens in it: there is no event to wait for
    later = [int(t) for t in Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[11:13]]
    assert sum(later) - sum(ticks) <= 1
    (rss,) = (
        line for line in Path(f"/proc/{agent}/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    assert int(rss.split()[1]) < 90 * 1024
    machine.nydus("umount", machine.directory / "mnt")


def test_an_agent_of_its_own_stays_when_nothing_is_mounted(machine: Machine, image: str) -> None:
    with subprocess.Popen(
        machine.command("agent"), env=machine.environment, stderr=subprocess.DEVNULL
    ) as agent:
        try:
            wait_until(lambda: serving_agent(machine) is not None)
            machine.nydus("mount", image, machine.directory / "mnt")
            machine.nydus("umount", machine.directory / "mnt")
            assert machine.run("agent", "--upgrade").returncode == 0
            agent.terminate()
            assert agent.wait(DEADLINE_S) == 0
        finally:
            agent.kill()
    wait_until(lambda: processes(machine) == [])


def test_no_agent_to_upgrade_and_one_too_many(machine: Machine, image: str) -> None:
    assert machine.failure("agent", "--upgrade")[0] == 98
    machine.nydus("mount", image, machine.directory / "mnt")
    code, line = machine.failure("agent")
    assert (code, "an agent runs already" in line) == (97, True)
    machine.nydus("umount", machine.directory / "mnt")


@pytest.mark.slow
def test_agents_killed_under_verifying_readers(tmp_path: Path, source: Path, driver: str) -> None:
    """A short run of tests/stress/chaos.py; `make chaos` is the long one."""
    report = run_chaos(tmp_path, source, driver, kills=12, seconds=6.0)
    assert report.is_clean, report
    assert report.kills == 12


def log(machine: Machine) -> str:
    return (machine.directory / "run" / LOG_NAME).read_text()


def read_record(machine: Machine) -> dict[str, object]:
    (path,) = (machine.directory / "run" / "mounts").glob("*.json")
    record = json.loads(path.read_text())
    assert isinstance(record, dict)
    return record


def wait_until(condition: "object") -> None:
    assert callable(condition)
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

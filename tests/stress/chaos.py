"""Kills agents under verifying readers: `python -m tests.stress.chaos --driver erofs --kills 200`.

The whole product runs as a user starts it: command line, supervisor, agent, a real mount. Killed is always
the agent that serves, at random moments, also while it is taking over. Prints one JSON document and exits
with 1 when a reader has seen anything.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fuse.supervisor.main import LOG_NAME
from tests.integration.cli_machine import Machine, unmount_anyway
from tests.stress.chaos_readers import LARGE, READERS

ROOT = Path(__file__).parents[2]
FOLDERS, FILES_EACH = 50, 40
GRACE_S = 30.0
STEP_BYTES = 16 << 20


@dataclass(slots=True)
class ChaosReport:
    """The outcome of a run. `hung` and `died`: readers without a report of their own."""

    driver: str
    kills: int = 0
    seconds: float = 0.0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    died: list[str] = field(default_factory=list)
    longest_stall_s: float = 0.0
    longest_find_s: float = 0.0
    complete_before_end: bool = False
    readers: list[dict[str, object]] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether no reader has noticed anything but time."""
        return not (self.wrong or self.errors or self.hung or self.died)


def make_source(root: Path, large_bytes: int) -> None:
    """A tree with one large file and many small ones, all of random bytes."""
    root.mkdir()
    chance = random.Random(0)
    with (root / LARGE).open("wb") as file:
        while (left := large_bytes - file.tell()) > 0:
            file.write(chance.randbytes(min(STEP_BYTES, left)))
    for number in range(FOLDERS):
        folder = root / f"d{number:03}"
        folder.mkdir()
        for index in range(FILES_EACH):
            (folder / f"f{index:03}").write_bytes(chance.randbytes(chance.randrange(1, 20_000)))


def serving_agent(machine: Machine) -> int | None:
    """The agent that serves or is about to: the youngest child of the supervisor, behind the template."""
    lock = machine.directory / "run" / "agent.lock"
    if not lock.exists():
        return None
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5].endswith(f":{lock.stat().st_ino}"):
            return _youngest_child(int(fields[4]))
    return None


def _youngest_child(pid: int) -> int | None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    started = {}
    for child in children:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            started[int(child)] = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[19])
    return max(started, key=lambda child: (started[child], child)) if len(started) > 1 else None


@contextlib.contextmanager
def readers(mount: Path, source: Path, seconds: float) -> Iterator[dict[str, "subprocess.Popen[str]"]]:
    """One process of each kind."""
    running = {}
    try:
        for kind in READERS:
            command = [sys.executable, "-m", "tests.stress.chaos_readers", kind]
            arguments = [str(mount), str(source), str(seconds)]
            running[kind] = subprocess.Popen(
                [*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
            )
        yield running
    finally:
        for process in running.values():
            process.kill()
            process.communicate()


def kill_agents(machine: Machine, kills: int, seconds: float, report: ChaosReport) -> None:
    """So many SIGKILLs within about so many seconds, at random moments."""
    chance, start = random.Random(), time.monotonic()
    for number in range(kills):
        due = start + (number + chance.random()) * seconds / kills
        time.sleep(max(0.0, due - time.monotonic()))
        while (pid := serving_agent(machine)) is None and time.monotonic() < due + GRACE_S:
            time.sleep(0.001)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                report.kills += 1
    report.seconds = round(time.monotonic() - start, 1)


def collect(running: dict[str, "subprocess.Popen[str]"], report: ChaosReport) -> None:
    """Adds up what the readers say."""
    for kind, process in running.items():
        try:
            output, _ = process.communicate(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            report.hung.append(kind)
            continue
        if process.returncode != 0:
            report.died.append(f"{kind}: {process.returncode}")
            continue
        said = json.loads(output)
        report.readers.append(said)
        report.wrong += said["wrong"]
        report.errors += said["errors"]
        report.longest_stall_s = max(report.longest_stall_s, round(said["stall_s"], 3))
        report.longest_find_s = max(report.longest_find_s, round(said["find_s"], 3))


def run_chaos(
    directory: Path, source: Path, driver: str, kills: int, seconds: float, options: Sequence[str] = ()
) -> ChaosReport:
    """Mounts `source` from an image in `directory`, and does all of the above."""
    machine, mount = Machine(directory), directory / "mnt"
    image = f"dir:{directory / 'image'}"
    machine.nydus("build", source, image, "--compressor", "none", "--chunk-size", "128KiB")
    report = ChaosReport(driver)
    mount.mkdir()
    try:
        machine.nydus("mount", "--driver", driver, *options, image, mount)
        with readers(mount, source, seconds + 2.0) as running:
            kill_agents(machine, kills, seconds, report)
            (status,) = machine.statuses(mount)
            report.complete_before_end = status["cached_bytes"] == status["decoded_size_bytes"]
            collect(running, report)
        machine.nydus("umount", mount)
    finally:
        unmount_anyway(mount)
    return report


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.chaos", description=__doc__)
    parser.add_argument("--driver", default="erofs", choices=["erofs", "fuse"])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--large-mib", type=int, default=4096)
    parser.add_argument("--dir", type=Path, help="work here and keep the source tree")
    options = parser.parse_args()
    directory = options.dir or Path(tempfile.mkdtemp(prefix="nydus-py-chaos-"))
    directory.mkdir(exist_ok=True)
    try:
        source = directory / "source"
        if not source.exists():
            make_source(source, options.large_mib << 20)
        place = Path(tempfile.mkdtemp(dir=directory))
        report = run_chaos(place, source, options.driver, options.kills, options.seconds)
        print(json.dumps(asdict(report), indent=2))
        if not report.is_clean:
            print((place / "run" / LOG_NAME).read_text()[-4000:], file=sys.stderr)
        shutil.rmtree(place)
    finally:
        if options.dir is None:
            shutil.rmtree(directory)
    return 0 if report.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())

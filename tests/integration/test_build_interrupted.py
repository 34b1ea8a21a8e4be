"""Builds that end in the middle: killed, out of disk, two at a time. The next one goes on where they were."""

import errno
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import blake3
import pytest

from backend.publishing import DiskFull
from builder.build import Build
from builder.journal import BuildRunning
from builder.pipeline import PipelineCounters
from tests.builder_support import build, image_bytes, options, put, read_image, read_tree
from tests.integration.cli_machine import Machine

FILES = 40
CHUNK = 1 << 16
TASK = 4 * (1 << 19) // CHUNK
"""Extents that are new in a task: half of each of its four files. Some records may be lost in a buffer."""
OPTIONS = options(chunk_size=CHUNK, batch_size=CHUNK, threads=2)

# Says a line for every task that is written and then waits for one, so that the test decides how far it gets.
_SLOW_BUILD = """
import sys
from pathlib import Path
from builder.build import Build
from tests.builder_support import options

def report(counters):
    print(counters.bytes_out, flush=True)
    sys.stdin.readline()

chosen = options(chunk_size=1 << 16, batch_size=1 << 16, threads=2)
with Build(Path(sys.argv[2]), chosen, on_progress=report) as running:
    running.run(Path(sys.argv[1]))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """40 MiB that compress a little, in files and batches."""
    root = tmp_path / "src"
    for number in range(FILES):
        noise = blake3.blake3(b"%d" % number).digest(1 << 19)
        put(root, b"%02d" % number, noise + bytes(1 << 19))
        for small in range(5):
            put(root, b"small/%02d-%d" % (number, small), noise[small : small + 700])
    return root


@contextmanager
def _slow_build(source: Path, work: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", _SLOW_BUILD, source, work],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _advance(process: subprocess.Popen[str], tasks: int) -> None:
    """Lets the build write so many tasks; it then waits."""
    assert process.stdin is not None
    assert process.stdout is not None
    for number in range(tasks):
        if number:
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.stdout.readline()


def _workers(process: subprocess.Popen[str]) -> list[int]:
    """Process file descriptors (`pidfd_open`) of the children."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [os.pidfd_open(int(pid)) for pid in children]


def _wait_for_end(pidfds: list[int]) -> None:
    for pidfd in pidfds:
        readable, _, _ = select.select([pidfd], [], [], 60)
        os.close(pidfd)
        assert readable, "a worker lives on after its parent"


def _kill_after(source: Path, work: Path, tasks: int) -> None:
    with _slow_build(source, work) as process:
        _advance(process, tasks)
        workers = _workers(process)
        assert len(workers) == 2
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        _wait_for_end(workers)
    assert not (work / "image.boot").exists()


def test_a_killed_build_leaves_no_image_and_the_next_one_goes_on(tmp_path: Path, source: Path) -> None:
    undisturbed = build(source, tmp_path / "w0", OPTIONS)
    _kill_after(source, tmp_path / "work", 5)
    built = build(source, tmp_path / "work", OPTIONS)
    assert 4 * TASK < built.statistics.extents_reused < built.statistics.chunks_unique
    assert image_bytes(built) == image_bytes(undisturbed)
    assert read_image(built) == read_tree(source)


def test_the_second_kill_loses_nothing_of_the_first(tmp_path: Path, source: Path) -> None:
    undisturbed = build(source, tmp_path / "w0", OPTIONS)
    _kill_after(source, tmp_path / "work", 7)
    _kill_after(source, tmp_path / "work", 2)
    assert len(list((tmp_path / "work").glob("*.blob"))) == 2
    built = build(source, tmp_path / "work", OPTIONS)
    assert built.statistics.extents_reused > 6 * TASK
    assert image_bytes(built) == image_bytes(undisturbed)
    assert len(list((tmp_path / "work").glob("*.blob"))) == 2


def _damage_blob(work: Path) -> None:
    (blob,) = work.glob("*.blob")
    raw = bytearray(blob.read_bytes())
    for at in range(0, len(raw), 100_000):
        raw[at] ^= 0xFF
    blob.write_bytes(raw)


def _tear_journal(work: Path) -> None:
    (journal,) = work.glob("*.journal")
    raw = journal.read_bytes()
    journal.write_bytes(raw[: len(raw) // 2 + 3] + b"\xff" * 500)


def _forget_blob(work: Path) -> None:
    (blob,) = work.glob("*.blob")
    blob.unlink()


def _empty_blob(work: Path) -> None:
    (blob,) = work.glob("*.blob")
    blob.write_bytes(bytes(blob.stat().st_size))


@pytest.mark.parametrize("damage", [_damage_blob, _tear_journal, _forget_blob, _empty_blob])
def test_damage_costs_time_only(tmp_path: Path, source: Path, damage: object) -> None:
    undisturbed = build(source, tmp_path / "w0", OPTIONS)
    _kill_after(source, tmp_path / "work", 5)
    damage(tmp_path / "work")  # type: ignore[operator]
    assert image_bytes(build(source, tmp_path / "work", OPTIONS)) == image_bytes(undisturbed)


def test_another_source_takes_only_what_is_the_same(tmp_path: Path, source: Path) -> None:
    _kill_after(source, tmp_path / "work", 5)
    other = tmp_path / "other"
    put(other, b"same", (source / "00").read_bytes())
    put(other, b"new", blake3.blake3(b"new").digest(100_000))
    built = build(other, tmp_path / "work", OPTIONS)
    assert built.statistics.extents_reused == 9
    assert read_image(built) == read_tree(other)


def test_two_builds_in_one_directory(tmp_path: Path, source: Path) -> None:
    with _slow_build(source, tmp_path / "work") as process:
        _advance(process, 1)
        with pytest.raises(BuildRunning, match="another build is using this work directory"):
            build(source, tmp_path / "work", OPTIONS)
        process.communicate("\n" * 1000)
        assert process.returncode == 0
    assert build(source, tmp_path / "work", OPTIONS).statistics.extents_reused > 0


def test_a_failed_build_is_continued_in_the_same_process(tmp_path: Path, source: Path) -> None:
    calls = iter(range(5))

    def report(counters: PipelineCounters) -> None:
        next(calls)

    with Build(tmp_path / "work", OPTIONS, on_progress=report) as running, pytest.raises(StopIteration):
        running.run(source)
    built = build(source, tmp_path / "work", OPTIONS)
    assert built.statistics.extents_reused > 0
    assert image_bytes(built) == image_bytes(build(source, tmp_path / "w0", OPTIONS))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.mark.needs_root
def test_a_full_disk(tmp_path: Path, source: Path, small_disk: Path) -> None:
    with pytest.raises(DiskFull, match=r"disk/work: cannot write: No space left.*--work-dir"):
        build(source, small_disk / "work", OPTIONS)
    assert not (small_disk / "work" / "image.boot").exists()
    assert [path.name for path in small_disk.iterdir()] == ["work"]


@pytest.mark.needs_root
def test_a_disk_that_fills_up_at_the_bootstrap(tmp_path: Path, small_disk: Path) -> None:
    """No file has content, so that only the metadata takes room."""
    (tmp_path / "src").mkdir()
    for number in range(2000):
        os.symlink(b"x" * 4000, tmp_path / "src" / f"{number:06}")
    put(small_disk, b"filler", bytes(2 << 20))
    with pytest.raises(DiskFull, match=r"disk/work: cannot write: No space left.*--work-dir"):
        build(tmp_path / "src", small_disk / "work")
    shutil.rmtree(small_disk / "work")


@pytest.mark.needs_root
def test_a_full_disk_is_one_line(tmp_path: Path, source: Path, small_disk: Path) -> None:
    machine = Machine(tmp_path)
    place = small_disk / "work"
    code, line = machine.failure("build", source, f"dir:{tmp_path / 'image'}", "--work-dir", place)
    assert code == DiskFull.exit_code
    assert line.startswith(f"nydus-py: {place}: cannot write: No space left on device")
    assert "--work-dir" in line


def test_an_error_of_the_source_is_not_the_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input that breaks while it is copied to the work directory."""
    cause = OSError(errno.EIO, "Input/output error")

    def fail(*_: object) -> None:
        raise cause

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR)
    try:
        with pytest.raises(OSError, match="Input/output") as caught:
            build(tmp_path / "pipe", tmp_path / "work", options(prefetch=("/",)))
    finally:
        os.close(writer)
    assert caught.value is cause

"""Dedup, counters and batches of the pipeline, and workers that fail."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from builder.build import Build
from builder.crew import ARENA_SIZE_MAX, Crew, WorkerDied
from builder.pipeline import PIECES_MAX, PipelineCounters
from builder.worker import SourceChanged, SourceUnreadable
from rafs.blob_table import BlobFeatures
from tests.builder_support import (
    ImageReader,
    build,
    decoded_size,
    image_bytes,
    options,
    put,
    read_image,
    read_tree,
)

SLOT = 4 << 20


def _numbered(count: int, size: int) -> bytes:
    """Chunks that all differ."""
    return b"".join(b"%08d" % number + bytes(size - 8) for number in range(count))


def test_equal_chunks_are_stored_once_within_a_task_and_between_tasks(tmp_path: Path) -> None:
    content = _numbered(3, 4096)
    put(tmp_path / "src", b"1", content + content)
    put(tmp_path / "src", b"2", _numbered(2 * SLOT // 4096, 4096))
    put(tmp_path / "src", b"3", content)
    built = build(tmp_path / "src", tmp_path / "work", options(threads=2))
    assert built.statistics.chunks == 6 + 2048 + 3
    assert built.statistics.chunks_unique == 2048
    assert built.statistics.bytes_unique == 2 * SLOT
    assert read_image(built) == read_tree(tmp_path / "src")


def test_an_index_that_does_not_fit_in_memory_gives_the_same_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "src", b"1", _numbered(500, 4096) * 2)
    put(tmp_path / "src", b"2", _numbered(2000, 4096))
    expected = image_bytes(build(tmp_path / "src", tmp_path / "w0"))
    monkeypatch.setattr("builder.dedup.IN_MEMORY_MAX", 100)
    monkeypatch.setattr("builder.row_spool.SORTED_AT_ONCE", 64)
    put(tmp_path, b"w1/dedup", b"left by a build that was killed")
    assert image_bytes(build(tmp_path / "src", tmp_path / "w1")) == expected
    assert not {"dedup", "rows"} & {path.name for path in (tmp_path / "w1").iterdir()}


def test_small_files_share_extents(tmp_path: Path) -> None:
    sizes = [100, 2000, 4000, 30_000, 32_767, 32_768, 1]
    for number, size in enumerate(sizes):
        put(tmp_path / "src", b"%d" % number, bytes([number + 1]) * size)
    built = build(tmp_path / "src", tmp_path / "work", options(chunk_size=1 << 16, batch_size=1 << 16))
    reader = ImageReader.open(built)
    metas = [reader.metas[0].chunk(number) for number in range(7)]
    assert [meta.is_batch for meta in sorted(metas, key=lambda m: m.uncompressed_size)] == [True] * 6 + [
        False
    ]
    assert reader.bootstrap.blobs[0].uncompressed_size == decoded_size(sizes)
    assert reader.bootstrap.blobs[0].features & BlobFeatures.BATCH
    assert reader.tree() == read_tree(tmp_path / "src")


def test_a_batch_of_one_is_a_chunk_of_its_own(tmp_path: Path) -> None:
    put(tmp_path / "src", b"only", b"small")
    built = build(tmp_path / "src", tmp_path / "work", options(batch_size=4096))
    reader = ImageReader.open(built)
    assert not reader.metas[0].chunk(0).is_batch
    assert not reader.bootstrap.blobs[0].features & BlobFeatures.BATCH


def test_more_files_than_a_task_takes(tmp_path: Path) -> None:
    for number in range(PIECES_MAX * 2 + 3):
        put(tmp_path / "src", b"%05d" % number, b"%d" % number)
    built = build(tmp_path / "src", tmp_path / "work", options(batch_size=4096, threads=2))
    assert built.statistics.files == PIECES_MAX * 2 + 3
    assert read_image(built) == read_tree(tmp_path / "src")


def test_paths_longer_than_a_message_takes(tmp_path: Path) -> None:
    """A task ends when its paths are 64 KiB, so that a message fits the socket's buffer."""
    deep = b"/".join([b"d" * 250] * 12)
    for number in range(60):
        put(tmp_path / "src", deep + b"/%d" % number, b"%d" % number)
    built = build(tmp_path / "src", tmp_path / "work", options(batch_size=4096, threads=2))
    assert read_image(built) == read_tree(tmp_path / "src")


def test_sizes_around_a_slot(tmp_path: Path) -> None:
    for number, size in enumerate((SLOT - 1, SLOT, SLOT + 1, SLOT - 4096, 4095, 4096, 4097, 3 * SLOT + 5)):
        put(tmp_path / "src", b"%d" % number, (_numbered(1, 8) * (size // 8 + 1))[:size])
    built = build(tmp_path / "src", tmp_path / "work", options(threads=2))
    assert read_image(built) == read_tree(tmp_path / "src")


@pytest.mark.parametrize("chunk_size", [4096, 1 << 20, 16 << 20])
@pytest.mark.parametrize("threads", [1, 2, 8, 33])
def test_the_arena_does_not_grow_with_the_cores(chunk_size: int, threads: int) -> None:
    with Crew(options(chunk_size=chunk_size, threads=threads)) as crew:
        assert len(crew.arena) == crew.slot_count * crew.slot_size <= ARENA_SIZE_MAX
        assert 2 <= crew.slot_count <= 3 * threads + 2


@pytest.mark.parametrize("arena_size", [0, ARENA_SIZE_MAX])
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_the_largest_chunks_go_through_few_slots(
    tmp_path: Path, threads: int, arena_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no arena to speak of there are two slots, whatever the number of workers."""
    monkeypatch.setattr("builder.crew.ARENA_SIZE_MAX", arena_size)
    source = tmp_path / "src"
    for number in range(5):
        with put(source, b"large-%d" % number, b"%d" % number).open("r+b") as file:
            file.truncate((16 << 20) * (number % 3) + 5)
    put(source, b"small", b"x")
    chosen = options(chunk_size=16 << 20, batch_size=1 << 20, threads=threads)
    built = build(source, tmp_path / "work", chosen)
    assert built.statistics.files == 6
    assert read_image(built) == read_tree(source)


def test_progress_only_grows_and_ends_at_the_whole(tmp_path: Path) -> None:
    put(tmp_path / "src", b"f", _numbered(3 * SLOT // 4096, 4096))
    seen: list[tuple[int, int]] = []

    def note(counters: PipelineCounters) -> None:
        seen.append((counters.bytes_in, counters.bytes_out))

    with Build(tmp_path / "work", options(), on_progress=note) as running:
        built = running.run(tmp_path / "src")
    assert seen == sorted(seen)
    assert len(seen) == 3
    assert seen[-1][0] == built.statistics.bytes_in == 3 * SLOT


def test_an_error_of_the_caller_ends_the_workers(tmp_path: Path) -> None:
    put(tmp_path / "src", b"f", _numbered(3 * SLOT // 4096, 4096))

    def fail(counters: PipelineCounters) -> None:
        raise KeyboardInterrupt

    before = _children()
    with Build(tmp_path / "work", options(threads=2), on_progress=fail) as running:
        with pytest.raises(KeyboardInterrupt):
            running.run(tmp_path / "src")
        assert _children() == before


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_killed_worker_is_an_error(tmp_path: Path, threads: int) -> None:
    put(tmp_path / "src", b"f", _numbered(20 * SLOT // 4096, 4096))
    before = set(_children())

    def kill(counters: PipelineCounters) -> None:
        for pid in set(_children()) - before:
            os.kill(pid, signal.SIGKILL)

    with Build(tmp_path / "work", options(threads=threads), on_progress=kill) as running:
        with pytest.raises(WorkerDied, match=r"build worker \d+ ended with status -9"):
            running.run(tmp_path / "src")
        assert set(_children()) == before
    assert not (tmp_path / "work" / "image.boot").exists()


def test_workers_that_are_killed_before_their_first_task(tmp_path: Path) -> None:
    before = set(_children())
    with Crew(options(threads=2)) as crew:
        for pid in set(_children()) - before:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="status -9"):
            crew.collect()


@pytest.mark.parametrize(("module", "more"), [("worker", ["4096", "1"]), ("layer_process", [])])
def test_a_process_whose_parent_has_gone_already_says_nothing(module: str, more: list[str]) -> None:
    """Its traceback stood behind the error of a build that had failed early."""
    ours, theirs = socket.socketpair()
    with theirs, tempfile.TemporaryFile() as arena:
        arena.truncate(4096)
        numbers = (theirs.fileno(), arena.fileno())
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import sys; from builder.{module} import main; main(sys.argv[1:])",
                *map(str, numbers),
                *more,
            ],
            pass_fds=numbers,
            stderr=subprocess.PIPE,
        )
    ours.close()
    assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == 0


def test_errors_of_workers_travel_whole() -> None:
    for error in (SourceChanged(path="/a\udcff"), SourceUnreadable(path="/b", why="gone")):
        copy = pickle.loads(pickle.dumps(error))
        assert str(copy) == str(error)
        assert type(copy) is type(error)

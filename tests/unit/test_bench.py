"""The pure parts of the benchmark: inputs, samples, goals, tables, and how commands are measured."""

import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tools.bench import ledger as q
from tools.bench.__main__ import parse
from tools.bench.contestants import Contestant, tree_builders
from tools.bench.corpus import Corpus
from tools.bench.goals import GOALS, Goal, judge
from tools.bench.inputs import LARGEST_BYTES, file_sizes, tree_path, write_tree
from tools.bench.ledger import NYDUS, Ledger
from tools.bench.machine import describe_machine, load_now
from tools.bench.nydus import Nydus
from tools.bench.origin import sent_by_path
from tools.bench.process import CommandFailed, memory_of, run_measured, session_members
from tools.bench.profile import SMALL, Profile
from tools.bench.report import Report, judge_all, text_lines
from tools.bench.rounds import interleave
from tools.bench.stages import KERNEL_IMAGES, Stage
from tools.bench.table import aligned, goal_table, scene_table
from tools.bench.volumes import lacking
from tools.bench.workload import digest_file, digest_files, read_randomly, read_sequentially, stat_all

TINY = Profile("tiny", files=205, tree_size_bytes=50_000, file_size_bytes=4096, random_reads=5)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    files = []
    for number in range(3):
        path = tmp_path / f"source-{number}"
        path.write_bytes(bytes([65 + number]) * (100 + number))
        files.append((path, path.stat().st_size))
    return Corpus(files)


def test_file_sizes_are_the_same_for_the_same_seed_and_add_up() -> None:
    sizes = file_sizes(10_000, 100 << 20, 1)
    assert sizes == file_sizes(10_000, 100 << 20, 1)
    assert sizes != file_sizes(10_000, 100 << 20, 2)
    assert 0 <= (100 << 20) - sum(sizes) <= len(sizes)
    assert 2.5 < sum(sizes) / len(sizes) / sorted(sizes)[len(sizes) // 2] < 5


def test_file_sizes_are_capped() -> None:
    assert file_sizes(1, 10 * LARGEST_BYTES, 1) == [LARGEST_BYTES]


def test_tree_paths_are_unique_with_100_files_in_a_directory() -> None:
    paths = [Path(tree_path(number)) for number in range(2000)]
    assert len(set(paths)) == 2000
    parents = [path.parent for path in paths]
    assert {parents.count(parent) for parent in parents} == {100}
    assert len({path.parts[0] for path in paths}) == 2


def test_corpus_cuts_pieces_of_its_files(corpus: Corpus) -> None:
    content = corpus.cut(1000, random.Random(1))
    assert len(content) == 1000
    assert set(content) <= set(b"ABC")
    assert content == corpus.cut(1000, random.Random(1))
    assert corpus.cut(0, random.Random(1)) == b""


def test_corpus_needs_files() -> None:
    with pytest.raises(ValueError, match="no files"):
        Corpus([])


def test_tree_is_the_same_twice(tmp_path: Path, corpus: Corpus) -> None:
    digests = []
    for name in ("a", "b"):
        names = tmp_path / f"{name}-names"
        size = write_tree(tmp_path / name, names, TINY, corpus)
        assert sum((tmp_path / name / path).stat().st_size for path in names.read_text().splitlines()) == size
        digests.append(digest_files(str(tmp_path / name), str(names)))
    assert digests[0] == digests[1]


def test_digest_of_a_tree_knows_names_and_contents(tmp_path: Path) -> None:
    names = tmp_path / "names"
    names.write_text("x\n")
    (tmp_path / "x").write_text("1")
    first = digest_files(str(tmp_path), str(names))
    (tmp_path / "x").write_text("2")
    assert digest_files(str(tmp_path), str(names)) != first


def test_ledger_keeps_the_best_sample_in_either_direction() -> None:
    ledger = Ledger()
    for sample in (3.0, 1.0, 2.0):
        ledger.add("scene", NYDUS, q.WALL, sample)
        ledger.add("scene", NYDUS, q.RATE_WARM, sample)
    assert ledger.best("scene", NYDUS, q.WALL) == 1.0
    assert ledger.best("scene", NYDUS, q.RATE_WARM) == 3.0
    assert ledger.best("scene", "other", q.WALL) is None
    assert [series.samples for series in ledger.series()] == [(3.0, 1.0, 2.0)] * 2


def test_ledger_notes_each_missing_thing_once() -> None:
    ledger = Ledger()
    ledger.miss("a", "not installed")
    ledger.miss("a", "not installed")
    assert len(ledger.missing) == 1
    assert not ledger.failed
    ledger.miss("b", "exit code 1", failed=True)
    assert ledger.failed


@pytest.mark.parametrize(
    ("own", "other", "met"), [(1.5, 1.0, True), (1.6, 1.0, False), (1.0, None, None), (None, 1.0, None)]
)
def test_goal_on_a_ratio(own: float | None, other: float | None, met: bool | None) -> None:
    ledger = Ledger()
    for subject, sample in ((NYDUS, own), ("tar", other)):
        if sample is not None:
            ledger.add("scene", subject, q.WALL, sample)
    assert judge(Goal("scene", q.WALL, "tar", 1.5), ledger).met is met


@pytest.mark.parametrize(("own", "met"), [(0.5, True), (0.4, False)])
def test_goal_where_higher_is_better(own: float, met: bool) -> None:
    ledger = Ledger()
    ledger.add("scene", NYDUS, q.RATE_WARM, own)
    ledger.add("scene", "ext4", q.RATE_WARM, 1.0)
    assert judge(Goal("scene", q.RATE_WARM, "ext4", 0.5), ledger).met is met


@pytest.mark.parametrize(("own", "met"), [(0.9, True), (1.1, False)])
def test_goal_on_the_value_itself(own: float, met: bool) -> None:
    ledger = Ledger()
    ledger.add("scene", NYDUS, q.USABLE, own)
    assert judge(Goal("scene", q.USABLE, None, 1.0), ledger).met is met


def test_scene_table_shows_values_and_ratios() -> None:
    ledger = Ledger()
    ledger.add("scene", NYDUS, q.WALL, 3.0)
    ledger.add("scene", NYDUS, q.SIZE, 2048)
    ledger.add("scene", "tar", q.WALL, 2.0)
    assert list(scene_table("scene", ledger)) == [
        "scene  [nydus-py / this]",
        "                      wall     size",
        "  nydus-py         3.000 s  2.0 KiB",
        "  tar       2.000 s [1.50]        -",
    ]


def test_goal_table_says_met_missed_and_not_measured() -> None:
    ledger = Ledger()
    ledger.add("a", NYDUS, q.USABLE, 0.5)
    ledger.add("b", NYDUS, q.USABLE, 2.0)
    verdicts = [judge(Goal(scene, q.USABLE, None, 1.0), ledger) for scene in ("a", "b", "c")]
    words = [line.split() for line in goal_table(verdicts)]
    assert [line[-1] for line in words[2:]] == ["met", "MISSED", "measured"]


def test_columns_are_aligned() -> None:
    assert list(aligned([["a", "1"], ["bb", "22"]])) == ["  a    1", "  bb  22"]


def test_report_names_what_was_not_measured_and_is_json(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.miss("mksquashfs", "mksquashfs not installed")
    report = Report(
        profile=SMALL,
        machine=describe_machine(tmp_path),
        load_before=load_now(),
        load_after=load_now(),
        caches_dropped=False,
        complete=False,
        series=(),
        verdicts=judge_all(ledger),
        missing=ledger.missing,
    )
    lines = list(text_lines(report, ledger))
    assert "not measured: mksquashfs: mksquashfs not installed" in lines
    assert any("INTERRUPTED" in line for line in lines)
    assert msgspec.json.decode(msgspec.json.encode(report))["verdicts"][0]["met"] is None


def test_sent_by_path_counts_the_bodies_of_get_requests() -> None:
    log = """\
time="..." level=info msg="response completed" http.request.method=GET http.response.written=2
127.0.0.1 - - [23/Nov/2026:22:14:41 +0000] "GET /v2/x/blobs/sha256:0 HTTP/1.1" 206 1000 "" "client/1"
127.0.0.1 - - [23/Nov/2026:22:14:41 +0000] "GET /v2/x/manifests/v1 HTTP/1.1" 200 24 "" "client/1"
127.0.0.1 - - [23/Nov/2026:22:14:41 +0000] "HEAD /v2/x/blobs/sha256:0 HTTP/1.1" 200 5000 "" "client/1"
"""
    assert sent_by_path(log) == {"/v2/x/blobs/sha256:0": 1000, "/v2/x/manifests/v1": 24}


def test_run_measured_returns_output_and_times() -> None:
    usage = run_measured([sys.executable, "-c", "print('x'); sum(range(10**6))"])
    assert usage.output == "x\n"
    assert usage.cpu_s > 0
    assert usage.wall_s > 0


def test_run_measured_tells_why_a_command_failed() -> None:
    with pytest.raises(CommandFailed, match=r"sh -c .*exit code 3: went wrong"):
        run_measured(["sh", "-c", "echo went wrong >&2; exit 3"])
    with pytest.raises(CommandFailed, match="No such file"):
        run_measured(["/does/not/exist"])


def test_run_measured_ends_a_command_that_takes_too_long() -> None:
    with pytest.raises(CommandFailed, match="exit code -9"):
        run_measured(["sleep", "1000"], timeout_s=0.01)


def test_memory_of_a_session_is_that_of_its_processes() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True) as process:
        assert session_members(process.pid) == [process.pid]
        _, rss = memory_of(process.pid)
        assert process.stdin is not None
        process.stdin.close()
    assert rss > 0
    assert memory_of(process.pid) == (0, 0)


def test_interleave_goes_round_and_leaves_out_what_fails(tmp_path: Path) -> None:
    subjects = [Contestant(name, (), tmp_path, ()) for name in "abc"]
    calls: list[tuple[str, int]] = []
    ledger = Ledger()

    def measure(subject: Contestant, number: int) -> None:
        calls.append((subject.name, number))
        if subject.name == "b":
            raise CommandFailed(command="b", why="broken")

    interleave("scene", subjects, 2, measure, ledger)
    assert calls == [("a", 0), ("b", 0), ("c", 0), ("c", 1), ("a", 1)]
    assert [(note.what, note.failed) for note in ledger.missing] == [("scene: b", True)]


def test_contestant_measures_and_clears_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "sub" / "blob").write_bytes(b"12345")
    directory = Contestant("d", (), tmp_path / "out", ())
    assert directory.size_bytes() == 5
    directory.clear()
    assert not (tmp_path / "out").exists()
    directory.clear()


def test_goals_and_kernel_images_name_contestants_that_exist(tmp_path: Path) -> None:
    builders = tree_builders(Nydus(tmp_path, tmp_path), tmp_path, tmp_path)
    names = {builder.name for builder in builders}
    assert {name for name, _ in KERNEL_IMAGES} <= names
    tree_goals = [goal for goal in GOALS if goal.scene.startswith("build: tree") and goal.beat]
    assert {goal.beat for goal in tree_goals} <= names
    assert len({builder.output for builder in builders}) == len(builders)


def test_lacking_names_the_programs() -> None:
    assert lacking("sh") is None
    assert lacking("sh", "no-such-program") == "no-such-program not installed"


def test_workloads_read_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(20 * 4096))
    names = tmp_path / "names"
    names.write_text("file\n")
    monkeypatch.chdir(tmp_path)
    assert read_sequentially(str(path))["bytes"] == 20 * 4096
    assert read_randomly(str(path), "5", "1")["reads"] == 5
    assert read_randomly(str(path), "50", "1")["reads"] == 20
    assert stat_all(str(tmp_path), str(names))["files"] == 1
    assert len(digest_file(str(path))["sha256"]) == 64


def test_options() -> None:
    options = parse(["--small", "--only", "build", "read", "--no-drop-caches"])
    assert options.only == [Stage.BUILD, Stage.READ]
    assert not options.drop_caches
    with pytest.raises(SystemExit):
        parse(["--rounds", "0"])

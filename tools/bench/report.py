"""Everything a run has found, as text, JSON and picture."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tools.bench.goals import GOALS, Verdict, judge
from tools.bench.ledger import Ledger, Missing, Series
from tools.bench.machine import Load, Machine
from tools.bench.plot import draw
from tools.bench.profile import Profile
from tools.bench.table import goal_table, machine_lines, scene_table


@dataclass(frozen=True, slots=True)
class Report:
    """A run. `complete` is false for one that was interrupted."""

    profile: Profile
    machine: Machine
    load_before: Load
    load_after: Load
    caches_dropped: bool
    complete: bool
    series: tuple[Series, ...]
    verdicts: tuple[Verdict, ...]
    missing: tuple[Missing, ...]


def text_lines(report: Report, ledger: Ledger) -> Iterator[str]:
    """The report for people."""
    for scene in ledger.scenes():
        yield from scene_table(scene, ledger)
        yield ""
    yield from goal_table(report.verdicts)
    yield ""
    yield from machine_lines(report.machine, report.load_before, report.load_after)
    cold = "the kernel's caches emptied" if report.caches_dropped else "remounted only, caches not emptied"
    yield f"profile {report.profile.name}; best of up to {report.profile.rounds}, in turn; cold = {cold}"
    if not report.complete:
        yield "INTERRUPTED: what follows in the run was not measured"
    for missing in report.missing:
        yield f"not measured: {missing.what}: {missing.why}"


def judge_all(ledger: Ledger) -> tuple[Verdict, ...]:
    """All goals."""
    return tuple(judge(goal, ledger) for goal in GOALS)


def write_files(report: Report, ledger: Ledger, directory: Path) -> list[str]:
    """Writes bench.json and bench.png; returns lines that say so."""
    directory.mkdir(parents=True, exist_ok=True)
    data, picture = directory / "bench.json", directory / "bench.png"
    data.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    lines = [f"wrote {data}"]
    reason = draw(ledger, picture)
    lines.append(f"wrote {picture}" if reason is None else f"no picture: {reason}")
    return lines

"""`python -m tools.bench`: measures, prints the tables, writes JSON and a picture."""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from tools.bench.inputs import make_inputs
from tools.bench.ledger import Ledger
from tools.bench.machine import describe_machine, load_now
from tools.bench.page_cache import PageCache
from tools.bench.profile import FULL, SMALL, Profile
from tools.bench.report import Report, judge_all, text_lines, write_files
from tools.bench.stages import Bench, Stage
from tools.failure import report_failure
from tools.output import talk

UNFINISHED = 1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; wrong ones end the process with exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("--small", action="store_true", help="5,000 files and 64 MiB: a look, not a result")
    parser.add_argument("--dir", type=Path, help="work here and keep the inputs for the next run")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="where bench.json and .png go")
    parser.add_argument("--rounds", type=_positive, default=None, help="best of so many (default 3)")
    parser.add_argument(
        "--only", type=Stage, nargs="+", choices=list(Stage), default=list(Stage), help="these stages only"
    )
    parser.add_argument(
        "--drop-caches",
        action=argparse.BooleanOptionalAction,
        default=os.geteuid() == 0,
        help="empty the caches of the whole machine before cold reads (default for root)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark; returns the exit code: 0 also for goals that are missed."""
    options = parse(arguments)
    profile = SMALL if options.small else FULL
    profile = replace(profile, rounds=options.rounds or profile.rounds)
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    try:
        with _work_dir(options.dir) as directory:
            page_cache = PageCache(droppable=options.drop_caches)
            failed = measure(directory, profile, page_cache, frozenset(options.only), options.out)
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        return report_failure(error, debug=False)
    return UNFINISHED if failed else 0


def measure(
    directory: Path, profile: Profile, page_cache: PageCache, stages: frozenset[Stage], out: Path
) -> bool:
    """Makes the inputs, runs the stages and reports, even when interrupted; whether one failed."""
    machine, before, ledger = describe_machine(directory), load_now(), Ledger()
    inputs = make_inputs(directory, profile, talk)
    if inputs.remark:
        ledger.miss("weights as of a trained model", inputs.remark)
    complete = False
    try:
        Bench(directory, profile, inputs, page_cache, ledger, talk).run(stages)
        complete = True
    finally:
        report = Report(
            profile=profile,
            machine=machine,
            load_before=before,
            load_after=load_now(),
            caches_dropped=page_cache.droppable,
            complete=complete,
            series=tuple(ledger.series()),
            verdicts=judge_all(ledger),
            missing=ledger.missing,
        )
        print("\n".join(text_lines(report, ledger)), flush=True)
        for line in write_files(report, ledger, out):
            talk(line)
    return ledger.failed


@contextlib.contextmanager
def _work_dir(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="nydus-py-bench-") as directory:
        yield Path(directory)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _stop(*_: object) -> NoReturn:
    """Everything is unmounted and stopped on the way out, which a second Ctrl-C must not interrupt."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

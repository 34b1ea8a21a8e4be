"""The stage that builds: wall and CPU time, memory and size of everyone's result."""

import os
import time
from collections.abc import Callable, Sequence

from tools.bench import ledger as q
from tools.bench.contestants import Contestant
from tools.bench.ledger import Ledger
from tools.bench.process import run_measured
from tools.bench.rounds import interleave
from tools.bench.volumes import lacking

Tell = Callable[[str], None]


def compare_builds(
    scene: str, builders: Sequence[Contestant], input_bytes: int, rounds: int, ledger: Ledger, tell: Tell
) -> None:
    """Runs everyone in turn and leaves the results of the last round in place."""

    def measure(builder: Contestant, number: int) -> None:
        if number >= builder.rounds_max:
            return
        tell(f"{scene}: {builder.name}, round {number + 1}")
        builder.clear()
        os.sync()  # what the one before has written is not written back on the time of this one
        usage = run_measured(builder.command, environment=builder.environment, poll_memory=True)
        start = time.perf_counter()
        os.sync()
        sync_s = time.perf_counter() - start
        size = builder.size_bytes()
        for quantity, sample in (
            (q.WALL, usage.wall_s),
            # nydus-py makes its result durable before it ends; the others leave that to the kernel.
            (q.ON_DISK, usage.wall_s + sync_s),
            (q.CPU, usage.cpu_s),
            (q.PEAK_PSS, usage.peak_pss_bytes),
            (q.PEAK_RSS, usage.peak_rss_bytes),
            (q.SIZE, size),
            (q.COMPRESSION, size / input_bytes),
        ):
            ledger.add(scene, builder.name, quantity, sample)

    interleave(scene, _able(scene, builders, ledger), rounds, measure, ledger)


def make_missing(builders: Sequence[Contestant], tell: Tell) -> None:
    """Makes the results that are not there, unmeasured: later stages read them. Raises `CommandFailed`."""
    for builder in builders:
        if not builder.output.exists() and lacking(*builder.programs) is None:
            tell(f"making {builder.output.name}")
            run_measured(builder.command, environment=builder.environment)


def _able(scene: str, builders: Sequence[Contestant], ledger: Ledger) -> list[Contestant]:
    able = []
    for builder in builders:
        if reason := lacking(*builder.programs):
            ledger.miss(f"{scene}: {builder.name}", reason)
        else:
            able.append(builder)
    return able

"""`python -m tools.bench.peers`: many hosts on shaped links read the same image, with and without peers.

Needs root: every host, the registry and the scheduler have namespaces of their own. Every byte that is read
is compared with its source.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from backend.sizes import parse_size
from tools.bench.peers.bed import Shape, running_bed
from tools.bench.peers.network import MOST_HOSTS
from tools.bench.peers.outcome import Outcome
from tools.bench.peers.rate import parse_rate
from tools.bench.peers.report import explanation, json_line, table
from tools.bench.peers.scenarios import LEAST_HOSTS, PEERS_ONLY, SCENARIOS
from tools.bench.peers.scheduler_node import peers_missing
from tools.failure import report_failure
from tools.output import talk

BASELINE, PEERS, BOTH = "baseline", "peers", "both"
WRONG = 1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; wrong ones end the process with exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.peers", description=__doc__)
    parser.add_argument("--hosts", type=_counts, default=(1, 2, 4, 8), help="numbers of hosts (1,2,4,8)")
    parser.add_argument("--rate", type=parse_rate, default="50mbit", help="a host's link, up and down")
    parser.add_argument("--origin-rate", type=parse_rate, default="50mbit", help="the registry's link")
    parser.add_argument("--size", type=parse_size, default="64MiB", help="of the model")
    parser.add_argument("--noise", type=float, default=1.0, help="share of the model that does not compress")
    parser.add_argument("--scenario", choices=list(SCENARIOS), nargs="+", default=["start"])
    parser.add_argument(
        "--only", choices=(BASELINE, PEERS, BOTH), default=BOTH, help="without, with, or both"
    )
    parser.add_argument("--readers", type=int, default=4, help="lazy: readers on each host")
    parser.add_argument("--reads", type=int, default=8, help="lazy: reads of each reader")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--driver", default="auto", help="as for mount")
    parser.add_argument(
        "--agent-option", action="append", default=[], help="another one for agents with peers"
    )
    parser.add_argument("--dir", type=Path, help="work below this directory")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each measurement, no table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Runs it; 1 when somebody did not finish or read wrong bytes."""
    options = parse(arguments)
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    try:
        return WRONG if not all(outcome.is_right for outcome in measure(options)) else 0
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        return report_failure(error, debug=False)


def measure(options: argparse.Namespace) -> list[Outcome]:
    """Measures and prints."""
    shape = Shape(
        size_bytes=options.size,
        origin_rate=options.origin_rate,
        host_rate=options.rate,
        readers=options.readers,
        reads=options.reads,
        seed=options.seed,
        driver=options.driver,
        noise=options.noise,
        agent_options=tuple(options.agent_option),
    )
    outcomes = []
    try:
        with (
            tempfile.TemporaryDirectory(prefix="peers-", dir=options.dir) as directory,
            running_bed(Path(directory), shape, max(options.hosts)) as bed,
        ):
            for name, hosts, peers in planned(options):
                talk(f"{name}, {hosts} hosts, {'peers' if peers else 'no peers'}")
                outcome = SCENARIOS[name](bed, hosts, peers)
                outcomes.append(outcome)
                if options.json:
                    print(json_line(outcome, shape), flush=True)
    finally:
        if outcomes and not options.json:
            print(*table(outcomes), *explanation(shape), sep="\n")
    return outcomes


def planned(options: argparse.Namespace) -> Iterator[tuple[str, int, bool]]:
    """Scenario, hosts and whether with peers, of each measurement; says what cannot be done."""
    missing = peers_missing() if options.only != BASELINE else None
    if missing:
        talk(f"with peers: not measured: {missing}")
    for name in options.scenario:
        for hosts in options.hosts:
            if hosts < LEAST_HOSTS.get(name, 1):
                continue
            if options.only != PEERS and name not in PEERS_ONLY:
                yield name, hosts, False
            if options.only != BASELINE and not missing:
                yield name, hosts, True


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if not all(1 <= count <= MOST_HOSTS for count in counts):
        raise ValueError(text)
    return counts


def _stop(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

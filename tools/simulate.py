"""`nydus-py simulate`: how long a number of hosts would need for one image, in virtual time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from backend.contract import BackendError
from backend.peers.simulation.cluster import PIECES, PIECES_MAX, Cluster
from backend.peers.simulation.outcome import Outcome
from backend.peers.simulation.topology import Topology, parse_bit_rate, read_topology, uniform
from tools.output import JsonOption, emit, talk
from tools.sizes import format_size, size_option

HOSTS_MAX = 100_000


class CannotDraw(BackendError):
    """The picture cannot be drawn."""

    message = "{path}: {why}"
    exit_code: ClassVar[int] = 224


def run(
    hosts: Annotated[str, typer.Option(help="Numbers of hosts, each a run of its own.")] = "1,8,64",
    size: Annotated[str, typer.Option(help="Size of the image.")] = "100GB",
    pieces: Annotated[int, typer.Option(min=1, max=PIECES_MAX, help="Pieces it is divided into.")] = PIECES,
    rate: Annotated[str, typer.Option(help="Link of each host, each way.")] = "10gbit",
    origin_rate: Annotated[str, typer.Option(help="Link of the registry.")] = "10gbit",
    origin_concurrency: Annotated[
        int, typer.Option(min=0, help="Requests of all hosts at once to the registry; 0 for no limit.")
    ] = 16,
    topology: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Hosts and links of a file instead.")
    ] = None,
    zones: Annotated[int, typer.Option(min=1, help="Zones that the hosts are spread over.")] = 1,
    slow_hosts: Annotated[
        float, typer.Option(min=0, max=0.9, help="Part of the hosts that have a tenth of the link.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw makespan and bound over the hosts.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Simulate hosts that all want the same image at the same moment.

    The code that decides is that of the agents and of the scheduler; links and time are a model.
    """
    size_bytes = size_option("--size", size)
    if not size_bytes:
        raise typer.BadParameter("there is nothing to fetch", param_hint="--size")
    if plot is not None:
        _check_matplotlib(plot)
    if topology is not None:
        plans = [read_topology(topology)]
    else:
        limits = (_rate("--rate", rate), _rate("--origin-rate", origin_rate))
        plans = [
            uniform(
                count,
                *limits,
                zones=zones,
                slow_part=slow_hosts,
                origin_concurrency=origin_concurrency or None,
            )
            for count in _counts(hosts)
        ]
    outcomes = [_simulate(plan, size_bytes, pieces, seed) for plan in plans]
    emit(outcomes, as_json=as_json, render=_lines)
    if plot is not None:
        _draw(outcomes, plot)


def _simulate(plan: Topology, size_bytes: int, pieces: int, seed: int) -> Outcome:
    total = len(plan.hosts) * pieces

    def progress(arrived: int) -> None:
        if arrived % max(10_000, total // 10 // 10_000 * 10_000) == 0:
            talk(f"{len(plan.hosts)} hosts: {arrived * 100 // total} % of the pieces have arrived")

    return Cluster(plan, size_bytes, pieces=pieces, seed=seed, progress=progress).run()


def _lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for run in outcomes:
        unfinished = f", {run.unfinished} HOSTS UNFINISHED" if run.unfinished else ""
        slow = f", slow hosts sent {run.slow_share:.1%}" if run.slow_share else ""
        yield (
            f"{run.hosts} hosts, {format_size(run.size_bytes)}: {run.makespan_s:.1f} s = {run.ratio:.2f}x "
            f"of the bound {run.bound_s:.1f} s, half are done after {run.median_s:.1f} s; "
            f"origin / unique {run.origin_ratio:.3f}{slow}{unfinished} "
            f"({run.events} events, {run.wall_s:.1f} s)"
        )


def _counts(text: str) -> list[int]:
    try:
        counts = [int(each) for each in text.split(",")]
    except ValueError:
        counts = []
    if not counts or not all(0 < count <= HOSTS_MAX for count in counts):
        raise typer.BadParameter(f"{text}: numbers from 1 to {HOSTS_MAX}, say 8,1000", param_hint="--hosts")
    return counts


def _rate(option: str, text: str) -> float:
    try:
        return parse_bit_rate(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _check_matplotlib(path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        why = "drawing needs matplotlib: pip install 'nydus-py[bench]'"
        raise CannotDraw(path=path, why=why) from error
    matplotlib.use("Agg")


def _draw(outcomes: Sequence[Outcome], path: Path) -> None:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    hosts = [run.hosts for run in outcomes]
    axis.plot(hosts, [run.makespan_s for run in outcomes], marker="o", label="last host done")
    axis.plot(hosts, [run.median_s for run in outcomes], marker=".", label="half of the hosts done")
    axis.plot(hosts, [run.bound_s for run in outcomes], linestyle="--", label="lower bound")
    axis.set_xscale("log")
    axis.set_xticks(hosts, [f"{count:,}" for count in hosts])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("hosts")
    axis.set_ylabel("seconds")
    axis.set_title(f"{format_size(outcomes[0].size_bytes)} for everybody at once")
    axis.legend()
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise CannotDraw(path=path, why=str(error)) from error
    finally:
        pyplot.close(figure)

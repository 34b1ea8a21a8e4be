"""The results as text: a table for each scene, then the goals."""

from collections.abc import Iterator, Sequence

from tools.bench.goals import Goal, Verdict
from tools.bench.ledger import NYDUS, Ledger, Quantity
from tools.bench.machine import Load, Machine
from tools.sizes import format_size

NOTHING = "-"


def scene_table(scene: str, ledger: Ledger) -> Iterator[str]:
    """Best samples of all subjects; in brackets what nydus-py has, divided by it."""
    quantities = ledger.quantities(scene)
    rows = [["", *(quantity.name for quantity in quantities)]]
    for subject in ledger.subjects(scene):
        rows.append([subject, *(_cell(scene, subject, quantity, ledger) for quantity in quantities)])
    yield scene + ("  [nydus-py / this]" if len(rows) > 2 else "")
    yield from aligned(rows)


def goal_table(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Every goal with the thing to beat, what was measured, the bound and whether it is met."""
    rows = [["scene", "quantity", "to beat", "measured", "goal", ""]]
    for verdict in verdicts:
        goal = verdict.goal
        sign = ">=" if goal.quantity.higher_is_better else "<="
        rows.append(
            [
                goal.scene,
                goal.quantity.name,
                goal.beat or NOTHING,
                _shown(verdict.value, goal),
                f"{sign} {_shown(goal.bound, goal)}",
                {True: "met", False: "MISSED", None: "not measured"}[verdict.met],
            ]
        )
    yield "goals"
    yield from aligned(rows)


def machine_lines(machine: Machine, before: Load, after: Load) -> Iterator[str]:
    """The facts of the machine."""
    memory = format_size(machine.memory_bytes)
    hardware = f"{machine.cores} cores, {memory}, {machine.processor}, {machine.file_system}"
    yield f"Linux {machine.kernel}, {hardware}"
    yield f"Python {machine.python}; {', '.join(machine.versions)}"
    yield f"load {before.one:.2f} at the start, {after.one:.2f} at the end"


def format_value(value: float | None, quantity: Quantity) -> str:
    """A value with its unit."""
    match quantity.unit:
        case _ if value is None:
            return NOTHING
        case "B":
            return format_size(value)
        case "s":
            return f"{value:.3f} s" if value < 10 else f"{value:.1f} s"
        case "x":
            return f"{value:.3f}"
        case unit:
            return f"{value:.0f} {unit}"


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of cells as lines with columns; the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = (
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  " + "  ".join([first, *others]).rstrip()


def _cell(scene: str, subject: str, quantity: Quantity, ledger: Ledger) -> str:
    value, own = ledger.best(scene, subject, quantity), ledger.best(scene, NYDUS, quantity)
    shown = format_value(value, quantity)
    return f"{shown} [{own / value:.2f}]" if subject != NYDUS and own is not None and value else shown


def _shown(value: float | None, goal: Goal) -> str:
    if value is None:
        return NOTHING
    return f"{value:.2f}x" if goal.beat else format_value(value, goal.quantity)

"""The results as a picture: one panel of bars for each scene and quantity with something to compare."""

from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench import ledger as q
from tools.bench.ledger import NYDUS, Ledger, Quantity
from tools.bench.table import format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
LEFT_OUT = (q.ON_DISK, q.CPU, q.PEAK_RSS, q.COMPRESSION, q.RANDOM_PINNED)
COLORS = {True: "#1f77b4", False: "#b0b0b0"}


def draw(ledger: Ledger, path: Path) -> str | None:
    """Writes a PNG; returns why not when it cannot."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [pair for pair in _pairs(ledger) if pair[1] not in LEFT_OUT]
    if not panels:
        return "nothing to compare"
    rows = -(-len(panels) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(16, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for (scene, quantity), axis in zip(panels, axes.flat, strict=False):
        _draw_panel(axis, scene, quantity, ledger)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return None


def _pairs(ledger: Ledger) -> list[tuple[str, Quantity]]:
    """Scenes and quantities that at least two subjects have."""
    counts: dict[tuple[str, Quantity], int] = {}
    for series in ledger.series():
        key = (series.scene, series.quantity)
        counts[key] = counts.get(key, 0) + 1
    return [key for key, count in counts.items() if count > 1]


def _draw_panel(axis: "Axes", scene: str, quantity: Quantity, ledger: Ledger) -> None:
    subjects = [s for s in ledger.subjects(scene) if ledger.best(scene, s, quantity) is not None]
    values = [ledger.best(scene, subject, quantity) or 0.0 for subject in subjects]
    bars = axis.barh(subjects, values, color=[COLORS[subject == NYDUS] for subject in subjects])
    axis.bar_label(bars, labels=[format_value(value, quantity) for value in values], padding=3, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, max(values) * 1.25 or 1)
    axis.tick_params(labelsize=7)
    axis.set_xticks([])
    better = "higher" if quantity.higher_is_better else "lower"
    axis.set_title(f"{scene}\n{quantity.name} ({better} is better)", fontsize=8)

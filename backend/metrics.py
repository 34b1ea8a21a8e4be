"""Metrics in the text format of Prometheus, version 0.0.4, written when somebody asks.

https://prometheus.io/docs/instrumenting/exposition_formats/. Counters live where they count, as plain
numbers; here is only what they are called. Names: https://prometheus.io/docs/practices/naming/.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METRICS_TARGET = "/metrics"
PREFIX = "nydus_py_"

LATENCY_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

Labels = Mapping[str, str]
NO_LABELS: Labels = {}


class Histogram:
    """How often values were up to each of some bounds, and their sum."""

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: tuple[float, ...] = LATENCY_BOUNDS_S) -> None:
        self.bounds = bounds
        self.total = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        """Counts one."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> Iterable[tuple[float, int]]:
        """Each bound, infinity the last, and how many values were not above it."""
        count = 0
        for bound, own in zip((*self.bounds, math.inf), self._counts, strict=True):
            count += own
            yield bound, count


class Exposition:
    """The metrics of one answer, family by family."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def counter(self, name: str, text: str, value: float) -> None:
        """`name` without prefix and `_total`."""
        self.counters(name, text, [(NO_LABELS, value)])

    def counters(self, name: str, text: str, samples: Iterable[tuple[Labels, float]]) -> None:
        """A counter for each set of labels."""
        self._family(f"{name}_total", "counter", text, samples)

    def gauge(self, name: str, text: str, value: float) -> None:
        """A value that goes up and down; `name` without prefix."""
        self.gauges(name, text, [(NO_LABELS, value)])

    def gauges(self, name: str, text: str, samples: Iterable[tuple[Labels, float]]) -> None:
        """A gauge for each set of labels."""
        self._family(name, "gauge", text, samples)

    def histograms(self, name: str, text: str, samples: Iterable[tuple[Labels, Histogram]]) -> None:
        """A histogram for each set of labels."""
        self._head(name, "histogram", text)
        for labels, histogram in samples:
            count = 0
            for bound, count in histogram.buckets():
                le = "+Inf" if math.isinf(bound) else f"{bound:g}"
                self._sample(f"{name}_bucket", {**labels, "le": le}, count)
            self._sample(f"{name}_sum", labels, histogram.total)
            self._sample(f"{name}_count", labels, count)

    def render(self) -> str:
        """All of it."""
        return "\n".join([*self._lines, ""])

    def _family(self, name: str, kind: str, text: str, samples: Iterable[tuple[Labels, float]]) -> None:
        self._head(name, kind, text)
        for labels, value in samples:
            self._sample(name, labels, value)

    def _head(self, name: str, kind: str, text: str) -> None:
        shown = text.replace("\\", r"\\").replace("\n", r"\n")
        self._lines += [f"# HELP {PREFIX}{name} {shown}", f"# TYPE {PREFIX}{name} {kind}"]

    def _sample(self, name: str, labels: Labels, value: float) -> None:
        shown = ",".join(f'{key}="{_escaped(each)}"' for key, each in labels.items())
        number = str(value) if isinstance(value, int) else repr(float(value))
        self._lines.append(f"{PREFIX}{name}{{{shown}}} {number}" if shown else f"{PREFIX}{name} {number}")


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def label_of(text: str) -> str:
    """A label's value for words that people read: `too many connections` as `too_many_connections`."""
    return "_".join(text.lower().split())

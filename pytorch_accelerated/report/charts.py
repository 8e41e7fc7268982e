"""What is drawn: which curves of the log share a chart, what is marked in it, and which points are left out."""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from pytorch_accelerated.report.reading import AXES, Numbers, Run, eval_sets

_FIRST = ("loss", "lr", "gradient_norm", "samples_per_second")
_TITLES = {
    "loss": "Loss",
    "lr": "Learning rate",
    "gradient_norm": "Gradient norm",
    "samples_per_second": "Throughput: samples per second",
    "tokens_per_second": "Throughput: tokens per second",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    name: str
    positions: dict[str, Numbers]
    """Where the points are on each axis."""
    values: Numbers
    has_points: bool
    """Whether each point is shown, as for values that come once in an epoch."""
    number: int
    """Of its colour: a run has the same in every chart of a page."""

    @property
    def num_non_finite(self) -> int:
        """Return how many values are NaN or infinite."""
        return int((~np.isfinite(self.values)).sum())


@dataclasses.dataclass(frozen=True)
class Mark:
    """Something at one place of the axis, or one point of the chart."""

    text: str
    positions: dict[str, float]
    value: float | None = None


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart with one axis of values."""

    title: str
    slug: str
    lines: list[Line]
    starts: list[Mark]
    """Where sessions began that were not the first."""
    bests: list[Mark]
    is_of_system: bool = False

    @property
    def axes(self) -> list[str]:
        """Return the axes that all lines can be drawn over."""
        return [axis for axis in AXES if all(axis in line.positions for line in self.lines)]

    def describe(self, axis: str = "updates") -> str:
        """Return in words what the chart shows, for those who cannot see it."""
        parts = []
        for line in self.lines:
            finite = line.values[np.isfinite(line.values)]
            text = f"{line.name}: {len(line.values)} value(s)"
            if len(finite):
                text += f", from {finite[0]:.6g} to {finite[-1]:.6g}, lowest {finite.min():.6g}"
                text += f", highest {finite.max():.6g}"
            parts.append(text + (f", {line.num_non_finite} not finite" if line.num_non_finite else ""))
        marks = [mark.text for mark in (*self.bests, *self.starts)]
        return f"{self.title} over {axis}. " + "; ".join([*parts, *marks]) + "."


def find_charts(run: Run, directions: Mapping[str, str]) -> list[Chart]:
    """Return the charts of one run.

    Args:
        run: the run.
        directions: ``min`` or ``max`` by the name of a metric, for the marks of the best values.
    """
    groups = _group(list(run.curves))
    starts = []
    for session in run.sessions[1:]:
        update = int(session.get("first_update") or 0)
        at = {axis: run.position_of(axis, update) for axis in run.positions}
        starts.append(Mark(f"session {session.get('number')} began at update {update}", at))
    charts = []
    for key, names in groups.items():
        lines = [_line(run, name, name, number) for number, name in enumerate(names)]
        marked = [name for name in names if name.startswith("eval") or name in directions] or names
        bests = [mark for name in marked if (mark := _best(run, name, directions)) is not None]
        charts.append(Chart(_title(key), _slug(key), lines, starts, bests, key.startswith("system_")))
    return charts


def find_overlays(runs: Sequence[Run]) -> list[Chart]:
    """Return charts that show one quantity of several runs each."""
    shared = dict.fromkeys(name for run in runs for name in run.curves if not name.startswith("system_"))
    charts = []
    for name in sorted(shared, key=_order):
        lines = [_line(run, name, run.name, number) for number, run in enumerate(runs) if name in run.curves]
        charts.append(Chart(name, _slug(name), lines, [], []))
    return charts


def thin(x: Numbers, y: Numbers, limit: int) -> tuple[Numbers, Numbers]:
    """Return at most about ``limit`` points of a curve, among them the ends, and the extremes of each stretch."""
    if len(x) <= limit:
        return x, y
    kept: set[int] = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), max(limit // 3, 1)):
        finite = part[np.isfinite(y[part])]
        if len(finite) < len(part):  # a gap stays a gap
            kept.add(int(part[np.flatnonzero(~np.isfinite(y[part]))[0]]))
        if len(finite):
            kept |= {int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])}
    chosen = np.array(sorted(kept))
    return x[chosen], y[chosen]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return round numbers between two numbers."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda size: abs(size - raw))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two positive numbers, for a logarithmic axis."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, (last - first) // 5)
    factors = (1,) if last - first > 3 else (1, 2, 5)
    found = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
    found = [tick for tick in found if low * 0.999 <= tick <= high * 1.001]
    return found if len(found) > 1 else ticks(low, high, 4)


def short(number: float, step: float = 0.0) -> str:
    """Return a number as the label of a tick, with as many digits as tell it from one that is ``step`` away."""
    if number and 0 < step < abs(number) / 1e3:
        return f"{number:.{min(math.ceil(math.log10(abs(number) / step)) + 1, 15)}g}"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if limit <= abs(number) < 1e13:
            divisor = 1e3 if letter == "k" else limit
            return f"{number / divisor:.5g}{letter}"
    return f"{0.0 if abs(number) < 1e-300 else number:.4g}"


def _line(run: Run, name: str, label: str, number: int) -> Line:
    curve = run.curves[name]
    positions = {axis: at[curve.rows] for axis, at in run.positions.items()}
    return Line(label, positions, curve.values, has_points=len(curve.values) <= 60, number=number)


def _best(run: Run, name: str, directions: Mapping[str, str]) -> Mark | None:
    best = run.best_of(name, directions)
    if best is None or best.kind == "last" or not math.isfinite(best.value):
        return None
    curve = run.curves[name]
    row = next(row for row, value in zip(curve.rows, curve.values, strict=True) if value == best.value)
    at = {axis: float(positions[row]) for axis, positions in run.positions.items()}
    word = "lowest" if best.kind == "min" else "highest"
    return Mark(f"{word} {name} {best.value:.6g} at update {best.update}", at, best.value)


def _group(names: list[str]) -> dict[str, list[str]]:
    """Return the names by what they measure: the same of training and of each evaluation set share a chart."""
    sets, groups = eval_sets(names), dict[str, list[str]]()
    for name in names:
        groups.setdefault(_quantity(name, sets), []).append(name)
    return {key: groups[key] for key in sorted(groups, key=_order)}


def _quantity(name: str, sets: list[str]) -> str:
    if name.startswith("system_") or re.fullmatch(r"lr(_\d+)?", name):
        return re.sub(r"_?\d+", "", name)  # a line for each device, or group of parameters
    base = name.split("[")[0]
    for prefix in (
        *(f"{kind}_{one}_" for one in sets for kind in ("eval", "evaluation")),
        "evaluation_",
        "eval_",
        "train_",
    ):
        if base.startswith(prefix):
            base = base.removeprefix(prefix)
            break
    return base.removesuffix("_epoch") if base.endswith("_epoch") and base != "_epoch" else base


def _order(name: str) -> tuple[int, str]:
    quantity = _quantity(name, [])
    rank = _FIRST.index(quantity) if quantity in _FIRST else len(_FIRST)
    return (rank + (10 if name.startswith("system_") else 0), name)


def _title(quantity: str) -> str:
    text = quantity.replace("_", " ").strip() or quantity
    return _TITLES.get(quantity, text[:1].upper() + text[1:])


def _slug(name: str) -> str:
    """Return a name as a part of a file name, different for different names."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", lambda match: "~" + match[0].encode().hex(), name)
    return safe if len(safe) <= 100 else safe[:80] + f"~{zlib.crc32(name.encode()):x}"

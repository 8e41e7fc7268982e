"""Draw a chart as SVG, small enough that its text can be read on a phone; colours come from the page."""

from __future__ import annotations

from html import escape

import numpy as np

from pytorch_accelerated.report.charts import Chart, Line, log_ticks, short, thin, ticks
from pytorch_accelerated.report.reading import Numbers

NUM_COLOURS = 8
"""How many colours the page has for lines, ``--line-0`` and so on; more lines begin again, dashed."""

_WIDTH, _HEIGHT = 360.0, 226.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 10.0, 12.0, 36.0
_MAX_POINTS = 300
_MAX_CROSSES = 40


class _Frame:
    """Maps values to places in the picture."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], is_log: bool) -> None:
        self.x, self.is_log = _widened(*x), is_log
        self.y = tuple(np.log10(y)) if is_log else y
        self.y = _widened(float(self.y[0]), float(self.y[1]), 0.04)

    def across(self, x: Numbers | float) -> Numbers:
        low, high = self.x
        return np.asarray(_LEFT + (np.asarray(x) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT))

    def up(self, y: Numbers | float) -> Numbers:
        low, high = self.y
        place = np.log10(y) if self.is_log else np.asarray(y)
        return np.asarray(_HEIGHT - _BOTTOM - (place - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM))


def draw(chart: Chart, axis: str, is_log: bool = False) -> str:
    """Return the chart over one axis, with a linear or logarithmic scale of values."""
    title = f"{chart.describe(axis)} {'Logarithmic' if is_log else 'Linear'} scale."
    shown = [_visible(line, is_log) for line in chart.lines]
    values = np.concatenate([line.values[keep] for line, keep in zip(chart.lines, shown, strict=True)])
    places = np.concatenate([line.positions[axis] for line in chart.lines])
    content: list[str] = []
    if not len(values):
        content.append(_text(_WIDTH / 2, _HEIGHT / 2, "no value above 0" if is_log else "no finite value", "middle"))
    else:
        frame = _Frame(_extent(places), (float(values.min()), float(values.max())), is_log)
        content += [*_draw_grid(frame, axis), *_draw_starts(chart, frame, axis)]
        for line, keep in zip(chart.lines, shown, strict=True):
            content += _draw_line(line, keep, frame, axis)
        content += _draw_bests(chart, frame, axis)
    return _picture(content, title)


def line_class(number: int) -> str:
    """Return the classes of the line with this number, and of its sample in the legend."""
    return f"line l{number % NUM_COLOURS}" + (" again" if number >= NUM_COLOURS else "")


def _visible(line: Line, is_log: bool) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    finite = np.isfinite(line.values)
    return np.asarray(finite & (np.where(finite, line.values, 0.0) > 0) if is_log else finite)


def _extent(numbers: Numbers) -> tuple[float, float]:
    return float(numbers.min()), float(numbers.max())


def _widened(low: float, high: float, by: float = 0.0) -> tuple[float, float]:
    """Return a range that is not empty, a part ``by`` larger at both ends."""
    if not high > low:
        margin = abs(low) * 0.1 or 0.5
        return low - margin, high + margin
    return low - (high - low) * by, high + (high - low) * by


def _draw_grid(frame: _Frame, axis: str) -> list[str]:
    low, high = frame.y
    marks = log_ticks(10**low, 10**high) if frame.is_log else ticks(low, high)
    step = marks[1] - marks[0] if len(marks) > 1 else 0.0
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    content = []
    for mark in marks:
        y = float(frame.up(mark))
        if _TOP - 1 <= y <= bottom + 1:
            content.append(f'<path class="grid" d="M{_LEFT:g} {y:.1f}H{right:g}"/>')
            content.append(_text(_LEFT - 5, y + 4, short(mark, step), "end"))
    for mark in ticks(*frame.x, wanted=4):
        x = float(frame.across(mark))
        content.append(f'<path class="grid" d="M{x:.1f} {_TOP:g}V{bottom:g}"/>')
        content.append(_text(x, bottom + 15, short(mark), "end" if x > right - 12 else "middle"))
    content.append(_text((_LEFT + right) / 2, _HEIGHT - 4, axis, "middle"))
    return content


def _draw_line(line: Line, keep: np.ndarray[tuple[int], np.dtype[np.bool_]], frame: _Frame, axis: str) -> list[str]:
    number = line.number
    x, y = thin(line.positions[axis], np.where(keep, line.values, np.nan), _MAX_POINTS)
    is_there = np.isfinite(y)
    across, up = frame.across(x), frame.up(np.where(is_there, y, 1.0))
    pieces, begins = [], True
    for there, left, top in zip(is_there, across, up, strict=True):
        if there:
            pieces.append(f"{'M' if begins else 'L'}{left:.1f} {top:.1f}")
        begins = not there
    content = [f'<path class="{line_class(number)}" d="{"".join(pieces)}"/>'] if pieces else []
    alone = line.has_points or int(is_there.sum()) < 3
    if alone:
        dots = zip(across[is_there], up[is_there], strict=True)
        content += [f'<circle class="dot l{number % NUM_COLOURS}" cx="{a:.1f}" cy="{b:.1f}" r="2.2"/>' for a, b in dots]
    missing = line.positions[axis][~np.isfinite(line.values)][:_MAX_CROSSES]
    for left in frame.across(missing):
        cross = f"M{left - 3:.1f} {_TOP - 4:g}l6 6m-6 0l6 -6"
        content.append(f'<path class="cross l{number % NUM_COLOURS}" d="{cross}"><title>not finite</title></path>')
    return content


def _draw_starts(chart: Chart, frame: _Frame, axis: str) -> list[str]:
    content = []
    for mark in chart.starts:
        x = float(frame.across(mark.positions[axis]))
        if _LEFT <= x <= _WIDTH - _RIGHT:
            path = f'<path class="start" d="M{x:.1f} {_TOP:g}V{_HEIGHT - _BOTTOM:g}">'
            content.append(f"{path}<title>{escape(mark.text)}</title></path>")
    return content


def _draw_bests(chart: Chart, frame: _Frame, axis: str) -> list[str]:
    content = []
    for mark in chart.bests:
        if mark.value is not None and not (frame.is_log and mark.value <= 0):
            x, y = float(frame.across(mark.positions[axis])), float(frame.up(mark.value))
            circle = f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="5">'
            content.append(f"{circle}<title>{escape(mark.text)}</title></circle>")
    return content


def _picture(content: list[str], label: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(label)}">{"".join(content)}</svg>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def draw_scatter(true: Numbers, predicted: Numbers, label: str) -> str:
    """Return true values against predicted ones, with the line on which a perfect prediction is."""
    finite = np.isfinite(true) & np.isfinite(predicted)
    true, predicted = true[finite], predicted[finite]
    content = []
    if len(true):
        low, high = _extent(np.concatenate([true, predicted]))
        frame = _Frame((low, high), (low, high), is_log=False)
        content += _draw_grid(frame, "true value")
        content.append(f'<text x="{_LEFT + 4:g}" y="{_TOP + 8:g}" text-anchor="start">predicted value</text>')
        ends = [(float(frame.across(end)), float(frame.up(end))) for end in (low, high)]
        content.append('<path class="start" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>'.format(*ends[0], *ends[1]))
        dots = zip(frame.across(true), frame.up(predicted), strict=True)
        content += [f'<circle class="dot l0" cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in dots]
    return _picture(content, label)

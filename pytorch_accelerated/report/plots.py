"""Write the charts of a run as PNG files, with matplotlib's object-oriented interface alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytorch_accelerated.metrics_log import write_whole
from pytorch_accelerated.report.charts import Chart, thin
from pytorch_accelerated.report.markup import EXTRA
from pytorch_accelerated.report.predictions import class_name
from pytorch_accelerated.report.style import LIGHT
from pytorch_accelerated.report.svg import NUM_COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOTS = "plots"
"""The directory in a run directory that holds the PNG files."""

_COLOURS = [LIGHT[f"line-{number}"] for number in range(NUM_COLOURS)]
_MAX_CELLS_WITH_NUMBERS = 20
_MAX_POINTS = 3000  # of a line; matplotlib refuses very long ones


def check_matplotlib() -> None:
    """Refuse to go on where the PNG files could not be written.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        import matplotlib.backends.backend_agg  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(f"a report needs matplotlib and Pillow: {EXTRA}") from error


def write_plots(directory: Path, charts: Sequence[Chart], predictions: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write a PNG for each chart and each set of predictions into ``directory``, and return the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    written = [_write(directory / f"{chart.slug}.png", partial(_plot, chart=chart)) for chart in charts]
    draw = {"classification": _plot_confusion, "regression": _plot_scatter, "attention": _plot_attention}
    for facts in predictions:
        task = facts["task"]
        if task != "classification" or "confusion" in facts["arrays"]:
            written.append(_write(directory / f"{task}-{facts['file']}.png", partial(draw[task], facts=facts)))
    return written


def _write(path: Path, draw: Callable[[Figure], None]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=120)
    figure.subplots_adjust(left=0.12, right=0.97, top=0.91, bottom=0.13)
    canvas = FigureCanvasAgg(figure)
    draw(figure)
    file = io.BytesIO()
    canvas.print_png(file)  # type: ignore[no-untyped-call]
    write_whole(path, file.getvalue())
    return path


def _plot(figure: Figure, chart: Chart) -> None:
    axes: Axes = figure.add_subplot()
    for line in chart.lines:
        values = np.where(np.isfinite(line.values), line.values, np.nan)
        axes.plot(
            *thin(line.positions["updates"], values, _MAX_POINTS),
            color=_COLOURS[line.number % NUM_COLOURS],
            marker="o" if line.has_points else "",
            markersize=3,
            linewidth=1.4,
            linestyle="-" if line.number < NUM_COLOURS else "--",
            label=_plain(line.name),
        )
    for mark in chart.starts:
        axes.axvline(mark.positions["updates"], color="0.45", linestyle=":", linewidth=1)
    for mark in chart.bests:
        if mark.value is not None:
            axes.plot([mark.positions["updates"]], [mark.value], "o", markersize=8, fillstyle="none", color="black")
    axes.set_title(_plain(chart.title))
    axes.set_xlabel("updates")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _plain(text: str) -> str:
    """Return text in which matplotlib sees no formula, and a label that begins like a hidden one is shown."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _plot_confusion(figure: Figure, facts: Mapping[str, Any]) -> None:
    confusion = facts["arrays"]["confusion"]
    axes: Axes = figure.add_subplot()
    parts = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    if len(confusion) <= _MAX_CELLS_WITH_NUMBERS:
        names = [_plain(class_name(dict(facts), number)) for number in range(len(confusion))]
        axes.set_xticks(range(len(names)), names, fontsize=7, rotation=45 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        for (row, column), count in np.ndenumerate(confusion):
            colour = "white" if parts[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=colour)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(_plain(f"Confusion matrix, {facts.get('eval_name') or 'eval'}, update {facts['num_updates']}"))


def _plot_scatter(figure: Figure, facts: Mapping[str, Any]) -> None:
    true, predicted = facts["arrays"]["pairs_true"], facts["arrays"]["pairs_predicted"]
    axes: Axes = figure.add_subplot()
    axes.scatter(true, predicted, s=8, color=_COLOURS[0], alpha=0.6)
    finite = true[np.isfinite(true)]
    if len(finite):
        axes.plot([finite.min(), finite.max()], [finite.min(), finite.max()], color="0.45", linestyle="--")
    axes.set_xlabel("true value")
    axes.set_ylabel("predicted value")
    axes.set_title(_plain(f"True and predicted, {facts.get('eval_name') or 'eval'}, update {facts['num_updates']}"))
    axes.grid(alpha=0.3)


def _plot_attention(figure: Figure, facts: Mapping[str, Any]) -> None:
    weights = facts["arrays"]["attention"]
    columns = min(4, len(weights))
    rows = -(-len(weights) // columns)
    figure.set_size_inches(1.8 * columns, 2.0 * rows)
    for head, matrix in enumerate(weights):
        axes: Axes = figure.add_subplot(rows, columns, head + 1)
        axes.imshow(matrix, cmap="viridis", vmin=0)
        axes.set_title(f"head {head}", fontsize=8)
        axes.tick_params(labelsize=6)
    figure.suptitle(_plain(f"Attention of {facts['layer']}, update {facts['num_updates']}"), fontsize=9)

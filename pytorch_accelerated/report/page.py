"""Write the page: one HTML file with everything in it, for one run or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from pytorch_accelerated.metrics_log import format_seconds, is_loss, write_whole
from pytorch_accelerated.report.charts import Chart, find_charts, find_overlays
from pytorch_accelerated.report.comparison import RunTable, check_directions, table_of
from pytorch_accelerated.report.markup import MISSING, card, exact, settings_list, table, text_of
from pytorch_accelerated.report.media import show_media
from pytorch_accelerated.report.plots import PLOTS, check_matplotlib, write_plots
from pytorch_accelerated.report.predictions import show_predictions
from pytorch_accelerated.report.reading import AXES, Run, load_runs, read_predictions, status_of
from pytorch_accelerated.report.style import style_sheet
from pytorch_accelerated.report.svg import draw, line_class
from pytorch_accelerated.run_directory import PRINTED

PAGE = "report.html"
"""The name of the page."""

_MAX_PRINTED = 8_000
_OWN_CARDS = ("number", "started", "ended", "outcome", "error", "command", "git", "versions", "hardware")


def write_report(
    runs: Sequence[str | Path], output: str | Path | None = None, best: Mapping[str, str] | None = None
) -> Path:
    """Write the page of one run, or of several side by side, and a PNG of each chart into ``plots`` of each run.

    Args:
        runs: run directories, or directories that hold some.
        output: the page; None for ``report.html`` in the run directory, of several runs in the current directory. What
            is there is replaced at once or not at all.
        best: ``"min"`` or ``"max"`` by the name of a metric, to mark its best value. Of losses lower is better.

    Returns:
        The path of the page.

    Raises:
        ImportError: if matplotlib is not installed.
        RunDirectoryError: if there is no run at a path, or it cannot be read.
        ValueError: if ``best`` names a metric that no run has, or a file of a run is damaged.
    """
    check_matplotlib()
    loaded = load_runs([Path(run) for run in runs])
    directions = dict(best or {})
    check_directions(directions, loaded)
    bodies, axes = [], set(AXES)
    for run in loaded:
        charts, predictions = find_charts(run, directions), read_predictions(run)
        write_plots(run.path / PLOTS, charts, predictions)
        for chart in charts:
            axes &= set(chart.axes)
        bodies.append(_show_run(run, charts if len(loaded) == 1 else [], predictions, directions))
    known = [axis for axis in AXES if axis in axes]
    page = bodies[0] if len(loaded) == 1 else _show_several(loaded, bodies, known, directions)
    default = loaded[0].path / PAGE if len(loaded) == 1 else Path(PAGE)
    target = default if output is None else Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    title = f"Run {loaded[0].name}" if len(loaded) == 1 else f"{len(loaded)} runs"
    write_whole(target, _document(title, page, known).encode())
    return target


def _document(title: str, content: str, axes: Sequence[str]) -> str:
    switches = [("x", axis, axis, axis == axes[0]) for axis in axes]
    switches += [("y", "linear", "linear scale", True), ("y", "log", "log scale", False)]
    inputs = "".join(
        f'<input type="radio" class="switch" name="{group}" id="{group}-{key}" aria-label="{label}"'
        f"{' checked' if is_on else ''}>"
        for group, key, label, is_on in switches
    )
    labels = "".join(f'<label for="{group}-{key}">{label}</label>' for group, key, label, _ in switches)
    bar = f'<nav class="bar" aria-label="Axes of the charts">{labels}</nav>'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{style_sheet(axes)}</style></head><body>{inputs}"
        f"<header><h1>{escape(title)}</h1></header>"
        f"<main>{content.replace(_BAR, bar, 1)}</main>"
        "<footer><p>Made by pytorch_accelerated.report.</p></footer></body></html>\n"
    )


_BAR = "<!-- bar -->"


def _show_run(run: Run, charts: list[Chart], predictions: list[dict[str, Any]], directions: Mapping[str, str]) -> str:
    parts = [_show_summary(run), _show_error(run)]
    if not run.rows:
        parts.append(card("Learning curves", "<p>Nothing has been logged yet.</p>"))
    if charts:
        parts += ["<h2>Learning curves</h2>", _BAR, _show_charts([c for c in charts if not c.is_of_system])]
        if system := _show_charts([chart for chart in charts if chart.is_of_system]):
            parts += ["<h2>System</h2>", system]
    parts += [show_predictions(facts) for facts in predictions]
    parts.append(_show_metrics(run, directions))
    if charts or not run.rows:
        parts.append(show_media(run))
    parts += ["<h2>Configuration</h2>", card("Settings", settings_list({"seed": run.facts.get("seed")} | run.config))]
    parts += ["<h2>Sessions</h2>", *(_show_session(session) for session in run.sessions), _show_printed(run)]
    return "".join(parts)


def _show_summary(run: Run) -> str:
    last = run.rows[-1] if run.rows else {}
    tiles = {"ended": status_of(run), "created": _moment(run.facts.get("created")), "sessions": len(run.sessions)}
    for name, label in (("num_updates", "updates"), ("current_epoch", "epoch"), ("num_samples", "samples")):
        if name in last:
            tiles[label] = last[name]
    if "seconds" in last:
        tiles["time"] = format_seconds(float(last["seconds"]))
    for name in run.curves:
        if name.startswith("eval") and is_loss(name) and (best := run.best_of(name, {})) is not None:
            tiles[f"lowest {name}"] = f"{best.value:.6g}"
    pairs = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text_of(value))}</dd></div>" for name, value in tiles.items()
    )
    return f'<dl class="tiles">{pairs}</dl>'


def _moment(text: Any) -> str:
    return str(text or MISSING)[:16].replace("T", " ")


def _show_error(run: Run) -> str:
    error = run.sessions[-1].get("error") if run.sessions else None
    if not error:
        return ""
    return card("How it ended", f'<pre class="bad" tabindex="0">{escape(str(error))}</pre>')


def _show_charts(charts: Sequence[Chart]) -> str:
    if not charts:
        return ""
    return f'<div class="grid-of-cards">{"".join(_show_chart(chart) for chart in charts)}</div>'


def _show_chart(chart: Chart) -> str:
    views = []
    for axis in chart.axes:
        for scale in ("linear", "log"):
            views.append(f'<div class="view view-{axis}-{scale}">{draw(chart, axis, scale == "log")}</div>')
    items, notes = [], [mark.text for mark in chart.bests] + [mark.text for mark in chart.starts]
    for line in chart.lines:
        sample = (
            f'<svg viewBox="0 0 22 8" aria-hidden="true"><path class="{line_class(line.number)}" d="M0 4H22"/></svg>'
        )
        items.append(f"<li>{sample}{escape(line.name)}</li>")
        if line.num_non_finite:
            notes.append(
                f"{line.name}: {line.num_non_finite} value(s) are NaN or infinite, marked by crosses at the top"
            )
        not_positive = int((line.values <= 0).sum())
        if not_positive:
            notes.append(f"{line.name}: {not_positive} value(s) are not above 0, left out of the log scale")
    noted = "".join(f"<li>{escape(note)}</li>" for note in notes)
    caption = f'<ul class="notes">{noted}</ul>' if notes else ""
    return card(chart.title, f'{"".join(views)}<ul class="legend">{"".join(items)}</ul>{caption}')


def _show_metrics(run: Run, directions: Mapping[str, str]) -> str:
    rows: list[tuple[Any, ...]] = []
    for name, curve in run.curves.items():
        best = run.best_of(name, directions)
        marked = ("", "") if best is None or best.kind == "last" else (best.value, best.update)
        finite = curve.values[np.isfinite(curve.values)]
        extremes = (float(finite.min()), float(finite.max())) if len(finite) else ("", "")
        rows.append((name, float(curve.values[-1]), *marked, len(curve.values), *extremes))
    heads = ["value", "last", "best", "at update", "number", "lowest", "highest"]
    parts = [table(heads, rows, numeric=range(1, 7), name="All values")] if rows else []
    if run.others:
        others = [(name, text_of(value)[:2000]) for name, value in run.others.items()]
        parts.append(table(["value", "newest"], others, "What is no number"))
    return f"<h2>Values</h2>{card('All values of the log', ''.join(parts))}" if parts else ""


def _show_session(session: Mapping[str, Any]) -> str:
    ended = session.get("ended")
    outcome = session.get("outcome") or "still running, or killed"
    facts: dict[str, Any] = {"started": session.get("started"), "ended": ended, "outcome": outcome}
    facts |= {name: value for name, value in session.items() if name not in _OWN_CARDS and value is not None}
    parts = [settings_list(facts)]
    if command := session.get("command"):
        text = " ".join(map(str, command)) if isinstance(command, list) else str(command)
        parts.append(f'<h4>Command</h4><pre tabindex="0">{escape(text)}</pre>')
    if error := session.get("error"):
        parts.append(f'<h4>Error</h4><pre tabindex="0">{escape(str(error))}</pre>')
    for name, title in (("git", "Git"), ("hardware", "Hardware"), ("versions", "Versions")):
        if session.get(name):
            parts.append(f"<details><summary>{title}</summary>{settings_list(session[name])}</details>")
    return card(f"Session {session.get('number', '')}", "".join(parts))


def _show_printed(run: Run) -> str:
    path = run.path / PRINTED
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _MAX_PRINTED, 0))
        text = file.read().decode("utf-8", "replace")
    return f'<details><summary>The end of what was printed</summary><pre tabindex="0">{escape(text)}</pre></details>'


def _show_several(runs: list[Run], bodies: list[str], axes: list[str], directions: Mapping[str, str]) -> str:
    overview = table_of(runs, directions)
    parts = ["<h2>Runs side by side</h2>", card("Best values", _best_table(overview))]
    parts.append(card("Settings that differ", _settings_table(overview)))
    overlays = find_overlays(runs)
    if overlays:
        parts += ["<h2>Learning curves</h2>", _BAR, _show_charts(overlays)]
    parts.append("<h2>Each run</h2>")
    note = '<p class="muted">Its own curves and media are on the page that is made for it alone.</p>'
    for run, body in zip(runs, bodies, strict=True):
        parts.append(f"<details><summary>{escape(run.name)}: {escape(status_of(run))}</summary>{note}{body}</details>")
    return "".join(parts)


def _best_table(overview: RunTable) -> str:
    rows = []
    for number, name in enumerate(overview.runs):
        bests = [values[number] for values in overview.metrics.values()]
        cells = [MISSING if best is None else f"{exact(best.value)} at {best.update}" for best in bests]
        rows.append((name, overview.status[number], overview.num_updates[number], *cells))
    heads = ["run", "ended", "updates", *overview.headings()]
    return table(heads, rows, "Each value with the update it is of", numeric=range(2, len(heads)))


def _settings_table(overview: RunTable) -> str:
    if not overview.settings:
        return "<p>All settings are the same.</p>"
    rows = [(name, *values) for name, values in overview.settings.items()]
    return table(["setting", *overview.runs], rows, name="Settings that differ")

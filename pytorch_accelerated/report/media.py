"""What the page shows of the media of a run: images, figures, tables, texts, sounds, histograms."""

from __future__ import annotations

import csv
import io
import itertools
import json
from html import escape
from pathlib import Path
from typing import Any

from pytorch_accelerated.metrics_log import COUNTERS
from pytorch_accelerated.report.markup import Html, card, data_uri, exact, figure, picture, table, text_of
from pytorch_accelerated.report.reading import Run
from pytorch_accelerated.run_directory import MEDIA

MAX_MOMENTS = 6
"""How many moments of each name are shown: the first, and the newest."""
MAX_FILES = 24
"""How many files of one moment are shown."""
MAX_BYTES = 32 * 2**20
"""How large the files of a run that are part of the page may be together."""
_MAX_ROWS = 100
_MAX_LETTERS = 20_000
_KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp"}


def show_media(run: Run) -> str:
    """Return a card for each name under which media were logged; empty where there are none."""
    by_name: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in run.media:
        by_name.setdefault((str(row.get("name")), str(row.get("kind"))), []).append(row)
    budget = _Budget(run.path)
    cards = []
    for (name, kind), rows in by_name.items():
        chosen = rows if len(rows) <= MAX_MOMENTS else [rows[0], *rows[1 - MAX_MOMENTS :]]
        parts = [_show_moment(row, kind, budget) for row in chosen]
        if len(chosen) < len(rows):
            note = f"{len(rows)} moments were logged; the first and the newest {MAX_MOMENTS - 1} are shown."
            parts.insert(0, f'<p class="muted">{note}</p>')
        cards.append(card(f"{name} ({kind})", "".join(parts)))
    return f"<h2>Media</h2>{''.join(cards)}" if cards else ""


class _Budget:
    """Reads files of a run, as long as the page does not become too large."""

    def __init__(self, run: Path) -> None:
        self.run, self.left = run.resolve(), MAX_BYTES

    def read(self, file: str) -> bytes | str:
        """Return the content of a file, or in words why it is not shown."""
        path = next((found for base in (MEDIA, ".") if (found := (self.run / base / file).resolve()).is_file()), None)
        if path is None:
            return f"{file} is not there."
        if not path.is_relative_to(self.run):
            return f"{file} lies outside of the run directory and is left out."
        size = path.stat().st_size
        if size > self.left:
            return f"{file} ({size:,} bytes) is left out: the page would become too large."
        self.left -= size
        return path.read_bytes()


def _show_moment(row: dict[str, Any], kind: str, budget: _Budget) -> str:
    files = [str(file) for file in row.get("files") or []]
    captions = row.get("captions") or []
    parts = []
    for file, caption in itertools.islice(itertools.zip_longest(files, captions), MAX_FILES):
        if file is None:
            break
        content = budget.read(file)
        label = str(caption) if caption is not None else ""
        if isinstance(content, str):
            parts.append(f'<p class="muted">{escape(content)}</p>')
        else:
            parts.append(_show_file(kind, file, content, label, str(row.get("name"))))
    if len(files) > MAX_FILES:
        parts.append(f'<p class="muted">{len(files) - MAX_FILES} more files are in the run directory.</p>')
    joined = "".join(parts)
    when = ", ".join(
        f"{name.removeprefix('num_').removeprefix('current_')} {text_of(row[name])}"
        for name in COUNTERS[2:4]
        if name in row
    )
    shown = f'<div class="pictures">{joined}</div>' if kind == "images" else joined
    return f"<h4>{escape(when)}</h4>{shown}"


def _show_file(kind: str, file: str, content: bytes, caption: str, name: str) -> str:
    suffix = Path(file).suffix.lower()
    alt = f"{name}: {caption}" if caption else f"{name}, {Path(file).name}"
    shown: str | None = None
    if suffix in _KINDS:
        is_small = suffix == ".png" and max(int.from_bytes(content[16:20]), int.from_bytes(content[20:24])) <= 128
        return figure(picture(content, alt, _KINDS[suffix], is_small), caption)
    if suffix == ".wav":
        shown = f'<audio controls src="{data_uri(content, "audio/wav")}" aria-label="{escape(alt)}"></audio>'
    elif suffix == ".csv":
        shown = _show_table(content.decode("utf-8", "replace"), alt)
    elif suffix == ".json" and kind == "histogram":
        shown = _show_histogram(content, alt)
    if shown is None:
        text = content.decode("utf-8", "replace")
        cut = f"\n… {len(text) - _MAX_LETTERS} more characters" if len(text) > _MAX_LETTERS else ""
        shown = f'<pre tabindex="0">{escape(text[:_MAX_LETTERS] + cut)}</pre>'
    return figure(shown, caption)


def _show_table(text: str, name: str) -> str:
    rows = list(itertools.islice(csv.reader(io.StringIO(text)), _MAX_ROWS + 2))
    if not rows:
        return '<p class="muted">An empty table.</p>'
    note = f'<p class="muted">The first {_MAX_ROWS} rows.</p>' if len(rows) > _MAX_ROWS + 1 else ""
    return table(rows[0], rows[1 : _MAX_ROWS + 1], name=name) + note


def _show_histogram(content: bytes, name: str) -> str | None:
    """Return bars; None for a file of another form, which is shown as text."""
    try:
        found = json.loads(content)
        counts, edges = [float(n) for n in found["counts"]], [float(edge) for edge in found["edges"]]
    except (ValueError, KeyError, TypeError):
        return None
    if len(edges) != len(counts) + 1:
        return None
    width, most = 320 / max(len(counts), 1), max([*counts, 1.0])
    bars = []
    for number, count in enumerate(counts):
        height = 110 * count / most
        title = f"<title>{exact(count)} from {edges[number]:.4g} to {edges[number + 1]:.4g}</title>"
        place = f'x="{20 + number * width:.1f}" y="{125 - height:.1f}" width="{max(width - 0.6, 0.4):.1f}"'
        bars.append(f'<rect class="dot l0" {place} height="{height:.1f}">{title}</rect>')
    ends = f'<text x="20" y="142">{edges[0]:.4g}</text><text x="340" y="142" text-anchor="end">{edges[-1]:.4g}</text>'
    ends += f'<text x="20" y="11">{exact(most)} at most</text>'
    return Html(
        f'<svg viewBox="0 0 360 148" role="img" aria-label="Histogram {escape(name)}">{"".join(bars)}{ends}</svg>'
    )

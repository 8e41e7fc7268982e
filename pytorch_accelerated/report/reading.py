"""A run as its directory tells it: facts, curves over several axes, media, and what callbacks left for the report."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytorch_accelerated.metrics_log import COUNTERS, is_loss, is_number, read_rows
from pytorch_accelerated.run_directory import MEDIA_INDEX, METRICS, REPORT_DATA, find_runs, read_run

Numbers = NDArray[np.float64]

AXES = ("updates", "samples", "epochs", "seconds")
"""What a curve can be drawn over."""

_COLUMNS = {"updates": "num_updates", "samples": "num_samples", "seconds": "seconds"}


def depends_on_clock(name: str) -> bool:
    """Return whether a value of the log would differ if the same run were made again."""
    parts = ("memory", "wait_share", "utilisation")
    return (
        name == "seconds" or name.startswith("system_") or name.endswith("per_second") or any(p in name for p in parts)
    )


@dataclasses.dataclass(frozen=True)
class Curve:
    """The values of one name in the log of a run."""

    name: str
    rows: NDArray[np.int64]
    """The rows of the log they are in."""
    values: Numbers


@dataclasses.dataclass(frozen=True)
class Best:
    """The value of a metric that stands for a run in a table."""

    value: float
    update: int
    kind: str
    """``min``, ``max`` or, where the direction is not known, ``last``."""


@dataclasses.dataclass
class Run:
    """What a run directory holds."""

    path: Path
    name: str
    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    media: list[dict[str, Any]]
    curves: dict[str, Curve]
    """By name: numbers, each element of a short list being a curve of its own."""
    others: dict[str, Any]
    """The newest values of what is no number: strings, longer or nested lists."""
    positions: dict[str, Numbers]
    """Where each row is on each axis; an axis that is not known is left out."""

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """Return what is known of the processes that worked on the run."""
        return [session for session in self.facts.get("sessions") or [] if isinstance(session, dict)]

    @property
    def config(self) -> dict[str, Any]:
        """Return the settings of the run."""
        return dict(self.facts.get("config") or {})

    def best_of(self, name: str, directions: Mapping[str, str]) -> Best | None:
        """Return the best value of a metric, or the last where it is not known what is better; None without any."""
        curve = self.curves.get(name)
        if curve is None:
            return None
        kind = directions.get(name) or ("min" if is_loss(name) else "last")
        finite = np.flatnonzero(np.isfinite(curve.values))
        if kind == "last" or not len(finite):
            index = len(curve.values) - 1
        else:
            chosen = np.argmin if kind == "min" else np.argmax
            index = int(finite[chosen(curve.values[finite])])
        update = int(self.rows[curve.rows[index]].get("num_updates", 0))
        return Best(float(curve.values[index]), update, kind)

    def position_of(self, axis: str, update: int) -> float:
        """Return where an update is on an axis, between the rows that are nearest."""
        updates = self.positions["updates"]
        return float(np.interp(update, updates, self.positions[axis])) if len(updates) else 0.0


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the runs at ``paths``, each a run directory or one that holds some, named so that they differ.

    Raises:
        RunDirectoryError: if there is no run at a path, or it cannot be read.
        ValueError: if no path is given, or a log is damaged.
    """
    found = list(dict.fromkeys(path for given in paths for path in find_runs(Path(given))))
    if not found:
        raise ValueError("a report needs at least one run directory, got none.")
    return [_load(path, name) for path, name in zip(found, _short_names(found), strict=True)]


def _load(path: Path, name: str) -> Run:
    rows, media = (read_rows(path / name, missing_ok=True) for name in (METRICS, MEDIA_INDEX))
    curves, others = _find_curves(rows)
    return Run(path, name, read_run(path), rows, media, curves, others, _find_positions(rows))


def _short_names(paths: list[Path]) -> list[str]:
    for length in range(1, 4):
        names = ["/".join(path.resolve().parts[-length:]) for path in paths]
        if len(set(names)) == len(names) and (length > 1 or len(names) > 1 or not names[0].isdecimal()):
            return names
    return [str(path) for path in paths]


def _find_curves(rows: list[dict[str, Any]]) -> tuple[dict[str, Curve], dict[str, Any]]:
    points: dict[str, list[tuple[int, float]]] = {}
    others: dict[str, Any] = {}
    for number, row in enumerate(rows):
        for name, value in row.items():
            if name in COUNTERS or value is None:
                continue
            if is_number(value):
                points.setdefault(name, []).append((number, float(value)))
            elif isinstance(value, list) and 0 < len(value) <= 12 and all(is_number(item) for item in value):
                for position, item in enumerate(value):
                    points.setdefault(f"{name}[{position}]", []).append((number, float(item)))
            else:
                others[name] = value
    curves = {
        name: Curve(name, np.array([row for row, _ in pairs]), np.array([value for _, value in pairs], np.float64))
        for name, pairs in points.items()
    }
    return curves, others


def _find_positions(rows: list[dict[str, Any]]) -> dict[str, Numbers]:
    positions = {axis: _column(rows, name) for axis, name in _COLUMNS.items() if any(name in row for row in rows)}
    positions.setdefault("updates", np.zeros(len(rows)))
    epochs = _find_epochs(rows, positions["updates"])
    if epochs is not None:
        positions["epochs"] = epochs
    return {axis: positions[axis] for axis in AXES if axis in positions}


def _column(rows: list[dict[str, Any]], name: str) -> Numbers:
    """Return a counter of each row; a row without it has that of the row before."""
    values, last = [], 0.0
    for row in rows:
        value = row.get(name)
        last = float(value) if is_number(value) and math.isfinite(value) else last
        values.append(last)
    return np.array(values)


def _find_epochs(rows: list[dict[str, Any]], updates: Numbers) -> Numbers | None:
    """Return how many epochs were over at each row, with fractions; None where no end of an epoch is in the log."""
    ends = {
        int(row.get("current_epoch", 0)): update
        for row, update in zip(rows, updates, strict=True)
        if "train_loss_epoch" in row
    }
    known = [(0, 0.0), *sorted((epoch, update) for epoch, update in ends.items() if epoch > 0)]
    if len(known) < 2:
        return None
    at, epochs = [update for _, update in known], [float(epoch) for epoch, _ in known]
    result = np.interp(updates, at, epochs)
    per_update = (epochs[-1] - epochs[-2]) / max(at[-1] - at[-2], 1.0)
    beyond = updates > at[-1]
    result[beyond] = epochs[-1] + (updates[beyond] - at[-1]) * per_update
    return np.asarray(result, np.float64)


def eval_sets(names: Iterable[str]) -> list[str]:
    """Return the names of evaluation sets, longest first, as the names of the losses tell them."""
    found = (re.fullmatch(r"eval_(.+)_loss_epoch|evaluation_(.+)_loss", name) for name in names)
    return sorted({match[1] or match[2] for match in found if match}, key=lambda name: (-len(name), name))


def status_of(run: Run) -> str:
    """Return in words how the last session of a run ended."""
    if not run.sessions:
        return "no session"
    outcome = run.sessions[-1].get("outcome")
    return str(outcome) if outcome else "running, or killed"


def read_predictions(run: Run) -> list[dict[str, Any]]:
    """Return what was collected of evaluations: facts, and arrays under ``"arrays"``.

    Raises:
        ValueError: if a file is damaged.
    """
    found = []
    for path in sorted((run.path / REPORT_DATA).glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            facts = json.loads(str(arrays.pop("facts")))
        except (OSError, KeyError, ValueError, EOFError) as error:
            raise ValueError(
                f"{path} cannot be read: {error}. Delete it, and the report is made without it."
            ) from error
        found.append({**facts, "arrays": arrays, "file": path.stem})
    return sorted(found, key=lambda facts: bool(facts["task"] == "attention"))  # what is most asked for comes first

"""What tells runs apart: a table of settings and best metrics, and the first update at which two runs part."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_accelerated.errors import did_you_mean
from pytorch_accelerated.metrics_log import COUNTERS, is_loss
from pytorch_accelerated.report.markup import MISSING, text_of
from pytorch_accelerated.report.reading import Best, Run, depends_on_clock, load_runs, status_of
from pytorch_accelerated.trackers.media import flatten

_COMPARED_COUNTERS = ("num_samples", "current_epoch", "num_skipped_updates")


@dataclasses.dataclass(frozen=True)
class RunTable:
    """Several runs side by side; printed, it is a table for a terminal."""

    runs: list[str]
    """The name of each run."""
    status: list[str]
    """How each run ended."""
    num_updates: list[int]
    """How far each run came."""
    settings: dict[str, list[Any]]
    """The settings that differ, each with its value in each run; None where a run does not have it."""
    metrics: dict[str, list[Best | None]]
    """The metrics, each with what stands for it in each run."""

    def __str__(self) -> str:
        heads = ["run", "ended", "updates", *self.settings, *self.headings()]
        columns: list[list[str]] = [self.runs, self.status, [str(number) for number in self.num_updates]]
        columns += [[text_of(value) for value in values] for values in self.settings.values()]
        columns += [
            [MISSING if b is None else f"{b.value:.6g} @{b.update}" for b in bests] for bests in self.metrics.values()
        ]
        widths = [max(len(head), *map(len, column)) for head, column in zip(heads, columns, strict=True)]
        lines = [heads, ["-" * width for width in widths], *map(list, zip(*columns, strict=True))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def headings(self) -> list[str]:
        """Return the names of the metrics, each with what is shown of it: the lowest, highest or last value."""
        words = {"min": "lowest", "max": "highest", "last": "last"}
        kinds = [next((best.kind for best in bests if best is not None), "last") for bests in self.metrics.values()]
        return [f"{words[kind]} {name}" for name, kind in zip(self.metrics, kinds, strict=True)]


def compare_runs(runs: Sequence[str | Path], best: Mapping[str, str] | None = None) -> RunTable:
    """Return a table of runs: the settings in which they differ, and their best metrics.

    Args:
        runs: run directories, or directories that hold some.
        best: ``"min"`` or ``"max"`` by the name of a metric. Of losses lower is better; of other metrics that are not
            named here the last value stands for the run.

    Raises:
        RunDirectoryError: if there is no run at a path, or it cannot be read.
        ValueError: if ``best`` names a metric that no run has, or another direction.
    """
    loaded = load_runs([Path(run) for run in runs])
    check_directions(best or {}, loaded)
    return table_of(loaded, best or {})


def table_of(runs: list[Run], best: Mapping[str, str]) -> RunTable:
    """Return the table of runs that have been read, with directions that have been checked; see ``compare_runs``."""
    names = dict.fromkeys(name for run in runs for name in run.curves if _is_metric(name) or name in best)
    metrics = {name: [run.best_of(name, best) for run in runs] for name in sorted(names, key=_metric_order)}
    reached = [int(run.positions["updates"][-1]) if run.rows else 0 for run in runs]
    return RunTable([run.name for run in runs], [status_of(run) for run in runs], reached, differences(runs), metrics)


def check_directions(best: Mapping[str, str], runs: Sequence[Run]) -> None:
    """Refuse directions that are none, and names of metrics that no run has.

    Raises:
        ValueError: if there is such.
    """
    known = {name for run in runs for name in run.curves}
    for name, direction in best.items():
        if direction not in ("min", "max"):
            raise ValueError(f"the best value of {name!r} must be 'min' or 'max', got {direction!r}.")
        if known and name not in known:
            raise ValueError(f"no run has a metric {name!r}.{did_you_mean(name, known)} There are {sorted(known)}.")


# Of TrainerRunConfig: they follow from other settings.
_DERIVED = (
    "num_updates",
    "num_update_steps_per_epoch",
    "num_local_update_steps_per_epoch",
    "train_total_batch_size",
    "eval_total_batch_size",
    "is_distributed",
    "train_dataloader_len",
    "eval_dataloader_len",
)


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the settings that are not the same in all runs, with the value of each run; the user's own come first."""
    flat = [flatten(run.config) | {"seed": run.facts.get("seed")} for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    found = {name: [settings.get(name) for settings in flat] for name in names}
    differ = [name for name, values in found.items() if any(value != values[0] for value in values)]
    shown = [name for name in differ if name.removeprefix("run.") not in _DERIVED]
    return {name: found[name] for name in sorted(shown, key=lambda name: not name.startswith("user."))}


def _is_metric(name: str) -> bool:
    return name.startswith(("eval_", "evaluation_", "train_")) and not depends_on_clock(name)


def _metric_order(name: str) -> tuple[int, str]:
    kinds = ("eval_", "evaluation_", "train_")
    kind = next((number for number, prefix in enumerate(kinds) if name.startswith(prefix)), len(kinds))
    return (kind, ("0" if is_loss(name) else "1") + name)


@dataclasses.dataclass(frozen=True)
class Parting:
    """The first place at which two runs are not the same."""

    update: int
    name: str
    first: Any
    """The value in the first run; None where it has none."""
    second: Any


@dataclasses.dataclass(frozen=True)
class RunDiff:
    """In what two runs differ; printed, it says so in words."""

    runs: tuple[str, str]
    parting: Parting | None
    """Where they part; None where they are equal as far as both go."""
    settings: dict[str, list[Any]]
    """The settings that differ, with both values."""
    last_updates: tuple[int, int]
    """How far each run goes."""

    @property
    def are_equal(self) -> bool:
        """Return whether settings, lengths and all values are the same."""
        return self.parting is None and not self.settings and self.last_updates[0] == self.last_updates[1]

    def __str__(self) -> str:
        lines = []
        for name, (one, other) in self.settings.items():
            lines.append(f"setting {name}: {text_of(one)} in {self.runs[0]}, {text_of(other)} in {self.runs[1]}")
        (first, last), common = self.last_updates, min(self.last_updates)
        if self.parting is not None:
            parting = self.parting
            values = f"{_shown(parting.first)} in {self.runs[0]}, {_shown(parting.second)} in {self.runs[1]}"
            lines.append(f"the runs part at update {parting.update}: {parting.name} is {values}")
        elif first == last:
            lines.append(f"the runs are equal: all values until update {common} are the same")
        else:
            lines.append(f"the runs are equal as far as both go: all values until update {common} are the same")
        if first != last:
            longer, reach = (self.runs[0], first) if first > last else (self.runs[1], last)
            lines.append(f"{longer} is longer: it goes to update {reach}, the other to update {common}")
        return "\n".join(lines)


def diff_runs(first: str | Path, second: str | Path, rtol: float = 0.0) -> RunDiff:
    """Return the first update at which two runs part, and in which quantity.

    All values of the log are compared but those that depend on the clock: seconds, speeds, shares of time, memory and
    what the system does. The number of steps is not compared, as an update may be split into batches in several ways.

    Args:
        first: a run directory.
        second: another.
        rtol: how much numbers may differ, as a part of the larger one; 0 for not at all.

    Raises:
        RunDirectoryError: if there is no run at a path, or it cannot be read.
        ValueError: if there are several runs at a path.
    """
    found = []
    for path in (first, second):
        runs = load_runs([Path(path)])
        if len(runs) > 1:
            raise ValueError(f"{path} holds {len(runs)} runs, and two runs are compared: name one, as {runs[-1].path}.")
        found.append(runs[0])
    one, other = found
    names = (one.name, other.name) if one.name != other.name else (str(one.path), str(other.path))
    last = tuple(int(run.positions["updates"][-1]) if run.rows else 0 for run in found)
    parting = next(_partings(one, other, min(last), rtol), None)
    return RunDiff(names, parting, differences(found), (last[0], last[1]))


def _partings(one: Run, other: Run, until: int, rtol: float) -> Iterator[Parting]:
    first, second = _by_update(one), _by_update(other)
    for update in sorted(first.keys() | second.keys()):
        if update > until:
            return
        here, there = first.get(update, {}), second.get(update, {})
        for name in dict.fromkeys([*here, *there]):
            mine, theirs = here.get(name, []), there.get(name, [])
            for position in range(max(len(mine), len(theirs))):
                values = [row[position] if position < len(row) else None for row in (mine, theirs)]
                if not _is_same(values[0], values[1], rtol):
                    yield Parting(update, name, values[0], values[1])


def _by_update(run: Run) -> dict[int, dict[str, list[Any]]]:
    """Return the values of each update by name, in the order of the log; the counters come last."""
    found: dict[int, dict[str, list[Any]]] = {}
    for row in run.rows:
        values = found.setdefault(int(row.get("num_updates", 0)), {})
        for name, value in row.items():
            if name not in COUNTERS and not depends_on_clock(name):
                values.setdefault(name, []).append(value)
    for row in run.rows:
        # The last of an update: how the values of one moment are spread over rows does not matter.
        found[int(row.get("num_updates", 0))] |= {name: [row[name]] for name in _COMPARED_COUNTERS if name in row}
    return found


def _is_same(one: Any, other: Any, rtol: float) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_is_same(a, b, rtol) for a, b in zip(one, other, strict=True))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other or (math.isnan(one) and math.isnan(other)) or math.isclose(one, other, rel_tol=rtol)
    return bool(one == other)


def _shown(value: Any) -> str:
    return "not there" if value is None else text_of(value)

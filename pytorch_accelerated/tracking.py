"""What a run has counted and measured: counters, history, and sums that stay on the device."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytorch_accelerated.errors import did_you_mean
from pytorch_accelerated.metrics_log import COUNTERS, read_rows

if TYPE_CHECKING:
    import pandas as pd

Number = int | float | Tensor


@dataclasses.dataclass
class RunCounters:
    """Count how far a run has come. The counters never go back and are the same on every process."""

    num_samples: int = 0
    """Training samples seen, over all processes."""
    num_steps: int = 0
    """Training batches of one process that went through the hooks."""
    num_updates: int = 0
    """Optimizer steps that changed the weights."""
    current_epoch: int = 0
    """Number of the epoch in progress, from 1; 0 before the first."""
    num_skipped_updates: int = 0
    """Updates left out because the gradients were not finite."""


class RunHistory:
    """Record metrics, each value together with the counters of the moment it was recorded at."""

    def __init__(self) -> None:
        """Start with no metrics and with all counters at zero."""
        self.counters = RunCounters()
        self._values: dict[str, list[Any]] = {}
        self._counters: dict[str, list[dict[str, int]]] = {}

    def __repr__(self) -> str:
        latest = ", ".join(f"{name}={values[-1]!r}" for name, values in self._values.items())
        return f"RunHistory({self.counters}, latest: {latest or 'nothing'})"

    @property
    def current_epoch(self) -> int:
        """Return the number of the epoch in progress, from 1; 0 before the first."""
        return self.counters.current_epoch

    def update_metric(self, metric_name: str, metric_value: Any) -> None:
        """Append a value.

        Args:
            metric_name: any name; the trainer's own begin with ``train_``, ``eval_`` or ``evaluation_``.
            metric_value: a number, or nested lists of numbers. A tensor is converted, which waits for its device.

        Raises:
            ValueError: if the name is a counter's, which each metric comes with.
        """
        if metric_name in RunCounters.__dataclass_fields__:
            raise ValueError(f"{metric_name!r} is a counter, recorded with every metric; give the metric another name.")
        if hasattr(metric_value, "tolist"):  # a tensor, or a number or an array of numpy
            metric_value = metric_value.tolist()  # waits for the device: recording is a log point
        elif isinstance(metric_value, list):
            metric_value = copy.deepcopy(metric_value)  # the caller may go on filling it
        self._values.setdefault(metric_name, []).append(metric_value)
        self._counters.setdefault(metric_name, []).append(dataclasses.asdict(self.counters))

    def get_metric_names(self) -> set[str]:
        """Return the names of the metrics recorded so far."""
        return set(self._values)

    def get_metric_values(self, metric_name: str) -> list[Any]:
        """Return all values of a metric, oldest first, as a new list.

        Raises:
            KeyError: if nothing was recorded under this name.
        """
        return list(self._lookup(self._values, metric_name))

    def get_metric_counters(self, metric_name: str) -> list[dict[str, int]]:
        """Return, for each value of a metric, the counters of the run when it was recorded.

        Raises:
            KeyError: if nothing was recorded under this name.
        """
        return [dict(counters) for counters in self._lookup(self._counters, metric_name)]

    def get_latest_metric(self, metric_name: str) -> Any:
        """Return the newest value of a metric.

        Raises:
            KeyError: if nothing was recorded under this name.
        """
        return self._lookup(self._values, metric_name)[-1]

    def get_news(self, num_seen: Mapping[str, int]) -> list[tuple[dict[str, int], str, Any]]:
        """Return what has been recorded since an earlier look: counters, name and value, in the order of the counters.

        Args:
            num_seen: how many values of each metric there were then.
        """
        news = []
        for name, values in self._values.items():
            first = num_seen.get(name, 0)
            news += list(zip(self._counters[name][first:], [name] * len(values[first:]), values[first:], strict=True))
        return sorted(news, key=lambda item: (item[0]["num_samples"], item[0]["num_updates"]))

    def _lookup(self, records: dict[str, list[Any]], metric_name: str) -> list[Any]:
        if metric_name not in records:
            hint = did_you_mean(metric_name, records)
            raise KeyError(f"no metric {metric_name!r} has been recorded; there are {sorted(records)}.{hint}")
        return records[metric_name]

    def reset(self) -> None:
        """Forget all metrics and set all counters to zero."""
        self._values.clear()
        self._counters.clear()
        self.counters = RunCounters()

    def to_pandas(self) -> pd.DataFrame:
        """Return a table with one row for each moment at which something was recorded.

        The columns are the counters, then the metrics in the order of their first appearance; a cell without a value is
        NaN. A metric recorded several times between two changes of the counters has several rows.

        Raises:
            ImportError: if pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("RunHistory.to_pandas needs pandas: pip install pandas") from error
        rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        for name, values in self._values.items():
            seen: dict[tuple[int, ...], int] = {}
            for value, counters in zip(values, self._counters[name], strict=True):
                moment = tuple(counters[field.name] for field in dataclasses.fields(RunCounters))
                repeat = seen[moment] = seen.get(moment, -1) + 1
                rows.setdefault((moment, repeat), dict(counters))[name] = value
        columns = [field.name for field in dataclasses.fields(RunCounters)] + list(self._values)
        if any("seconds" in row for row in rows.values()):  # as read_log has them
            columns.insert(len(columns) - len(self._values), "seconds")
        return pd.DataFrame([rows[key] for key in sorted(rows)], columns=columns)

    def state_dict(self) -> dict[str, Any]:
        """Return counters and metrics as plain dicts, lists and numbers."""
        return {
            "counters": dataclasses.asdict(self.counters),
            "metrics": {
                name: [[value, dict(counters)] for value, counters in zip(values, self._counters[name], strict=True)]
                for name, values in self._values.items()
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace counters and metrics by those of ``state_dict``."""
        # In place: a loop that is under way counts in the same object.
        vars(self.counters).update(dataclasses.asdict(RunCounters(**state_dict["counters"])))
        self._values = {name: [value for value, _ in rows] for name, rows in state_dict["metrics"].items()}
        self._counters = {name: [dict(at) for _, at in rows] for name, rows in state_dict["metrics"].items()}

    def save_json(self, path: str | Path) -> None:
        """Write counters and metrics to a JSON file; infinite and NaN values are written as Python's json does."""
        Path(path).write_text(json.dumps(self.state_dict()), encoding="utf-8")

    @classmethod
    def load_json(cls, path: str | Path) -> RunHistory:
        """Return the history that ``save_json`` wrote."""
        history = cls()
        history.load_state_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        return history

    @classmethod
    def read_log(cls, path: str | Path) -> RunHistory:
        """Return what a run directory's log holds as a history, also of a run that is still going on.

        It has all that is in the log: what was logged within epochs, too. The counters of a value come with
        ``seconds``, the time the run had taken.

        Args:
            path: a run directory, or its ``metrics.jsonl``.

        Raises:
            ValueError: if a line of the file is damaged.
        """
        path = Path(path)
        history = cls()
        for row in read_rows(path / "metrics.jsonl" if path.is_dir() else path):
            counters = {name: row.pop(name) for name in COUNTERS if name in row}
            for name, value in row.items():
                history._values.setdefault(name, []).append(value)
                history._counters.setdefault(name, []).append(dict(counters))
            vars(history.counters).update({name: counters[name] for name in vars(history.counters)})
        return history


InMemoryRunHistory = RunHistory
"""The published library's name for it."""


def _accumulator_dtype(device: torch.device) -> torch.dtype:
    # Sums of many losses lose digits in float32; MPS alone has no float64.
    return torch.float32 if device.type == "mps" else torch.float64


def _accumulator(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=_accumulator_dtype(device), device=device)


class LossSum:
    """Sum losses and the items they are means of, without waiting for the device.

    On the CPU the sums are numbers of Python, which are added up in a tenth of the time that tensors take.
    """

    skips_non_finite = False
    """Whether losses that are infinite or NaN are left out."""

    def __init__(self, device: torch.device) -> None:
        """Start at zero, with the sums on ``device``."""
        self._device = device
        self._is_on_host = device.type == "cpu"
        self.reset()

    def reset(self) -> None:
        """Go back to zero."""
        self._loss: Number = 0.0 if self._is_on_host else _accumulator(self._device)
        self._items: Number = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of this process."""
        return {"sums": self.sums()}

    def add_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Add the sums that ``state_dict`` returned, here or on another process."""
        sums = state_dict["sums"]
        loss, items = sums.tolist() if self._is_on_host else sums.to(self._device)  # waits for nothing on the CPU
        self._loss, self._items = self._loss + loss, self._items + items

    def update(self, loss: float | Tensor, num_items: Number) -> None:
        """Add one batch.

        Args:
            loss: scalar tensor, mean over the items of the batch; on the CPU also a number.
            num_items: how many items that were: a number, or a scalar tensor on the device of ``loss``.
        """
        if self._is_on_host:
            value = loss.item() if isinstance(loss, Tensor) else loss  # waits for nothing on the CPU
            items = num_items.item() if isinstance(num_items, Tensor) else num_items  # waits for nothing, either
            if items and not (self.skips_non_finite and not math.isfinite(value)):
                self._loss += value * items
                self._items += items
            return
        assert isinstance(loss, Tensor), "numbers are for the CPU"
        loss = without_empty(loss.detach(), num_items)
        if self.skips_non_finite:
            is_finite = torch.isfinite(loss)
            loss, num_items = torch.where(is_finite, loss, 0.0), is_finite * num_items
        if isinstance(num_items, Tensor):
            self._loss += loss.to(_accumulator_dtype(self._device)) * num_items
        else:
            self._loss.add_(loss, alpha=num_items)  # type: ignore[union-attr]  # a tensor on a device
        self._items = self._items + num_items

    def local_mean(self) -> float | None:
        """Return the mean loss per item on this process, None where there were no items. Waits for the device."""
        loss, items = self.sums().tolist()  # waits for the device: the caller wants to show it
        return loss / items if items else None

    def sums(self) -> Tensor:
        """Return the sum of the losses, each times its items, and that of the items: a new tensor of shape (2,)."""
        sums = torch.zeros(2, dtype=_accumulator_dtype(self._device), device=self._device)
        sums[0] += self._loss
        sums[1] += self._items
        return sums


class AccumulationWindow:
    """Find the factors that make the gradient of a window equal to that of the one big batch.

    The gradient of an update is that of ``sum(loss_i * n_i) / sum(n_i)`` over all micro-batches i of the window on all
    processes. While the window is open its total is unknown, so each loss is weighed against a reference (the items of
    the first micro-batch times the number of micro-batches planned); when the window closes, the gradients are
    multiplied by ``reference / total``. In full windows of equal batches the reference is the total and nothing is
    multiplied. As processes average their gradients, each weight carries the number of processes.
    """

    def __init__(
        self, num_steps: int, num_processes: int, reduce_sum: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        """Store the size of a full window and how gradients and counts are combined.

        Args:
            num_steps: micro-batches in a full window.
            num_processes: number of processes whose gradients are averaged.
            reduce_sum: returns the sum of a tensor over all processes (a collective).
            device: where counts that must be reduced are put.
        """
        self.is_one_batch = num_steps == num_processes == 1
        """Whether a window is one batch of one process, which nothing has to be weighed against."""
        self._full_size = num_steps
        self._num_processes = num_processes
        self._reduce_sum = reduce_sum
        self._device = device
        self.begin_epoch(None)

    def begin_epoch(self, num_steps: int | None) -> None:
        """Begin an epoch of ``num_steps`` micro-batches; None if that is not known."""
        self._num_steps_left = num_steps
        self._size = self._planned_size = 0
        self._reference: Number = 0
        self._total: Number = 0
        self._not_reduced: Number | None = None

    def begin_step(self, is_last: bool) -> bool:
        """Begin a micro-batch, the last of its epoch or not, and return whether it completes the window."""
        if self._size == 0:
            left = self._num_steps_left
            self._planned_size = self._full_size if left is None else max(1, min(self._full_size, left))
        self._size += 1
        if self._num_steps_left is not None:
            self._num_steps_left -= 1
        return is_last or self._size == self._full_size

    def weight(self, num_items: Number, total_items: int | None) -> Number:
        """Return what to multiply the loss of the micro-batch by.

        Args:
            num_items: items that the loss of this process is the mean of.
            total_items: the same over all processes; None if that is not known, which costs one reduction for the first
                micro-batch of a window and, in windows of several, one more at the end.
        """
        if isinstance(num_items, Tensor):
            num_items = _accumulator(num_items.device) + num_items  # a quotient of integers would be float32
        if self._size == 1:
            first = self._over_processes(num_items) if total_items is None else total_items
            self._reference = self._planned_size * _one_if_zero(first)
            self._total = first
            self._not_reduced = 0 if total_items is None else None  # the first has been reduced already
        elif total_items is None:
            self._not_reduced = (self._not_reduced or 0) + num_items
        else:
            self._total = self._total + total_items
        return num_items * self._num_processes / self._reference

    def close(self, parameters: Iterable[Tensor]) -> None:
        """End the window: correct the gradients of ``parameters`` for its true total."""
        total = self._total
        if self._not_reduced is not None and self._size > 1:
            total = total + self._over_processes(self._not_reduced)
        is_alone = self._size == self._planned_size == 1  # then its reference was its total
        self._size = 0
        factor: Number = 1 if is_alone else self._reference / _one_if_zero(total)
        if isinstance(factor, Tensor) or factor != 1:
            _scale_gradients(parameters, factor)

    def _over_processes(self, num_items: Number) -> Number:
        if self._num_processes == 1:
            return num_items
        total = _accumulator(self._device)
        total += num_items
        return self._reduce_sum(total)


def _one_if_zero(number: Number) -> Number:
    """Return what may be divided by. Item counts may be weights, so a number below one stays as it is."""
    return torch.where(number == 0, 1, number) if isinstance(number, Tensor) else number or 1


def without_empty(loss: Tensor, num_items: Number) -> Tensor:
    """Return the loss, zero where it is the mean over no items at all: often NaN, and never of any weight."""
    if isinstance(num_items, Tensor):
        return torch.where(num_items == 0, 0.0, loss)
    return loss if num_items else torch.nan_to_num(loss, 0.0, 0.0, 0.0) * 0


def _scale_gradients(parameters: Iterable[Tensor], factor: Number) -> None:
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault((parameter.grad.dtype, parameter.grad.device), []).append(parameter.grad)
    for (dtype, device), gradients in groups.items():
        if isinstance(factor, Tensor):
            real = torch.empty((), dtype=dtype).real.dtype if dtype.is_complex else dtype
            torch._foreach_mul_(gradients, factor.to(device, real))
        else:
            torch._foreach_mul_(gradients, factor)

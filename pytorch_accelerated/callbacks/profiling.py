"""Where the time of a run goes: traces of single updates, and the throughput of all."""

from __future__ import annotations

import dataclasses
import re
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

from pytorch_accelerated import distributed
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.metrics_log import replace_file, write_whole

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

_MIB = 2**20

_PEAK_FLOPS = (
    (r"H100 PCIe", 756e12),
    (r"H100 NVL|H200 NVL", 835e12),
    (r"H100|H200|GH200", 989e12),
    (r"B200", 2250e12),
    (r"A100", 312e12),
    (r"A10", 125e12),
    (r"L40S", 362e12),
    (r"L4", 121e12),
    (r"V100-PCIE", 112e12),
    (r"V100", 125e12),
    (r"T4", 65e12),
    (r"MI300X", 1307e12),
)
# By a word in the device's name, the first that fits; FLOP/s of dense bf16 products, of V100 and T4, which have no
# bf16, of fp16, as the vendors' data sheets have them.


class ProfilerCallback(TrainerCallback):
    """Record some updates of a training run with torch.profiler: a Chrome trace and a table of operators.

    One step of the profiler is one whole update: from the end of the update before, fetching the batches, all forward
    and backward passes of its accumulation window, and the optimizer's step. An evaluation or a save between two
    updates is in the trace of the second. Each process writes its own files, ``trace_run1_update10_process0.json``
    (open it at https://ui.perfetto.dev) and ``table_run1_update10_process0.txt``, named after the run of this trainer
    and the last update recorded. When a run ends within a cycle, also by a failure, what has been recorded is written.
    After the last cycle the profiler is gone. ``evaluate`` and ``predict`` are not recorded.
    """

    def __init__(
        self,
        directory: str | Path,
        wait: int = 5,
        warmup: int = 2,
        active: int = 3,
        repeat: int = 1,
        activities: Iterable[ProfilerActivity] | None = None,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        with_flops: bool = False,
        sort_by: str | None = None,
        row_limit: int = 10,
    ) -> None:
        """Take where to write, and what to record when.

        Args:
            directory: for the files; made if it is not there.
            wait: updates at the beginning of a cycle that are left alone.
            warmup: updates after these in which the profiler runs and nothing is kept, because its start is slow.
            active: updates after these that are recorded.
            repeat: number of such cycles.
            activities: what to record; None for the CPU and, where there is one, the accelerator.
            record_shapes: whether to record the shapes of inputs; the table then has a row for each.
            profile_memory: whether to record allocations.
            with_stack: whether to record where in the source an operator was called, which is slow.
            with_flops: whether to estimate the FLOPs of matrix products and convolutions.
            sort_by: column of the table, such as ``"cpu_time_total"``; None for the time in the operator itself, on the
                accelerator if it is recorded, else on the CPU.
            row_limit: rows of the table that the main process prints; the file has all.

        Raises:
            ValueError: if a number is too small, or there is no such column.
        """
        smallest = {"wait": (wait, 0), "warmup": (warmup, 0), "active": (active, 1), "repeat": (repeat, 1)}
        for name, (number, least) in (smallest | {"row_limit": (row_limit, 1)}).items():
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}.")
        if sort_by is not None and not hasattr(FunctionEventAvg(), re.sub("cuda|xpu", "device", sort_by)):
            raise ValueError(f"sort_by={sort_by!r} is no column of the profiler's table, such as 'cpu_time_total'.")
        self.directory = Path(directory)
        self.wait, self.warmup, self.active, self.repeat = wait, warmup, active, repeat
        self.activities = None if activities is None else set(activities)
        self.record_shapes = record_shapes
        self.profile_memory = profile_memory
        self.with_stack = with_stack
        self.with_flops = with_flops
        self.sort_by = sort_by
        self.row_limit = row_limit
        self._profiler: profile | None = None
        self._num_updates = 0  # of this run, while the profiler is there
        self._num_traces = 0

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Begin the first cycle."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._num_updates = self._num_traces = 0
        self._start(trainer)

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Tell the profiler that a step is over; at the end of a cycle it has its trace and table written."""
        if self._profiler is None:
            return
        self._num_updates += 1
        self._profiler.step()
        if self._num_updates % self._cycle == 0:
            self._stop(is_written=False)  # by now it is
            if self._num_updates < self._cycle * self.repeat:
                self._start(trainer)

    def on_train_run_end(self, trainer: Trainer, exception: BaseException | None = None, **kwargs: Any) -> None:
        """Write what the profiler has of a cycle that is not complete, and warn if there was nothing in the run."""
        if self._profiler is None:
            return
        num_recorded = self._num_updates_recorded
        # Of an update that failed the trace may say why; of one that was never begun there is nothing to say.
        self._stop(is_written=num_recorded > 0 or (num_recorded == 0 and exception is not None))
        if self._num_traces == 0 and num_recorded <= 0 and trainer.accelerator.is_main_process:
            warnings.warn(
                f"ProfilerCallback recorded nothing: the run made {self._num_updates} update(s), and recording begins "
                f"after {self.wait} + {self.warmup} (wait + warmup). Let it wait less, or train longer.",
                stacklevel=2,
            )

    @property
    def _cycle(self) -> int:
        return self.wait + self.warmup + self.active

    @property
    def _num_updates_recorded(self) -> int:
        """Return the whole updates recorded since the last trace was written; below zero before the first is begun."""
        return self._num_updates - self._num_traces * self._cycle - self.wait - self.warmup

    def _start(self, trainer: Trainer) -> None:
        device = trainer.device.type.upper()
        of_device = {activity for activity in supported_activities() if activity.name == device}  # type: ignore[no-untyped-call]
        activities = {ProfilerActivity.CPU} | of_device if self.activities is None else self.activities
        # One for each cycle: torch's own repetition adds up the cycles in the table, or warns that it does not.
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=self.wait, warmup=self.warmup, active=self.active, repeat=1),
            on_trace_ready=partial(self._write, trainer, is_on_device=activities != {ProfilerActivity.CPU}),
            record_shapes=self.record_shapes,
            profile_memory=self.profile_memory,
            with_stack=self.with_stack,
            with_flops=self.with_flops,
        )
        self._profiler.start()

    def _stop(self, is_written: bool) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None, "it is stopped once"
        if not is_written:
            profiler.on_trace_ready = None
        profiler.stop()

    def _write(self, trainer: Trainer, profiler: profile, is_on_device: bool) -> None:
        """Write trace and table of the updates just recorded, and say where they are."""
        num_recorded = self._num_updates_recorded
        process = trainer.accelerator.process_index
        moment = f"run{trainer.num_runs_started}_update{trainer.num_updates}_process{process}"
        trace, table = self.directory / f"trace_{moment}.json", self.directory / f"table_{moment}.txt"
        replace_file(trace, lambda path: profiler.export_chrome_trace(str(path)))
        averages = profiler.key_averages(group_by_input_shape=self.record_shapes)
        sort_by = self.sort_by or ("self_device_time_total" if is_on_device else "self_cpu_time_total")
        write_whole(table, averages.table(sort_by, row_limit=-1).encode())
        self._num_traces += 1
        trainer.print(f"Profiled {num_recorded} whole update(s) until update {trainer.num_updates}: {trace}, {table}")
        trainer.print(averages.table(sort_by, row_limit=self.row_limit))


@dataclasses.dataclass
class _Interval:
    """What has been measured since the last values were recorded."""

    start: float
    """Seconds, by the host's clock."""
    first_sample: int
    """Samples seen before it."""
    seconds_waited_before: float
    """Seconds that the epoch had waited for data before it."""
    seconds_evaluating: float = 0.0
    evaluation_start: float | None = None
    num_tokens: float | Tensor | None = None
    """Of this process; None where they are not known."""
    peak_bytes: tuple[int, int] = (0, 0)
    """Device memory of tensors, and with what the allocator holds besides, in the parts that are over."""


class ThroughputCallback(TrainerCallback):
    """Record how fast a run trains, what share of the time it waits for data, and the memory it takes.

    At the end of each epoch, and with ``every_n_updates`` within it, the run history gains, the same on every process:

    - ``train_samples_per_second``, over all processes.
    - ``train_tokens_per_second``, over all processes, where tokens are counted: by ``count_tokens``, else where
      ``calculate_train_batch_loss`` returns ``"num_items_in_batch"``, those items.
    - ``train_data_wait_share``: the part of the time, from 0 to 1, in which the process that waited longest had to wait
      for its next batch. The way of a batch to the device is no part of it.
    - ``train_model_flop_utilisation``: the model's FLOP/s as a part of what the devices could do, from 0 to 1, where
      the FLOPs of the model and the peak of the device are known.
    - ``train_peak_memory_allocated_mib`` and ``train_peak_memory_reserved_mib``: the most that tensors, and the
      allocator, took of the memory of a device, where there is one that says so. Its counters are reset for each value.
    - ``train_resident_memory_mib``: memory of a process on the host at the moment, without that of loader workers. Of
      memory the process with the most counts.

    Each value is of the time since the one before. It is the time of training alone: evaluation and prediction are left
    out; what callbacks do within an epoch, such as saving, is not, because it holds training up. The first updates of a
    run, also of one that goes on after an interruption, are left out. Nothing waits for the device but the recording of
    values and the beginning of an evaluation. An epoch that ends early by ``StopTrainingError`` has no value.
    """

    order = -1  # before callbacks that print or send the history, which find the values of the moment

    def __init__(
        self,
        every_n_updates: int | None = None,
        skip_first_n_updates: int = 3,
        count_tokens: Callable[[Any], int | Tensor] | None = None,
        flops_per_sample: float | None = None,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
    ) -> None:
        """Take when to record, and what the utilisation needs to know.

        Args:
            every_n_updates: counted over the whole run; None for the ends of epochs alone.
            skip_first_n_updates: of each run, which are slow: compilation, choice of kernels, the allocator's growth.
            count_tokens: returns the tokens, or other items, in a batch of this process, as a number or a scalar
                tensor, which is summed on its device.
            flops_per_sample: floating point operations that the model needs to train on a sample, forward and backward
                pass; three times those of its forward pass.
            flops_per_token: the same for a token; 6 times the number of parameters for a transformer with short
                sequences.
            peak_flops: FLOP/s that one device can do in the precision of the run; None looks it up by the name of the
                device, see ``find_peak_flops``.

        Raises:
            ValueError: if a number is too small, or both kinds of FLOPs are given.
        """
        if every_n_updates is not None and every_n_updates < 1:
            raise ValueError(f"every_n_updates must be at least 1, or None, got {every_n_updates}.")
        if skip_first_n_updates < 0:
            raise ValueError(f"skip_first_n_updates must be at least 0, got {skip_first_n_updates}.")
        numbers = {"flops_per_sample": flops_per_sample, "flops_per_token": flops_per_token, "peak_flops": peak_flops}
        for name, number in numbers.items():
            if number is not None and not number > 0:
                raise ValueError(f"{name} must be above 0, or None, got {number}.")
        if flops_per_sample is not None and flops_per_token is not None:
            raise ValueError("the model's FLOPs are flops_per_sample or flops_per_token, not both.")
        self.every_n_updates = every_n_updates
        self.skip_first_n_updates = skip_first_n_updates
        self.count_tokens = count_tokens
        self.flops_per_sample = flops_per_sample
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self._peak_of_device: float | None = None
        self._first_update = 0
        self._interval: _Interval | None = None

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Find out what the device can do, and say so where it is needed and not known."""
        self._first_update, self._interval = trainer.num_updates, None
        self._peak_of_device = self.peak_flops or find_peak_flops(trainer.device)
        if self._peak_of_device is None and (self.flops_per_sample or self.flops_per_token):
            trainer.print(
                f"ThroughputCallback: the peak FLOP/s of {_name_of(trainer.device)!r} are not known, so there will be "
                "no train_model_flop_utilisation; pass peak_flops."
            )

    def on_train_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Have the waiting for data measured, and begin to measure the rest once the first updates are over."""
        assert trainer.data_pass is not None, "the event is one of a pass"
        trainer.data_pass.loader.seconds_waiting = 0.0
        self._begin_if_warm(trainer)

    def on_train_step_end(self, trainer: Trainer, batch: Any, batch_output: dict[str, Any], **kwargs: Any) -> None:
        """Count the tokens of the batch. Raises ValueError if they are needed and not known."""
        if self._interval is None:
            return
        if self.count_tokens is not None:
            num_tokens: Any = self.count_tokens(batch)
        else:
            num_tokens = batch_output.get("num_items_in_batch")
        if num_tokens is None:
            if self.flops_per_token is not None:
                raise ValueError(
                    "ThroughputCallback(flops_per_token=...) needs to know the tokens: pass count_tokens, or return "
                    "'num_items_in_batch' from calculate_train_batch_loss."
                )
            return
        if not trainer.has_samples:
            num_tokens = 0
        elif isinstance(num_tokens, Tensor):
            num_tokens = num_tokens.detach().to(torch.float32 if num_tokens.device.type == "mps" else torch.float64)
        before = self._interval.num_tokens
        self._interval.num_tokens = (0 if before is None else before) + num_tokens

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record if it is time; begin to measure after the first updates."""
        every = self.every_n_updates
        if self._interval is None:
            self._begin_if_warm(trainer)
        elif every is not None and trainer.num_updates % every == 0:
            self._record(trainer)
            self._begin_if_warm(trainer)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record, and measure no further until the next epoch begins."""
        self._record(trainer)

    def on_eval_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Stop the clock: what comes is no training."""
        interval = self._interval
        if interval is not None and interval.evaluation_start is None:
            interval.evaluation_start = _read_clock(trainer.device)
            interval.peak_bytes = _larger(interval.peak_bytes, _peak_bytes(trainer.device))

    on_prediction_run_begin = on_eval_epoch_begin

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Let the clock go on."""
        interval = self._interval
        if interval is not None and interval.evaluation_start is not None:
            interval.seconds_evaluating += _read_clock(trainer.device) - interval.evaluation_start
            interval.evaluation_start = None
            _reset_peak_bytes(trainer.device)

    # Also of an evaluation that failed within the run, if somebody caught it.
    on_evaluation_run_end = on_eval_epoch_end
    on_prediction_run_end = on_eval_epoch_end

    def on_train_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Forget what a run that failed has not recorded."""
        self._interval = None

    def _begin_if_warm(self, trainer: Trainer) -> None:
        if trainer.num_updates - self._first_update >= self.skip_first_n_updates:
            _reset_peak_bytes(trainer.device)
            now = _read_clock(trainer.device)
            self._interval = _Interval(now, trainer.num_samples, _seconds_waiting(trainer))

    def _record(self, trainer: Trainer) -> None:
        """Put the values of the interval into the history, and end it. Collective; waits for the device."""
        interval, self._interval = self._interval, None
        if interval is None or trainer.num_samples == interval.first_sample:
            return
        num_tokens = interval.num_tokens
        if isinstance(num_tokens, Tensor):
            num_tokens = float(num_tokens.item())  # waits for the device: a log point
        mine = {
            "seconds": _read_clock(trainer.device) - interval.start - interval.seconds_evaluating,
            "seconds_waiting": _seconds_waiting(trainer) - interval.seconds_waited_before,
            "num_tokens": num_tokens,
            "peak_flops": self._peak_of_device,
            "peak_bytes": _larger(interval.peak_bytes, _peak_bytes(trainer.device)),
            "resident_bytes": psutil.Process().memory_info().rss,
        }
        rows = distributed.gather_rows(trainer.accelerator, mine)
        of_all: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in mine}
        seconds = max(of_all["seconds"])
        num_samples = trainer.num_samples - interval.first_sample
        values = {"samples_per_second": num_samples / seconds}
        flops = None if self.flops_per_sample is None else self.flops_per_sample * num_samples
        if None not in of_all["num_tokens"]:
            values["tokens_per_second"] = sum(of_all["num_tokens"]) / seconds
            flops = flops if self.flops_per_token is None else self.flops_per_token * sum(of_all["num_tokens"])
        values["data_wait_share"] = max(of_all["seconds_waiting"]) / seconds
        if flops is not None and None not in of_all["peak_flops"]:
            values["model_flop_utilisation"] = flops / (seconds * sum(of_all["peak_flops"]))
        if _has_peak_bytes(trainer.device):
            values["peak_memory_allocated_mib"] = max(allocated for allocated, _ in of_all["peak_bytes"]) / _MIB
            values["peak_memory_reserved_mib"] = max(reserved for _, reserved in of_all["peak_bytes"]) / _MIB
        values["resident_memory_mib"] = max(of_all["resident_bytes"]) / _MIB
        for name, value in values.items():
            trainer.run_history.update_metric(f"train_{name}", value)


def find_peak_flops(device: torch.device) -> float | None:
    """Return the FLOP/s that a well-known GPU can do, None for any other device.

    The figures are those of the vendors' data sheets for dense products in bf16, in fp16 where a GPU has no bf16. A run
    in another precision has another peak, which ``ThroughputCallback(peak_flops=...)`` takes.
    """
    name = _name_of(device)
    if "MIG" in name.split():  # a part of a GPU
        return None
    return next((peak for words, peak in _PEAK_FLOPS if re.search(rf"\b({words})\b", name)), None)


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _seconds_waiting(trainer: Trainer) -> float:
    """Return the seconds that this process has waited for training batches in this epoch."""
    assert trainer.data_pass is not None, "an epoch is in progress"
    return trainer.data_pass.loader.seconds_waiting or 0.0


def _read_clock(device: torch.device) -> float:
    """Return the time in seconds once the device has done what it was given."""
    if (synchronize := getattr(getattr(torch, device.type, None), "synchronize", None)) is not None:
        synchronize()  # waits: the device runs behind the host, and its time is what counts; at log points only
    return time.perf_counter()


def _has_peak_bytes(device: torch.device) -> bool:
    return hasattr(getattr(torch, device.type, None), "max_memory_reserved")


def _peak_bytes(device: torch.device) -> tuple[int, int]:
    if not _has_peak_bytes(device):
        return 0, 0
    module = getattr(torch, device.type)
    return module.max_memory_allocated(device), module.max_memory_reserved(device)


def _reset_peak_bytes(device: torch.device) -> None:
    if _has_peak_bytes(device):
        getattr(torch, device.type).reset_peak_memory_stats(device)


def _larger(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    return max(first[0], second[0]), max(first[1], second[1])

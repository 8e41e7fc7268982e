"""What a run takes of the machine: processors, memory, GPUs and disk, measured beside the training."""

from __future__ import annotations

import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from pytorch_accelerated import distributed
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.callbacks.saving import save_directories

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

_GIB, _MIB = 2**30, 2**20
_SECONDS_BETWEEN_PEAKS = 0.5  # at most, between two looks at the memory of the process
_PHASES = ("training", "evaluation", "prediction")


def _mean(values: Iterable[float]) -> float:
    several = list(values)
    return sum(several) / len(several)


# How the values that several processes, or moments, have of something become one.
_REDUCE: dict[str, Callable[[Iterable[float]], float]] = {"mean": _mean, "max": max, "min": min}


class SystemStatsCallback(TrainerCallback):
    """Record what a run takes of the machine, measured by a thread of its own so that training does not wait for it.

    The run history gains, at the end of each epoch and evaluation, and every ``every_n_updates``, values for the time
    since they were last recorded. They are the same on every process. One process of each machine measures the machine.

    - ``system_cpu_percent``: of all processors of a machine; mean over the time and the machines.
    - ``system_process_cpu_percent``: of a process with its children, such as loader workers; 100 is one processor.
      Mean over the time, of the process with the most.
    - ``system_memory_available_gib``: smallest value of the time, of the machine with the least.
    - ``system_process_memory_gib``: resident memory of a process without its children; the most.
    - ``system_disk_free_gib``: of the file system of the run directory; the least.
    - ``system_disk_read_mib_per_second``, ``system_disk_written_mib_per_second``: by a process and its children, where
      the system says so; of the process with the most.
    - ``system_gpu_memory_allocated_gib``, ``system_gpu_memory_reserved_gib``: by torch, on CUDA devices; the most.
    - ``system_gpu_utilisation_percent``, ``system_gpu_memory_used_gib``: of the device, by whomever it is used; mean
      over the time and the devices, and the most. They need nvidia-ml-py: ``pip install nvidia-ml-py``.
    - ``system_peak_memory_training_gib``, ``..._evaluation_gib``, ``..._prediction_gib``: the most resident memory of a
      process in this phase since the run began, looked at twice a second and where the phase begins and ends.
    - ``system_peak_gpu_memory_training_gib`` and so on: the most that tensors took of a device, from torch's own
      counters, which are reset where an evaluation or a prediction begins and ends.

    Where nothing was measured since the last time, as in an epoch that is shorter than ``every_n_seconds``, nothing is
    recorded but the memory of the process. ``evaluate`` and ``predict`` alone record their peaks when they end.
    """

    order = -2  # before ThroughputCallback, which resets torch's counters of memory where an evaluation ends

    def __init__(
        self,
        every_n_seconds: float = 10.0,
        every_n_updates: int | None = None,
        disk_path: str | Path | None = None,
        min_free_disk_gib: float = 1.0,
    ) -> None:
        """Take when to measure and to record, and what to warn of.

        Args:
            every_n_seconds: between two measurements.
            every_n_updates: between two recordings within an epoch, counted over the whole run; None for the ends of
                epochs and evaluations alone.
            disk_path: a path on the file system to be watched; None for the run directory, else where the state of the
                run is saved, else the current directory.
            min_free_disk_gib: where less is free than this, a warning is printed, once in a run. 0 for none.

        Raises:
            ValueError: if a number is too small.
        """
        if every_n_seconds <= 0:
            raise ValueError(f"every_n_seconds must be above 0, got {every_n_seconds}.")
        if every_n_updates is not None and every_n_updates < 1:
            raise ValueError(f"every_n_updates must be at least 1, or None, got {every_n_updates}.")
        if min_free_disk_gib < 0:
            raise ValueError(f"min_free_disk_gib must be at least 0, got {min_free_disk_gib}.")
        self.every_n_seconds = every_n_seconds
        self.every_n_updates = every_n_updates
        self.disk_path = None if disk_path is None else Path(disk_path)
        self.min_free_disk_gib = min_free_disk_gib
        self._sampler: _Sampler | None = None
        self._depth = 0  # of runs: an evaluation may be run inside a training run
        self._is_warned = False
        self._is_gpu_told = False

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Begin to measure."""
        self._begin(trainer, "training")

    def on_evaluation_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Begin to measure, unless a training run has."""
        self._begin(trainer, None)

    on_prediction_run_begin = on_evaluation_run_begin

    def on_eval_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """End the phase; the next begins with the first step, when other callbacks have heard of it."""
        if self._sampler is not None:
            self._sampler.end_phase()

    on_predict_epoch_begin = on_eval_epoch_begin

    def on_eval_step_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Begin the phase of evaluation with its first step."""
        if self._sampler is not None and self._sampler.phase is None:
            self._sampler.begin_phase("evaluation")

    def on_predict_step_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Begin the phase of prediction with its first step."""
        if self._sampler is not None and self._sampler.phase is None:
            self._sampler.begin_phase("prediction")

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """End the phase of evaluation, and record."""
        if self._sampler is not None:
            self._sampler.end_phase()
            self._record(trainer)
            if trainer.is_training_run:
                self._sampler.begin_phase("training")

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record."""
        self._record(trainer)

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Record if it is time, and warn at once if the disk is almost full."""
        every = self.every_n_updates
        if every is not None and trainer.num_updates % every == 0:
            self._record(trainer)
        elif self._sampler is not None and self._sampler.disk_free_gib is not None:
            self._check_disk(trainer, self._sampler.disk_free_gib)

    def on_predict_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """End the phase of prediction, and record."""
        if self._sampler is not None:
            self._sampler.end_phase()
            self._record(trainer)

    def on_train_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Stop measuring where the outermost run ends, also where it failed."""
        self._depth -= 1
        if self._sampler is None:
            return
        if trainer.is_training_run or self._depth <= 0:
            sampler, self._sampler, self._depth = self._sampler, None, 0
            sampler.stop()
        else:
            self._sampler.end_phase()
            self._sampler.begin_phase("training")

    on_evaluation_run_end = on_train_run_end
    on_prediction_run_end = on_train_run_end

    def _begin(self, trainer: Trainer, phase: str | None) -> None:
        if phase == "training" and self._sampler is not None:  # of a run whose end was not heard
            self._sampler.stop()
            self._sampler, self._depth = None, 0
        self._depth += 1
        if self._sampler is not None:
            return
        self._is_warned = False
        places = [self.disk_path, trainer.run_dir, *save_directories(trainer), Path.cwd()]
        path = _existing(next(place for place in places if place is not None))
        gpu = _Gpu(trainer.device) if trainer.device.type == "cuda" else None
        if gpu is not None and gpu.problem is not None and not self._is_gpu_told:
            self._is_gpu_told = True
            trainer.print(f"SystemStatsCallback: there will be no utilisation of GPUs, because {gpu.problem}")
        self._sampler = _Sampler(self.every_n_seconds, path, trainer.accelerator.is_local_main_process, gpu)
        self._sampler.start(phase)
        self._check_disk(trainer, _free_gib(path))

    def _record(self, trainer: Trainer) -> None:
        """Put what was measured since the last time into the history. Collective."""
        if self._sampler is None:
            return
        rows = distributed.gather_rows(trainer.accelerator, self._sampler.take())
        for name, how in _METRICS.items():
            values = [row[name] for row in rows if name in row]
            if values:
                value = _REDUCE[how](values)
                trainer.run_history.update_metric(f"system_{name}", value)
                if name == "disk_free_gib":
                    self._check_disk(trainer, value)

    def _check_disk(self, trainer: Trainer, free_gib: float) -> None:
        if free_gib < self.min_free_disk_gib and not self._is_warned:
            self._is_warned = True
            assert self._sampler is not None, "it measures"
            trainer.print(
                f"SystemStatsCallback: only {free_gib:.2f} GiB of disk are free where {self._sampler.path} is, less "
                f"than min_free_disk_gib={self.min_free_disk_gib:g}: the run will fail when it cannot save."
            )


# What is recorded, and which of the values of several processes.
_METRICS = {
    "cpu_percent": "mean",
    "process_cpu_percent": "max",
    "memory_available_gib": "min",
    "process_memory_gib": "max",
    "disk_free_gib": "min",
    "disk_read_mib_per_second": "max",
    "disk_written_mib_per_second": "max",
    "gpu_utilisation_percent": "mean",
    "gpu_memory_used_gib": "max",
    "gpu_memory_allocated_gib": "max",
    "gpu_memory_reserved_gib": "max",
}
# Which of the values of several moments.
_OVER_TIME = dict(_METRICS) | {
    "process_cpu_percent": "mean",
    "disk_read_mib_per_second": "mean",
    "disk_written_mib_per_second": "mean",
}
_METRICS |= {f"peak_{kind}memory_{phase}_gib": "max" for kind in ("", "gpu_") for phase in _PHASES}


class _Sampler:
    """Measure in a thread. The thread and the training share nothing but what is guarded by ``lock``."""

    def __init__(self, interval: float, path: Path, measures_machine: bool, gpu: _Gpu | None) -> None:
        self.path = path
        self.phase: str | None = None
        self.disk_free_gib: float | None = None
        self.lock = threading.Lock()
        self._interval = interval
        self._measures_machine = measures_machine
        self._gpu = gpu
        self._values: dict[str, list[float]] = {}
        self._peaks: dict[str, float] = {}
        self._process = psutil.Process()
        self._tree = _ProcessTree(self._process)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system statistics", daemon=True)

    def start(self, phase: str | None) -> None:
        if phase is not None:
            self.begin_phase(phase)
        _hold_back_at_forks(self)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a measurement that hangs is not waited for long."""
        self._stop.set()
        self._thread.join(timeout=2)
        _samplers.discard(self)

    def begin_phase(self, phase: str) -> None:
        """Count memory as taken by a phase from now on."""
        with self.lock:
            self.phase = phase
            if self._gpu is not None:
                # ThroughputCallback has taken the peak of training by now, or is about to reset it as well.
                self._gpu.reset_peak()
            self._look_at_memory()

    def end_phase(self) -> None:
        """Count memory as taken by no phase from now on."""
        with self.lock:
            self._look_at_memory()
            self.phase = None

    def take(self) -> dict[str, float]:
        """Return what was measured since the last call, and the peaks since the beginning."""
        with self.lock:
            self._look_at_memory()
            values, self._values = self._values, {}
            taken = {name: _REDUCE[_OVER_TIME[name]](several) for name, several in values.items()}
            return taken | self._peaks

    def _run(self) -> None:
        psutil.cpu_percent()  # which says what was used since the thread last called it
        next_sample = time.monotonic() + self._interval
        while not self._stop.wait(max(min(next_sample - time.monotonic(), _SECONDS_BETWEEN_PEAKS), 0.0)):
            with self.lock:
                self._look_at_memory()
                if time.monotonic() >= next_sample:
                    self._measure()
                    next_sample = time.monotonic() + self._interval

    def _measure(self) -> None:
        found = self._tree.measure()
        if self._gpu is not None:
            found |= self._gpu.measure()
        if self._measures_machine:
            found["cpu_percent"] = psutil.cpu_percent()
            found["memory_available_gib"] = psutil.virtual_memory().available / _GIB
            if os.path.exists(self.path):  # somebody may delete it while the run goes on
                found["disk_free_gib"] = self.disk_free_gib = _free_gib(self.path)
        for name, value in found.items():
            self._values.setdefault(name, []).append(value)

    def _look_at_memory(self) -> None:
        resident = self._process.memory_info().rss / _GIB
        so_far = self._values.get("process_memory_gib", [0.0])
        self._values["process_memory_gib"] = [max(resident, *so_far)]
        if self.phase is not None:
            found = {f"peak_memory_{self.phase}_gib": resident}
            if self._gpu is not None:
                found[f"peak_gpu_memory_{self.phase}_gib"] = self._gpu.peak_gib()
            for name, value in found.items():
                self._peaks[name] = max(value, self._peaks.get(name, 0.0))


# A child that is forked while another thread holds a lock, its own or one in the C library, has that lock held for
# ever. So forks, such as those of loader workers, wait for a measurement to be over, which takes milliseconds.
_samplers: weakref.WeakSet[_Sampler] = weakref.WeakSet()
_held: list[_Sampler] = []
_is_registered = False


def _hold_back_at_forks(sampler: _Sampler) -> None:
    global _is_registered
    _samplers.add(sampler)
    if not _is_registered and hasattr(os, "register_at_fork"):
        _is_registered = True
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def _before_fork() -> None:
    for sampler in list(_samplers):
        if sampler.lock.acquire(timeout=5):  # what hangs longer, on a dead file system, must not hold up the training
            _held.append(sampler)


def _after_fork() -> None:
    while _held:
        _held.pop().lock.release()


def _after_fork_in_child() -> None:
    _after_fork()
    _samplers.clear()  # their threads are the parent's


class _ProcessTree:
    """Measure what a process and its children use."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._used: dict[tuple[int, float], tuple[float, float, float]] = {}
        self._time = time.monotonic()
        self._total_before = self._total()

    def measure(self) -> dict[str, float]:
        """Return the use since the last call."""
        now, total = time.monotonic(), self._total()
        seconds = max(now - self._time, 1e-9)
        used = [(after - before) / seconds for after, before in zip(total, self._total_before, strict=True)]
        self._time, self._total_before = now, total
        found = {"process_cpu_percent": 100 * used[0]}
        if hasattr(self._process, "io_counters"):  # not on macOS
            found |= {
                "disk_read_mib_per_second": used[1] / _MIB,
                "disk_written_mib_per_second": used[2] / _MIB,
            }
        return found

    def _total(self) -> tuple[float, float, float]:
        """Return seconds of processors and bytes read and written; what children that are gone had used stays in."""
        for process in [self._process, *self._process.children(recursive=True)]:
            # A child that is gone, or not ours to look at, has used what it had when it was last seen.
            with suppress(psutil.Error):
                key = process.pid, process.create_time()
                times, (read, written) = process.cpu_times(), self._used.get(key, (0.0, 0.0, 0.0))[1:]
                with suppress(psutil.Error, AttributeError):  # macOS has no such counters
                    disk = process.io_counters()
                    read, written = disk.read_bytes, disk.write_bytes
                self._used[key] = times.user + times.system, read, written
        cpu, read, written = (sum(column) for column in zip(*self._used.values(), strict=True))
        return cpu, read, written


class _Gpu:
    """Measure the CUDA device of this process, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        # By its number: the current device is that of a thread, and this one's thread is another than the training's.
        self._device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        self._nvml: Any = None
        self._handle: Any = None
        self.problem: str | None = None
        """Why the device itself cannot be measured; None if it can."""
        try:
            pynvml: Any = import_module("pynvml")  # which has no types
        except ImportError:
            self.problem = "nvidia-ml-py is not installed: pip install nvidia-ml-py"
            return
        try:
            pynvml.nvmlInit()
            # By its identifier: CUDA_VISIBLE_DEVICES gives the devices other numbers than the driver's.
            uuid = torch.cuda.get_device_properties(device).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._nvml = pynvml
            self._measure_device()
        except pynvml.NVMLError as error:
            self._nvml = None
            self.problem = f"the driver does not tell: {error}"

    def measure(self) -> dict[str, float]:
        """Return what torch has allocated and, where it can be measured, the use of the device."""
        found = {
            "gpu_memory_allocated_gib": torch.cuda.memory_allocated(self._device) / _GIB,
            "gpu_memory_reserved_gib": torch.cuda.memory_reserved(self._device) / _GIB,
        }
        if self._nvml is not None:
            try:
                found |= self._measure_device()
            except self._nvml.NVMLError:  # for the moment; there is one value less in the mean
                return found
        return found

    def peak_gib(self) -> float:
        """Return the most that tensors took since the counters were reset."""
        return torch.cuda.max_memory_allocated(self._device) / _GIB

    def reset_peak(self) -> None:
        """Begin to count anew."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def _measure_device(self) -> dict[str, float]:
        return {
            "gpu_utilisation_percent": float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu),
            "gpu_memory_used_gib": self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used / _GIB,
        }


def _existing(path: Path) -> Path:
    """Return the path, or the nearest directory above it that is there."""
    path = path.absolute()
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def _free_gib(path: Path) -> float:
    return shutil.disk_usage(path).free / _GIB

"""What a run takes of the machine: measured beside it, recorded on all processes alike, never in its way."""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LambdaCallback, SaveTrainingStateCallback
from pytorch_accelerated.callbacks.system import SystemStatsCallback
from tests.support import PlainDataset, make_data, make_mlp, run_processes

MACHINE = {"system_cpu_percent", "system_memory_available_gib", "system_disk_free_gib"}
PROCESS = {
    "system_process_cpu_percent",
    "system_process_memory_gib",
    "system_disk_read_mib_per_second",
    "system_disk_written_mib_per_second",
}
THREAD = "system statistics"


class Slow(Trainer):
    """Takes 0.03 seconds for a step, in which a processor is busy."""

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        end = time.thread_time() + 0.03
        while time.thread_time() < end:
            pass
        return super().calculate_train_batch_loss(batch)


def make_trainer(*callbacks: Any, cls: type[Trainer] = Slow) -> Trainer:
    return cls(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), callbacks, seed=0)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == THREAD]


def test_an_epoch_records_what_it_took() -> None:
    seen: list[int] = []
    look = LambdaCallback(on_train_update_end=lambda trainer, **_: seen.append(len(threads())))
    history = make_trainer(SystemStatsCallback(every_n_seconds=0.05), look).train(make_data(80), 2, make_data(8))
    assert set(seen) == {1} and threads() == []
    peaks = {"system_peak_memory_training_gib", "system_peak_memory_evaluation_gib"}
    assert {name for name in history.get_metric_names() if name.startswith("system")} == MACHINE | PROCESS | peaks
    epochs = [counters["current_epoch"] for counters in history.get_metric_counters("system_process_cpu_percent")]
    assert set(epochs) == {1, 2} and len(epochs) <= 4  # of each epoch, and of its evaluation if that was long enough
    cpu = history.get_metric_values("system_process_cpu_percent")[0]
    assert 30 < cpu < 400, "one processor was busy, on a machine that others use, too"
    assert 0 < history.get_latest_metric("system_cpu_percent") <= 100
    resident = psutil.Process().memory_info().rss / 2**30
    assert history.get_latest_metric("system_process_memory_gib") == pytest.approx(resident, rel=0.2)
    available, disk = psutil.virtual_memory().available / 2**30, psutil.disk_usage(os.getcwd()).free / 2**30
    assert history.get_latest_metric("system_memory_available_gib") == pytest.approx(available, rel=0.5)
    assert history.get_latest_metric("system_disk_free_gib") == pytest.approx(disk, rel=0.1)


def test_values_are_recorded_within_an_epoch_as_well() -> None:
    callback = SystemStatsCallback(every_n_seconds=0.02, every_n_updates=4)
    history = make_trainer(callback).train(make_data(80), 1)
    updates = [counters["num_updates"] for counters in history.get_metric_counters("system_process_memory_gib")]
    assert updates == [4, 8, 10]


def test_what_is_shorter_than_the_interval_records_no_more_than_memory() -> None:
    history = make_trainer(SystemStatsCallback(every_n_seconds=3600), cls=Trainer).train(make_data(8), 1)
    names = {name for name in history.get_metric_names() if name.startswith("system")}
    assert names == {"system_process_memory_gib", "system_peak_memory_training_gib"}


class Greedy(Slow):
    """Takes 200 MiB in a phase, and gives them back."""

    greedy = "evaluation"

    def take(self) -> None:
        block = bytearray(os.urandom(2**20) * 200)  # pages that are written to
        time.sleep(0.05)  # looked at more often than that, in the test
        del block

    def calculate_eval_batch_loss(self, batch: Any) -> Any:
        self.take()
        return super().calculate_eval_batch_loss(batch)

    def calculate_predictions(self, batch: Any) -> Any:
        self.take()
        return super().calculate_predictions(batch)


def test_the_peak_of_each_phase_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytorch_accelerated.callbacks.system._SECONDS_BETWEEN_PEAKS", 0.005)
    trainer = make_trainer(SystemStatsCallback(), cls=Greedy)
    history = trainer.train(make_data(32), 1, make_data(16))
    training, evaluation = (
        history.get_latest_metric(f"system_peak_memory_{phase}_gib") for phase in ("training", "evaluation")
    )
    assert evaluation - training > 0.15, (training, evaluation)
    assert "system_peak_memory_prediction_gib" not in history.get_metric_names()
    trainer.predict(make_data(8))
    assert history.get_latest_metric("system_peak_memory_prediction_gib") - training > 0.15
    num_values = len(history.get_metric_values("system_peak_memory_evaluation_gib"))
    trainer.evaluate(make_data(8))
    assert len(history.get_metric_values("system_peak_memory_evaluation_gib")) == num_values + 1
    assert threads() == []


@pytest.mark.parametrize("event", ["on_train_run_begin", "on_train_step_end", "on_eval_step_end", "on_train_run_end"])
@pytest.mark.parametrize("error", [RuntimeError("enough"), KeyboardInterrupt()])
def test_the_thread_ends_whatever_happens(event: str, error: BaseException) -> None:
    def fail(trainer: Trainer, **kwargs: Any) -> None:
        if event != "on_train_run_end" or isinstance(error, Exception):
            raise error

    trainer = make_trainer(SystemStatsCallback(), LambdaCallback(**{event: fail}), cls=Trainer)
    if event == "on_train_run_end" and not isinstance(error, Exception):
        trainer.train(make_data(8), 1)
    else:
        with pytest.raises(type(error)):
            trainer.train(make_data(8), 1, make_data(8))
    assert threads() == []


def test_a_run_inside_a_run_goes_on_measuring() -> None:
    phases: list[Any] = []
    stats = SystemStatsCallback(every_n_seconds=0.02)

    def evaluate(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == 2:
            trainer.evaluate(make_data(4))
            trainer.predict(make_data(4))
        assert stats._sampler is not None
        phases.append((stats._sampler.phase, len(threads())))

    history = make_trainer(stats, LambdaCallback(on_train_update_end=evaluate)).train(make_data(32), 1)
    assert phases == [("training", 1)] * 4
    assert {"system_peak_memory_evaluation_gib", "system_peak_memory_prediction_gib"} <= history.get_metric_names()


class Forking(Dataset[Any]):
    """Makes and ends child processes all the time, as loaders with workers do."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        if (child := os.fork()) == 0:
            psutil.Process().memory_info()  # uses what the thread may have been in the middle of
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        return torch.zeros(4), 0


@pytest.mark.timeout(60)
def test_forks_do_not_meet_a_measurement_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_accelerated.callbacks import system

    monkeypatch.setattr(system, "_SECONDS_BETWEEN_PEAKS", 0.0)
    stats, held = SystemStatsCallback(every_n_seconds=1e-6), []
    trainer = make_trainer(stats, cls=Trainer)

    def look(trainer: Trainer, **kwargs: Any) -> None:
        if (child := os.fork()) == 0:  # in which the lock is free, however busy the thread of the parent is
            assert stats._sampler is not None
            os._exit(0 if stats._sampler.lock.acquire(timeout=1) else 1)
        held.append(os.waitpid(child, 0)[1])

    trainer.callback_handler.add_callback(LambdaCallback(on_train_update_end=look))
    trainer.train(Forking(), 1, per_device_batch_size=4)
    assert held == [0] * 6


@pytest.mark.timeout(60)
def test_loader_workers_run_beside_it_and_are_counted() -> None:
    stats = SystemStatsCallback(every_n_seconds=0.01)
    history = make_trainer(stats).train(
        PlainDataset(make_data(80)), 2, train_dataloader_kwargs={"num_workers": 2, "multiprocessing_context": "fork"}
    )
    assert history.get_latest_metric("system_process_cpu_percent") > 10


def test_a_full_disk_is_told_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saver = SaveTrainingStateCallback(tmp_path / "not there yet")
    stats = SystemStatsCallback(every_n_seconds=0.01, min_free_disk_gib=1e9)
    make_trainer(stats, saver).train(make_data(32), 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "GiB of disk are free" in line]
    assert len(lines) == 1 and f"where {tmp_path} is, less than min_free_disk_gib=1e+09" in lines[0]
    make_trainer(SystemStatsCallback(every_n_seconds=0.01), cls=Trainer).train(make_data(32), 2)
    assert capsys.readouterr().out == ""


def test_a_disk_that_fills_up_during_an_epoch_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    stats = SystemStatsCallback(every_n_seconds=0.01)

    def fill(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == 4:
            stats.min_free_disk_gib = 1e9
        trainer.print(trainer.num_updates)

    make_trainer(stats, LambdaCallback(on_train_update_end=fill)).train(make_data(80), 1)
    lines = capsys.readouterr().out.splitlines()
    position = next(number for number, line in enumerate(lines) if "GiB of disk" in line)
    assert lines[position - 1] == "4" and lines[position + 1] == "5"


def _train(every_n_updates: int | None) -> Any:
    stats, measured = SystemStatsCallback(0.02, every_n_updates), set()

    def look(trainer: Trainer, **kwargs: Any) -> None:
        assert stats._sampler is not None
        measured.update(stats._sampler._values)

    callbacks = stats, LambdaCallback(on_train_step_end=look)
    history = make_trainer(*callbacks).train(make_data(160), 2, make_data(16))
    return history.state_dict(), threads(), measured


def test_two_processes_have_the_same_history() -> None:
    (first, first_threads, on_first), (second, second_threads, on_second) = run_processes(_train, 2, 4)
    assert first == second
    # One process measures the machine, each itself.
    machine = {name.removeprefix("system_") for name in MACHINE}
    assert machine <= on_first and not machine & on_second and "process_cpu_percent" in on_second
    assert set(first["metrics"]) >= MACHINE | PROCESS
    assert first_threads == second_threads == []


@pytest.mark.parametrize(
    "arguments",
    [{"every_n_seconds": 0}, {"every_n_updates": 0}, {"min_free_disk_gib": -1}],
)
def test_arguments_that_make_no_sense_are_refused(arguments: Any) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
        SystemStatsCallback(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_gpu_is_that_of_its_phase() -> None:
    from pytorch_accelerated.callbacks import ThroughputCallback

    class Takes(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> Any:
            torch.empty(300 * 2**20, dtype=torch.uint8, device=self.device)
            return super().calculate_train_batch_loss(batch)

        def calculate_eval_batch_loss(self, batch: Any) -> Any:
            torch.empty(100 * 2**20, dtype=torch.uint8, device=self.device)
            return super().calculate_eval_batch_loss(batch)

    callbacks = ThroughputCallback(skip_first_n_updates=0), SystemStatsCallback(every_n_seconds=0.05)
    for order in (callbacks, callbacks[::-1]):
        history = make_trainer(*order, cls=Takes).train(make_data(800), 2, make_data(80))
        peaks = [
            history.get_latest_metric(f"system_peak_gpu_memory_{phase}_gib") for phase in ("training", "evaluation")
        ]
        assert 0.29 < peaks[0] < 0.35 and 0.09 < peaks[1] < 0.2
        assert 299 < history.get_latest_metric("train_peak_memory_allocated_mib") < 350
        assert "system_gpu_memory_reserved_gib" in history.get_metric_names()

"""Traces of single updates, and the figures of all: what is recorded, when, and of what."""

from __future__ import annotations

import inspect
import json
import re
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity
from torch.utils.data import default_collate

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    DEFAULT_CALLBACKS,
    LambdaCallback,
    LogMetricsCallback,
    ProfilerCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    ThroughputCallback,
    TrainerCallback,
)
from pytorch_accelerated.callbacks.profiling import find_peak_flops
from tests.support import Interruption, PlainDataset, Stream, interrupt_at, make_data, make_mlp, run_processes


def make_trainer(*callbacks: Any, **kwargs: Any) -> Trainer:
    return Trainer(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.125), callbacks, seed=5, **kwargs)


# --------------------------------------------------------------------------------------------------------------------
# Traces
# --------------------------------------------------------------------------------------------------------------------


def count_events(path: Path) -> Counter[str]:
    """Return how often each name is in a trace, which must be valid JSON; the number of a step is left out."""
    events = json.loads(path.read_text())["traceEvents"]
    return Counter(re.sub(r"#\d+$", "", event["name"]) for event in events if event.get("ph") == "X")


def count_phases(path: Path) -> tuple[int, int, int, int]:
    """Return the steps of the profiler in a trace, and the forward passes, backward passes and optimizer steps."""
    counts = count_events(path)
    # The network has two linear layers, of which the first has no gradient for its input.
    forward = counts["aten::linear"] / 2
    backward = counts["autograd::engine::evaluate_function: NllLossBackward0"]
    assert forward == int(forward)
    return counts["ProfilerStep"], int(forward), backward, counts["Optimizer.step#SGD.step"]


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_exactly_the_active_updates_are_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(ProfilerCallback(tmp_path / "new" / "traces", wait=2, warmup=1, active=3))
    trainer.train(make_data(80), 1)
    traces = tmp_path / "new" / "traces"
    assert names_in(traces) == ["table_run1_update6_process0.txt", "trace_run1_update6_process0.json"]
    assert count_phases(traces / "trace_run1_update6_process0.json") == (3, 3, 3, 3)
    table = (traces / "table_run1_update6_process0.txt").read_text()
    [step] = [line.split() for line in table.splitlines() if line.split()[:1] == ["Optimizer.step#SGD.step"]]
    assert step[-1] == "3"
    out = capsys.readouterr().out
    first = out.splitlines()[0]
    assert first.startswith("Profiled 3 whole update(s) until update 6: ") and str(traces) in first
    rows = [line for line in out.splitlines() if "%" in line and line.split()[-1].isdigit()]
    assert len(rows) == 10 and out.count("aten::") < table.count("aten::")


def test_each_cycle_has_files_of_its_own_and_nothing_runs_after_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profiler = ProfilerCallback(tmp_path, wait=1, warmup=1, active=2, repeat=2)
    running: list[bool] = []
    look = LambdaCallback(
        on_train_step_end=lambda trainer, **_: running.append(torch.autograd.profiler._is_profiler_enabled)
    )
    make_trainer(profiler, look).train(make_data(96), 1)
    traces = [tmp_path / f"trace_run1_update{update}_process0.json" for update in (4, 8)]
    assert sorted(tmp_path.glob("*.json")) == traces
    assert [count_phases(path) for path in traces] == [(2, 2, 2, 2)] * 2
    out = capsys.readouterr().out
    assert re.findall(r"Profiled (\d+) whole update\(s\) until update (\d+)", out) == [("2", "4"), ("2", "8")]
    # The table is of its own cycle, too.
    table = (tmp_path / "table_run1_update8_process0.txt").read_text()
    assert re.search(r"Optimizer\.step#SGD\.step .* 2 *$", table, re.MULTILINE)
    assert len(running) == 12 and not any(running[8:]) and all(running[2:4])
    assert profiler._profiler is None


def test_a_step_of_the_profiler_is_a_whole_window(tmp_path: Path) -> None:
    trainer = make_trainer(ProfilerCallback(tmp_path, wait=1, warmup=1, active=2))
    trainer.train(make_data(80), 1, per_device_batch_size=4, gradient_accumulation_steps=3)
    assert count_phases(tmp_path / "trace_run1_update4_process0.json") == (2, 6, 6, 2)


def test_an_evaluation_in_between_is_in_the_trace_of_the_update_it_precedes(tmp_path: Path) -> None:
    trainer = make_trainer(ProfilerCallback(tmp_path, wait=1, warmup=1, active=2), StepBasedEvaluationCallback(3))
    trainer.train(make_data(48), 1, make_data(16))
    assert count_phases(tmp_path / "trace_run1_update4_process0.json") == (2, 4, 2, 2)


def test_a_second_run_is_recorded_like_the_first(tmp_path: Path) -> None:
    trainer = make_trainer(ProfilerCallback(tmp_path, wait=1, warmup=1, active=2))
    trainer.train(make_data(48), 1)
    trainer.train(make_data(48), 1, reset_run_history=False)
    assert [path.name for path in sorted(tmp_path.glob("*.json"))] == [
        "trace_run1_update4_process0.json",
        "trace_run2_update10_process0.json",
    ]
    assert {count_phases(path) for path in tmp_path.glob("*.json")} == {(2, 2, 2, 2)}


def test_a_run_that_fails_leaves_what_was_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiler = ProfilerCallback(tmp_path, wait=1, warmup=1, active=5)
    trainer = make_trainer(profiler, interrupt_at(4))
    with pytest.raises(Interruption):
        trainer.train(make_data(80), 1)
    assert names_in(tmp_path) == ["table_run1_update4_process0.txt", "trace_run1_update4_process0.json"]
    # Two whole updates, and the forward pass of the one that failed, whose step the profiler closed.
    assert count_phases(tmp_path / "trace_run1_update4_process0.json") == (3, 3, 2, 2)
    assert "Profiled 2 whole update(s) until update 4" in capsys.readouterr().out
    assert profiler._profiler is None and not torch.autograd.profiler._is_profiler_enabled
    # The callback is as good as new.
    trainer.callback_handler.remove_callback(list(trainer.callback_handler)[1])
    trainer.train(make_data(80), 1)
    assert count_phases(tmp_path / "trace_run2_update7_process0.json") == (5, 5, 5, 5)


def test_the_first_recorded_update_may_be_the_one_that_fails(tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        make_trainer(ProfilerCallback(tmp_path, wait=1, warmup=1, active=2), interrupt_at(2)).train(make_data(80), 1)
    assert count_phases(tmp_path / "trace_run1_update2_process0.json") == (1, 1, 0, 0)


def test_a_run_that_ends_within_a_cycle_leaves_what_was_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(ProfilerCallback(tmp_path, wait=1, warmup=1, active=4, repeat=2)).train(make_data(88), 1)
    assert count_events(tmp_path / "trace_run1_update11_process0.json")["Optimizer.step#SGD.step"] == 3
    out = capsys.readouterr().out
    assert re.findall(r"Profiled (\d+) whole update\(s\) until update (\d+)", out) == [("4", "6"), ("3", "11")]


@pytest.mark.parametrize("num_updates", [1, 2, 3])
def test_a_run_too_short_to_record_says_so(num_updates: int, tmp_path: Path) -> None:
    message = rf"recorded nothing: the run made {num_updates} update\(s\), and recording begins after 2 \+ 1 "
    with pytest.warns(UserWarning, match=message):
        make_trainer(ProfilerCallback(tmp_path, wait=2, warmup=1, active=3)).train(make_data(8 * num_updates), 1)
    assert names_in(tmp_path) == []
    assert not torch.autograd.profiler._is_profiler_enabled


def test_a_cycle_that_was_not_reached_is_no_reason_to_warn(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(ProfilerCallback(tmp_path, wait=1, warmup=1, active=2, repeat=9)).train(make_data(40), 1)
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_a_trace_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    profiler = ProfilerCallback(tmp_path / "traces", wait=1, warmup=1, active=2)

    def block(trainer: Trainer, **kwargs: Any) -> None:
        (tmp_path / "traces" / "table_run1_update4_process0.txt").mkdir()

    with pytest.raises(OSError) as raised:
        make_trainer(profiler, LambdaCallback(on_train_run_begin=block)).train(make_data(80), 1)
    assert "table_run1_update4" in str(raised.value)
    assert not any(name.startswith(".") for name in names_in(tmp_path / "traces"))
    assert profiler._profiler is None and not torch.autograd.profiler._is_profiler_enabled


def test_what_is_recorded_can_be_chosen(tmp_path: Path) -> None:
    profiler = ProfilerCallback(
        tmp_path,
        wait=1,
        warmup=1,
        active=1,
        activities=[ProfilerActivity.CPU],
        record_shapes=True,
        profile_memory=True,
        with_stack=True,
        with_flops=True,
        sort_by="cpu_memory_usage",
    )
    make_trainer(profiler).train(make_data(40), 1)
    table = (tmp_path / "table_run1_update3_process0.txt").read_text()
    assert all(column in table for column in ("Input Shapes", "CPU Mem", "FLOPs")) and "[[8, 4], [8, 4]" in table
    trace = (tmp_path / "trace_run1_update3_process0.json").read_text()
    assert "Input Dims" in trace and "trainer.py" in trace


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"active": 0}, "active must be at least 1, got 0"),
        ({"wait": -1}, "wait must be at least 0, got -1"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"repeat": 0}, "repeat must be at least 1, got 0"),
        ({"row_limit": 0}, "row_limit must be at least 1, got 0"),
        ({"sort_by": "cpu_tiem_total"}, "sort_by='cpu_tiem_total' is no column"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ProfilerCallback(tmp_path, **arguments)


def test_columns_of_accelerators_are_known(tmp_path: Path) -> None:
    assert ProfilerCallback(tmp_path, sort_by="self_cuda_time_total").sort_by == "self_cuda_time_total"


def _profile(directory: Path) -> int:
    trainer = make_trainer(ProfilerCallback(directory, wait=1, warmup=1, active=2))
    trainer.train(make_data(80), 1)
    return trainer.run_config.num_processes


def test_each_process_has_a_trace(tmp_path: Path) -> None:
    assert run_processes(_profile, 2, tmp_path) == [2, 2]
    assert names_in(tmp_path) == [
        f"{kind}_run1_update4_process{process}.{suffix}"
        for kind, suffix in (("table", "txt"), ("trace", "json"))
        for process in (0, 1)
    ]
    for path in tmp_path.glob("*.json"):
        assert count_phases(path) == (2, 2, 2, 2)
        assert any("gloo" in name or "c10d" in name for name in count_events(path))


# --------------------------------------------------------------------------------------------------------------------
# Throughput
# --------------------------------------------------------------------------------------------------------------------


def slow_collate(seconds: float) -> Any:
    """Return a collate function that takes a known time for each batch."""
    return partial(_collate_slowly, seconds)


def _collate_slowly(seconds: float, samples: list[Any]) -> Any:
    if seconds:  # a sleep of no time lets other processes go first
        time.sleep(seconds)
    return default_collate(samples)


class SlowTrainer(Trainer):
    """Takes a known time for each training batch and each evaluation."""

    seconds_per_batch = seconds_per_evaluation = 0.0

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        if self.seconds_per_batch:
            time.sleep(self.seconds_per_batch)
        return super().calculate_train_batch_loss(batch)

    def calculate_eval_batch_loss(self, batch: Any) -> Any:
        if self.seconds_per_evaluation:
            time.sleep(self.seconds_per_evaluation)
        return super().calculate_eval_batch_loss(batch)


def make_slow_trainer(*callbacks: Any, seconds_per_batch: float = 0.0, seconds_per_evaluation: float = 0.0) -> Trainer:
    trainer = SlowTrainer(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.125), callbacks, seed=5)
    trainer.seconds_per_batch, trainer.seconds_per_evaluation = seconds_per_batch, seconds_per_evaluation
    return trainer


class Tokens(Trainer):
    """Says that each sample of class c has c + 1 tokens."""

    as_tensor = True

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        output = super().calculate_train_batch_loss(batch)
        num_items = (batch[1] + 1).sum()
        return {**output, "num_items_in_batch": num_items if self.as_tensor else int(num_items)}


def make_token_trainer(*callbacks: Any) -> Tokens:
    return Tokens(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.125), callbacks, seed=5)


def latest(trainer: Trainer, name: str) -> Any:
    return trainer.run_history.get_latest_metric(f"train_{name}")


def test_rate_and_share_of_a_run_of_known_times() -> None:
    # A batch takes at least 16 ms to read and 16 ms to compute; a busy machine takes longer for both.
    trainer = make_slow_trainer(ThroughputCallback(), seconds_per_batch=0.016)
    start = time.perf_counter()
    trainer.train(PlainDataset(make_data(240)), 1, collate_fn=slow_collate(0.016))
    seconds = time.perf_counter() - start
    assert 240 / seconds * 0.8 < latest(trainer, "samples_per_second") < 8 / 0.032
    assert 0.3 < latest(trainer, "data_wait_share") < 0.7


@pytest.mark.parametrize(("data_seconds", "batch_seconds"), [(0.02, 0.0), (0.0, 0.02)])
def test_the_share_tells_slow_data_from_slow_models(data_seconds: float, batch_seconds: float) -> None:
    trainer = make_slow_trainer(ThroughputCallback(), seconds_per_batch=batch_seconds)
    trainer.train(PlainDataset(make_data(160)), 1, collate_fn=slow_collate(data_seconds))
    share = latest(trainer, "data_wait_share")
    assert share > 0.6 if data_seconds else share < 0.4


@pytest.mark.parametrize("kind", [PlainDataset, Stream])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_waiting_is_counted_in_windows_of_several_batches(kind: Any, num_workers: int) -> None:
    trainer = make_slow_trainer(ThroughputCallback(), seconds_per_batch=0.005)
    kwargs = {"num_workers": num_workers, "shuffle": False}
    data, collate = kind(make_data(160)), slow_collate(0.03)
    trainer.train(data, 1, gradient_accumulation_steps=2, collate_fn=collate, train_dataloader_kwargs=kwargs)
    assert 0.5 < latest(trainer, "data_wait_share") < 1


@pytest.mark.parametrize("every", [None, 4])
def test_evaluation_is_no_training_time(every: int | None) -> None:
    slow = 0.5  # seconds for each evaluation, of which there are nine; training takes less than one of them
    evaluate = StepBasedEvaluationCallback(2)
    trainer = make_slow_trainer(ThroughputCallback(every), evaluate, seconds_per_batch=0.002)
    trainer.seconds_per_evaluation = slow
    trainer.train(make_data(160), 1, make_data(8))
    for rate in trainer.run_history.get_metric_values("train_samples_per_second"):
        # With the evaluations in, 16 samples would take at least half a second: 32 a second.
        assert 50 < rate < 8 / 0.002


def test_evaluations_and_predictions_by_callbacks_are_no_training_time() -> None:
    def interrupt(trainer: Any, **kwargs: Any) -> None:
        if trainer.num_updates == 10:
            trainer.run_evaluation()
            trainer.evaluate(make_data(8))
            trainer.predict(PlainDataset(make_data(8)), collate_fn=slow_collate(0.8))

    trainer = make_slow_trainer(ThroughputCallback(), LambdaCallback(on_train_update_end=interrupt))
    trainer.seconds_per_evaluation = 0.8
    trainer.train(make_data(160), 1, make_data(8))
    assert latest(trainer, "samples_per_second") > 136 / 0.8


def test_an_evaluation_that_fails_and_is_caught_does_not_stop_the_clock() -> None:
    class Broken(SlowTrainer):
        def calculate_eval_batch_loss(self, batch: Any) -> Any:
            raise RuntimeError("broken")

    def interrupt(trainer: Any, **kwargs: Any) -> None:
        if trainer.num_updates == 4:
            with pytest.raises(RuntimeError, match="broken"):
                trainer.evaluate(make_data(8))

    callbacks = ThroughputCallback(), LambdaCallback(on_train_update_end=interrupt)
    trainer = Broken(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.125), callbacks, seed=5)
    trainer.seconds_per_batch = 0.005
    trainer.train(make_data(160), 1)
    assert latest(trainer, "samples_per_second") < 8 / 0.005


def test_the_first_updates_of_each_run_are_left_out() -> None:
    def be_slow(trainer: Any, **kwargs: Any) -> None:
        if trainer.num_updates - first[0] < 2:
            time.sleep(0.5)

    first = [0]
    throughput = ThroughputCallback(skip_first_n_updates=2)
    trainer = make_trainer(throughput, LambdaCallback(on_train_step_end=be_slow))
    trainer.train(make_data(80), 1)
    assert latest(trainer, "samples_per_second") > 64 / 0.8
    first[0] = 10
    trainer.train(make_data(80), 1, reset_run_history=False)
    assert latest(trainer, "samples_per_second") > 64 / 0.8
    throughput.skip_first_n_updates, first[0] = 0, 0
    trainer.train(make_data(80), 1)
    assert latest(trainer, "samples_per_second") < 80


def test_values_come_every_n_updates_with_the_counters_of_the_moment() -> None:
    trainer = make_trainer(ThroughputCallback(every_n_updates=4, skip_first_n_updates=2))
    trainer.train(make_data(80), 2)  # ten updates in each of two epochs
    counters = trainer.run_history.get_metric_counters("train_samples_per_second")
    moments = [(row["current_epoch"], row["num_updates"], row["num_samples"]) for row in counters]
    assert moments == [(1, 4, 32), (1, 8, 64), (1, 10, 80), (2, 12, 96), (2, 16, 128), (2, 20, 160)]


def test_an_epoch_has_one_value_and_a_run_too_short_has_none() -> None:
    trainer = make_trainer(ThroughputCallback())
    trainer.train(make_data(80), 2)
    assert len(trainer.run_history.get_metric_values("train_samples_per_second")) == 2
    trainer.train(make_data(24), 1)
    assert not any("per_second" in name for name in trainer.run_history.get_metric_names())


def test_a_run_that_goes_on_within_an_epoch_measures_from_there(tmp_path: Path) -> None:
    def make(*others: Any) -> Trainer:
        saver = SaveTrainingStateCallback(tmp_path / "state", save_every_n_updates=1)
        profiler = ProfilerCallback(tmp_path / "traces", wait=0, warmup=1, active=2)
        return make_trainer(*DEFAULT_CALLBACKS, saver, ThroughputCallback(2, skip_first_n_updates=1), profiler, *others)

    with pytest.raises(Interruption):
        make(interrupt_at(5)).train(make_data(80), 1)
    trainer = make()
    trainer.train(make_data(80), 1, resume_from="latest")
    counters = trainer.run_history.get_metric_counters("train_samples_per_second")
    # Two of the first run; the update after the interruption is left out.
    assert [row["num_updates"] for row in counters] == [2, 4, 8, 10]
    assert {count_phases(path) for path in (tmp_path / "traces").glob("*update8*.json")} == {(2, 2, 2, 2)}


class ValuesOfAnInterval(TrainerCallback):
    """Looks at what is given to the history, to relate values of one moment exactly."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        history = trainer.run_history
        self.rows.append({name: history.get_latest_metric(name) for name in history.get_metric_names()})


@pytest.mark.parametrize("source", ["tensor", "number", "count"])
def test_tokens_are_counted(source: str) -> None:
    data, skipped = make_data(83), 2
    total = int((data.tensors[1] + 1).sum())
    first = slice(8 * skipped, None)
    throughput = ThroughputCallback(skip_first_n_updates=skipped)
    kwargs = {"train_dataloader_kwargs": {"shuffle": False}}
    rows = ValuesOfAnInterval()
    if source == "count":
        throughput.count_tokens = lambda batch: (batch[1] + 1).sum()
        make_trainer(rows, throughput).train(data, 2, **kwargs)
    else:
        trainer = make_token_trainer(rows, throughput)
        trainer.as_tensor = source == "tensor"
        trainer.train(data, 2, **kwargs)
    of_first = int((data.tensors[1][first] + 1).sum())
    ratios = [row["train_tokens_per_second"] / row["train_samples_per_second"] for row in rows.rows]
    assert ratios == pytest.approx([of_first / (83 - 8 * skipped), total / 83], rel=1e-12)


def test_tokens_are_not_read_before_they_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    original = torch.Tensor.item

    def item(self: torch.Tensor) -> Any:
        if "callbacks/profiling" in inspect.stack()[1].filename:
            reads.append(trainer.num_updates)
        return original(self)

    trainer = make_trainer(ThroughputCallback(count_tokens=lambda batch: batch[1].sum()))
    monkeypatch.setattr(torch.Tensor, "item", item)
    trainer.train(make_data(160), 1)
    assert reads == [20]


def test_what_the_user_counts_with_is_left_alone() -> None:
    counted = torch.tensor(3.0, dtype=torch.float64)
    trainer = make_trainer(ThroughputCallback(count_tokens=lambda batch: counted))
    trainer.train(make_data(80), 1)
    assert counted == 3
    ratio = latest(trainer, "tokens_per_second") / latest(trainer, "samples_per_second")
    assert ratio == pytest.approx(3 / 8, rel=1e-12)


def test_tokens_that_are_not_known_have_no_value_and_are_missed_where_they_are_needed() -> None:
    trainer = make_trainer(ThroughputCallback())
    trainer.train(make_data(80), 1)
    assert "train_tokens_per_second" not in trainer.run_history.get_metric_names()
    with pytest.raises(ValueError, match=r"flops_per_token=\.\.\.\) needs to know the tokens"):
        make_trainer(ThroughputCallback(flops_per_token=6e6, peak_flops=1e12)).train(make_data(80), 1)


def test_the_utilisation_of_known_numbers() -> None:
    rows = ValuesOfAnInterval()
    make_trainer(rows, ThroughputCallback(flops_per_sample=3e6, peak_flops=1e12)).train(make_data(80), 1)
    [row] = rows.rows
    assert row["train_model_flop_utilisation"] == pytest.approx(row["train_samples_per_second"] * 3e6 / 1e12)
    rows = ValuesOfAnInterval()
    make_token_trainer(rows, ThroughputCallback(flops_per_token=6e6, peak_flops=2e12)).train(make_data(80), 1)
    [row] = rows.rows
    assert row["train_model_flop_utilisation"] == pytest.approx(row["train_tokens_per_second"] * 6e6 / 2e12)


def test_no_utilisation_where_it_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(ThroughputCallback(peak_flops=1e12))
    trainer.train(make_data(80), 1)
    assert "train_model_flop_utilisation" not in trainer.run_history.get_metric_names()
    assert capsys.readouterr().out == ""
    trainer = make_trainer(ThroughputCallback(flops_per_sample=1e6))
    trainer.train(make_data(80), 1)
    assert "train_model_flop_utilisation" not in trainer.run_history.get_metric_names()
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("ThroughputCallback: the peak FLOP/s of 'cpu' are not known")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("NVIDIA GeForce RTX 3080", None),
    ],
)
def test_well_known_devices(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert find_peak_flops(torch.device("cuda")) == peak
    assert find_peak_flops(torch.device("cpu")) is None


def test_memory_of_the_process_is_recorded_and_none_of_a_device_that_is_not_there() -> None:
    trainer = make_trainer(ThroughputCallback())
    held: list[torch.Tensor] = []
    trainer.train(make_data(80), 1)
    before = latest(trainer, "resident_memory_mib")
    assert before > 50  # torch alone takes more
    held.append(torch.ones(256 * 2**18))  # 256 MiB
    trainer.train(make_data(80), 1)
    assert 200 < latest(trainer, "resident_memory_mib") - before < 2000
    if not torch.cuda.is_available():
        assert not any("peak" in name for name in trainer.run_history.get_metric_names())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peaks_of_a_device_are_of_training_alone() -> None:
    class Large(Trainer):
        def calculate_eval_batch_loss(self, batch: Any) -> Any:
            torch.empty(2**28, device=self.device)  # 1 GiB
            return super().calculate_eval_batch_loss(batch)

        def calculate_train_batch_loss(self, batch: Any) -> Any:
            torch.empty(2**26, device=self.device)  # 256 MiB
            return super().calculate_train_batch_loss(batch)

    callbacks = ThroughputCallback(flops_per_sample=1e3), StepBasedEvaluationCallback(2)
    trainer = Large(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.125), callbacks, seed=5)
    trainer.train(make_data(80), 2, make_data(8))
    for allocated in trainer.run_history.get_metric_values("train_peak_memory_allocated_mib"):
        assert 256 <= allocated < 512
    assert latest(trainer, "peak_memory_reserved_mib") >= latest(trainer, "peak_memory_allocated_mib")
    has_peak = find_peak_flops(trainer.device) is not None
    assert ("train_model_flop_utilisation" in trainer.run_history.get_metric_names()) == has_peak


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_work_that_a_device_has_still_to_do_is_counted() -> None:
    """The host only launches, in far less time than the device computes."""

    class Heavy(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> Any:
            torch.cuda._sleep(20_000_000)  # clock cycles: 10 ms at 2 GHz
            return super().calculate_train_batch_loss(batch)

    throughput = ThroughputCallback(every_n_updates=5)
    callbacks = throughput, StepBasedEvaluationCallback(7)
    trainer = Heavy(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.125), callbacks, seed=5)
    trainer.train(make_data(320), 1, make_data(8))
    rates = trainer.run_history.get_metric_values("train_samples_per_second")
    assert len(rates) == 8 and max(rates) < 8 / 0.007


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_updates": 0}, "every_n_updates must be at least 1, or None, got 0"),
        ({"skip_first_n_updates": -1}, "skip_first_n_updates must be at least 0, got -1"),
        ({"peak_flops": 0}, "peak_flops must be above 0, or None, got 0"),
        ({"flops_per_sample": float("nan")}, "flops_per_sample must be above 0, or None, got nan"),
        ({"flops_per_sample": 1, "flops_per_token": 1}, "not both"),
    ],
)
def test_nonsense_for_throughput_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThroughputCallback(**arguments)


def test_callbacks_that_print_the_history_find_the_values_of_the_moment(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(LogMetricsCallback, ThroughputCallback()).train(make_data(80), 1)
    [line] = capsys.readouterr().out.splitlines()
    assert "train_loss_epoch" in line and "train_samples_per_second" in line


def test_a_run_that_failed_leaves_nothing_to_the_next() -> None:
    trainer = make_trainer(ThroughputCallback(), interrupt_at(5))
    with pytest.raises(Interruption):
        trainer.train(make_data(80), 1)
    trainer.callback_handler.remove_callback(list(trainer.callback_handler)[1])
    time.sleep(0.5)
    trainer.train(make_data(80), 1)
    assert latest(trainer, "samples_per_second") > 56 / 0.5


def _measure() -> dict[str, list[Any]]:
    # 81 samples: in the last round one process has one, the other has none left.
    throughput = ThroughputCallback(every_n_updates=3, skip_first_n_updates=1, flops_per_token=2e6, peak_flops=1e12)
    trainer = make_token_trainer(throughput)
    trainer.train(make_data(81), 1, train_dataloader_kwargs={"shuffle": False})
    assert torch.distributed.get_world_size() == 2
    history = trainer.run_history
    counters = history.get_metric_counters("train_samples_per_second")
    values = {name: history.get_metric_values(name) for name in sorted(history.get_metric_names())}
    return values | {"num_samples": [row["num_samples"] for row in counters]}


def test_processes_agree_on_the_rates_of_all_together() -> None:
    first, second = run_processes(_measure, 2)
    assert first == second
    assert first["num_samples"] == [48, 81]  # of six updates; the first is left out
    tokens = make_data(81).tensors[1] + 1
    ratios = [tokens[16:48].sum().item() / 32, tokens[48:].sum().item() / 33]
    found = zip(first["train_tokens_per_second"], first["train_samples_per_second"], strict=True)
    assert [rate / samples for rate, samples in found] == pytest.approx(ratios, rel=1e-12)
    of_both = [rate * 2e6 / (2 * 1e12) for rate in first["train_tokens_per_second"]]
    assert first["train_model_flop_utilisation"] == pytest.approx(of_both)


def _measure_slow() -> list[float]:
    trainer = make_slow_trainer(ThroughputCallback())
    is_slow = trainer.accelerator.process_index == 1
    assert trainer.accelerator.num_processes == 2
    trainer.train(PlainDataset(make_data(320)), 1, collate_fn=slow_collate(0.02 if is_slow else 0.0))
    return [latest(trainer, "samples_per_second"), latest(trainer, "data_wait_share")]


def test_the_process_that_waits_longest_counts() -> None:
    first, second = run_processes(_measure_slow, 2)
    assert first == second
    rate, share = first
    assert share > 0.5 and rate < 16 / 0.02

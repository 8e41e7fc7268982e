"""The log of a run: what its rows hold, when they are written, and that each is there once."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import enum
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim import SGD
from torchmetrics.classification import MulticlassAccuracy

from pytorch_accelerated import DEFAULT_CALLBACKS, RunHistory, Trainer
from pytorch_accelerated.callbacks import (
    LambdaCallback,
    PrintProgressCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    TerminateOnNaNCallback,
)
from pytorch_accelerated.errors import NonFiniteError, StopTrainingError, TrackerError
from pytorch_accelerated.metrics_log import COUNTERS, RowFile, read_rows
from pytorch_accelerated.run_directory import find_runs, read_run
from pytorch_accelerated.trackers import Tracker
from tests.support import (
    Interruption,
    PlainDataset,
    Stream,
    interrupt_at,
    make_data,
    make_mlp,
    run_processes,
    run_until_killed,
)

BY_THE_CLOCK = ("seconds", "samples_per_second")


class Parts(Trainer):
    """Returns the parts of its loss, and logs some values."""

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        outputs = self.model(batch[0])
        cross_entropy = nn.functional.cross_entropy(outputs, batch[1])
        penalty = outputs.square().mean()
        self.log({"newest": batch[0].sum(), "weight": lambda: self.get_model()[0].weight.sum()})  # type: ignore[index]
        loss = cross_entropy + 0.01 * penalty
        return {
            "loss": loss,
            "model_outputs": outputs,
            "loss_ce": cross_entropy,
            "penalty": penalty.detach(),
            "size": len(batch[0]),
        }

    calculate_eval_batch_loss = calculate_train_batch_loss


def make_trainer(run_dir: Path | None, *callbacks: Any, **kwargs: Any) -> Parts:
    kwargs = {"log_every": 2, "trackers": (), "seed": 3, "config": {"width": 8}} | kwargs
    metrics = {"accuracy": MulticlassAccuracy(3, average="micro")}
    return Parts(
        make_mlp(dropout=0.1), None, partial(SGD, lr=0.1), callbacks or None, metrics=metrics, run_dir=run_dir, **kwargs
    )


def rows_of(run: Path | None) -> list[dict[str, Any]]:
    assert run is not None
    return read_rows(run / "metrics.jsonl")


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in BY_THE_CLOCK} for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def test_the_rows_of_a_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "runs", gradient := LambdaCallback())
    trainer.train(make_data(22), 2, make_data(6), per_device_batch_size=4, gradient_clip_norm=1e9)
    assert gradient
    rows = rows_of(trainer.run_dir)
    assert [row["num_updates"] for row in rows] == [2, 4, 6, 6, 6, 8, 10, 12, 12, 12]
    assert [row["num_samples"] for row in rows] == [8, 16, 22, 22, 22, 30, 38, 44, 44, 44]
    assert [row["num_steps"] for row in rows] == [2, 4, 6, 6, 6, 8, 10, 12, 12, 12]
    assert [row["current_epoch"] for row in rows] == [1] * 5 + [2] * 5
    for row in rows:
        assert tuple(row)[: len(COUNTERS)] == COUNTERS
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[0] >= 0
    within = [row for row in rows if "train_loss" in row]
    assert [row["num_updates"] for row in within] == [2, 4, 6, 8, 10, 12]
    for row in within:
        expected = {"train_loss", "train_loss_ce", "train_penalty", "train_size", "lr", "gradient_norm"}
        assert expected <= row.keys() and row["lr"] == 0.1 and row["samples_per_second"] > 0
    ends = [row for row in rows if "train_loss_epoch" in row]
    assert [set(row) - set(COUNTERS) for row in ends] == [
        {"train_loss_epoch", "train_loss_ce_epoch", "train_penalty_epoch", "train_size_epoch", "train_accuracy"}
    ] * 2
    evaluations = [row for row in rows if "eval_loss_epoch" in row]
    for row in evaluations:
        assert {"eval_loss_epoch", "eval_loss_ce_epoch", "eval_penalty_epoch", "eval_accuracy"} <= row.keys()
    # Each in the history, too.
    for row, value in zip(ends, trainer.run_history.get_metric_values("train_loss_ce_epoch"), strict=True):
        assert row["train_loss_ce_epoch"] == value


@pytest.mark.parametrize("accumulation", [1, 2])
def test_values_within_an_epoch_are_those_of_the_updates_since_the_row_before(
    tmp_path: Path, accumulation: int
) -> None:
    seen: list[tuple[float, float, int]] = []
    norms: list[float] = []

    def note(trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any) -> None:
        seen.append((batch_output["loss"].item(), batch_output["loss_ce"].item(), len(batch[0])))

    def note_norm(trainer: Trainer, **kwargs: Any) -> None:
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))

    watch = LambdaCallback(on_train_step_end=note, on_optimizer_step_begin=note_norm)
    trainer = make_trainer(tmp_path, watch)
    trainer.train(make_data(30), 1, per_device_batch_size=4, gradient_accumulation_steps=accumulation)
    rows = [row for row in rows_of(trainer.run_dir) if "train_loss" in row]
    assert [row["num_updates"] for row in rows] == ([2, 4, 6, 8] if accumulation == 1 else [2, 4])
    for number, row in enumerate(rows):
        part = seen[number * 2 * accumulation : (number + 1) * 2 * accumulation]
        items = sum(size for _, _, size in part)
        assert row["train_loss"] == pytest.approx(sum(loss * size for loss, _, size in part) / items, rel=1e-12)
        assert row["train_loss_ce"] == pytest.approx(sum(part_ * size for _, part_, size in part) / items, rel=1e-12)
        assert row["gradient_norm"] == pytest.approx(norms[2 * number + 1], rel=1e-5)
        assert row["train_size"] == pytest.approx(sum(size * size for _, _, size in part) / items)


def test_named_losses_are_means_over_all_samples(tmp_path: Path) -> None:
    trainer = make_trainer(None)
    data = make_data(11, seed=4)
    trainer.model.eval()
    results = trainer.evaluate(data, per_device_batch_size=4)
    outputs = trainer.model(data.tensors[0])
    assert results["evaluation_penalty"] == pytest.approx(outputs.square().mean().item(), rel=1e-6)
    expected = nn.functional.cross_entropy(outputs, data.tensors[1]).item()
    assert results["evaluation_loss_ce"] == pytest.approx(expected, rel=1e-6)
    history = trainer.train(data, 1, {"a": data}, per_device_batch_size=4)
    assert {"train_penalty_epoch", "eval_a_penalty_epoch", "eval_a_loss_ce_epoch"} <= history.get_metric_names()


class Sometimes(Trainer):
    """Has a part of its loss in some batches only."""

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        outputs = self.model(batch[0])
        output = {"loss": nn.functional.cross_entropy(outputs, batch[1]), "model_outputs": outputs}
        if self.num_steps % 2:
            output["odd"] = torch.tensor(float(self.num_steps))
        return output


def test_a_scalar_that_comes_in_some_batches_is_the_mean_over_these() -> None:
    trainer = Sometimes(make_mlp(), nn.CrossEntropyLoss(), partial(SGD, lr=0.1), None)
    history = trainer.train(make_data(12), 1, per_device_batch_size=2)
    assert history.get_metric_values("train_odd_epoch") == [3.0]  # of steps 1, 3 and 5


def test_functions_are_called_only_for_a_row(tmp_path: Path) -> None:
    calls: list[int] = []

    class Lazy(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> Any:
            self.log({"costly": lambda: calls.append(self.num_updates) or 7})  # type: ignore[func-returns-value]
            self.log_text("notes", lambda: f"at {self.num_updates}")
            return super().calculate_train_batch_loss(batch)

        def train_epoch_end(self) -> None:
            self.log({"at_the_end": lambda: 1})

    trainer = Lazy(
        make_mlp(), nn.CrossEntropyLoss(), partial(SGD, lr=0.1), None, run_dir=tmp_path, trackers=(), log_every=5
    )
    trainer.train(make_data(24), 1, per_device_batch_size=2)
    assert calls == [4, 9, 11]  # in the steps of updates 5 and 10, and of the last of the epoch
    rows = rows_of(trainer.run_dir)
    assert [row["num_updates"] for row in rows if "costly" in row] == [5, 10, 12]
    assert [row["num_updates"] for row in rows if "at_the_end" in row] == [12]
    media = read_rows(tmp_path / "1" / "media" / "index.jsonl")
    assert [row["num_updates"] for row in media] == [4, 9, 11]
    assert [(tmp_path / "1" / row["files"][0]).read_text() for row in media] == ["at 4", "at 9", "at 11"]


def test_rows_by_the_clock(tmp_path: Path) -> None:
    pause = LambdaCallback(on_train_step_end=lambda trainer, **kwargs: time.sleep(0.02))
    often = make_trainer(tmp_path / "often", pause, log_every=timedelta(milliseconds=10))
    often.train(make_data(20), 1, per_device_batch_size=2)
    # Whether an update gets a row is decided when it begins, by the time since the last one.
    updates = [row["num_updates"] for row in rows_of(often.run_dir) if "train_loss" in row]
    assert updates in ([2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 10])  # the last of the epoch has one anyway
    seldom = make_trainer(tmp_path / "seldom", log_every=timedelta(hours=1))
    seldom.train(make_data(20), 2, per_device_batch_size=2)
    assert [row["num_updates"] for row in rows_of(seldom.run_dir)] == [10, 10, 20, 20]  # the ends of the epochs


def test_values_of_every_kind(tmp_path: Path) -> None:
    def log(trainer: Trainer, **kwargs: Any) -> None:
        trainer.log({"f32": np.float32(0.5), "i64": np.int64(3), "zero_d": np.array(2.5), "tensor": torch.tensor(1.25)})
        trainer.log({"text": "abc", "flag": True, "rows": torch.eye(2), "inf": math.inf, "nan": float("nan")})

    trainer = make_trainer(tmp_path, LambdaCallback(on_train_epoch_end=log))
    trainer.train(make_data(4), 1, make_data(4))
    row = next(row for row in rows_of(trainer.run_dir) if "f32" in row)
    assert [row[name] for name in ("f32", "i64", "zero_d", "tensor", "text", "flag")] == [
        0.5,
        3,
        2.5,
        1.25,
        "abc",
        True,
    ]
    assert row["rows"] == [[1.0, 0.0], [0.0, 1.0]] and row["inf"] == math.inf and math.isnan(row["nan"])
    for line in (tmp_path / "1" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    with pytest.raises(ValueError, match="'num_updates' is a counter"):
        trainer.log({"num_updates": 3})


def test_what_is_logged_anywhere_has_its_counters(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        LambdaCallback(on_train_update_end=lambda t, **kw: t.run_history.update_metric("own", t.num_updates)),
        log_every=4,
    )
    trainer.log({"early": 1})
    trainer.train(make_data(12), 1, per_device_batch_size=2)
    rows = rows_of(trainer.run_dir)
    assert [(row["num_updates"], row["own"]) for row in rows if "own" in row] == [(i, i) for i in range(1, 7)]
    assert [row["num_updates"] for row in rows] == sorted(row["num_updates"] for row in rows)
    assert sum("early" in row for row in rows) == 0  # a run begins anew
    trainer.log({"late": 1})
    trainer.evaluate(make_data(4))
    last = rows_of(trainer.run_dir)[-1]
    assert last["late"] == 1 and last["num_updates"] == 6 and "evaluation_loss" in last


def test_the_table_and_the_history_hold_what_the_log_holds(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, StepBasedEvaluationCallback(2))
    trainer.train(make_data(20), 2, {"a": make_data(4), "b": make_data(3)}, per_device_batch_size=4)
    assert trainer.run_dir is not None
    rows = rows_of(trainer.run_dir)
    with (trainer.run_dir / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    for line, row in zip(table, rows, strict=True):
        assert {name: float(text) for name, text in line.items() if text} == pytest.approx(row)
    history = RunHistory.read_log(trainer.run_dir)
    assert dataclasses.asdict(history.counters) == dataclasses.asdict(trainer.run_history.counters)
    for name in trainer.run_history.get_metric_names():
        assert history.get_metric_values(name) == trainer.run_history.get_metric_values(name)
        counters = history.get_metric_counters(name)
        assert [{n: c for n, c in at.items() if n != "seconds"} for at in counters] == (
            trainer.run_history.get_metric_counters(name)
        )
    assert history.get_metric_values("train_loss") == [row["train_loss"] for row in rows if "train_loss" in row]
    frame = history.to_pandas()
    assert frame["seconds"].is_monotonic_increasing and len(frame) >= len(history.get_metric_values("train_loss"))


def test_a_torn_last_line_is_no_row_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    file.append({"a": 1.5})
    file.append({"a": -math.inf, "b": [math.nan, "NaN?"]})
    with file.path.open("ab") as raw:
        raw.write(b'{"a": 3')
    rows = read_rows(file.path)
    assert rows[0] == {"a": 1.5} and rows[1]["a"] == -math.inf and math.isnan(rows[1]["b"][0]) and len(rows) == 2
    with file.path.open("ab") as raw:
        raw.write(b'\n{"a": 4}\n')
    with pytest.raises(ValueError, match=r"line 3: expected a JSON object, got b'{\"a\": 3'"):
        read_rows(file.path)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"log_every": 0}, "at least 1 update, got 0"),
        ({"log_every": 1.5}, "number of updates or a datetime.timedelta, got 1.5"),
        ({"log_every": timedelta(0)}, "a time above zero"),
        ({"config": 3}, "config must be a mapping, a dataclass or a namespace, got 3"),
        ({"run_dir": 7}, "run_dir must be a path, a RunDirectory or None, got 7"),
        ({"trackers": ["tensorbord"]}, "Did you mean 'tensorboard'?"),
        ({"trackers": ["tensorboard"], "run_dir": None}, "give the trainer a run_dir"),
    ],
)
def test_wrong_arguments_are_refused_at_once(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    arguments = {"run_dir": tmp_path, **wrong}
    with pytest.raises((TypeError, ValueError, TrackerError), match=message.replace("?", r"\?")):
        make_trainer(arguments.pop("run_dir"), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_rows_of_an_epoch_leave_no_update_out(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, log_every=4)
    trainer.train(make_data(22), 2, per_device_batch_size=4)
    rows = rows_of(trainer.run_dir)
    within = [row for row in rows if "train_loss" in row]
    assert [row["num_updates"] for row in within] == [4, 6, 8, 12]
    assert all("lr" in row and "gradient_norm" in row for row in within)
    mean = (within[0]["train_loss"] * 16 + within[1]["train_loss"] * 6) / 22
    assert mean == pytest.approx(next(row["train_loss_epoch"] for row in rows if "train_loss_epoch" in row), rel=1e-12)


def test_the_learning_rate_is_that_of_the_update(tmp_path: Path) -> None:
    for number, lr in enumerate((1e-3, torch.tensor(1e-3))):
        trainer = Trainer(
            make_mlp(),
            nn.CrossEntropyLoss(),
            partial(SGD, lr=lr),
            None,
            run_dir=tmp_path / str(number),
            trackers=(),
            log_every=1,
        )
        halve = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda update: 0.5**update)
        trainer.train(make_data(6), 1, per_device_batch_size=2, create_scheduler_fn=halve)
        rates = [row["lr"] for row in rows_of(trainer.run_dir) if "lr" in row]
        assert rates == pytest.approx([1e-3, 5e-4, 2.5e-4])


def test_the_row_of_an_update_after_which_a_callback_stops_the_run(tmp_path: Path) -> None:
    def stop(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == 4:
            raise StopTrainingError("enough")

    trainer = make_trainer(tmp_path, LambdaCallback(on_train_update_end=stop))
    trainer.train(make_data(24), 1, per_device_batch_size=2)
    assert [row["num_updates"] for row in rows_of(trainer.run_dir) if "train_loss" in row] == [2, 4]
    [session] = read_run(tmp_path / "1")["sessions"]
    assert session["outcome"] == "finished" and session["stopped"] == "enough"


def test_a_run_that_fails_at_its_very_end_has_failed(tmp_path: Path) -> None:
    late = LambdaCallback(on_train_run_end=lambda trainer, **kwargs: 1 / 0)
    late.order = 5
    notes = Notes()
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, late, trackers=[notes]).train(make_data(4), 1)
    [session] = read_run(tmp_path / "1")["sessions"]
    assert session["outcome"] == "failed" and "ZeroDivisionError" in session["error"] and notes.outcomes == ["failed"]


def test_scalars_of_numpy_are_scalars() -> None:
    class WithNumpy(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> Any:
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            other = {"f32": np.float32(0.5), "i64": np.int64(3), "complex": torch.tensor(1j), "flag": True}
            return {"loss": loss, **other}

    history = WithNumpy(make_mlp(), None, partial(SGD, lr=0.1), None).train(make_data(4), 1)
    assert history.get_latest_metric("train_f32_epoch") == 0.5 and history.get_latest_metric("train_i64_epoch") == 3
    assert history.get_metric_names() == {"train_loss_epoch", "train_f32_epoch", "train_i64_epoch"}


@pytest.mark.parametrize("name", ["lr", "train_loss", "gradient_norm", "eval_loss_epoch", "num_steps", 7])
def test_names_that_are_taken_cannot_be_logged(tmp_path: Path, name: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"another name|must be strings"):
        make_trainer(tmp_path).log({name: 1})


class Kind(enum.Enum):
    FAST = 1


@dataclasses.dataclass
class Inner:
    path: Path = Path("x")
    kind: Kind = Kind.FAST


@dataclasses.dataclass
class Settings:
    lr: float = 0.1
    layers: tuple[int, ...] = (8, 8)
    inner: Inner = dataclasses.field(default_factory=Inner)
    width: Any = dataclasses.field(default_factory=lambda: np.int64(8))
    ratio: Any = dataclasses.field(default_factory=lambda: torch.tensor(0.5))
    limit: float = math.inf


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"a": {"b": [1, {"c": None}]}, 3: Path("x")}, {"a": {"b": [1, {"c": None}]}, "3": "x"}),
        (
            Settings(),
            {
                "lr": 0.1,
                "layers": [8, 8],
                "inner": {"path": "x", "kind": "FAST"},
                "width": 8,
                "ratio": 0.5,
                "limit": "Infinity",
            },
        ),
        ({"f": torch.relu, "n": argparse.Namespace(a=1)}, {"f": "torch._VariableFunctionsClass.relu", "n": {"a": 1}}),
        (argparse.Namespace(lr=0.1, name="n"), {"lr": 0.1, "name": "n"}),
        (None, {}),
    ],
)
def test_the_configuration_of_the_user_is_recorded(tmp_path: Path, config: Any, expected: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, config=config, trackers=["tensorboard"])
    trainer.train(make_data(4), 1)
    assert read_run(tmp_path / "1")["config"]["user"] == expected


def test_without_a_place_to_log_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(None)
    trainer.train(make_data(8), 1)
    trainer.log_images("images", lambda: pytest.fail("nobody looks at it"))
    assert trainer.recorder is None and trainer.run_dir is None and list(tmp_path.iterdir()) == []


def test_nothing_is_read_between_the_rows(tmp_path: Path) -> None:
    """On a device that holds no numbers, as in test_syncs, with the log of every 30th update."""
    import subprocess
    import sys

    script = (
        "import json, sys; from tests.sync_cases import find_waits, Reading; from pytorch_accelerated import Trainer\n"
        "class Logs(Trainer):\n"
        "    def __init__(self, *args, **kwargs): super().__init__(*args, run_dir=sys.argv[1], trackers=(),\n"
        "        log_every=30, **kwargs)\n"
        "    def calculate_train_batch_loss(self, batch):\n"
        "        output = super().calculate_train_batch_loss(batch)\n"
        "        self.log({'newest': output['loss']})\n"
        "        return {**output, 'part': output['loss'].detach()}\n"
        "print(json.dumps(find_waits(Logs)))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    waits = json.loads(done.stdout.splitlines()[-1])
    library = {place.split()[1]: number for owner, place, number in waits if owner == "library"}
    own = {name: n for name, n in library.items() if name != "TerminateOnNaNCallback._read"}
    # At updates 30, 60, 90 and 120, and at the end of the epoch: the sums; and what was logged and the norm.
    assert own == {"DataPass.sums_so_far": 5, "RecordingCallback._measure": 4, "as_plain": 4} or own == {
        "DataPass.sums_so_far": 5,
        "RecordingCallback._measure": 4,
        "_of_array": 4,
    }, waits
    assert [row["num_updates"] for row in rows_of(tmp_path / "1") if "gradient_norm" in row] == [30, 60, 90, 120]


# ---------------------------------------------------------------------------------------------------------------------
# Resume
# ---------------------------------------------------------------------------------------------------------------------


def train_with_log(
    run_dir: Path, *callbacks: Any, every: int = 3, trackers: Any = ("tensorboard",), num_epochs: int = 3
) -> Parts:
    saver = SaveTrainingStateCallback(save_every_n_updates=every)
    images = LambdaCallback(
        on_eval_epoch_end=lambda trainer, **kw: trainer.log_image("noise", torch.full((4, 4), 0.5), "gray")
    )
    trainer = make_trainer(run_dir, saver, images, StepBasedEvaluationCallback(4), *callbacks, trackers=trackers)
    trainer.train(make_data(22), num_epochs, make_data(6), per_device_batch_size=4, resume_from="latest")
    return trainer


def check_tensorboard(run: Path, rows: list[dict[str, Any]]) -> None:
    """Read the files as TensorBoard does: each value of the log is there once, in order."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = {"train_loss": "train/loss", "eval_loss_epoch": "eval/loss_epoch", "lr": "optimizer/lr"}
    for name, tag in tags.items():
        expected = [(row["num_updates"], row[name]) for row in rows if name in row]
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in expected], (name, found, expected)
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)


@pytest.mark.parametrize(
    "update", [1, 4, 6, 11, *(pytest.param(update, marks=pytest.mark.slow) for update in (3, 7, 17))]
)
def test_a_run_that_went_on_has_the_log_of_one_that_was_left_alone(tmp_path: Path, update: int) -> None:
    whole = train_with_log(tmp_path / "whole", every=3)
    with pytest.raises(Interruption):
        train_with_log(tmp_path / "parts", interrupt_at(update), every=3)
    resumed = train_with_log(tmp_path / "parts", every=3)
    assert resumed.run_dir == tmp_path / "parts" / ("1" if update >= 3 else "2")  # nothing saved before update 3
    rows, expected = rows_of(resumed.run_dir), rows_of(whole.run_dir)
    assert without_clock(rows) == without_clock(expected)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    check_tensorboard(resumed.run_dir, rows)
    media, expected_media = (
        read_rows(trainer.run_dir / "media" / "index.jsonl") for trainer in (resumed, whole) if trainer.run_dir
    )
    assert without_clock(media) == without_clock(expected_media)
    assert all((resumed.run_dir / file).exists() for row in media for file in row["files"])
    if update >= 3:
        sessions = read_run(resumed.run_dir)["sessions"]
        assert [(session["number"], session["outcome"]) for session in sessions] == [(1, "failed"), (2, "finished")]
        assert sessions[0]["error"] == "Interruption: " and sessions[1]["first_update"] == update // 3 * 3


def die_at(update: int, run_dir: Path) -> None:
    def die(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == update:
            os.kill(os.getpid(), signal.SIGKILL)

    train_with_log(run_dir, LambdaCallback(on_train_step_end=die))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_that_is_killed_again_and_again_has_an_unbroken_log(tmp_path: Path, num_processes: int) -> None:
    run_processes(partial(train_quietly, tmp_path / "whole"), num_processes)
    kills = sorted(random.Random(5).sample(range(3, 18 if num_processes == 1 else 9), 3))
    for update in kills:
        assert -signal.SIGKILL in run_until_killed(partial(die_at, update, tmp_path / "parts"), num_processes)
    assert run_processes(partial(train_quietly, tmp_path / "parts"), num_processes) == [num_processes] * num_processes
    rows = rows_of(tmp_path / "parts" / "1")
    assert without_clock(rows) == without_clock(rows_of(tmp_path / "whole" / "1"))
    check_tensorboard(tmp_path / "parts" / "1", rows)
    sessions = read_run(tmp_path / "parts" / "1")["sessions"]
    assert [session["outcome"] for session in sessions] == [None] * len(kills) + ["finished"]
    assert len(find_runs(tmp_path / "parts")) == 1


def train_quietly(run_dir: Path) -> int:
    return train_with_log(run_dir).accelerator.num_processes


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


def log_of_processes(run_dir: Path) -> tuple[int, str, list[str]]:
    trainer = make_trainer(run_dir, PrintProgressCallback, trackers=["tensorboard"], log_every=3)
    size = 12 // trainer.accelerator.num_processes
    trainer.train(PlainDataset(make_data(50)), 2, make_data(7), per_device_batch_size=size)
    trainer.evaluate(make_data(5))
    return trainer.accelerator.num_processes, str(trainer.run_dir), sorted(os.listdir(run_dir))


def test_two_processes_write_one_log(tmp_path: Path) -> None:
    [(_, alone, _)] = run_processes(partial(log_of_processes, tmp_path / "one"), 1)
    found = run_processes(partial(log_of_processes, tmp_path / "two"), 2)
    assert found == [(2, str(tmp_path / "two" / "1"), ["1"])] * 2
    rows, expected = rows_of(tmp_path / "two" / "1"), rows_of(Path(alone))
    assert len(rows) == len(expected) and len(rows) == 5 + 2 + 2 + 1
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        # Dropout differs between processes; the counters and the sizes of batches do not.
        for name in ("num_samples", "num_updates", "current_epoch"):
            assert row[name] == other[name]
    printed = (tmp_path / "two" / "1" / "log.txt").read_text()
    assert printed.count("Starting training run") == 1
    check_tensorboard(tmp_path / "two" / "1", rows)


class Refuses(Tracker):
    name = "refuses"

    def open(self, opening: Any) -> None:
        raise ConnectionError("no route to host")


def train_with(tracker: Tracker, run_dir: Path) -> str:
    steps: list[int] = []
    trainer = make_trainer(
        run_dir, LambdaCallback(on_train_step_begin=lambda *a, **k: steps.append(1)), trackers=[tracker]
    )
    try:
        trainer.train(make_data(8), 1)
    except TrackerError as error:
        assert not steps
        return str(error)
    return "trained"


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_tracker_that_does_not_connect_is_one_error_before_training(tmp_path: Path, num_processes: int) -> None:
    errors = run_processes(partial(train_with, Refuses(), tmp_path), num_processes)
    assert errors == ["The tracker 'refuses' could not be opened: ConnectionError: no route to host"] * num_processes


# ---------------------------------------------------------------------------------------------------------------------
# Trackers that fail, and how they end
# ---------------------------------------------------------------------------------------------------------------------


class Notes(Tracker):
    """Keeps what it is told, and fails when asked to."""

    name = "notes"

    def __init__(self, fails: Callable[[int], bool] = lambda update: False) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.outcomes: list[str] = []
        self.calls = 0
        self.fails = fails

    def log_scalars(self, values: Any, counters: Any) -> None:
        self.calls += 1
        if self.fails(counters["num_updates"]):
            raise TimeoutError("no answer")
        self.rows.append((counters["num_updates"], dict(values)))

    def finish(self, outcome: str) -> None:
        self.outcomes.append(outcome)


def test_a_tracker_that_fails_in_the_middle_is_said_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = Notes(lambda update: update == 4)
    trainer = make_trainer(tmp_path, trackers=[once])
    trainer.train(make_data(20), 1, per_device_batch_size=2)
    assert [update for update, _ in once.rows] == [2, 6, 8, 10, 10] and once.outcomes == ["finished"]
    out = capsys.readouterr().out
    assert out.count("The tracker notes has failed (TimeoutError: no answer): training goes on.") == 1
    assert f"Nothing is missing in {tmp_path / '1' / 'metrics.jsonl'}" in out
    for_good = Notes(lambda update: True)
    trainer = make_trainer(tmp_path, trackers=[for_good])
    trainer.train(make_data(20), 1, per_device_batch_size=2)
    assert for_good.calls == 3 and for_good.outcomes == ["finished"]
    out = capsys.readouterr().out
    assert out.count("training goes on") == 2 and out.count("it is left alone from now on") == 1
    assert len(rows_of(trainer.run_dir)) == 6


@pytest.mark.parametrize("how", ["finished", "failed", "interrupted", "nan"])
def test_trackers_are_finished_however_the_run_ends(tmp_path: Path, how: str) -> None:
    notes = Notes()
    callbacks: list[Any] = [TerminateOnNaNCallback]
    expected: type[BaseException] | None = None
    if how == "failed":
        callbacks.append(interrupt_at(3))
        expected = Interruption
    elif how == "interrupted":
        expected = KeyboardInterrupt

        def interrupt(trainer: Trainer, **kwargs: Any) -> None:
            if trainer.num_updates == 3:
                raise KeyboardInterrupt

        callbacks.append(LambdaCallback(on_train_step_begin=interrupt))
    data = make_data(20)
    if how == "nan":
        data.tensors[0][:] = math.nan
        expected = NonFiniteError
    trainer = make_trainer(tmp_path, *callbacks, trackers=[notes, "tensorboard"])
    if expected is None:
        trainer.train(data, 1, per_device_batch_size=2)
    else:
        with pytest.raises(expected):
            trainer.train(data, 1, per_device_batch_size=2)
    outcome = "failed" if how == "nan" else how
    assert notes.outcomes == [outcome]
    assert trainer.accelerator.trackers == []
    session = read_run(tmp_path / "1")["sessions"][0]
    assert session["outcome"] == outcome and (session["error"] is None) == (how == "finished")
    printed = (tmp_path / "1" / "log.txt").read_text()
    assert ("Traceback" in printed) == (expected is not None)
    if how == "failed":
        rows = rows_of(trainer.run_dir)
        assert [row["num_updates"] for row in rows] == [2]
        events = EventAccumulator(str(tmp_path / "1" / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [2]


@pytest.mark.parametrize("updates", [(11,), (11, 7), (9, 11, 8)])
def test_rows_that_a_tracker_has_got_are_not_sent_again(tmp_path: Path, updates: tuple[int, ...]) -> None:
    first, second = Notes(), Notes()
    for update in updates:
        with pytest.raises(Interruption):
            train_with_log(tmp_path, interrupt_at(update), every=6, trackers=[first])
    resumed = train_with_log(tmp_path, every=6, trackers=[second])
    assert max(update for update, _ in first.rows) > 6  # some came after the checkpoint
    sent = [
        (update, {n: v for n, v in row.items() if n not in BY_THE_CLOCK}) for update, row in first.rows + second.rows
    ]
    expected = [
        (row["num_updates"], {n: v for n, v in row.items() if n not in COUNTERS and n not in BY_THE_CLOCK})
        for row in rows_of(resumed.run_dir)
    ]
    assert sent == expected


class Legacy(GeneralTracker):
    """One that a user wrote for Accelerate."""

    name = "legacy"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []
        self.config: dict[str, Any] = {}
        self.is_finished = False

    @property
    def tracker(self) -> Any:
        return self.rows

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.rows.append((step, values))

    @on_main_process
    def finish(self) -> None:
        self.is_finished = True


def test_what_accelerate_was_given_is_used(tmp_path: Path) -> None:
    legacy = Legacy()
    accelerator = Accelerator(log_with=[legacy, "tensorboard"], project_dir=str(tmp_path / "project"))
    trainer = make_trainer(None, accelerator=accelerator, trackers=None)
    trainer.train(make_data(8), 1, per_device_batch_size=2)
    assert [step for step, _ in legacy.rows] == [2, 4, 4] and legacy.is_finished
    assert legacy.config["user.width"] == 8 and legacy.config["optimizer.type"] == "SGD"
    assert any(path.name.startswith("events.out") for path in (tmp_path / "project").rglob("*"))


def test_the_directory_that_accelerate_was_given_is_one_for_trackers_by_name(tmp_path: Path) -> None:
    accelerator = Accelerator(project_dir=str(tmp_path))
    trainer = make_trainer(None, accelerator=accelerator, trackers=["tensorboard"])
    trainer.train(make_data(8), 1, per_device_batch_size=2)
    assert any(path.name.startswith("events.out") for path in tmp_path.rglob("*"))


def test_trackers_that_the_user_has_started_are_not_finished() -> None:
    legacy = Legacy()
    accelerator = Accelerator(log_with=legacy)
    accelerator.init_trackers("mine")
    trainer = make_trainer(None, accelerator=accelerator, trackers=None)
    trainer.train(make_data(8), 1, per_device_batch_size=2)
    assert [step for step, _ in legacy.rows] == [2, 4, 4]
    assert not legacy.is_finished and accelerator.get_tracker("legacy").tracker == legacy.rows


def test_tensorboard_is_the_default_with_a_run_directory(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, *DEFAULT_CALLBACKS, trackers=None)
    trainer.train(Stream(make_data(8)), 1, per_device_batch_size=2)
    rows = rows_of(trainer.run_dir)
    events = EventAccumulator(str(tmp_path / "1" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 2 and len(rows) == 3
    assert "train/accuracy" in events.Tags()["scalars"]

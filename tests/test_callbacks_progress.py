"""What is printed: a bar on a terminal, plain lines elsewhere, on the main process only."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    LambdaCallback,
    LimitEvalStepsCallback,
    LogMetricsCallback,
    PrintProgressCallback,
    ProgressBarCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
)
from pytorch_accelerated.errors import TrainingInterrupted
from tests.support import Stream, make_data, make_mlp, run_processes

ROOT = Path(__file__).parent.parent


def make_trainer(*callbacks: Any) -> Trainer:
    return Trainer(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.125), callbacks, seed=5)


def test_runs_epochs_and_evaluations_are_announced(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(PrintProgressCallback).train(make_data(8), 2, {"a": make_data(4), "b": make_data(4)})
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    evaluations = ["Starting evaluation on a", "Starting evaluation on b"]
    assert lines == [
        "Starting training run: 2 epoch(s), 2 updates, 1 process(es), seed 5",
        "Starting epoch 1/2",
        *evaluations,
        "Starting epoch 2/2",
        *evaluations,
        "Finishing training run: 2 updates, 16 samples",
    ]


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(ProgressBarCallback(seconds_between_lines=0))
    trainer.train(make_data(10), 1, make_data(4), per_device_batch_size=4)
    lines = capsys.readouterr().out.splitlines()
    number, rate, left = r"\d+\.\d+", r"[\d,]+ samples/s", r"0:00:0\d left"
    expected = [rf"epoch 1/1: step {step}/3, loss {number}, lr 0.125, {rate}, {left}" for step in (1, 2, 3)]
    expected.append(rf"eval: step 1/1, loss {number}, {rate}, {left}")
    assert len(lines) == len(expected)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, lines, strict=True)), lines
    trainer.predict(make_data(4))
    assert re.fullmatch(rf"predict: step 1/1, {rate}, {left}\n", capsys.readouterr().out)


def test_data_without_length_has_no_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(ProgressBarCallback(seconds_between_lines=0)).train(Stream(make_data(8)), None, max_num_train_steps=1)
    [line] = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"epoch 1: step 1, loss \d\.\d+, lr 0\.125, [\d,]+ samples/s", line), line


def test_short_passes_print_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(ProgressBarCallback()).train(make_data(40), 2, make_data(4))
    assert capsys.readouterr().out == ""


def test_the_loss_is_read_only_when_something_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_accelerated.tracking import LossSum

    reads: list[int] = []
    original = LossSum.local_mean
    monkeypatch.setattr(LossSum, "local_mean", lambda self: reads.append(1) or original(self))
    make_trainer(ProgressBarCallback(seconds_between_lines=3600)).train(make_data(80), 1)
    assert reads == []
    make_trainer(ProgressBarCallback(seconds_between_lines=0)).train(make_data(80), 1)
    assert len(reads) == 10


SCRIPT = """
from functools import partial
import torch
from torch import nn
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import ProgressBarCallback, StepBasedEvaluationCallback
from tests.support import make_data, make_mlp

trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.125),
                  [ProgressBarCallback(seconds_between_draws=0), StepBasedEvaluationCallback(5)])
trainer.train(make_data(72), 2, make_data(16))
"""


def run_on_a_terminal(script: str, num_columns: int) -> str:
    """Return what a Python script writes to a terminal."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50 if num_columns else 0, num_columns, 0, 0))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=follower, stderr=follower, env=environment, cwd=ROOT
    )
    os.close(follower)
    written = b""
    with contextlib.suppress(OSError):  # Linux reports the end of a terminal as an error
        while part := os.read(leader, 65536):
            written += part
    os.close(leader)
    assert process.wait() == 0, written.decode()
    return written.decode()


@pytest.mark.parametrize("num_columns", [120, 0])  # some pseudo-terminals say that they have none
def test_a_bar_on_a_terminal(num_columns: int) -> None:
    written = run_on_a_terminal(SCRIPT, num_columns)
    states = [state.strip() for state in re.split(r"[\r\n]|\x1b\[A", written) if state.strip()]
    last = next(state for state in reversed(states) if state.startswith("epoch 2/2"))
    assert re.fullmatch(
        r"epoch 2/2: 100%\|█+\| 9/9 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+step/s, loss \d\.\d+, lr 0\.125, [\d,]+ samples/s\]",
        last,
    ), last
    # Each epoch has one bar, and so has each evaluation; the one inside an epoch is nested and goes away.
    assert len({state.split(":")[0] for state in states}) == 3
    assert sum("100%" in state and "epoch" in state for state in states) >= 2


@pytest.mark.parametrize("event", ["on_train_step_end", "on_eval_step_end"])
def test_a_failed_run_leaves_no_bar_behind(event: str) -> None:
    def fail(trainer: Trainer, **kwargs: Any) -> None:
        raise RuntimeError("enough")

    bars = ProgressBarCallback()
    trainer = make_trainer(bars, StepBasedEvaluationCallback(1), LambdaCallback(**{event: fail}))
    with pytest.raises(RuntimeError, match="enough"):
        trainer.train(make_data(8), 1, make_data(4))
    assert bars._passes == []


def test_new_metrics_are_logged_once_at_the_end_of_their_pass(capsys: pytest.CaptureFixture[str]) -> None:
    record = LambdaCallback(
        on_train_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("constraint_loss", 0.5),
        on_eval_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("eval_matrix", [[1, 2], [3, 4]]),
    )
    trainer = make_trainer(record, LogMetricsCallback)
    trainer.train(make_data(8), 2, make_data(4))
    lines = capsys.readouterr().out.splitlines()
    number = r"\d+\.\d+"
    expected = [
        line
        for epoch in (1, 2)
        for line in (
            rf"epoch {epoch}: constraint_loss 0\.5, train_loss_epoch {number}",
            rf"epoch {epoch}: eval_loss_epoch {number}, eval_matrix \[\[1, 2\], \[3, 4\]\]",
        )
    ]
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, lines, strict=True)), lines
    trainer.evaluate(make_data(4))
    [line] = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"eval_matrix \[\[1, 2\], \[3, 4\]\], evaluation_loss {number}", line), line


def test_metrics_can_be_sent_elsewhere() -> None:
    sent: list[dict[str, Any]] = []

    class Elsewhere(LogMetricsCallback):
        def log_metrics(self, trainer: Trainer, metrics: Any) -> None:
            sent.append(dict(metrics))

    history = make_trainer(Elsewhere).train(make_data(8), 1, make_data(4))
    assert sent == [{name: history.get_latest_metric(name)} for name in ("train_loss_epoch", "eval_loss_epoch")]


class Elsewhere(LogMetricsCallback):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Any] = []

    def log_metrics(self, trainer: Trainer, metrics: Any) -> None:
        self.sent.append(dict(metrics))


def _print_everything() -> tuple[str, int, int]:
    out, bars, elsewhere, depths = io.StringIO(), ProgressBarCallback(seconds_between_lines=0), Elsewhere(), []
    look = LambdaCallback(on_train_step_end=lambda trainer, **_: depths.append(len(bars._passes)))
    with contextlib.redirect_stdout(out):
        callbacks = PrintProgressCallback, bars, LogMetricsCallback, elsewhere, look
        make_trainer(*callbacks).train(make_data(16), 1, make_data(4))
    return out.getvalue(), depths[0], len(elsewhere.sent)


def test_only_the_main_process_prints_draws_and_logs() -> None:
    (first, num_bars, num_logs), (second, num_other_bars, num_other_logs) = run_processes(_print_everything, 2)
    assert (num_bars, num_logs, num_other_bars, num_other_logs) == (1, 2, 0, 0)
    assert "Starting training run" in first and "2 process(es)" in first and "step 1/1" in first
    assert second == ""


def test_samples_are_counted_over_all_processes_and_the_loss_is_a_mean_of_the_pass() -> None:
    drawn: list[Tensor | float] = []
    losses: list[float] = []
    trainer = make_trainer(
        LambdaCallback(
            on_train_step_end=lambda trainer, batch_output, **_: (
                losses.append(batch_output["loss"].item()),
                drawn.append(trainer.data_pass.mean_loss_so_far()),
            )
        )
    )
    trainer.train(make_data(12), 1, per_device_batch_size=4)
    assert drawn == pytest.approx([sum(losses[: n + 1]) / (n + 1) for n in range(3)])


def test_a_run_inside_a_run_leaves_the_outer_bar_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def evaluate(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == 2:
            trainer.evaluate(make_data(4))
            trainer.predict(make_data(4))

    bars = ProgressBarCallback(seconds_between_lines=0)
    make_trainer(bars, LambdaCallback(on_train_update_end=evaluate)).train(make_data(32), 1)
    labels = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert labels == [
        "epoch 1/1: step 1/4",
        "epoch 1/1: step 2/4",
        "eval: step 1/1",
        "predict: step 1/1",
        "epoch 1/1: step 3/4",
        "epoch 1/1: step 4/4",
    ]
    assert bars._passes == bars._depths == []


def test_a_limit_set_after_the_bar_began_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = ProgressBarCallback(seconds_between_lines=0), LimitEvalStepsCallback(2, limit_intermediate_only=False)
    make_trainer(*callbacks).train(make_data(8), 1, make_data(40))
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()][1:] == [
        "eval: step 1/2",
        "eval: step 2/2",
    ]


def test_consoles_that_are_terminals_without_being_files_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Console(io.StringIO):
        def isatty(self) -> bool:
            return True

    console = Console()
    monkeypatch.setattr(sys, "stderr", console)
    make_trainer(ProgressBarCallback(seconds_between_draws=0)).train(make_data(8), 1)
    assert "epoch 1/1: 100%" in console.getvalue()


def test_what_later_callbacks_record_is_printed_before_the_next_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    late = LambdaCallback(
        on_eval_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("late", trainer.current_epoch)
    )
    announce = LambdaCallback(on_train_epoch_begin=lambda trainer, **_: trainer.print(f"epoch {trainer.current_epoch}"))
    make_trainer(LogMetricsCallback, announce, late).train(make_data(8), 2, make_data(4))
    lines = [line for line in capsys.readouterr().out.splitlines() if line and "loss" not in line]
    assert lines == ["epoch 1", "epoch 1: late 1", "epoch 2", "epoch 2: late 2"]


@pytest.mark.parametrize("error", [RuntimeError("enough"), KeyboardInterrupt()])
def test_a_failed_run_is_not_announced_as_finished(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == 2:
            raise error

    trainer = make_trainer(PrintProgressCallback, LambdaCallback(on_train_update_end=fail))
    with pytest.raises(type(error)) as raised:
        trainer.train(make_data(32), 1)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"Training run ended by {type(error).__name__} in epoch 1: 2 updates, 16 samples"
    )
    assert any("while training" in note for note in raised.value.__notes__)


def test_an_interrupted_run_is_announced_as_interrupted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saver = SaveTrainingStateCallback(tmp_path, time_budget=1e-9)
    with pytest.raises(TrainingInterrupted):
        make_trainer(PrintProgressCallback, saver).train(make_data(32), 1)
    assert capsys.readouterr().out.splitlines()[-1] == "Training run interrupted in epoch 1: 1 updates, 8 samples"

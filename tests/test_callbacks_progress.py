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
import time
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
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
)
from pytorch_accelerated.callbacks.progress import RunSummary, SummaryCallback, make_epoch_table
from pytorch_accelerated.errors import StopTrainingError, TrainingInterrupted
from pytorch_accelerated.passes import DataPass
from pytorch_accelerated.tracking import RunHistory
from tests.support import Stream, make_data, make_mlp, run_processes

ROOT = Path(__file__).parent.parent


def make_trainer(*callbacks: Any, **kwargs: Any) -> Trainer:
    return Trainer(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.125), callbacks, seed=5, **kwargs)


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
    expected = [rf"epoch 1/1: step {step}/3, loss {number}, lr 0.125, {rate}, {left}, run {left}" for step in (1, 2, 3)]
    expected.append(rf"eval: step 1/1, loss {number}, {rate}, {left}")
    assert len(lines) == len(expected)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, lines, strict=True)), lines
    trainer.predict(make_data(4))
    assert re.fullmatch(rf"predict: step 1/1, {rate}, {left}\n", capsys.readouterr().out)


def test_data_without_length_has_no_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    bars = ProgressBarCallback(seconds_between_lines=0)
    make_trainer(bars).train(Stream(make_data(8)), None, max_num_train_steps=1)
    [line] = capsys.readouterr().out.splitlines()
    start = r": step 1, loss \d\.\d+, lr 0\.125, [\d,]+ samples/s"
    assert re.fullmatch(rf"epoch 1{start}, run 0:00:00 left", line), line  # the updates of the run are known
    make_trainer(bars).train(Stream(make_data(8)), 1)
    [line] = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"epoch 1/1{start}", line), line


def test_short_passes_print_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(ProgressBarCallback()).train(make_data(40), 2, make_data(4))
    assert capsys.readouterr().out == ""


def test_the_loss_is_read_only_when_something_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    original = DataPass.own_loss_sums
    monkeypatch.setattr(DataPass, "own_loss_sums", lambda self: reads.append(1) or original(self))
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
PRINTING_SCRIPT = SCRIPT.replace("import ProgressBarCallback,", "import LogMetricsCallback, ProgressBarCallback,")
PRINTING_SCRIPT = PRINTING_SCRIPT.replace("[ProgressBarCallback", "[LogMetricsCallback, ProgressBarCallback")


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


def test_a_narrow_terminal_has_the_most_important_facts_and_printed_lines_rows_of_their_own() -> None:
    written = run_on_a_terminal(PRINTING_SCRIPT, 80)
    states = [state.strip() for state in re.split(r"[\r\n]|\x1b\[A", written) if state.strip()]
    last = next(state for state in reversed(states) if state.startswith("epoch 2/2"))
    assert re.fullmatch(r"epoch 2/2: 100%\|█+\| 9/9 \[\d\d:\d\d<\d\d:\d\d, loss \d\.\d+, run 0:00:00 left\]", last)
    assert max(map(len, states)) <= 80
    lines = re.findall(r"(?:^|[\r\n]|\x1b\[A)(epoch \d: [^\r\n]*)\r\n", written)
    # Of two epochs, an evaluation after each, and three in between.
    assert len(lines) == 7 and all(re.fullmatch(r"epoch \d: \w+_loss_epoch \d\.\d+", line) for line in lines), written


@pytest.mark.parametrize("num_columns", [120, 0])  # some pseudo-terminals say that they have none
def test_a_bar_on_a_terminal(num_columns: int) -> None:
    written = run_on_a_terminal(SCRIPT, num_columns)
    states = [state.strip() for state in re.split(r"[\r\n]|\x1b\[A", written) if state.strip()]
    last = next(state for state in reversed(states) if state.startswith("epoch 2/2"))
    assert re.fullmatch(
        r"epoch 2/2: 100%\|█+\| 9/9 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+step/s, loss \d\.\d+, lr 0\.125, [\d,]+ samples/s, "
        r"run 0:00:00 left\]",
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


def losses_shown(lines: str) -> list[float]:
    return [float(value) for value in re.findall(r"epoch .* loss ([\d.e-]+),", lines)]


@pytest.mark.parametrize("counts_items", [False, True])
def test_the_loss_shown_is_a_mean_that_looks_back_on_some_steps(
    counts_items: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    class Planned(Trainer):
        """Has losses that are known beforehand: 1, 2, 3 ..., which the second epoch goes on with."""

        num_losses = 0

        def calculate_train_batch_loss(self, batch: Any) -> Any:
            self.num_losses += 1
            output = {"loss": self.model(batch[0]).sum() * 0 + float(self.num_losses)}
            return output | ({"num_items_in_batch": 7.0 * self.num_losses} if counts_items else {})

    bars = ProgressBarCallback(seconds_between_lines=0)
    Planned(make_mlp(), None, partial(torch.optim.SGD, lr=0.1), [bars]).train(make_data(24), 2)
    weights = [0.98**back * 0.02 for back in range(6)]
    expected = [
        sum(weight * loss for weight, loss in zip(weights, range(last, 0, -1), strict=False)) / sum(weights[:last])
        for last in range(1, 7)
    ]
    assert losses_shown(capsys.readouterr().out) == pytest.approx(expected, rel=1e-3)  # four digits are shown
    # A mean over the steps between two draws counts as much as all of them.
    bars._run.__init__()  # type: ignore[misc, union-attr]  # as at the beginning of a run
    bars._run.add_loss(1.0, 1)  # type: ignore[union-attr]
    bars._run.add_loss(3.0, 100)  # type: ignore[union-attr]
    first, second = 0.98**100 * 0.02, 1 - 0.98**100
    assert bars._run.loss == pytest.approx((first * 1 + second * 3) / (first + second))  # type: ignore[union-attr]


def test_the_loss_of_an_evaluation_is_the_mean_of_the_pass(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(ProgressBarCallback(seconds_between_lines=0))
    history = trainer.train(make_data(8), 1, make_data(40))
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"loss {history.get_latest_metric('eval_loss_epoch'):.4g}," in last


def test_metrics_are_as_they_are_without_a_bar() -> None:
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

    def train(*callbacks: Any) -> Any:
        metrics = {"accuracy": MulticlassAccuracy(3), "f1": MulticlassF1Score(3)}
        trainer = Trainer(
            make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), callbacks, metrics=metrics
        )
        return trainer.train(make_data(40), 2, make_data(40)).state_dict()

    torch.manual_seed(0)
    without = train()
    torch.manual_seed(0)
    assert train(ProgressBarCallback(seconds_between_lines=0)) == without


class Slow(Trainer):
    """Takes a known time for each step."""

    train_seconds, eval_seconds = 0.02, 0.05

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        time.sleep(self.train_seconds)
        return super().calculate_train_batch_loss(batch)

    def calculate_eval_batch_loss(self, batch: Any) -> Any:
        time.sleep(self.eval_seconds)
        return super().calculate_eval_batch_loss(batch)


def time_left_at(trainer: Trainer, bars: ProgressBarCallback) -> dict[int, float | None]:
    """Let the seconds be noted that are said to be left of the run, by update."""
    left: dict[int, float | None] = {}

    def note(trainer: Trainer, **kwargs: Any) -> None:
        assert bars._run is not None
        left[trainer.num_updates] = bars._run.seconds_left(trainer, time.monotonic())

    trainer.callback_handler.add_callback(LambdaCallback(on_train_step_end=note))  # when it would be drawn
    return left


def test_the_time_left_is_that_of_the_whole_run_with_its_evaluations() -> None:
    bars = ProgressBarCallback()
    trainer = Slow(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), [bars])
    left = time_left_at(trainer, bars)
    ends: dict[int, float] = {}
    trainer.callback_handler.add_callback(
        LambdaCallback(on_train_step_end=lambda trainer, **_: ends.update({trainer.num_updates: time.monotonic()}))
    )
    trainer.train(make_data(80), 4, make_data(32))  # 10 updates and 4 steps of evaluation in an epoch
    end = time.monotonic()
    # Of the second epoch on, when an evaluation has been seen: near the truth, of which the evaluations are half.
    for update in (15, 25, 35):
        assert left[update] == pytest.approx(end - ends[update], rel=0.25, abs=0.05), (update, left, end - ends[update])
    # Before: an evaluation step is taken for a third of a training step.
    assert left[8] is not None and 0.7 * 32 * 0.02 < left[8] < 0.6 * (end - ends[8]) + 0.8


def test_the_time_left_is_right_after_a_resume_and_within_other_limits(tmp_path: Path) -> None:
    def make() -> tuple[Slow, dict[int, float | None]]:
        bars = ProgressBarCallback()
        saver = SaveTrainingStateCallback(tmp_path, save_every_n_updates=10)
        trainer = Slow(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), [bars, saver])
        return trainer, time_left_at(trainer, bars)

    make()[0].train(make_data(80), 1)
    trainer, left = make()
    trainer.train(make_data(80), 4, resume_from="latest")
    assert min(left) == 10
    for update in (15, 30):  # 25 and 10 more
        seconds = (39 - update) * Slow.train_seconds
        assert left[update] is not None and 0.9 * seconds < left[update] < 2 * seconds + 0.2, left  # type: ignore[operator]
    trainer, left = make()
    # Windows of 4 and 4 and 2 steps: 12 updates are 4 epochs, which the limit of 8 ends early.
    trainer.train(make_data(80), 4, max_num_train_steps=8, gradient_accumulation_steps=4)
    seconds = 10 * Slow.train_seconds  # after 18 steps, when the fifth update is about to be made, of 28
    assert left[4] is not None and 0.8 * seconds < left[4] < 2 * seconds + 0.2


def test_samples_per_second_are_those_of_training_alone(capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = ProgressBarCallback(seconds_between_lines=0), StepBasedEvaluationCallback(1)
    trainer = Slow(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), callbacks)
    trainer.train(make_data(64), 1, make_data(32))
    line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")][-1]
    rate = float(re.search(r"([\d,]+) samples/s", line)[1].replace(",", ""))  # type: ignore[index]
    assert 200 < rate <= 400  # 8 samples in 0.02 seconds; with the evaluations it would be below 40


def summary_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    [first] = [number for number, line in enumerate(lines) if line.startswith("Summary: ")]
    return lines[first:]


def test_a_summary_is_the_last_that_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rate = LambdaCallback(
        on_eval_epoch_end=lambda trainer, **_: trainer.run_history.update_metric("rate", trainer.num_updates / 2)
    )
    saver = SaveBestModelCallback(tmp_path / "best.safetensors")
    trainer = make_trainer(
        SummaryCallback, PrintProgressCallback, LogMetricsCallback, rate, saver, run_dir=tmp_path / "runs"
    )
    history = trainer.train(make_data(32), 3, make_data(8))
    train, evals = (history.get_metric_values(f"{name}_loss_epoch") for name in ("train", "eval"))
    first, head, *table, last = summary_of(capsys)
    assert re.fullmatch(r"Summary: 3 epochs, 12 updates, 96 samples in 0:00:0\d, [\d,]+ samples/s", first)
    assert head.split(maxsplit=2) == ["metric", "last", "best, or smallest to greatest"]
    best = [f"{min(values):.4g} (epoch {values.index(min(values)) + 1})" for values in (train, evals)]
    assert [line.split(maxsplit=2) for line in table] == [
        ["train_loss_epoch", f"{train[-1]:.4g}", best[0]],
        ["eval_loss_epoch", f"{evals[-1]:.4g}", best[1]],
        ["rate", "6", "2 (epoch 1) to 6 (epoch 3)"],
    ]
    assert last == f"Run directory: {tmp_path / 'runs' / '1'}"
    assert (tmp_path / "runs" / "1" / "log.txt").read_text().splitlines()[-1] == last


def test_a_summary_is_compact(capsys: pytest.CaptureFixture[str]) -> None:
    def record(trainer: Trainer, **kwargs: Any) -> None:
        trainer.run_history.update_metric("nothing", float("nan"))  # before those for which there is no room
        for number in range(30):
            trainer.run_history.update_metric("system_cpu_percent", 50)  # of the machine: not shown
            trainer.run_history.update_metric(f"zebra_{number}_{'x' * 80}", -1234567.891 * number)
        trainer.run_history.update_metric("matrix", [[1, 2], [3, 4]])

    make_trainer(SummaryCallback, LambdaCallback(on_train_update_end=record)).train(make_data(32), 3, make_data(8))
    lines = summary_of(capsys)
    assert len(lines) < 20 and max(map(len, lines)) <= 100, lines
    assert lines[-1] == "  and 22 more in the history"
    assert not any("system_" in line for line in lines)
    assert not any("matrix" in line for line in lines)
    [nothing] = [line for line in lines if "nothing" in line]
    assert nothing.split() == ["nothing", "nan"]
    assert any(re.search(r"\(update 1\) to|\(update 1\)$", line) for line in lines), lines  # several in an epoch


class StopsEarly(LambdaCallback):
    def __init__(self, error: BaseException) -> None:
        def stop(trainer: Trainer, **kwargs: Any) -> None:
            if trainer.num_updates == 6:
                raise error

        super().__init__(on_train_update_end=stop)


def test_the_summary_comes_also_where_a_run_ends_early_and_is_short_where_it_fails(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    callbacks = SummaryCallback, PrintProgressCallback
    make_trainer(*callbacks, StopsEarly(StopTrainingError("enough"))).train(make_data(32), 3)
    lines = summary_of(capsys)
    assert lines[0].startswith("Summary: 1 epoch and a part of one, 6 updates, 48 samples in") and len(lines) == 3
    for error in (RuntimeError("enough"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            make_trainer(*callbacks, StopsEarly(error)).train(make_data(32), 3)
        [line] = summary_of(capsys)
        assert line.startswith("Summary: 1 epoch and a part of one, 6 updates, 48 samples in 0:00:0")
    with pytest.raises(TrainingInterrupted):
        make_trainer(*callbacks, SaveTrainingStateCallback(tmp_path, time_budget=1e-9)).train(make_data(32), 1)
    assert len(summary_of(capsys)) == 1
    make_trainer(*callbacks, SaveTrainingStateCallback(tmp_path)).train(make_data(32), 1, resume_from="latest")
    first = summary_of(capsys)[0]
    assert re.match(r"Summary: 1 epoch, 4 updates, 32 samples; since update 1, where it went on, 0:00:0\d, ", first), (
        first
    )


def test_a_run_that_had_nothing_to_do_has_a_summary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    callbacks = SummaryCallback, SaveTrainingStateCallback(tmp_path)
    make_trainer(*callbacks).train(make_data(8), 1)
    capsys.readouterr()
    make_trainer(*callbacks).train(make_data(8), 1, resume_from="latest")
    lines = summary_of(capsys)
    assert lines[0].startswith("Summary: 1 epoch, 1 updates, 8 samples; since update 1")
    assert "samples/s" not in lines[0]
    assert SummaryCallback not in vars(RunSummary)


def _summarise() -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        make_trainer(SummaryCallback).train(make_data(16), 1)
    return out.getvalue()


def test_only_the_main_process_prints_a_summary() -> None:
    first, second = run_processes(_summarise, 2)
    assert first.startswith("Summary: 1 epoch, 1 updates, 16 samples in") and second == ""


def test_a_table_has_a_row_for_each_epoch() -> None:
    history = RunHistory()
    for epoch in (1, 2, 3):
        history.counters.current_epoch, history.counters.num_updates = epoch, 1000 * epoch
        history.update_metric("eval_<b>", 9.0)
        history.update_metric("eval_<b>", epoch / 8)  # the later one counts
        history.update_metric("train_loss_epoch", [0.5, 0.25, float("nan")][epoch - 1])
        history.update_metric("matrix", [[1]])
        history.update_metric("system_memory", 1.0)
    table = make_epoch_table(history)
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert cells == [
        ["epoch", "updates", "train_loss_epoch", "eval_&lt;b&gt;"],
        ["1", "1,000", "0.5", "0.125"],
        ["2", "2,000", "<b>0.25</b>", "0.25"],
        ["3", "3,000", "nan", "0.375"],
    ]
    for number in range(20):
        history.update_metric(f"eval_{number}", 1.0)
    for epoch in range(4, 104):
        history.counters.current_epoch = epoch
        history.update_metric("train_loss_epoch", 1.0)
    table = make_epoch_table(history)
    assert table.count("<tr>") == 101 and table.count("<th ") == 10
    assert "Left out: 3 earlier epochs; the metrics eval_6, " in table


IN_A_NOTEBOOK = """
import warnings
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm asks for ipywidgets
from functools import partial
import torch
from torch import nn
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LogMetricsCallback, PrintProgressCallback, ProgressBarCallback
from tests.support import make_data, make_mlp

callbacks = [PrintProgressCallback, ProgressBarCallback, LogMetricsCallback]
trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.125), callbacks, seed=0)
trainer.train(make_data(16), 3, make_data(8))
trainer.evaluate(make_data(8))
import os
if (child := os.fork()) == 0:
    from pytorch_accelerated.callbacks.progress import find_notebook
    os._exit(0 if find_notebook() is None else 1)
print("forked:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_notebook_has_a_table_that_grows(tmp_path: Path) -> None:
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name="python3")
    manager.kernel_spec.argv[0] = sys.executable
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    manager.start_kernel(env=environment, cwd=str(tmp_path))
    client = manager.client()
    messages: list[Any] = []
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        reply = client.execute_interactive(IN_A_NOTEBOOK, timeout=120, output_hook=messages.append, store_history=False)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    printed = "".join(message["content"].get("text", "") for message in messages if message["msg_type"] == "stream")
    assert reply["content"]["status"] == "ok", (reply["content"], printed)
    tables = [message for message in messages if "text/html" in message["content"].get("data", {})]
    # After each epoch and each evaluation; the first is shown, the others take its place.
    assert [message["msg_type"] for message in tables] == ["display_data"] + ["update_display_data"] * 5
    assert len({message["content"]["transient"]["display_id"] for message in tables}) == 1
    assert [message["content"]["data"]["text/html"].count("<tr>") for message in tables] == [2, 2, 3, 3, 4, 4]
    lines = [line for line in printed.splitlines() if line.strip()]
    assert lines[0].startswith("Starting training run: 3 epoch(s)") and lines[-1] == "forked: 0"
    assert [line.split(":")[0].split()[0] for line in lines[1:-1]] == ["Finishing", "evaluation_loss"], lines

"""What a user sees while a run goes on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.errors import TrainingInterrupted

if TYPE_CHECKING:
    from pytorch_accelerated.passes import DataPass
    from pytorch_accelerated.trainer import Trainer


class PrintProgressCallback(TrainerCallback):
    """Print a line when a run, an epoch or an evaluation begins, and when a run ends. Main process only."""

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print that training begins, and how far it will go."""
        config = trainer.run_config
        goals = [f"{config.num_epochs} epoch(s)"] if config.num_epochs is not None else []
        goals += [f"{config.num_updates} updates"] if config.num_updates is not None else []
        trainer.print(
            f"Starting training run: {', '.join(goals)}, {config.num_processes} process(es), seed {config.seed}"
        )

    def on_train_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print the number of the epoch."""
        trainer.print(f"Starting epoch {trainer.current_epoch}{_out_of(trainer)}")

    def on_eval_epoch_begin(self, trainer: Trainer, eval_name: str | None = None, **kwargs: Any) -> None:
        """Print which evaluation begins."""
        trainer.print(f"Starting evaluation{f' on {eval_name}' if eval_name else ''}")

    def on_train_run_end(self, trainer: Trainer, exception: BaseException | None = None, **kwargs: Any) -> None:
        """Print that training is over, and what it took."""
        what = "Finishing training run"
        if exception is not None:
            is_failure = not isinstance(exception, TrainingInterrupted)
            how = f"ended by {type(exception).__name__}" if is_failure else "interrupted"
            what = f"Training run {how} in epoch {trainer.current_epoch}"
        trainer.print(f"{what}: {trainer.num_updates} updates, {trainer.num_samples} samples")


class ProgressBarCallback(TrainerCallback):
    """Show a bar for each pass over data, with loss, learning rate, samples per second and the time left in the pass.

    In a notebook the bar is a widget. Where the output is no terminal (a log file, CI), a plain line is printed now and
    then instead. Main process only. The loss, the mean of the pass so far on this process, is read only when something
    is drawn, because reading it waits for the device.
    """

    def __init__(self, seconds_between_draws: float = 0.5, seconds_between_lines: float = 30.0) -> None:
        """Take the smallest intervals in seconds: of the bar, and of the plain lines where there is no terminal."""
        self.seconds_between_draws = seconds_between_draws
        self.seconds_between_lines = seconds_between_lines
        self._passes: list[_PassProgress] = []  # more than one while an evaluation interrupts an epoch
        self._depths: list[int] = []  # how many there were when each run began; runs may be nested, too

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Note which bars are not of this run."""
        self._depths.append(len(self._passes))

    on_evaluation_run_begin = on_train_run_begin
    on_prediction_run_begin = on_train_run_begin

    def on_train_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Begin a bar for the epoch."""
        self._begin(trainer, f"epoch {trainer.current_epoch}{_out_of(trainer)}")

    def on_eval_epoch_begin(self, trainer: Trainer, eval_name: str | None = None, **kwargs: Any) -> None:
        """Begin a bar for the evaluation."""
        self._begin(trainer, f"eval {eval_name}" if eval_name else "eval")

    def on_predict_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Begin a bar for the predictions."""
        self._begin(trainer, "predict")

    def on_train_step_end(self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any) -> None:
        """Count the batch, and draw if it is time."""
        if self._passes:
            self._passes[-1].advance(trainer)

    on_eval_step_end = on_train_step_end
    on_predict_step_end = on_train_step_end

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Draw the bar for the last time."""
        if self._passes:
            self._passes.pop().close(trainer)

    on_eval_epoch_end = on_train_epoch_end
    on_predict_epoch_end = on_train_epoch_end

    def on_train_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Leave no bar behind where a run failed."""
        self._close(trainer, self._depths.pop() if self._depths else 0)

    on_evaluation_run_end = on_train_run_end
    on_prediction_run_end = on_train_run_end

    def on_exception(self, trainer: Trainer, exception: BaseException, **kwargs: Any) -> None:
        """Close the bars of the run before other callbacks print that it is over."""
        self._close(trainer, self._depths[-1] if self._depths else 0)

    def _close(self, trainer: Trainer, depth: int) -> None:
        while len(self._passes) > depth:
            self._passes.pop().close(trainer, has_failed=True)

    def _begin(self, trainer: Trainer, label: str) -> None:
        if trainer.accelerator.is_main_process:
            data_pass = trainer.data_pass
            assert data_pass is not None, "the event is one of a pass"
            bar = _create_bar(label, data_pass.num_steps, data_pass.step + 1, is_nested=bool(self._passes))
            interval = self.seconds_between_lines if bar is None else self.seconds_between_draws
            self._passes.append(_PassProgress(bar, label, data_pass, interval))


class _PassProgress:
    """Progress of one pass over data."""

    def __init__(self, bar: Any, label: str, data_pass: DataPass, interval: float) -> None:
        self._bar = bar
        self._label = label
        self._data_pass = data_pass
        self._interval = interval
        self._step = self._first_step = data_pass.step + 1  # not 0 in an epoch that goes on after an interruption
        self._samples = 0
        self._start = time.monotonic()
        self._next_draw = self._start + interval

    def advance(self, trainer: Trainer) -> None:
        self._step += 1
        self._samples += self._data_pass.loader.round_samples
        now = time.monotonic()
        if now >= self._next_draw:
            self._next_draw = now + self._interval
            self._draw(trainer, now - self._start)

    def close(self, trainer: Trainer, has_failed: bool = False) -> None:
        if self._bar is not None:
            if has_failed:
                self._bar.update(self._step - self._bar.n)  # without the loss, which may be what failed
            else:
                self._draw(trainer, time.monotonic() - self._start)
            self._bar.close()

    def _draw(self, trainer: Trainer, seconds: float) -> None:
        num_steps = self._data_pass.num_steps  # which a callback may have limited since the pass began
        facts = []
        if (loss := self._data_pass.mean_loss_so_far()) is not None:
            facts.append(f"loss {loss:.4g}")
        if self._data_pass.kind == "training" and (groups := getattr(trainer.optimizer, "param_groups", None)):
            facts.append(f"lr {float(groups[0]['lr']):.3g}")
        facts.append(f"{self._samples / max(seconds, 1e-9):,.0f} samples/s")
        if self._bar is not None:
            self._bar.total = num_steps
            self._bar.set_postfix_str(", ".join(facts), refresh=False)
            self._bar.update(self._step - self._bar.n)
            return
        if num_steps:
            left = int(seconds / max(self._step - self._first_step, 1) * (num_steps - self._step))
            facts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        of_all = f"/{num_steps}" if num_steps else ""
        trainer.print(f"{self._label}: step {self._step}{of_all}, {', '.join(facts)}")


def _create_bar(label: str, num_steps: int | None, first_step: int, is_nested: bool) -> Any:
    """Return a tqdm bar, or None where nobody could watch it move."""
    from tqdm.auto import tqdm

    is_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    if not is_notebook and not sys.stderr.isatty():
        return None
    # Some pseudo-terminals say that they have neither columns nor rows, into which tqdm would draw nothing.
    has_width = is_notebook
    with suppress(OSError):  # some consoles are terminals without being files
        has_width = has_width or os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return tqdm(
        total=num_steps,
        initial=first_step,
        desc=label,
        leave=not is_nested,
        mininterval=0,
        miniters=0,
        unit="step",
        dynamic_ncols=has_width,
        ncols=None if has_width else 100,
        nrows=None if has_width else 24,
    )


class LogMetricsCallback(TrainerCallback):
    """Print what the run history has gained since the last look, at the end of each pass. Main process only.

    Override ``log_metrics`` to send it elsewhere.
    """

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self._num_seen: dict[str, int] = {}

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Take what is in the history as seen."""
        self._find_new(trainer)

    on_evaluation_run_begin = on_train_run_begin

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Print what is new."""
        metrics = self._find_new(trainer)
        if metrics and trainer.accelerator.is_main_process:
            self.log_metrics(trainer, metrics)

    on_eval_epoch_end = on_train_epoch_end
    # What callbacks after this one recorded at the end of a pass is seen now.
    on_train_epoch_begin = on_train_epoch_end
    on_train_run_end = on_train_epoch_end
    on_evaluation_run_end = on_train_epoch_end

    def log_metrics(self, trainer: Trainer, metrics: Mapping[str, Any]) -> None:
        """Print metrics; called on the main process.

        Args:
            trainer: the trainer.
            metrics: the newest value of each metric that was recorded since the last call.
        """
        values = [f"{name} {f'{value:.6g}' if isinstance(value, float) else value}" for name, value in metrics.items()]
        # Of the moment of recording, which for what later callbacks recorded is not the present one.
        epoch = max(trainer.run_history.get_metric_counters(name)[-1]["current_epoch"] for name in metrics)
        trainer.print(f"{f'epoch {epoch}: ' if trainer.is_training_run else ''}{', '.join(values)}")

    def _find_new(self, trainer: Trainer) -> dict[str, Any]:
        history = trainer.run_history
        counts = {name: len(history.get_metric_values(name)) for name in sorted(history.get_metric_names())}
        new = {name: history.get_latest_metric(name) for name, n in counts.items() if n > self._num_seen.get(name, 0)}
        self._num_seen = counts
        return new


def _out_of(trainer: Trainer) -> str:
    last = trainer.last_epoch
    return f"/{last}" if last is not None else ""

"""What a user sees while a run goes on."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.errors import TrainingInterrupted
from pytorch_accelerated.metrics_log import format_seconds, is_loss, is_number

if TYPE_CHECKING:
    from pytorch_accelerated.passes import DataPass
    from pytorch_accelerated.tracking import RunHistory
    from pytorch_accelerated.trainer import Trainer

_KEPT_PER_STEP = 0.98  # of the weight that the losses before have in the one shown: it looks back on about 50 steps
_MIN_COLUMNS = 110  # of a terminal, for a bar with all facts beside it
_MAX_COLUMNS, _MAX_ROWS = 8, 100  # of the table in a notebook
_MAX_METRICS = 12  # in a summary


class PrintProgressCallback(TrainerCallback):
    """Print a line when a run, an epoch or an evaluation begins, and when a run ends. Main process only.

    In a notebook, where bars and a table say it, epochs and evaluations are not announced.
    """

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
        if find_notebook() is None:
            trainer.print(f"Starting epoch {trainer.current_epoch}{_out_of(trainer)}")

    def on_eval_epoch_begin(self, trainer: Trainer, eval_name: str | None = None, **kwargs: Any) -> None:
        """Print which evaluation begins."""
        if find_notebook() is None:
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
    """Show a bar for each pass over data, with loss, learning rate, samples per second and the time left.

    The time beside the bar is that left in the pass; ``run 0:12:30 left`` is that left in the training run, with the
    evaluations to come, where the length of the run is known. The loss of a training pass is a mean that looks back on
    about 50 steps, of an evaluation the mean of the pass so far; both of this process. They are read only when
    something is drawn, because reading waits for the device.

    In a notebook the bar is a widget. Where the output is no terminal (a log file, CI), a plain line is printed now and
    then instead. Main process only.
    """

    def __init__(self, seconds_between_draws: float = 0.5, seconds_between_lines: float = 30.0) -> None:
        """Take the smallest intervals in seconds: of the bar, and of the plain lines where there is no terminal."""
        self.seconds_between_draws = seconds_between_draws
        self.seconds_between_lines = seconds_between_lines
        self._passes: list[_PassProgress] = []  # more than one while an evaluation interrupts an epoch
        self._depths: list[int] = []  # how many there were when each run began; runs may be nested, too
        self._run: _RunProgress | None = None  # of the training run

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Begin to measure the run."""
        self._run = _RunProgress()
        self._note_depth()

    def on_evaluation_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Note which bars are not of this run."""
        self._note_depth()

    on_prediction_run_begin = on_evaluation_run_begin

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

    def on_train_epoch_end(self, trainer: Trainer, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Draw the bar for the last time."""
        if not self._passes:
            return
        seconds, num_steps = self._passes.pop().close(trainer)
        if self._run is not None and trainer.is_training_run and trainer.data_pass is not self._run.data_pass:
            self._run.add_evaluation(seconds, num_steps, is_intermediate)
        if self._passes:
            self._passes[-1].leave_out(seconds)

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

    def _note_depth(self) -> None:
        self._depths.append(len(self._passes))

    def _close(self, trainer: Trainer, depth: int) -> None:
        while len(self._passes) > depth:
            self._passes.pop().close(trainer, has_failed=True)

    def _begin(self, trainer: Trainer, label: str) -> None:
        if trainer.accelerator.is_main_process:
            data_pass = trainer.data_pass
            assert data_pass is not None, "the event is one of a pass"
            run = self._run if data_pass.kind == "training" else None
            if run is not None:
                run.data_pass = data_pass
            if self._passes:
                self._passes[-1].pause()
            bar = _create_bar(label, data_pass.num_steps, data_pass.step + 1, is_nested=bool(self._passes))
            interval = self.seconds_between_lines if bar is None else self.seconds_between_draws
            self._passes.append(_PassProgress(bar, label, data_pass, interval, run))


class _RunProgress:
    """Progress of a training run: the loss of late, and how long steps and evaluations have taken."""

    def __init__(self) -> None:
        self.data_pass: DataPass | None = None
        self.loss: float | None = None
        self._loss_weight = 0.0
        self._start = time.monotonic()
        self._first_step: int | None = None  # which is the slowest, and therefore no measure of the others
        self._seconds_evaluating = self._seconds_before = 0.0
        self._num_eval_steps = self._num_intermediate_steps = self._num_final_steps = self._num_final_passes = 0

    def begin(self, trainer: Trainer, now: float) -> None:
        """Begin to measure, after the first step."""
        if self._first_step is None:
            self._first_step, self._start = trainer.num_steps, now
            self._seconds_before = self._seconds_evaluating

    def add_loss(self, loss: float, num_steps: int) -> None:
        """Take in the mean loss of some steps."""
        if self.loss is None or not math.isfinite(self.loss):
            self.loss, self._loss_weight = 0.0, 0.0
        # The weights of a mean that decays by the step, divided by their sum so that it is unbiased from the first on.
        kept = _KEPT_PER_STEP**num_steps
        weight = kept * self._loss_weight + 1 - kept
        self.loss += (loss - self.loss) * (1 - kept) / weight
        self._loss_weight = weight

    def add_evaluation(self, seconds: float, num_steps: int, is_intermediate: bool) -> None:
        """Take in how long an evaluation has taken."""
        self._seconds_evaluating += seconds
        self._num_eval_steps += num_steps
        if is_intermediate:
            self._num_intermediate_steps += num_steps
        else:
            self._num_final_steps += num_steps
            self._num_final_passes += 1

    def seconds_left(self, trainer: Trainer, now: float) -> float | None:
        """Return how long the run will go on, evaluations included; None where its length is not known."""
        run, data_pass = trainer.training_run, self.data_pass
        assert data_pass is not None, "a training pass is in progress"
        length, done = data_pass.num_steps, data_pass.step + 1
        limits: list[float] = []
        if run.epoch_limit is not None and length is not None:
            limits.append((run.epoch_limit - trainer.current_epoch + 1) * length - done)
        if run.update_limit is not None:
            window: float = trainer.run_config.gradient_accumulation_steps
            window = window if length is None else length / math.ceil(length / window)  # the last one may be shorter
            limits.append((run.update_limit - trainer.num_updates) * window - (done - run.num_steps_in_epoch))
        if not limits:
            return None
        steps_left = max(min(limits), 0.0)

        num_steps = trainer.num_steps - (trainer.num_steps if self._first_step is None else self._first_step)
        seconds = now - self._start - (self._seconds_evaluating - self._seconds_before)
        seconds_per_step = max(seconds, 0.0) / max(num_steps, 1)
        left = steps_left * seconds_per_step
        if run.eval_loaders:
            # Until one has been seen, an evaluation step is taken for a third of a training step: forward alone.
            if self._num_eval_steps:
                seconds_per_eval_step = self._seconds_evaluating / self._num_eval_steps
            else:
                seconds_per_eval_step = seconds_per_step / 3
            epochs_left = 1 if length is None else 1 + math.ceil(max(steps_left - (length - done), 0.0) / length)
            eval_steps: float = trainer.run_config.eval_dataloader_len or 0
            if self._num_final_passes:
                eval_steps = self._num_final_steps / self._num_final_passes * len(run.eval_loaders)
            eval_steps_left = epochs_left * eval_steps
            eval_steps_left += steps_left * self._num_intermediate_steps / max(num_steps, 1)
            left += eval_steps_left * seconds_per_eval_step
        return left


class _PassProgress:
    """Progress of one pass over data."""

    def __init__(
        self, bar: Any, label: str, data_pass: DataPass, interval: float, run: _RunProgress | None = None
    ) -> None:
        self._bar = bar
        self._label = label
        self._data_pass = data_pass
        self._interval = interval
        self._run = run  # of a training pass
        self._step = self._first_step = data_pass.step + 1  # not 0 in an epoch that goes on after an interruption
        self._samples = 0
        self._start = time.monotonic()
        self._seconds_left_out = 0.0
        self._next_draw = self._start + interval
        self._seen = (0.0, 0.0, 0)  # sum of losses, items and steps when something was last drawn
        self._is_measured = run is None

    def advance(self, trainer: Trainer) -> None:
        self._step += 1
        self._samples += self._data_pass.loader.round_samples
        now = time.monotonic()
        if now >= self._next_draw:
            self._next_draw = now + self._interval
            self._draw(trainer, now)
        if not self._is_measured:
            assert self._run is not None, "it is measured where there is one"
            self._is_measured = True
            self._run.begin(trainer, now)

    def pause(self) -> None:
        """Let the bar count the steps made so far, before something else takes time."""
        if self._bar is not None:
            self._bar.update(self._step - self._bar.n)

    def leave_out(self, seconds: float) -> None:
        """Go on, and take the time out that something else has taken."""
        self._seconds_left_out += seconds
        if self._bar is not None:
            self._bar.unpause()

    def close(self, trainer: Trainer, has_failed: bool = False) -> tuple[float, int]:
        """Draw for the last time, and return how long the pass took and its steps."""
        now = time.monotonic()
        if self._bar is not None:
            if has_failed:
                self._bar.update(self._step - self._bar.n)  # without the loss, which may be what failed
            else:
                self._draw(trainer, now)
            self._bar.close()
        return now - self._start, self._step - self._first_step

    def _read_loss(self) -> float | None:
        """Return the loss to show; waits for the device."""
        if self._run is None:
            return self._data_pass.mean_loss_so_far()
        loss, items = self._data_pass.own_loss_sums()
        seen_loss, seen_items, seen_step = self._seen
        if items > seen_items:
            num_steps = self._data_pass.step + 1 - seen_step
            self._run.add_loss((loss - seen_loss) / (items - seen_items), max(num_steps, 1))
            self._seen = loss, items, self._data_pass.step + 1
        return self._run.loss

    def _draw(self, trainer: Trainer, now: float) -> None:
        num_steps = self._data_pass.num_steps  # which a callback may have limited since the pass began
        seconds = max(now - self._start - self._seconds_left_out, 1e-9)
        facts, run_left = [], None
        if (loss := self._read_loss()) is not None:
            facts.append(f"loss {loss:.4g}")
        if self._run is not None:
            seconds_left = self._run.seconds_left(trainer, now)
            run_left = None if seconds_left is None else f"run {format_seconds(seconds_left)} left"
        is_narrow = self._bar is not None and 0 < _num_columns() < _MIN_COLUMNS
        if is_narrow and num_steps:
            self._bar.bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        if not is_narrow:
            if self._run is not None and (groups := getattr(trainer.optimizer, "param_groups", None)):
                facts.append(f"lr {float(groups[0]['lr']):.3g}")
            facts.append(f"{self._samples / seconds:,.0f} samples/s")
        if self._bar is None and num_steps:
            left = seconds / max(self._step - self._first_step, 1) * (num_steps - self._step)
            facts.append(f"{format_seconds(left)} left")
        if run_left is not None:
            facts.append(run_left)
        if self._bar is not None:
            self._bar.total = num_steps
            self._bar.set_postfix_str(", ".join(facts), refresh=False)
            self._bar.update(self._step - self._bar.n)
            return
        of_all = f"/{num_steps}" if num_steps else ""
        trainer.print(f"{self._label}: step {self._step}{of_all}, {', '.join(facts)}")


def _create_bar(label: str, num_steps: int | None, first_step: int, is_nested: bool) -> Any:
    """Return a tqdm bar, or None where nobody could watch it move."""
    from tqdm.auto import tqdm

    is_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    if not is_notebook and not sys.stderr.isatty():
        return None
    # Some pseudo-terminals say that they have neither columns nor rows, into which tqdm would draw nothing.
    has_width = is_notebook or _num_columns() > 0
    return tqdm(
        total=num_steps,
        initial=first_step,
        desc=label,
        leave=not (is_nested or is_notebook),  # a notebook has a table of the epochs
        mininterval=0,
        miniters=0,
        unit="step",
        dynamic_ncols=has_width,
        ncols=None if has_width else 120,
        nrows=None if has_width else 24,
    )


def _num_columns() -> int:
    """Return the columns of the terminal, 0 where it does not say."""
    with suppress(OSError, ValueError):  # some consoles are terminals without being files
        return os.get_terminal_size(sys.stderr.fileno()).columns
    return 0


@contextmanager
def bars_aside() -> Iterator[None]:
    """Take the bars off the terminal while something is printed, and draw them again below it."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:  # then there is no bar
        yield
        return
    with tqdm.tqdm.external_write_mode():
        yield


class LogMetricsCallback(TrainerCallback):
    """Print what the run history has gained since the last look, at the end of each pass. Main process only.

    Statistics of the machine, ``system_*``, are not printed: the run history and the log have them. In a notebook a
    training run has a table instead, which gains a row with each epoch. Override ``log_metrics`` to send the metrics
    elsewhere.
    """

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self._num_seen: dict[str, int] = {}
        self._table: Any = None

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Take what is in the history as seen, and begin a new table."""
        self._find_new(trainer)
        self._table = None

    def on_evaluation_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Take what is in the history as seen."""
        self._find_new(trainer)

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
        if trainer.is_training_run and find_notebook() is not None:
            self._show_table(trainer.run_history)
            return
        values = [f"{name} {f'{value:.6g}' if isinstance(value, float) else value}" for name, value in metrics.items()]
        # Of the moment of recording, which for what later callbacks recorded is not the present one.
        epoch = max(trainer.run_history.get_metric_counters(name)[-1]["current_epoch"] for name in metrics)
        trainer.print(f"{f'epoch {epoch}: ' if trainer.is_training_run else ''}{', '.join(values)}")

    def _show_table(self, history: RunHistory) -> None:
        ipython: Any = import_module("IPython.display")  # which has no types
        content = ipython.HTML(make_epoch_table(history))
        if self._table is None:
            self._table = ipython.display(content, display_id=True)
        else:
            self._table.update(content)

    def _find_new(self, trainer: Trainer) -> dict[str, Any]:
        history = trainer.run_history
        counts = {name: len(history.get_metric_values(name)) for name in sorted(history.get_metric_names())}
        new = [name for name, n in counts.items() if n > self._num_seen.get(name, 0) and not _is_of_machine(name)]
        self._num_seen = counts
        return {name: history.get_latest_metric(name) for name in new}


def find_notebook() -> Any:
    """Return the shell of the notebook that this process runs in; None where it runs in none.

    A process that a notebook has forked cannot display anything in it, so that it counts as outside.
    """
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = get_ipython() if get_ipython is not None else None
    session = getattr(getattr(shell, "kernel", None), "session", None)
    return shell if session is not None and getattr(session, "pid", os.getpid()) == os.getpid() else None


def make_epoch_table(history: RunHistory) -> str:
    """Return an HTML table of a run: a row for each epoch, a column for each metric of training and evaluation.

    Of several values in an epoch the last is shown. The smallest value of each loss is bold. The oldest epochs, and
    metrics for which there is no room, are left out, which a line below says.
    """
    import html  # for notebooks alone

    metrics = history.state_dict()["metrics"]
    names = [name for name in metrics if is_number(metrics[name][-1][0]) and name.startswith(("train_", "eval_"))]
    names.sort(key=lambda name: (not is_loss(name), not name.startswith("train_")))  # losses first, in their order
    shown = names[:_MAX_COLUMNS]
    rows: dict[int, dict[str, Any]] = {}
    for name in shown:
        for value, counters in metrics[name]:
            if is_number(value):
                row = rows.setdefault(counters["current_epoch"], {"updates": 0})
                row[name], row["updates"] = value, max(row["updates"], counters["num_updates"])
    epochs = sorted(rows)
    numbers = {name: [row[name] for row in rows.values() if name in row and row[name] == row[name]] for name in shown}
    smallest = {name: min(values) for name, values in numbers.items() if values and is_loss(name)}
    cell = '<td style="text-align: right; padding: 2px 10px">'
    heads = "".join(
        f'<th style="text-align: right; padding: 2px 10px">{html.escape(name)}</th>'
        for name in ("epoch", "updates", *shown)
    )
    lines = []
    for epoch in epochs[-_MAX_ROWS:]:
        row = rows[epoch]
        cells = [str(epoch), f"{row['updates']:,}"]
        for name in shown:
            text = _format(row[name]) if name in row else ""
            cells.append(f"<b>{text}</b>" if name in row and row[name] == smallest.get(name) else text)
        lines.append("<tr>" + "".join(f"{cell}{text}</td>" for text in cells) + "</tr>")
    left_out = [f"{len(epochs) - _MAX_ROWS} earlier epochs"] if len(epochs) > _MAX_ROWS else []
    left_out += [f"the metrics {', '.join(names[_MAX_COLUMNS:])}"] if len(names) > _MAX_COLUMNS else []
    note = f"<p>Left out: {html.escape('; '.join(left_out))}.</p>" if left_out else ""
    head = f"<thead><tr>{heads}</tr></thead>"
    return f'<table style="font-variant-numeric: tabular-nums">{head}<tbody>{"".join(lines)}</tbody></table>{note}'


class RunSummary:
    """Measure a training run, and say in a few lines what came of it."""

    def __init__(self, trainer: Trainer) -> None:
        """Begin to measure."""
        self._start = time.monotonic()
        self._first_sample, self._first_update = trainer.num_samples, trainer.num_updates
        self._is_resumed = trainer.num_updates > trainer.training_run.first_update
        self._seconds_evaluating = 0.0
        self._evaluation_start: float | None = None

    def begin_evaluation(self) -> None:
        """Stop the clock of training."""
        self._evaluation_start = time.monotonic()

    def end_evaluation(self) -> None:
        """Let the clock of training go on."""
        if self._evaluation_start is not None:
            self._seconds_evaluating += time.monotonic() - self._evaluation_start
            self._evaluation_start = None

    def describe(self, trainer: Trainer, is_short: bool = False) -> str:
        """Return the summary: how far the run came, its metrics as a table, and where things are.

        Args:
            trainer: whose run it is.
            is_short: whether to leave the table out, as after a failure.
        """
        seconds = time.monotonic() - self._start
        num_samples = trainer.num_samples - self._first_sample
        run = trainer.training_run
        num_epochs = trainer.current_epoch - run.first_epoch - run.is_in_epoch
        facts = f"{num_epochs} epoch{'' if num_epochs == 1 else 's'}{' and a part of one' if run.is_in_epoch else ''}"
        facts += f", {trainer.num_updates:,} updates"
        facts += f", {trainer.num_samples:,} samples"
        facts += f"; since update {self._first_update:,}, where it went on," if self._is_resumed else " in"
        facts += f" {format_seconds(seconds)}"
        if self._seconds_evaluating >= 1:
            facts += f" ({format_seconds(self._seconds_evaluating)} of it evaluating)"
        if num_samples:
            facts += f", {num_samples / max(seconds - self._seconds_evaluating, 1e-9):,.0f} samples/s"
        lines = [f"Summary: {facts}"]
        if not is_short:
            lines += _describe_metrics(trainer.run_history)
        if (directory := trainer.run_dir) is not None:
            lines.append(f"Run directory: {directory}")
        return "\n".join(lines)


class SummaryCallback(TrainerCallback):
    """Print a summary when a training run ends: its metrics with last and best values, how long it took, where it is.

    The best of a loss is its smallest value. Of other metrics nobody can tell from the name which values are good, so
    the smallest and the greatest are shown. After a failure or an interruption the summary is a short one. It comes
    after what other callbacks print. Main process only.
    """

    order = 20

    def __init__(self) -> None:
        """Begin with no run."""
        self._summary: RunSummary | None = None

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Begin to measure."""
        self._summary = RunSummary(trainer)

    def on_eval_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Stop the clock of training."""
        if self._summary is not None:
            self._summary.begin_evaluation()

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Let the clock of training go on."""
        if self._summary is not None:
            self._summary.end_evaluation()

    def on_train_run_end(self, trainer: Trainer, exception: BaseException | None = None, **kwargs: Any) -> None:
        """Print the summary."""
        summary, self._summary = self._summary, None
        if summary is not None and trainer.accelerator.is_main_process:
            trainer.print(summary.describe(trainer, is_short=exception is not None))


def _describe_metrics(history: RunHistory) -> list[str]:
    """Return a table of the metrics, a line for each."""
    metrics = {name: rows for name, rows in history.state_dict()["metrics"].items() if is_number(rows[-1][0])}
    groups = ("train_", "eval_", "evaluation_")
    kinds = {name: next((n for n, prefix in enumerate(groups) if name.startswith(prefix)), 3) for name in metrics}
    names = sorted((name for name in metrics if not _is_of_machine(name)), key=lambda n: (not is_loss(n), kinds[n]))
    if not names:
        return []
    table = [("metric", "last", "best, or smallest to greatest")]
    for name in names[:_MAX_METRICS]:
        # The name's beginning and end, which tell it from others.
        title = name if len(name) <= 44 else f"{name[:21]}...{name[-20:]}"
        table.append((title, _format(metrics[name][-1][0]), _describe_best(name, metrics[name])))
    widths = [max(len(row[column]) for row in table) for column in (0, 1)]
    lines = [f"  {title:{widths[0]}}  {last:>{widths[1]}}  {best}".rstrip() for title, last, best in table]
    if (num_more := len(metrics) - min(len(names), _MAX_METRICS)) > 0:
        lines.append(f"  and {num_more} more in the history")
    return lines


def _describe_best(name: str, rows: list[Any]) -> str:
    """Return the best value of a loss, the extremes of another metric, and where they were."""
    rows = [(value, counters) for value, counters in rows if is_number(value) and not math.isnan(value)]
    if not rows:
        return ""
    epochs = [counters["current_epoch"] for _, counters in rows]
    unit = "epoch" if len(set(epochs)) == len(epochs) else "update"  # the shorter one where it is enough
    key = "current_epoch" if unit == "epoch" else "num_updates"
    smallest, greatest = min(rows, key=lambda row: row[0]), max(rows, key=lambda row: row[0])
    texts = [f"{_format(value)} ({unit} {counters[key]})" for value, counters in (smallest, greatest)]
    if is_loss(name) or smallest[0] == greatest[0]:
        return texts[0]
    return " to ".join(texts)


def _is_of_machine(name: str) -> bool:
    """Return whether a metric is of the machine, as ``SystemStatsCallback`` records them."""
    return name.startswith("system_")


def _format(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _out_of(trainer: Trainer) -> str:
    last = trainer.last_epoch
    return f"/{last}" if last is not None else ""

"""The record of a run: its log, its trackers, its directory."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pytorch_accelerated import distributed
from pytorch_accelerated import run_directory as directories
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.checkpoint import is_superseded, list_checkpoints
from pytorch_accelerated.errors import RunDirectoryError, TrackerError, outcome_of
from pytorch_accelerated.media import prepare_media
from pytorch_accelerated.metrics_log import COUNTERS
from pytorch_accelerated.run_directory import OpenRunDirectory, RunDirectory
from pytorch_accelerated.snapshot import describe_hardware
from pytorch_accelerated.trackers import Tracker, check_trackers, open_trackers
from pytorch_accelerated.trackers.media import as_plain
from pytorch_accelerated.tracking import RunCounters

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pytorch_accelerated.checkpoint import Checkpoint
    from pytorch_accelerated.trainer import Trainer

_NUM_FAILURES_UNTIL_LEFT_ALONE = 3
_OWN_NAMES = ("lr", "gradient_norm", "samples_per_second", "train_loss")
_FILES_TO_SEND = (directories.RUN, directories.TABLE, directories.PRINTED, "report.html")


class RecordingCallback(TrainerCallback):
    """Keep the log of a run and pass it on to trackers; a trainer with ``run_dir`` or ``trackers`` makes one by itself.

    A row is written every ``log_every``, at the end of each epoch and of each evaluation. It has all counters. What a
    step gives is read at these points alone, so that in between nothing waits for the device.
    """

    order = 1  # after those whose values it records, before those that save the state of the run

    def __init__(
        self,
        accelerator: Accelerator,
        options: RunDirectory | None,
        trackers: Iterable[Any] | Mapping[Any, Mapping[str, Any]],
        log_every: int | timedelta,
        config: Any,
    ) -> None:
        """Take what the trainer was given.

        Args:
            accelerator: whose own directory, and trackers that are started already, will do for what needs such.
            options: where the run directory is to be; None for none.
            trackers: names of trackers, with or without arguments for each, or trackers.
            log_every: updates, or time, between two rows.
            config: the user's own settings: a mapping, a dataclass or an object with attributes; None for none.

        Raises:
            TrackerError: if a tracker is unknown or not installed, or needs a run directory.
            TypeError: if ``log_every`` or ``config`` is something else.
            ValueError: if ``log_every`` is not above zero.
        """
        self._every, self._seconds_between = _as_interval(log_every)
        self._config = _as_mapping(config)
        check_trackers(trackers, None if options is None else Path(options.path), accelerator)
        self._options = options
        self._wanted = trackers
        self.run_dir: Path | None = None
        """The directory of the run in progress, or of the last one; on every process."""
        self.is_due = False
        """Whether the update in progress is one that a row will be written for; the same on every process."""
        self._directory: OpenRunDirectory | None = None  # on the main process
        self._trackers: list[Tracker] = []  # on the main process
        self._tracker_states: dict[str, dict[str, Any]] = {}
        self._num_failures: dict[str, int] = {}
        self._said: set[str] = set()
        self._lines: list[str] = []  # printed before there was a directory
        self._has_trained = False
        self._delivered: Counter[tuple[Any, ...]] = Counter()  # what trackers have got and the log has no more
        self._first_update = 0  # of this session
        self.is_training = False
        """Whether a training run is in progress, also while an evaluation by itself interrupts it."""
        self._pending: dict[str, Any] = {}
        self._stopped: str | None = None  # why the run was stopped early
        self._noted: int | None = None  # the updates before the one that norm and learning rates are noted of
        self._norm: Tensor | None = None
        self._rates: list[float | Tensor] = []
        self._sums: dict[str, tuple[float, float]] = {}
        self._num_seen: dict[str, int] = {}
        self._seconds_before = 0.0  # that the run had taken when it was opened
        self._start: float | None = None  # when that was; None while it is closed
        self._num_rows = self._num_media = 0  # that a checkpoint counts
        self._agreement: distributed.PeriodicAgreement | None = None
        self._begin_interval(0)
        self.closing = ClosingCallback(self)
        """Closes what this one has opened."""

    # ----------------------------------------------------------------------------------------------------------------
    # What the trainer calls
    # ----------------------------------------------------------------------------------------------------------------

    def begin_run(self, trainer: Trainer, checkpoint: Checkpoint | None, begins_anew: bool) -> None:
        """Open the directory and the trackers of a training run, before its first hook. Collective.

        Args:
            trainer: everything is prepared, and what ``checkpoint`` holds has been given back.
            checkpoint: what the run goes on from.
            begins_anew: whether history and counters begin at zero.

        Raises:
            RunDirectoryError: if the directory cannot be had.
            TrackerError: if a tracker does not start.
        """
        if checkpoint is None and begins_anew:
            self._num_seen, self._pending = {}, {}
            if self._has_trained:  # else it goes into the directory of an evaluation that came before, if there is one
                self._seconds_before = 0.0
        seconds = min(1.0, self._seconds_between)
        self._agreement = distributed.PeriodicAgreement(trainer.accelerator, seconds)
        self._stopped = self._noted = None
        self._start = self._last_log = time.monotonic()
        open_run = partial(self._open_run, trainer, checkpoint, begins_anew)
        try:
            self.run_dir = distributed.on_main_process(trainer.accelerator, open_run, RunDirectoryError)
            distributed.on_main_process(trainer.accelerator, partial(self._open_trackers, trainer), TrackerError)
        except Exception as error:  # no event of the run will come
            self.note_end(error)
            self.close(trainer, error)
            raise
        if self.run_dir is not None:
            trainer.print(f"Run directory: {self.run_dir}")
        self.is_training = self._has_trained = True
        self._choose_next(trainer)

    def log(self, trainer: Trainer, values: Mapping[str, Any]) -> None:
        """Note values for the next row; see ``Trainer.log``."""
        for name, value in values.items():
            if not isinstance(name, str):
                raise TypeError(f"the names of what is logged must be strings, got {name!r}.")
            if name in COUNTERS or name in _OWN_NAMES or name.endswith("loss_epoch"):
                what = "is a counter, which each row has" if name in COUNTERS else "is what the trainer itself logs"
                raise ValueError(f"{name!r} {what}; give the value another name.")
            if callable(value) and not isinstance(value, nn.Module):
                if not self.is_wanted_now(trainer):
                    continue
                value = value()
            # A copy, because the next step may change the tensor; it is read when the row is written.
            self._pending[name] = value.detach().clone() if isinstance(value, Tensor) else value

    def log_media(self, trainer: Trainer, kind: str, name: str, content: Any, **details: Any) -> None:
        """Write an image or the like now; given as a function, only when a row is due. See ``Trainer.log_images``."""
        if callable(content):
            if not self.is_wanted_now(trainer):
                return
            content = content()
        if not trainer.accelerator.is_main_process:
            return
        counters = self._counters(trainer)
        media = prepare_media(kind, name, content, **details)
        if self._directory is not None:
            self._directory.write_media(media, counters)
        self._dispatch(trainer, kind, name, lambda tracker: partial(media.send, tracker, counters))

    def send_file(self, trainer: Trainer, path: Path) -> None:
        """Send a file to the trackers that keep such."""
        if trainer.accelerator.is_main_process:
            counters = self._counters(trainer)
            self._dispatch(trainer, "file", str(path), lambda tracker: partial(tracker.log_file, path, counters))

    def send_model(self, trainer: Trainer, example: Any, name: str) -> None:
        """Send the model to the trackers that take such."""
        model = trainer.get_model()
        if trainer.accelerator.is_main_process:
            counters = self._counters(trainer)
            self._dispatch(
                trainer, "model", name, lambda tracker: partial(tracker.log_model, model, example, counters, name)
            )

    def _dispatch(self, trainer: Trainer, kind: str, name: str, make: Callable[[Tracker], Callable[[], None]]) -> None:
        """Send something to the trackers that take its kind; of those that do not it is said once."""
        if self._wanted and not self._trackers and (note := f"closed: {kind}") not in self._said:
            self._said.add(note)
            trainer.print(f"No run is in progress, so the trackers are closed: {kind} {name!r} does not reach them.")
        for tracker in self._find_listeners(trainer.num_updates, kind, name):
            if kind in tracker.supported:
                self._guarded(trainer, tracker, make(tracker))
            elif (note := f"{tracker.name} takes no {kind}") not in self._said:
                self._said.add(note)
                is_kept = self.run_dir is not None and kind not in ("file", "model")
                trainer.print(f"{note}: {name!r} {'is in the run directory only' if is_kept else 'is not sent there'}.")

    def note_end(self, exception: BaseException | None) -> None:
        """Note how the session in progress ended, if there is one."""
        if self._directory is not None and self._directory.facts.get("sessions"):
            error = None if exception is None else f"{type(exception).__name__}: {exception}"
            self._directory.end_session(outcome_of(exception), error, self._stopped)

    def close(self, trainer: Trainer, exception: BaseException | None) -> None:
        """Finish the trackers, and let others use the directory."""
        if self._directory is not None and self._trackers:
            paths = [self._directory.path / name for name in _FILES_TO_SEND]
            counters = self._counters(trainer)
            for tracker in [tracker for tracker in self._trackers if "file" in tracker.supported]:
                for path in filter(Path.exists, paths):
                    self._guarded(trainer, tracker, partial(tracker.log_file, path, counters))
        finished, self._trackers = self._trackers, []
        for tracker in finished:
            self._guarded(trainer, tracker, partial(tracker.finish, outcome_of(exception)))
        self.is_due, self._num_rows, self._num_media = False, 0, 0
        self._seconds_before, self._start = self._seconds(), None
        if self._directory is not None:
            self._directory.let_go()

    def write_line(self, text: str) -> None:
        """Keep what was printed on the main process."""
        if self._directory is not None:
            if self._directory.is_held:
                self._directory.write_line(text)
        elif self._options is not None:
            self._lines.append(text)

    def find_checkpoints(self) -> Path | None:
        """Return where the newest run that has checkpoints keeps them; None without a run directory."""
        if self._options is None:
            return None
        base = Path(self._options.path)
        found = directories.list_runs(base)
        with_checkpoints = [run for run in found if list_checkpoints(run / directories.CHECKPOINTS)]
        return (with_checkpoints or [base / "1"])[-1] / directories.CHECKPOINTS

    def is_wanted_now(self, trainer: Trainer) -> bool:
        """Return whether what is only computed for a row should be computed: always but between two of an epoch."""
        run = trainer.training_run if trainer.is_training_run else None
        is_between = run is not None and run.is_in_epoch and trainer.data_pass is run.data_pass
        return self.is_due or not is_between or _is_last_update(trainer)

    # ----------------------------------------------------------------------------------------------------------------
    # Events
    # ----------------------------------------------------------------------------------------------------------------

    def on_train_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Begin the sums of an epoch, or go on with those of an interrupted one."""
        assert trainer.data_pass is not None, "the event is one of a pass"
        if trainer.data_pass.step < 0:
            self._sums = {}
        if trainer.training_run.checkpoint is None:  # else what was noted will be taken back
            self._flush(trainer)
        self._choose_next(trainer)
        self._begin_interval(trainer.num_samples)

    def on_optimizer_step_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Note gradient norm and learning rates of an update that a row will be written for."""
        self.is_due = self.is_due or _is_last_update(trainer)
        if self.is_due:
            self._noted = trainer.num_updates
            groups = trainer.optimizer.param_groups
            # A copy of one that is a tensor: the scheduler changes it in place before it is read.
            self._rates = [
                rate.detach().clone() if isinstance(rate := group["lr"], Tensor) else rate for group in groups
            ]
            self._norm = _find_gradient_norm(trainer)

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Write a row if it is time. Collective then; waits for the device."""
        if self.is_due:
            self._flush(trainer, self._measure(trainer))
            self._last_log = time.monotonic()
        self._choose_next(trainer)

    def on_stop_training_error(self, trainer: Trainer, exception: BaseException | None = None, **kwargs: Any) -> None:
        """Write the row of an update after which another callback has stopped the run. Collective then."""
        self._stopped = str(exception) or "without a reason"
        if self._noted is not None and trainer.num_updates > self._noted:
            self._flush(trainer, self._measure(trainer))

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Write a row with what the history has gained."""
        self._flush(trainer)

    def on_eval_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Stop the clock of the throughput."""
        self._evaluation_start = time.monotonic()

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Write a row with what the history has gained."""
        self._flush(trainer)
        self._seconds_evaluating += time.monotonic() - self._evaluation_start

    def on_evaluation_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Open directory and trackers again, or anew where there has been no run. Collective."""
        if not self.is_training:
            self._start, before = time.monotonic(), self.run_dir
            open_again = partial(self._open_again, trainer)
            self.run_dir = distributed.on_main_process(trainer.accelerator, open_again, RunDirectoryError)
            if self.run_dir is not None and self.run_dir != before:
                trainer.print(f"Run directory: {self.run_dir}")
            distributed.on_main_process(trainer.accelerator, partial(self._open_trackers, trainer), TrackerError)

    def on_evaluation_run_end(self, trainer: Trainer, exception: BaseException | None = None, **kwargs: Any) -> None:
        """Write what is left."""
        self._flush(trainer)
        if not self.is_training and not self._has_trained:
            self.note_end(exception)

    def on_train_run_end(self, trainer: Trainer, exception: BaseException | None = None, **kwargs: Any) -> None:
        """Write what is left, and note how the run ended."""
        self.is_training = False
        if exception is not None:
            self._pending.clear()  # what was noted in an update that was not finished
        try:
            self._flush(trainer)
        finally:
            self.note_end(exception)

    def on_exception(self, trainer: Trainer, exception: BaseException, **kwargs: Any) -> None:
        """Keep the traceback."""
        if self.run_dir is None or not self.run_dir.is_dir():
            return
        process = trainer.accelerator.process_index
        name = directories.PRINTED if process == 0 else f"log_process{process}.txt"
        with (self.run_dir / name).open("a", encoding="utf-8") as file:
            traceback.print_exception(exception, file=file)

    # ----------------------------------------------------------------------------------------------------------------
    # State
    # ----------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return how long the log is, and what is noted for its next row. Waits for the disk and the device."""
        if self._directory is not None:
            self._directory.log.sync()
            self._directory.media.sync()
        return {
            "num_rows": 0 if self._directory is None else self._directory.log.num_rows,
            "num_media": 0 if self._directory is None else self._directory.media.num_rows,
            "seconds": self._seconds(),
            "num_seen": dict(self._num_seen),
            "sums": {name: list(sums) for name, sums in self._sums.items()},
            "pending": {name: as_plain(value) for name, value in self._pending.items()},
            "trackers": self._tracker_states,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up; the log is cut to its length when the run directory is opened."""
        self._num_rows, self._num_media = state_dict["num_rows"], state_dict["num_media"]
        self._seconds_before = state_dict["seconds"]
        self._num_seen = dict(state_dict["num_seen"])
        if self.is_training:  # just before the run goes on, not where a checkpoint is loaded to be evaluated
            self._start = time.monotonic()
            self._sums = {name: (sums[0], sums[1]) for name, sums in state_dict["sums"].items()}
            self._pending = dict(state_dict["pending"])
        else:  # the trackers are not open yet
            self._tracker_states = dict(state_dict["trackers"])

    # ----------------------------------------------------------------------------------------------------------------
    # Private: rows
    # ----------------------------------------------------------------------------------------------------------------

    def _seconds(self) -> float:
        return self._seconds_before + (0.0 if self._start is None else time.monotonic() - self._start)

    def _counters(self, trainer: Trainer) -> dict[str, Any]:
        return {**dataclasses.asdict(trainer.run_history.counters), "seconds": round(self._seconds(), 3)}

    def _begin_interval(self, num_samples: int) -> None:
        """Begin to measure the throughput anew."""
        self._interval_start, self._first_sample = time.monotonic(), num_samples
        self._seconds_evaluating = 0.0

    def _choose_next(self, trainer: Trainer) -> None:
        """Decide whether the next update is one to write a row for. Collective about once a second by time."""
        if self._every is not None:
            self.is_due = (trainer.num_updates + 1) % self._every == 0
            return
        assert self._agreement is not None, "a run has begun"
        is_time = time.monotonic() - self._last_log >= self._seconds_between
        answer = self._agreement.ask(int(is_time and trainer.accelerator.is_main_process))
        self.is_due = answer is not None and bool(answer[0])

    def _measure(self, trainer: Trainer) -> dict[str, Any]:
        """Return what the updates since the row before have given. Collective; waits for the device: a log point."""
        data_pass = trainer.data_pass
        assert data_pass is not None, "an epoch is in progress"
        self._noted = None
        sums, before = data_pass.sums_so_far(), self._sums
        self._sums = sums
        values: dict[str, Any] = {}
        for name, (total, num_items) in sums.items():
            first_total, first_items = before.get(name, (0.0, 0.0))
            if num_items > first_items:
                values[f"train_{name}"] = (total - first_total) / (num_items - first_items)
        if data_pass.has_windowed_metrics:
            values |= {f"train_{name}": value for name, value in data_pass.windowed_results().items()}
        rates = {"lr": self._rates[0]} if len(self._rates) == 1 else {f"lr_{i}": r for i, r in enumerate(self._rates)}
        values |= {name: float(rate) for name, rate in rates.items()}  # waits where the optimizer has it in a tensor
        if self._norm is not None:
            values["gradient_norm"] = float(self._norm)  # waits for the device
            self._norm = None
        seconds = time.monotonic() - self._interval_start - self._seconds_evaluating
        values["samples_per_second"] = (trainer.num_samples - self._first_sample) / max(seconds, 1e-9)
        self._begin_interval(trainer.num_samples)
        return values

    def _flush(self, trainer: Trainer, measured: Mapping[str, Any] | None = None) -> None:
        """Write what the history has gained, what was noted, and what was measured, each with its counters."""
        pending, self._pending = self._pending, {}
        if not trainer.accelerator.is_main_process:
            return
        counters = self._counters(trainer)
        rows: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for moment, name, value in trainer.run_history.get_news(self._num_seen):
            self._num_seen[name] = self._num_seen.get(name, 0) + 1
            if not rows or rows[-1][0] != moment or name in rows[-1][1]:
                rows.append((moment, {}))
            rows[-1][1][name] = value
        values = {**(measured or {}), **{name: as_plain(value) for name, value in pending.items()}}
        if values:
            now = {name: counters[name] for name in RunCounters.__dataclass_fields__}
            if rows and rows[-1][0] == now and not values.keys() & rows[-1][1].keys():
                values = {**values, **rows.pop()[1]}
            rows.append((now, values))
        for moment, row in rows:
            self._write(trainer, row, {**moment, "seconds": counters["seconds"]})

    def _write(self, trainer: Trainer, values: dict[str, Any], counters: Mapping[str, Any]) -> None:
        if self._directory is not None and self._directory.is_held:
            self._directory.write_row({**counters, **values})
        for tracker in self._find_listeners(counters["num_updates"], *sorted(values)):
            self._guarded(trainer, tracker, partial(tracker.log_scalars, values, counters))

    # ----------------------------------------------------------------------------------------------------------------
    # Private: trackers
    # ----------------------------------------------------------------------------------------------------------------

    def _find_listeners(self, num_updates: int, *names: str) -> list[Tracker]:
        """Return the trackers that have not got this yet, and that have not failed for good."""
        key = (num_updates, *names)
        is_told = self._delivered[key] > 0
        if is_told:
            self._delivered[key] -= 1
        return [
            tracker
            for tracker in self._trackers
            # One that can take back has done so with all that came after the update the run goes on from.
            if not (is_told and (not tracker.can_take_back or num_updates <= self._first_update))
            and self._num_failures.get(tracker.name, 0) < _NUM_FAILURES_UNTIL_LEFT_ALONE
        ]

    def _guarded(self, trainer: Trainer, tracker: Tracker, send: Callable[[], None]) -> None:
        """Send something to a tracker; one that fails never ends the training, but it is said."""
        try:
            send()
        except Exception as error:
            number = self._num_failures[tracker.name] = self._num_failures.get(tracker.name, 0) + 1
            is_last = number >= _NUM_FAILURES_UNTIL_LEFT_ALONE
            what = "it is left alone from now on" if is_last else "training goes on"
            log = "" if self.run_dir is None else f" Nothing is missing in {self.run_dir / directories.METRICS}."
            trainer.print(f"The tracker {tracker.name} has failed ({type(error).__name__}: {error}): {what}.{log}")
        else:
            self._num_failures[tracker.name] = 0

    def _open_trackers(self, trainer: Trainer) -> None:
        base = None if self._options is None else Path(self._options.path)
        project = "pytorch_accelerated" if base is None else base.resolve().name
        self._num_failures.clear()
        self._trackers = open_trackers(
            trainer.accelerator,
            self._wanted,
            self.run_dir if self._directory is None else self._directory.path,
            project,
            project if self._directory is None else f"{project}/{self._directory.path.name}",
            # That of the run, also where an evaluation after it opens them again.
            self._directory.facts["config"] if self._directory is not None else _describe(trainer, self._config),
            self._tracker_states,
            trainer.num_updates,
        )
        self._tracker_states = {tracker.name: tracker.state_dict() for tracker in self._trackers}
        if self._directory is not None:
            self._directory.note_run({"trackers": self._tracker_states})

    # ----------------------------------------------------------------------------------------------------------------
    # Private: the directory, on the main process
    # ----------------------------------------------------------------------------------------------------------------

    def _open_run(self, trainer: Trainer, checkpoint: Checkpoint | None, begins_anew: bool) -> Path | None:
        source = self._choose_directory(checkpoint, begins_anew)
        directory = self._directory
        if directory is None:
            if checkpoint is None and begins_anew:
                self._tracker_states = {}
        else:
            self._delivered.clear()
            self._first_update = trainer.num_updates
            if checkpoint is not None:
                self._delivered = directory.note_delivered(self._first_update, self._num_rows, self._num_media)
                lacking = directory.begin_log(source or directory.path, self._num_rows, self._num_media)
                if lacking:
                    trainer.print(
                        f"Note on resuming: {lacking} of the {self._num_rows} rows that the log had at the checkpoint "
                        f"are not in {source or directory.path}; the log lacks them."
                    )
            facts = {"run_id": trainer.training_run.run_id, "seed": trainer.training_run.seed}
            directory.note_run({**facts, "config": _describe(trainer, self._config)})
            self._tracker_states = directory.facts.get("trackers", {})
            self._begin_session(trainer, directory, checkpoint)
        return None if directory is None else directory.path

    def _choose_directory(self, checkpoint: Checkpoint | None, begins_anew: bool) -> Path | None:
        """Take hold of the directory for a training run; return the one that the checkpoint's log is in."""
        if self._options is None:
            return None
        base = Path(self._options.path)
        if self._options.strict:
            directories.refuse_dirty_tree(base)
        source = None
        if checkpoint is not None:
            source = directories.run_of_checkpoint(checkpoint.path) or directories.find_by_id(base, checkpoint.run_id)
        if self._directory is not None:
            self._directory.hold()
        if source is not None and checkpoint is not None:
            goes_on = source.parent.resolve() == base.resolve() and not is_superseded(checkpoint.path)
            if goes_on and (self._directory is None or self._directory.path.resolve() != source.resolve()):
                self._take(OpenRunDirectory(base / source.name))
            if goes_on:
                return source
        elif self._directory is not None and checkpoint is None and not (begins_anew and self._has_trained):
            return None
        self._take(OpenRunDirectory.create(base))
        return source

    def _take(self, directory: OpenRunDirectory) -> None:
        if self._directory is not None:
            self._directory.let_go()
        self._directory, self._has_trained = directory, False
        directory.write_line("".join(self._lines))
        self._lines.clear()

    def _begin_session(self, trainer: Trainer, directory: OpenRunDirectory, checkpoint: Checkpoint | None) -> None:
        assert self._options is not None, "there is a directory"
        counters = trainer.run_history.counters
        directory.begin_session(
            self._options,
            {
                "first_update": counters.num_updates,
                "first_epoch": counters.current_epoch,
                "first_sample": counters.num_samples,
                "seconds": round(self._seconds(), 3),
                "resumed_from": None if checkpoint is None else str(checkpoint.path),
                "num_processes": trainer.accelerator.num_processes,
                "hardware": describe_hardware(trainer.device),
            },
        )

    def _open_again(self, trainer: Trainer) -> Path | None:
        """Open what an evaluation by itself is recorded in."""
        if self._options is not None and self._directory is None:
            if self._options.strict:
                directories.refuse_dirty_tree(Path(self._options.path))
            self._take(OpenRunDirectory.create(Path(self._options.path)))
            assert self._directory is not None, "it has been taken"
            facts = {"run_id": None, "seed": trainer.seed, "config": _describe(trainer, self._config)}
            self._directory.note_run(facts)
            self._begin_session(trainer, self._directory, None)
        if self._directory is None:
            return None
        self._directory.hold()
        self._tracker_states = self._directory.facts.get("trackers", {})
        return self._directory.path


class ClosingCallback(TrainerCallback):
    """Close what the record of a run is sent to, once others have written what they write at its end."""

    order = 25  # after reports and summaries, before notifications and commands

    def __init__(self, recorder: RecordingCallback) -> None:
        """Take what keeps the record."""
        self._recorder = recorder

    def on_train_run_end(self, trainer: Trainer, exception: BaseException | None = None, **kwargs: Any) -> None:
        """Send the files of the run directory, and finish the trackers; said where that fails."""
        self._recorder.note_end(exception)  # again: a callback may have failed meanwhile
        self._recorder.close(trainer, exception)

    def on_evaluation_run_end(self, trainer: Trainer, exception: BaseException | None = None, **kwargs: Any) -> None:
        """Do the same after an evaluation by itself."""
        if not self._recorder.is_training:
            self._recorder.close(trainer, exception)


def _is_last_update(trainer: Trainer) -> bool:
    """Return whether the step in progress is the last of its epoch, or the update in progress that of the run."""
    run = trainer.training_run
    return run.loader.is_last or (run.update_limit is not None and trainer.num_updates + 1 >= run.update_limit)


def _as_interval(log_every: Any) -> tuple[int | None, float]:
    if isinstance(log_every, timedelta):
        if log_every.total_seconds() <= 0:
            raise ValueError(f"log_every must be a time above zero, got {log_every!r}.")
        return None, log_every.total_seconds()
    if not isinstance(log_every, Integral) or isinstance(log_every, bool):
        raise TypeError(f"log_every must be a number of updates or a datetime.timedelta, got {log_every!r}.")
    if log_every < 1:
        raise ValueError(f"log_every must be at least 1 update, got {log_every}.")
    return int(log_every), 0.0


def _as_mapping(config: Any) -> dict[str, Any]:
    """Return the user's settings as a dict of plain data, nested as they are."""
    if config is None:
        return {}
    if isinstance(config, type):
        raise TypeError(f"config must be a mapping, a dataclass or a namespace, got the class {config.__name__}.")
    is_mapping = isinstance(config, Mapping) or dataclasses.is_dataclass(config)
    if not is_mapping:
        try:
            config = vars(config)  # as of argparse
        except TypeError:
            raise TypeError(f"config must be a mapping, a dataclass or a namespace, got {config!r}.") from None
    plain: dict[str, Any] = as_plain(config)
    return plain


def _describe(trainer: Trainer, config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run as plain data."""
    model, optimizer = trainer.get_model(), trainer.optimizer
    groups = [] if optimizer is None else optimizer.param_groups
    run = trainer.training_run if trainer.has_training_run else None
    hyperparameters = [] if run is None else run.hyperparameters
    names = getattr(trainer.metrics, "keys", None)
    single = [] if trainer.metrics is None else [type(trainer.metrics).__name__]
    return {
        "run": trainer.run_config.to_dict(),
        "model": {
            "type": type(model).__name__,
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "num_trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "loss_func": None if trainer.loss_func is None else _name_of(trainer.loss_func),
        "optimizer": None
        if optimizer is None
        else {"type": type(getattr(optimizer, "optimizer", optimizer)).__name__, "num_groups": len(groups)}
        | {"groups": hyperparameters},
        "scheduler": None if trainer.scheduler is None else type(trainer.scheduler).__name__,
        "callbacks": [type(callback).__name__ for callback in trainer.callback_handler],
        "metrics": [str(name) for name in names()] if names is not None else single,
        "data": {
            "num_train_samples": None if run is None else run.loader.num_dataset_samples,
            "num_eval_samples": {}
            if run is None
            else {name or "eval": loader.num_dataset_samples for name, loader in run.eval_loaders.items()},
        },
        "user": config,
    }


def _name_of(function: Any) -> str:
    return repr(function) if isinstance(function, nn.Module) else getattr(function, "__qualname__", repr(function))


def _find_gradient_norm(trainer: Trainer) -> Tensor | None:
    """Return the norm of all gradients before clipping; None where only clipping by norm could tell it."""
    if trainer.run_config.gradient_clip_norm is not None:
        return trainer.gradient_norm
    if distributed.is_sharded(trainer.accelerator) or trainer.accelerator.scaler is not None:
        return None  # each process has a part of them; or they are multiplied by the scale
    groups: Sequence[Mapping[str, Any]] = trainer.optimizer.param_groups
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    if not gradients or any(gradient.is_sparse for gradient in gradients):
        return None
    return nn.utils.get_total_norm(gradients)

"""Checkpoints while a run goes on, when it is asked to stop, and of the best model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_accelerated import distributed
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.callbacks.watching import MetricWatcher
from pytorch_accelerated.checkpoint import (
    Boundary,
    CheckpointStore,
    capture,
    capture_alone,
    check_can_save,
    load_portable,
    prepare_directory,
    read_metadata,
    save_portable,
    write_together,
)
from pytorch_accelerated.errors import CheckpointError, TrainingInterrupted
from pytorch_accelerated.run_directory import CHECKPOINTS
from pytorch_accelerated.schedulers import WSDLrScheduler
from pytorch_accelerated.signals import SignalWatch

if TYPE_CHECKING:
    from pytorch_accelerated.checkpoint import Snapshot
    from pytorch_accelerated.trainer import Trainer

# What a process says when the processes agree; the greatest counts.
_GO_ON, _OUT_OF_TIME, _LAUNCHER_GONE, _SIGTERM, _SIGINT = range(5)
_REASONS = {
    _OUT_OF_TIME: "time budget",
    _LAUNCHER_GONE: "launcher gone",
    _SIGTERM: "SIGTERM",
    _SIGINT: "SIGINT",
}
_CODES = {reason: code for code, reason in _REASONS.items()}


_BEST_MODEL = "best_model.safetensors"


class SaveTrainingStateCallback(TrainerCallback):
    """Save the state of the run, so that ``train(resume_from="latest")`` goes on to the bit as if nothing had happened.

    Checkpoints are taken between updates, after all other callbacks, and appear whole or not at all. On SIGTERM and
    SIGINT, at the end of ``time_budget`` and when `accelerate launch` dies, the run finishes its update, saves, and
    leaves with ``TrainingInterrupted``: exit code 143, after SIGINT 130. It does not wait for the end of an evaluation.
    In an interactive session SIGINT (Ctrl-C) raises KeyboardInterrupt after saving, which gives the prompt back. The
    third Ctrl-C does at once, without saving, also where a step hangs. SIGUSR1 saves and goes on.
    """

    order = 2
    save_dir: Path
    """Where checkpoints are, once a run has begun."""

    def __init__(
        self,
        save_dir: str | Path | None = None,
        save_every_n_updates: int | None = None,
        save_every_n_epochs: int | None = None,
        save_every_n_seconds: float | None = None,
        save_at_end: bool = True,
        max_checkpoints: int | None = None,
        asynchronous: bool = False,
        time_budget: float | timedelta | None = None,
        save_on_exception: bool = False,
    ) -> None:
        """Take where and when to save; without any interval, at the end and when the run is asked to stop.

        Args:
            save_dir: holds one directory for each checkpoint; None for ``checkpoints`` in the run directory.
            save_every_n_updates: counted over the whole run.
            save_every_n_epochs: after the evaluation of each n-th epoch.
            save_every_n_seconds: since the last one; by the main process's clock.
            save_at_end: whether to save when the run has reached its end, also early.
            max_checkpoints: of this run, the older ones are deleted once a new one is complete; None keeps all.
            asynchronous: whether to write in the background: training stops only for a copy to the host's memory. One
                is written at a time; a failure is raised at the next update.
            time_budget: seconds after the beginning of the run at which it stops as after SIGTERM.
            save_on_exception: whether to save the state after the last update when an exception ends the run.

        Raises:
            ValueError: if a number is below one, or a time not above zero.
        """
        counts = {
            "save_every_n_updates": save_every_n_updates,
            "save_every_n_epochs": save_every_n_epochs,
            "max_checkpoints": max_checkpoints,
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {count}.")
        if isinstance(time_budget, timedelta):
            time_budget = time_budget.total_seconds()
        for name, seconds in {"save_every_n_seconds": save_every_n_seconds, "time_budget": time_budget}.items():
            if seconds is not None and seconds <= 0:
                raise ValueError(f"{name} must be above 0 seconds, or None, got {seconds}.")
        self.given_dir = None if save_dir is None else Path(save_dir)
        self.save_every_n_updates = save_every_n_updates
        self.save_every_n_epochs = save_every_n_epochs
        self.save_every_n_seconds = save_every_n_seconds
        self.save_at_end = save_at_end
        self.max_checkpoints = max_checkpoints
        self.asynchronous = asynchronous
        self.time_budget = time_budget
        self.save_on_exception = save_on_exception
        self.latest: Path | None = None
        """The newest checkpoint of the run that is known to be whole."""
        self._signals = SignalWatch()
        self._in_background: Future[Path] | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._staged: Snapshot | None = None  # the copy that is, or was, written in the background
        self._boundary: Boundary | None = None
        self._step_of_update: int | None = None
        self._is_stopping = False

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Begin to watch for signals, and check that it is possible to save.

        Raises:
            CheckpointError: if it is not.
            ValueError: if there is no place to save.
        """
        check_can_save(trainer)
        self.save_dir = _choose_directory(trainer, self, self.given_dir)
        self._store = CheckpointStore(self.save_dir, self.max_checkpoints, type(self).__name__)
        run = trainer.training_run
        self.latest = run.checkpoint.path if run.checkpoint is not None else None
        distributed.on_main_process(trainer.accelerator, self._store.prepare, CheckpointError)
        if run.loader.resume_note is not None:
            trainer.print(f"Note on resuming: {run.loader.resume_note}")
        self._start = self._last_save = time.monotonic()
        self._agreement = distributed.PeriodicAgreement(trainer.accelerator)
        self._boundary, self._step_of_update, self._is_stopping = None, None, False
        if not self._signals.start(announces=trainer.accelerator.is_main_process):
            trainer.print("train() runs in another thread than the main one, so signals do not reach it.")

    def on_train_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look again soon: what comes now may be slower than what came before."""
        if trainer.is_training_run:
            self._agreement.restart()

    on_eval_epoch_begin = on_train_epoch_begin

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save if it is time; raise TrainingInterrupted if the run is to stop."""
        self._raise_failure()
        every = self.save_every_n_updates
        self._act(trainer, is_due=every is not None and trainer.num_updates % every == 0)
        if self.save_on_exception:
            self._boundary = Boundary(trainer)

    def on_eval_step_end(self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any) -> None:
        """Raise TrainingInterrupted if the run is to stop, once its state before the evaluation is saved."""
        # An evaluation that a callback runs by itself is inside of an update, and has to be waited for.
        if trainer.is_training_run and trainer.training_run.is_evaluating:
            self._act(trainer, is_due=False)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save if it is time; raise TrainingInterrupted if the run is to stop."""
        if not trainer.is_training_run or trainer.training_run.is_in_epoch:  # an evaluation by itself, or in between
            return
        run = trainer.training_run
        if self.save_on_exception:
            self._boundary = Boundary(trainer)
        is_due = False
        if run.is_epoch_complete:
            is_over = run.has_reached_limit(trainer.run_history.counters)
            every = self.save_every_n_epochs
            is_due = (every is not None and trainer.current_epoch % every == 0) or (is_over and self.save_at_end)
        self._act(trainer, is_due)

    on_eval_epoch_end = on_train_epoch_end

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save the end of a run that stopped early."""
        if self.save_at_end:
            self._save(trainer)

    def on_optimizer_step_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Note that the weights are about to change."""
        if self.save_on_exception and trainer.data_pass is not None:
            self._step_of_update = trainer.data_pass.step

    def on_exception(self, trainer: Trainer, exception: BaseException, **kwargs: Any) -> None:
        """Save the state after the last update, if that was asked for; the main process does, alone."""
        is_saved = self._is_stopping or not self.save_on_exception
        if is_saved or not trainer.is_training_run or not trainer.accelerator.is_main_process:
            return
        boundary, self._boundary = self._boundary, None
        if boundary is None:
            return
        run = trainer.training_run
        is_changing = run.data_pass is not None and run.data_pass.step == self._step_of_update
        if run.is_between_updates:
            snapshot = capture_alone(trainer)
        elif boundary.num_updates == trainer.num_updates and not is_changing:
            snapshot = boundary.capture(trainer)
        else:
            trainer.print("The state was not saved: the exception came while the weights were being changed.")
            return
        self._finish_background()
        assert snapshot is not None, "this is the main process"
        self.latest = self._store.write(snapshot)
        trainer.print(f"Saved {self.latest}, the state after the last update.")

    def on_train_run_end(self, trainer: Trainer, exception: BaseException | None = None, **kwargs: Any) -> None:
        """Wait for what is being written, and watch for signals no longer."""
        self._signals.stop()
        self._boundary = None
        try:
            self._finish_background()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
                self._executor = self._staged = None
        if exception is None:
            self._signals.pass_on()

    def _act(self, trainer: Trainer, is_due: bool) -> None:
        """Save and stop as the processes agree."""
        now = time.monotonic()
        code = _CODES.get(self._signals.find_reason_to_stop() or "", _GO_ON)
        if code == _GO_ON and self.time_budget is not None and now - self._start >= self.time_budget:
            code = _OUT_OF_TIME
        every = self.save_every_n_seconds
        wants_save = self._signals.wants_save or (
            every is not None and now - self._last_save >= every and trainer.accelerator.is_main_process
        )
        code, wants_save = self._agreement.ask(code, int(wants_save)) or (_GO_ON, False)
        if code != _GO_ON:
            self._stop(trainer, code)
        if is_due or wants_save:
            if wants_save:
                self._signals.wants_save = False
            self._save(trainer, in_background=self.asynchronous)

    def _stop(self, trainer: Trainer, code: int) -> None:
        try:
            distributed.on_main_process(trainer.accelerator, self._finish_background, CheckpointError)
        except CheckpointError as error:  # told, because one more attempt is all that is left
            trainer.print(f"The save in the background has failed: {error}")
        path = self._save(trainer)
        reason, exit_code = _REASONS[code], 130 if code == _SIGINT else 143
        at_prompt = code == _SIGINT and hasattr(sys, "ps1")
        leaving = "giving the prompt back" if at_prompt else f"leaving with exit code {exit_code}"
        self._is_stopping = True
        with suppress(OSError):  # whoever read the output may be gone, as when the launcher has died
            trainer.print(f"{reason}: saved {path}, {leaving}. train(resume_from='latest') goes on from there.")
        if self._signals.raised is not None:  # by the user's own handler
            raise self._signals.raised
        if at_prompt:
            raise KeyboardInterrupt(f"saved {path}")
        raise TrainingInterrupted(reason, exit_code, path)

    def _save(self, trainer: Trainer, in_background: bool = False) -> Path:
        """Save, and return the path on every process. Collective."""
        distributed.on_main_process(trainer.accelerator, self._finish_background, CheckpointError)
        snapshot = capture(trainer)
        self._last_save = time.monotonic()
        if in_background:
            if snapshot is not None:
                if self._executor is None:
                    self._executor = ThreadPoolExecutor(1, thread_name_prefix="save")
                self._staged = snapshot.to_host(self._staged)
                self._in_background = self._executor.submit(self._store.write, self._staged)
            return self.save_dir
        self.latest = write_together(trainer, snapshot, self._store.write)
        return self.latest

    def _finish_background(self) -> None:
        """Wait for the checkpoint that is being written in the background. Raises what failed there."""
        if self._in_background is not None:
            writing, self._in_background = self._in_background, None
            self.latest = writing.result()

    def _raise_failure(self) -> None:
        if self._in_background is not None and self._in_background.done():
            self._finish_background()


class WSDCheckpointCallback(TrainerCallback):
    """Save the state of the run once, at the last update before a ``WSDLrScheduler`` lets the learning rate fall.

    A longer run that is resumed from this checkpoint goes on at the peak: ``train(num_epochs=more, resume_from=...)``.
    """

    order = 1
    save_dir: Path
    """Where the checkpoint is, once a run has begun."""

    def __init__(self, save_dir: str | Path | None = None) -> None:
        """Take the directory for the checkpoint; None for ``checkpoints`` in the run directory."""
        self.given_dir = None if save_dir is None else Path(save_dir)

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check that there is such a schedule, and that it is possible to save.

        Raises:
            CheckpointError: if it is not possible to save.
            ValueError: if there is no such schedule, or no place to save.
        """
        if not isinstance(trainer.scheduler, WSDLrScheduler):
            raise ValueError(
                f"WSDCheckpointCallback needs a WSDLrScheduler, got {type(trainer.scheduler).__name__}: "
                "train(create_scheduler_fn=WSDLrScheduler.create_scheduler_fn(decay_phase_ratio=0.2))."
            )
        check_can_save(trainer)
        self.save_dir = _choose_directory(trainer, self, self.given_dir)
        self._store = CheckpointStore(self.save_dir, None, type(self).__name__)
        distributed.on_main_process(trainer.accelerator, self._store.prepare, CheckpointError)

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Save if the decay comes next."""
        schedule = trainer.scheduler
        if schedule.last_epoch == schedule.num_updates - schedule.num_decay_updates:
            path = write_together(trainer, capture(trainer), self._store.write)
            trainer.print(f"Saved {path}, the state before the decay of the learning rate.")


class SaveBestModelCallback(MetricWatcher):
    """Save the weights whenever a metric is better than ever in this run, and load the best ones at its end.

    The file says of which run, moment and value it is. A file of another run is replaced by the first value, and never
    loaded. With ``SaveTrainingStateCallback`` an interrupted run remembers its best value.
    """

    order = 1

    def __init__(
        self,
        save_path: str | Path | None = None,
        watch_metric: str = "eval_loss_epoch",
        greater_is_better: bool | None = None,
        reset_on_train: bool = True,
        save_optimizer: bool = False,
        load_best_at_end: bool = True,
    ) -> None:
        """Take what to watch and where to save.

        Args:
            save_path: ends in ``.safetensors`` for weights alone, in something else for a file of torch. None for
                ``best_model.safetensors``, in the run directory if there is one.
            watch_metric: name of the metric in the run history. A NaN is never the best.
            greater_is_better: the direction; may be left out only for the trainer's own losses.
            reset_on_train: whether a new training run forgets the best value.
            save_optimizer: whether the file of torch holds the optimizer, too.
            load_best_at_end: whether the model has the best weights after a run that did not fail.

        Raises:
            ValueError: if the direction is missing, or the file cannot hold an optimizer.
        """
        super().__init__(watch_metric, greater_is_better)
        self._given_path = None if save_path is None else Path(save_path)
        self.save_path = self._given_path or Path(_BEST_MODEL)
        if save_optimizer and self.save_path.suffix == ".safetensors":
            raise ValueError(f"{self.save_path.name}: files of safetensors hold weights alone; choose .pt.")
        self.name = f"{watch_metric}:{self.save_path.name}"
        self.reset_on_train = reset_on_train
        self.save_optimizer = save_optimizer
        self.load_best_at_end = load_best_at_end
        self.best_value: float | None = None
        self._run_id: str | None = None

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Forget the best value, and clear away what killed saves have left.

        Raises:
            CheckpointError: if it is not possible to save.
            ValueError: if the metric cannot appear.
        """
        super().on_train_run_begin(trainer, **kwargs)
        self.save_path = self._given_path or (trainer.run_dir or Path()) / _BEST_MODEL
        if self.reset_on_train:
            self.best_value, self._run_id = None, None
        distributed.on_main_process(trainer.accelerator, partial(prepare_directory, self.save_path), CheckpointError)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look for a new value, and save if it is the best. Raises CheckpointError if that fails."""
        value = self.find_new_value(trainer)
        if value is None or not self.is_better(value, self.best_value):
            return
        self._run_id = trainer.training_run.run_id
        undone = distributed.on_main_process(trainer.accelerator, self._find_better_than(value), CheckpointError)
        self.best_value = value if undone is None else undone
        if undone is not None:
            return
        facts = {
            "run_id": self._run_id,
            "watch_metric": self.watch_metric,
            "value": repr(value),
            "num_updates": str(trainer.num_updates),
        }
        save_portable(trainer, self.save_path, None, self.save_optimizer, facts)

    on_eval_epoch_end = on_train_epoch_end

    def on_train_run_end(self, trainer: Trainer, exception: BaseException | None = None, **kwargs: Any) -> None:
        """Load the best weights. Raises CheckpointError if they are not there any more."""
        if exception is not None or not self.load_best_at_end:
            return
        if self.best_value is None:
            trainer.print(f"SaveBestModelCallback: {self.watch_metric!r} had no value, so nothing was saved or loaded.")
            return
        facts = read_metadata(self.save_path)
        if facts.get("run_id") != self._run_id or self.is_better(self.best_value, float(facts["value"])):
            raise CheckpointError(
                f"{self.save_path} is not the best model of this run any more ({self.watch_metric} {self.best_value:g}"
                f"): something else has been saved there, so it is not loaded. It says: {facts}."
            )
        load_portable(trainer, self.save_path, load_optimizer=False)
        trainer.print(f"Loaded the best weights from {self.save_path}: {self.watch_metric} {float(facts['value']):g}.")

    def _find_better_than(self, value: float) -> Callable[[], float | None]:
        """Return a function that looks whether the file has a better model of this run than one of ``value``.

        It has where an interruption has undone the part of the run that the model is of, and which went better.
        """

        def find() -> float | None:
            if not self.save_path.exists():
                return None
            facts = read_metadata(self.save_path)
            if facts.get("run_id") != self._run_id or facts.get("watch_metric") != self.watch_metric:
                return None
            saved = float(facts["value"])
            return saved if self.is_better(saved, value) else None

        return find

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the run it is of."""
        return {"best_value": self.best_value, "run_id": self._run_id}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best value and the run it is of."""
        self.best_value, self._run_id = state_dict["best_value"], state_dict["run_id"]
        if self._given_path is None and not self.save_path.exists():
            self.best_value = None  # a run that goes on from an older checkpoint has a directory without it


def save_directories(trainer: Trainer) -> list[Path]:
    """Return the directories in which callbacks save the state of the run, or have saved that of an earlier one."""
    kinds = (SaveTrainingStateCallback, WSDCheckpointCallback)
    in_run_dir = None if trainer.recorder is None else trainer.recorder.find_checkpoints()
    given = [callback.given_dir for callback in trainer.callback_handler if isinstance(callback, kinds)]
    found = [directory if directory is not None else in_run_dir for directory in given]
    return [directory for directory in dict.fromkeys(found) if directory is not None]


def _choose_directory(trainer: Trainer, callback: TrainerCallback, given: Path | None) -> Path:
    """Return where a callback is to save. Raises ValueError if it was not told, and there is no run directory."""
    if given is not None:
        return given
    if trainer.run_dir is None:
        raise ValueError(
            f"{type(callback).__name__} was given no save_dir, and there is no run directory to save in. Give one of "
            "them: Trainer(run_dir=...)."
        )
    return trainer.run_dir / CHECKPOINTS

"""A training run: what it consists of, how it is set up, and where it stands."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pytorch_accelerated import data, distributed, randomness
from pytorch_accelerated.checkpoint import hyperparameters_of, modes_of
from pytorch_accelerated.dealing import workers_outlive_signals
from pytorch_accelerated.engine import Engine, raw_optimizer
from pytorch_accelerated.errors import TrainingInterrupted
from pytorch_accelerated.passes import DataPass
from pytorch_accelerated.run_config import TrainerRunConfig
from pytorch_accelerated.tracking import AccumulationWindow, RunCounters

if TYPE_CHECKING:
    from pytorch_accelerated.checkpoint import Checkpoint
    from pytorch_accelerated.trainer import Trainer


class Suspended(NamedTuple):
    """What an evaluation changes and gives back: the mode of each module by name, and the random streams."""

    modes: dict[str, bool]
    streams: randomness.Streams


@dataclasses.dataclass
class TrainingRun:
    """Hold the data and the limits of a training run, and where it stands between two moments of the loop."""

    run_id: str
    """The same on all processes, and after an interruption."""
    seed: int
    """Of the order of the samples and of the randomness in the datasets."""
    loader: data.ShardedDataLoader
    """The training data."""
    eval_loaders: dict[str | None, data.ShardedDataLoader]
    """The evaluation sets by name; a single one is without."""
    window: AccumulationWindow
    """Weighs the losses of an update."""
    checkpoint: Checkpoint | None
    """What the run goes on from; None once it does, and where it began anew."""
    hyperparameters: list[dict[str, Any]]
    """Of each group of the optimizer, as they were when the run began, before any schedule."""

    first_epoch: int = 0
    """Epochs that were counted before the run, by an earlier one."""
    first_update: int = 0
    """Updates that were counted before the run."""
    epoch_limit: int | None = None
    """The number of the last epoch; None where only updates are limited."""
    update_limit: int | None = None
    """The number of the last update; None where only epochs are limited."""

    is_in_epoch: bool = False
    """Whether a pass over the training data has begun and its end has not been told to the callbacks."""
    num_steps_in_epoch: int = 0
    """Steps of that pass that belong to an update that was made."""
    is_epoch_exhausted: bool = False
    """Whether a pass that goes on after an interruption has no batch left."""
    pending_evaluation: Literal["intermediate", "final"] | None = None
    """The evaluation that comes next, or is in progress."""
    is_evaluating: bool = False
    """Whether it is in progress, and not one that a callback runs by itself."""
    num_evaluated: int = 0
    """Evaluation sets that it has been through."""
    is_stopped: bool = False
    """Whether a ``StopTrainingError`` has ended the run."""
    pass_states: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """The sums of the interrupted pass that are this process's to go on from."""
    data_pass: DataPass | None = None
    """The pass over the training data, also while an evaluation interrupts it."""
    suspended: Suspended | None = None
    """What an evaluation in progress will give back; None outside of one."""

    def set_limits(self, counters: RunCounters, config: TrainerRunConfig) -> None:
        """Count the limits from where the run began, which may have been before an interruption."""
        if self.checkpoint is not None:
            self.first_epoch = self.checkpoint.facts["first_epoch"]
            self.first_update = self.checkpoint.facts["first_update"]
        else:
            self.first_epoch, self.first_update = counters.current_epoch, counters.num_updates
        self.epoch_limit = None if config.num_epochs is None else self.first_epoch + config.num_epochs
        updates = config.max_num_train_steps
        self.update_limit = None if updates is None else self.first_update + updates

    def is_finished(self, counters: RunCounters) -> bool:
        """Return whether nothing is left to do: no epoch to begin, none to end, and no evaluation."""
        if self.is_stopped:
            return True
        if self.is_in_epoch or self.pending_evaluation is not None:
            return False
        return self.has_reached_limit(counters)

    def has_reached_limit(self, counters: RunCounters) -> bool:
        """Return whether no epoch is left to begin."""
        if self.epoch_limit is not None and counters.current_epoch >= self.epoch_limit:
            return True
        return self.is_out_of_updates(counters)

    def is_out_of_updates(self, counters: RunCounters) -> bool:
        """Return whether the last update of the run has been made."""
        return self.update_limit is not None and counters.num_updates >= self.update_limit

    @property
    def is_between_updates(self) -> bool:
        """Whether nothing has happened since the last update, so that its state is one to go on from."""
        if self.checkpoint is not None:
            return False
        if not self.is_in_epoch:
            return True
        return self.data_pass is not None and self.num_steps_in_epoch == self.data_pass.step + 1

    @property
    def is_epoch_complete(self) -> bool:
        """Whether an epoch has just ended and all evaluation sets have been gone through."""
        if self.is_in_epoch or self.pending_evaluation == "intermediate":
            return False
        return self.num_evaluated >= len(self.eval_loaders)


def choose_seed(trainer: Trainer) -> int:
    """Return the seed of the data's order and randomness, the same on every process, drawing from no stream."""
    if trainer.seed is not None:
        return trainer.seed
    # As nothing is drawn, a second run could find the streams as the first did; it must not repeat its order.
    seed = randomness.mix(randomness.peek_at_torch_stream(), trainer.num_runs_started)
    return distributed.broadcast_from_main(trainer.accelerator, seed)


def create_eval_loaders(
    trainer: Trainer, batch_size: int, kwargs: dict[str, Any], seed: int
) -> dict[str | None, data.ShardedDataLoader]:
    """Return the evaluation sets of the trainer as loaders by name."""
    dataset = trainer.eval_dataset
    if dataset is None:
        return {}
    loaders: dict[str | None, data.ShardedDataLoader] = {}
    try:
        for name, trainer.eval_dataset in data.name_datasets(dataset).items():
            dataloader = trainer.create_eval_dataloader(batch_size, kwargs)
            loaders[name] = data.shard_dataloader(dataloader, trainer.accelerator, randomness.mix(seed, "eval"))
            loaders[name].limit = trainer.limit_eval_batches
    finally:
        trainer.eval_dataset = dataset
    return loaders


def create_training_run(trainer: Trainer, checkpoint: Checkpoint | None, **facts: Any) -> TrainingRun:
    """Make loaders and run configuration of a training run, prepare model and optimizer, and make the scheduler.

    Args:
        trainer: whose hooks make them; it receives configuration and scheduler.
        checkpoint: what the run is to go on from; None to begin anew.
        **facts: fields of the run configuration.

    Raises:
        CheckpointMismatchError: if the checkpoint has another seed.
    """
    accelerator = trainer.accelerator
    seed, run_id = choose_seed(trainer), distributed.broadcast_from_main(accelerator, uuid.uuid4().hex)
    if checkpoint is not None:
        checkpoint.check_seed(trainer.seed)
        seed, run_id = checkpoint.seed, checkpoint.run_id
    kwargs, eval_kwargs = facts["train_dl_kwargs"], facts["eval_dl_kwargs"]
    dataloader = trainer.create_train_dataloader(facts["train_per_device_batch_size"], kwargs)
    loader = data.shard_dataloader(dataloader, accelerator, seed)
    loader.limit = trainer.limit_train_batches
    eval_loaders = create_eval_loaders(trainer, facts["eval_per_device_batch_size"], eval_kwargs, seed)
    trainer.prepare_model_and_optimizer()

    facts["train_per_device_batch_size"] = loader.batch_size
    facts["eval_per_device_batch_size"] = data.common_batch_size(eval_loaders.values())
    trainer.run_config = TrainerRunConfig.of_run(
        accelerator,
        train_dataloader_len=loader.num_steps,
        eval_dataloader_len=data.total_length(eval_loaders.values()),
        seed=seed,
        **facts,
    )
    hyperparameters = hyperparameters_of(raw_optimizer(trainer.optimizer))
    trainer.scheduler = trainer.create_scheduler()
    if isinstance(trainer.scheduler, ReduceLROnPlateau):
        raise TypeError(
            "ReduceLROnPlateau moves by a metric, not once per update: leave create_scheduler_fn out, and call its "
            "step in eval_epoch_end: self.plateau.step(self.run_history.get_latest_metric('eval_loss_epoch'))."
        )
    window = AccumulationWindow(
        trainer.run_config.gradient_accumulation_steps,
        accelerator.num_processes,
        partial(distributed.reduce_sum, accelerator),
        trainer.device,
    )
    raw_optimizer(trainer.optimizer).zero_grad()  # gradients that an interrupted run left behind
    return TrainingRun(run_id, seed, loader, eval_loaders, window, checkpoint, hyperparameters)


def begin(trainer: Trainer, checkpoint: Checkpoint | None, reset_run_history: bool) -> RunCounters:
    """Set history, counters and limits of a run to its beginning, or to where it goes on, and return the counters.

    What a checkpoint holds is given back before the hooks and callbacks of the run begin, so that they see where it is.

    Raises:
        CheckpointError: if the checkpoint cannot be read.
        CheckpointMismatchError: if it is of another run; nothing has been changed then.
    """
    run, config = trainer.training_run, trainer.run_config
    if checkpoint is None and reset_run_history:
        trainer.run_history.reset()
    counters = trainer.run_history.counters
    if checkpoint is not None:
        checkpoint.check(trainer)
        for note in checkpoint.notes(trainer):
            trainer.print(f"Note on resuming: {note}")
        checkpoint.restore(trainer, is_final=False)
        trainer.print(f"Resuming from {checkpoint.path}: {checkpoint.describe()}.")
    run.set_limits(counters, config)
    if checkpoint is not None and (run.is_stopped or (run.is_epoch_complete and run.has_reached_limit(counters))):
        why = "it was stopped early" if run.is_stopped else "its limits are reached"
        trainer.print(f"Nothing is left of the run to do: {why}. To train on, raise them or resume from another.")
    trainer.num_runs_started += 1
    if trainer.recorder is not None:
        trainer.recorder.begin_run(trainer, checkpoint, reset_run_history)
    return counters


@contextlib.contextmanager
def running(trainer: Trainer, engine: Engine, end_event: str, is_training: bool = False) -> Iterator[None]:
    """Set the run up and clear up after it, tell callbacks of failures, and fire the end event whatever happens."""
    if is_training and trainer.seed is not None:
        process = trainer.accelerator.process_index
        randomness.seed_all_streams(trainer.seed if process == 0 else randomness.mix(trainer.seed, "process", process))
    is_in_use, workers = engine.in_use(), workers_outlive_signals()
    with is_in_use, workers, temporarily(trainer, is_training_run=is_training, data_pass=None):
        try:
            yield
        except TrainingInterrupted as interruption:
            trainer.callback_handler.call_end_event(end_event, trainer, interruption, exception=interruption)
            raise
        except BaseException as error:
            locate(trainer, error)
            distributed.report_failure(trainer.accelerator, error)  # before callbacks, which may wait for the others
            # What the callbacks hear is the failure of the process that failed, not that the connection to it broke.
            cause = distributed.peer_failure(trainer.accelerator, error)
            told = cause or error
            trainer.callback_handler.call_end_event("on_exception", trainer, told, exception=told)
            trainer.callback_handler.call_end_event(end_event, trainer, told, exception=told)
            if cause is not None:
                raise cause from None
            raise
        finally:
            trainer.update_is_skipped = False
        try:
            trainer.callback_handler.call_end_event(end_event, trainer, exception=None)
        except Exception as error:
            trainer.callback_handler.call_end_event("on_exception", trainer, error, exception=error)
            raise


def begin_train_pass(trainer: Trainer) -> DataPass:
    """Return a pass over the training data: of an epoch that begins, or that goes on after an interruption."""
    run, goes_on = trainer.training_run, trainer.training_run.is_in_epoch
    if not goes_on:
        trainer.run_history.counters.current_epoch += 1
        run.is_in_epoch, run.is_epoch_exhausted, run.num_steps_in_epoch = True, False, 0
    metrics = metrics_of_pass(trainer, is_training=True, pass_states=run.pass_states if goes_on else ())
    run.data_pass = DataPass("training", run.loader, trainer.accelerator, metrics, run.window)
    if goes_on:
        run.data_pass.go_on(run.num_steps_in_epoch, run.pass_states)
    return run.data_pass


def metrics_of_pass(trainer: Trainer, **facts: Any) -> Any:
    """Return the metrics that take part in a pass that begins; see ``metrics.choose_metrics``."""
    if trainer.metrics is None:
        return None
    from pytorch_accelerated.metrics import choose_metrics  # which imports torchmetrics

    return choose_metrics(trainer, **facts)


@contextlib.contextmanager
def evaluating(trainer: Trainer, kind: str, loader: data.ShardedDataLoader, **facts: Any) -> Iterator[DataPass]:
    """Let a trainer go without gradients through ``loader``, and leave modes and random streams as they were.

    Args:
        trainer: whose model it is.
        kind: what the pass is for: evaluating, or predicting, which needs no metrics.
        loader: where the batches come from.
        **facts: what the metrics that take part are chosen by.
    """
    metrics = metrics_of_pass(trainer, is_training=False, **facts) if kind == "evaluating" else None
    modes = [(module, module.training) for module in trainer.model.modules()]
    streams = randomness.get_streams(trainer.device)
    run = trainer.training_run if trainer.has_training_run else None
    before = None if run is None else run.suspended  # evaluations may be nested
    if run is not None and before is None:
        run.suspended = Suspended(modes_of(trainer), streams)
    data_pass = DataPass(kind, loader, trainer.accelerator, metrics, window=None)
    with temporarily(trainer, data_pass=data_pass):
        try:
            # Not inference_mode: its tensors cannot be used in training, and compiled or sharded models refuse it.
            with torch.no_grad():
                yield data_pass
        except Exception as error:
            locate(trainer, error)
            raise
        finally:
            randomness.set_streams(streams, trainer.device)
            for module, mode in modes:
                module.training = mode
            if run is not None:
                run.suspended = before


@contextlib.contextmanager
def temporarily(owner: Any, **attributes: Any) -> Iterator[None]:
    """Give attributes of an object other values inside the block."""
    before = {name: getattr(owner, name) for name in attributes}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        vars(owner).update(before)


def locate(trainer: Trainer, error: BaseException) -> None:
    """Add a note to an exception of user code that says where in the run it happened, unless it has one."""
    prefix = "pytorch_accelerated: while "
    notes = getattr(error, "__notes__", ())
    if not isinstance(error, Exception | KeyboardInterrupt) or any(note.startswith(prefix) for note in notes):
        return
    accelerator, data_pass = trainer.accelerator, trainer.data_pass
    doing, where = ("running", "") if data_pass is None else (data_pass.kind, f", {data_pass.describe_position()}")
    error.add_note(
        f"{prefix}{doing}, process {accelerator.process_index} of {accelerator.num_processes}, epoch "
        f"{trainer.current_epoch}, {trainer.num_updates} updates made{where}"
    )

"""The Trainer: one training loop, whose every stage is a method to override.

::

    train_dataloader = create_train_dataloader()
    eval_dataloader  = create_eval_dataloader()
    scheduler        = create_scheduler()

    training_run_start()                                          on_train_run_begin
    for epoch in epochs:
        train_epoch_start()                                       on_train_epoch_begin
        for batch in train_dataloader:
                                                                  on_train_step_begin
            batch_output = calculate_train_batch_loss(batch)      on_train_step_end(batch, batch_output)
            backward_step(batch_output["loss"])
            # once per update: when the accumulation window is complete, or the epoch ends
            clip_gradients()                                      on_optimizer_step_begin
            optimizer_step()
            scheduler_step()
            optimizer_zero_grad()                                 on_train_update_end
        train_epoch_end()                                         on_train_epoch_end

        eval_epoch_start()                                        on_eval_epoch_begin
        for batch in eval_dataloader:
                                                                  on_eval_step_begin
            batch_output = calculate_eval_batch_loss(batch)       on_eval_step_end(batch, batch_output)
        eval_epoch_end()                                          on_eval_epoch_end
    training_run_end()                                            on_train_run_end
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from pytorch_accelerated import checkpoint, data, distributed, runs
from pytorch_accelerated.callbacks import DEFAULT_CALLBACKS, CallbackHandler, TrainerCallback
from pytorch_accelerated.callbacks.base import ACCEPTED_SPELLINGS, EVENTS
from pytorch_accelerated.callbacks.limits import limit_from_environment
from pytorch_accelerated.callbacks.progress import bars_aside
from pytorch_accelerated.callbacks.saving import save_directories
from pytorch_accelerated.engine import Engine, raw_optimizer, unwrapped
from pytorch_accelerated.errors import StopTrainingError, refuse_near_misses
from pytorch_accelerated.passes import (
    BatchOutput,
    DataPass,
    as_metric,
    as_predictions,
    calculate_batch_loss,
    update_metrics,
)
from pytorch_accelerated.predictions import collect_predictions
from pytorch_accelerated.recording import RunRecord, create_recorder
from pytorch_accelerated.run_config import TrainerPlaceholderValues as TrainerPlaceholderValues  # its place in 0.1.x
from pytorch_accelerated.run_config import (
    TrainerRunConfig,
    check_train_arguments,
    check_trainer_arguments,
    resolve_placeholders,
)
from pytorch_accelerated.run_directory import RunDirectory
from pytorch_accelerated.syncs import SyncAudit
from pytorch_accelerated.tracking import RunHistory

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection


class Trainer(RunRecord):
    """Train, evaluate and predict with a PyTorch model, on whatever hardware Accelerate was set up for.

    To change what happens, override a hook; to do something besides, write a callback. See the module's docstring for
    the order of both.
    """

    EVENTS: ClassVar[tuple[str, ...]] = EVENTS
    """Names of the events callbacks may listen to; a subclass that has events of its own adds their names."""

    HOOKS: ClassVar[tuple[str, ...]] = (
        "create_accelerator",
        "create_train_dataloader",
        "create_eval_dataloader",
        "create_predict_dataloader",
        "create_scheduler",
        "training_run_start",
        "train_epoch_start",
        "calculate_train_batch_loss",
        "backward_step",
        "clip_gradients",
        "optimizer_step",
        "scheduler_step",
        "optimizer_zero_grad",
        "train_epoch_end",
        "eval_epoch_start",
        "calculate_eval_batch_loss",
        "eval_epoch_end",
        "training_run_end",
        "evaluation_run_start",
        "evaluation_run_end",
        "prediction_run_start",
        "predict_epoch_start",
        "calculate_predictions",
        "predict_epoch_end",
        "prediction_run_end",
        "update_metrics",
    )
    """Names of the methods that are there to be overridden, in the order of a run."""

    # Given by the user; model and optimizer become what Accelerate made of them when the first run begins.
    model: nn.Module
    loss_func: Callable[..., Tensor] | None
    optimizer: Any
    metrics: Metric | MetricCollection | None
    accelerator: Accelerator
    callback_handler: CallbackHandler
    seed: int | None
    limit_train_batches: int | None
    limit_eval_batches: int | None

    # Facts and state of the run.
    run_config: TrainerRunConfig
    run_history: RunHistory
    scheduler: Any
    train_dataset: Any
    eval_dataset: Any
    predict_dataset: Any
    collate_fn: Callable[[Any], Any] | None
    create_scheduler_fn: Callable[..., Any] | None
    is_training_run: bool
    num_runs_started: int
    data_pass: DataPass | None  # the pass over data in progress: its length, the samples of its step, its loss so far
    update_is_skipped: bool  # whether the update about to be made is left out
    gradient_norm: Tensor | None  # of the last update, before clipping; None where norms are not clipped

    def __init__(
        self,
        model: nn.Module,
        loss_func: Callable[..., Tensor] | None = None,
        optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        callbacks: Iterable[TrainerCallback | type[TrainerCallback]] | None = DEFAULT_CALLBACKS,
        run_history: RunHistory | None = None,
        accelerator: Accelerator | None = None,
        seed: int | None = None,
        metrics: Metric | MetricCollection | Mapping[str, Metric | MetricCollection] | None = None,
        run_dir: str | Path | RunDirectory | None = None,
        trackers: Iterable[Any] | Mapping[str, Mapping[str, Any]] | str | None = None,
        log_every: int | timedelta = 50,
        config: Any = None,
    ) -> None:
        """Store what training needs; nothing is moved, wrapped or seeded before a run begins.

        Args:
            model: any module.
            loss_func: called with the model's output and the targets, returns a scalar tensor, the mean over the batch.
                None when the model returns its own loss, as ``outputs.loss`` or ``outputs["loss"]``.
            optimizer: an optimizer over the model's parameters, or a function that makes one of them, such as
                ``partial(AdamW, lr=1e-3)``. Not needed to evaluate and predict.
            callbacks: instances, or classes of which an instance is made, called in this order. None for none.
            run_history: where metrics are recorded; None for a new ``RunHistory``.
            accelerator: None for what ``create_accelerator`` returns.
            seed: None leaves the random streams to the user: the order of samples and the randomness in datasets then
                follow from torch's state when a run begins. A number fixes these, and seeds torch, numpy and random
                when a training run begins, differently on each process.
            metrics: torchmetrics objects to be updated with model outputs and targets in training and in evaluation;
                ``When`` and ``Windowed`` of ``pytorch_accelerated.metrics`` say in which passes, and over which steps.
            run_dir: holds a numbered directory for each run, with its log and every fact of it; None for none.
            trackers: names, such as ``["tensorboard", "wandb"]``, a dict of names and arguments, or trackers. None for
                what Accelerate was given, or with ``run_dir`` for TensorBoard.
            log_every: updates, or time as a ``timedelta``, between two rows of the log within an epoch.
            config: the user's own settings, to be recorded: a dict (may be nested), a dataclass or a namespace.

        Raises:
            LaunchError: if a launcher started several processes that do not know of each other.
            TrackerError: if a tracker is unknown, is not installed, or lacks the run directory it needs.
            TypeError: if an argument is of a wrong type.
            ValueError: if a callback listens to an event that does not exist, or a method of a subclass has a name that
                is almost a hook's.
        """
        refuse_near_misses(type(self), Trainer, self.HOOKS, (*self.EVENTS, *ACCEPTED_SPELLINGS))
        check_trainer_arguments(model, loss_func, optimizer, seed)
        self.model = model
        self.loss_func = loss_func
        self.optimizer = optimizer
        self.metrics = as_metric(metrics)
        self.accelerator = accelerator if accelerator is not None else self.create_accelerator()
        distributed.check_launch(self.accelerator)
        self.run_history = run_history if run_history is not None else RunHistory()
        self.run_config = TrainerRunConfig()
        self.seed = seed
        self.scheduler = None
        self.train_dataset = self.eval_dataset = self.predict_dataset = None
        self.collate_fn = self.create_scheduler_fn = None
        self.limit_train_batches = self.limit_eval_batches = None
        self.is_training_run = False
        self.data_pass = self.gradient_norm = None

        self.num_runs_started = 0
        self._run: runs.TrainingRun | None = None
        self._engine = Engine(self.accelerator)
        self.update_is_skipped = False

        self.recorder = create_recorder(self.accelerator, run_dir, trackers, log_every, config)
        recorders = () if self.recorder is None else (self.recorder, self.recorder.closing)
        self.callback_handler = CallbackHandler(recorders, self.EVENTS)
        self.callback_handler.add_callbacks(callbacks or ())
        if (limit := limit_from_environment()) is not None:
            self.callback_handler.add_callback(limit)
        self._event("on_init_end")

    # ----------------------------------------------------------------------------------------------------------------
    # Runs
    # ----------------------------------------------------------------------------------------------------------------

    def train(
        self,
        train_dataset: Any,
        num_epochs: int | None,
        eval_dataset: Any = None,
        per_device_batch_size: int = 8,
        max_num_train_steps: int | None = None,
        gradient_accumulation_steps: int = 1,
        gradient_clip_value: float | None = None,
        gradient_clip_norm: float | None = None,
        create_scheduler_fn: Callable[[Optimizer], Any] | None = None,
        train_dataloader_kwargs: Mapping[str, Any] | None = None,
        eval_dataloader_kwargs: Mapping[str, Any] | None = None,
        reset_run_history: bool = True,
        collate_fn: Callable[[Any], Any] | None = None,
        resume_from: str | Path | None = None,
    ) -> RunHistory:
        """Train the model, evaluating it after each epoch.

        Args:
            train_dataset: a map-style or iterable dataset, or a DataLoader over the data for one process.
            num_epochs: passes over the training data; None when ``max_num_train_steps`` alone is the limit.
            eval_dataset: the same kinds, or a dict of several by name. None for no evaluation.
            per_device_batch_size: samples in a batch of one process.
            max_num_train_steps: limit of the run in updates; the smaller limit wins.
            gradient_accumulation_steps: batches of one process that make up one update. 1 leaves it to Accelerate's
                setting.
            gradient_clip_value: limit for the magnitude of each element of a gradient, applied once per update.
            gradient_clip_norm: limit for the norm of all gradients together, applied once per update.
            create_scheduler_fn: makes a scheduler of the optimizer; it is stepped once per update. A
                ``functools.partial`` may hold ``TrainerPlaceholderValues``.
            train_dataloader_kwargs: arguments for the training DataLoader, which win over the defaults.
            eval_dataloader_kwargs: the same for the evaluation DataLoaders.
            reset_run_history: whether history and counters begin anew. If not, epochs and updates are counted on from
                the last run, and the limits are counted from here.
            collate_fn: makes a batch of a list of samples; None for torch's default.
            resume_from: ``"latest"`` goes on from the newest whole checkpoint where ``SaveTrainingStateCallback``
                saves, and begins anew where there is none; a directory of checkpoints likewise; a checkpoint goes on
                from exactly that one. The limits are targets that count from the beginning of the interrupted run: a
                finished run trains no more.

        Returns:
            The run history.

        Raises:
            CheckpointError: if there is nothing at ``resume_from``, or nothing whole.
            CheckpointMismatchError: if it is of another model, optimizer, dataset, batch size or seed.
            TypeError: if an argument is of a wrong type, or a DataLoader argument unknown.
            ValueError: if there is nothing to train on, nothing to train with, or no end to the training.
            NonFiniteError: with the default callbacks, if a loss or a gradient is infinite or NaN.
        """
        if self.is_training_run:
            raise RuntimeError("train() was called inside a training run of the same trainer; make another Trainer.")
        facts: dict[str, Any] = {
            "num_epochs": num_epochs,
            "max_num_train_steps": max_num_train_steps,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "gradient_clip_value": gradient_clip_value,
            "gradient_clip_norm": gradient_clip_norm,
        }
        size = per_device_batch_size
        check_train_arguments(**facts, per_device_batch_size=size, create_scheduler_fn=create_scheduler_fn)
        if self.optimizer is None:
            raise ValueError("training needs an optimizer: Trainer(model, loss_func, optimizer=...).")
        self.train_dataset, self.eval_dataset, self.collate_fn = train_dataset, eval_dataset, collate_fn
        self.create_scheduler_fn = create_scheduler_fn
        with distributed.failing_together(self.accelerator):
            facts["gradient_accumulation_steps"] = self._engine.choose_accumulation_steps(gradient_accumulation_steps)
            found = checkpoint.find(self.accelerator, resume_from, save_directories(self), self.print)
            run = self._run = runs.create_training_run(
                self,
                found,
                train_per_device_batch_size=size,
                eval_per_device_batch_size=size,
                train_dl_kwargs=dict(train_dataloader_kwargs or {}),
                eval_dl_kwargs=dict(eval_dataloader_kwargs or {}),
                **facts,
            )
            self._engine.check_what_moves(has_schedule=self.scheduler is not None)
            counters = runs.begin(self, found, reset_run_history)
            with runs.running(self, self._engine, "on_train_run_end", is_training=True):
                try:
                    self.training_run_start()
                    self._event("on_train_run_begin")
                    if not run.is_in_epoch:
                        self._take_up()
                    while not run.is_finished(counters):
                        if run.is_in_epoch or run.pending_evaluation is None:
                            self._run_train_epoch()
                        self._run_pending_evaluation()
                except StopTrainingError as error:
                    run.is_stopped = True
                    self._event("on_stop_training_error", exception=error)
                self.training_run_end()
        return self.run_history

    def evaluate(
        self,
        dataset: Any,
        per_device_batch_size: int = 8,
        dataloader_kwargs: Mapping[str, Any] | None = None,
        collate_fn: Callable[[Any], Any] | None = None,
    ) -> dict[str, Any]:
        """Evaluate the model, apart from any training; the training history stays, and gains the results.

        Args:
            dataset: a map-style or iterable dataset, a DataLoader, or a dict of several by name.
            per_device_batch_size: samples in a batch of one process.
            dataloader_kwargs: arguments for the DataLoader, which win over the defaults.
            collate_fn: makes a batch of a list of samples; None for torch's default.

        Returns:
            ``evaluation_loss`` and the metrics, as ``evaluation_<metric>``; of a named set ``evaluation_<name>_loss``
            and so on.
        """
        if dataset is None:
            raise ValueError("evaluate needs a dataset, got None.")
        with (
            distributed.failing_together(self.accelerator),
            runs.temporarily(self, eval_dataset=dataset, collate_fn=collate_fn),
        ):
            kwargs = dict(dataloader_kwargs or {})
            self.prepare_model_and_optimizer()
            loaders = runs.create_eval_loaders(self, per_device_batch_size, kwargs, runs.choose_seed(self))
            config = TrainerRunConfig.of_run(
                self.accelerator,
                eval_per_device_batch_size=data.common_batch_size(loaders.values()),
                eval_dl_kwargs=kwargs,
                eval_dataloader_len=data.total_length(loaders.values()),
            )
            with runs.temporarily(self, run_config=config), runs.running(self, self._engine, "on_evaluation_run_end"):
                self.evaluation_run_start()
                self._event("on_evaluation_run_begin")
                results: dict[str, Any] = {}
                for name, loader in loaders.items():
                    prefix = f"evaluation_{name}" if name else "evaluation"
                    results |= self._run_eval_epoch(loader, f"{prefix}_loss", prefix, name, is_intermediate=False)
                self.evaluation_run_end()
            return results

    def predict(
        self,
        dataset: Any,
        per_device_batch_size: int = 8,
        dataloader_kwargs: Mapping[str, Any] | None = None,
        collate_fn: Callable[[Any], Any] | None = None,
        save_to: str | Path | None = None,
        overwrite: bool = False,
    ) -> Any:
        """Return the model's outputs for a dataset, or write them to a file.

        Args:
            dataset: a map-style or iterable dataset, or a DataLoader; targets in it are not used.
            per_device_batch_size: samples in a batch of one process.
            dataloader_kwargs: arguments for the DataLoader, which win over the defaults.
            collate_fn: makes a batch of a list of samples; None for torch's default.
            save_to: a ``.parquet``, ``.npz`` or ``.jsonl`` file to write them to while they are made, so that they need
                not fit into memory, with a column or array for each part of the output.
            overwrite: whether a file that is there may be replaced.

        Returns:
            What ``calculate_predictions`` returns, joined along the first dimension in the order of the dataset, each
            sample once, on the CPU, on every process. Nested structures keep their structure. Of ``save_to`` the path.

        Raises:
            FileExistsError: if there is a file at ``save_to``, and no ``overwrite``.
            ValueError: if the loader shuffles, or if outputs of different batches differ in other dimensions than the
                first.
        """
        kwargs = dict(dataloader_kwargs or {})
        if kwargs.get("shuffle"):
            raise ValueError("predict returns outputs in the order of the dataset, so it cannot take shuffle=True.")
        processes = distributed.failing_together(self.accelerator)
        given = runs.temporarily(self, predict_dataset=dataset, collate_fn=collate_fn)
        with processes, given, collect_predictions(self.accelerator, save_to, overwrite) as outputs:
            self.prepare_model_and_optimizer()
            dataloader = self.create_predict_dataloader(per_device_batch_size, kwargs)
            if data.is_shuffled(dataloader):
                raise ValueError("predict returns outputs in the order of the dataset, but its DataLoader shuffles.")
            loader = data.shard_dataloader(dataloader, self.accelerator, runs.choose_seed(self))
            with (
                runs.running(self, self._engine, "on_prediction_run_end"),
                runs.evaluating(self, "predicting", loader) as data_pass,
            ):
                self.prediction_run_start()
                self._event("on_prediction_run_begin")
                self.predict_epoch_start()
                self._event("on_predict_epoch_begin")
                with contextlib.closing(data_pass.iterate(epoch=0)) as batches:
                    for batch in batches:
                        self._event("on_predict_step_begin")
                        output = self.calculate_predictions(batch)
                        self._event("on_predict_step_end", batch=batch, batch_output=output, step=data_pass.step)
                        outputs.add(output, self.has_samples)
                self.predict_epoch_end()
                self._event("on_predict_epoch_end")
                self.prediction_run_end()
            return outputs.result()

    # ----------------------------------------------------------------------------------------------------------------
    # The loop
    # ----------------------------------------------------------------------------------------------------------------

    def _run_train_epoch(self) -> None:
        run, counters = self.training_run, self.run_history.counters
        loader, window = run.loader, run.window
        data_pass = self.data_pass = runs.begin_train_pass(self)
        accumulation_steps = self.run_config.gradient_accumulation_steps
        self.train_epoch_start()
        self._event("on_train_epoch_begin")
        self._take_up()
        self._run_pending_evaluation()
        self.model = self._engine.follow_freezing()
        is_over = run.is_epoch_exhausted or run.is_out_of_updates(counters)  # after an interruption
        with contextlib.closing(data_pass.iterate(counters.current_epoch)) as batches:
            for batch in batches if not is_over else ():
                is_update = window.is_one_batch or window.begin_step(loader.is_last)
                with self._engine.gradient_sync(is_update, accumulation_steps):
                    self._event("on_train_step_begin")
                    batch_output = self._account(batch, self.calculate_train_batch_loss(batch))
                    self._event("on_train_step_end", batch=batch, batch_output=batch_output, step=data_pass.step)
                    self.backward_step(data_pass.weigh(batch_output["loss"]))
                counters.num_steps += 1
                counters.num_samples += loader.round_samples
                if is_update:
                    if not window.is_one_batch:
                        window.close(self._engine.parameters)
                    self.clip_gradients()
                    self._event("on_optimizer_step_begin")
                    if not self.update_is_skipped:
                        self.optimizer_step()
                    if is_applied := self._count_update():
                        self.scheduler_step()
                    self.optimizer_zero_grad()
                    run.num_steps_in_epoch, run.is_epoch_exhausted = data_pass.step + 1, loader.is_last
                    if is_applied:
                        self._event("on_train_update_end")
                        if run.pending_evaluation is not None:
                            self._run_pending_evaluation()
                    if run.is_out_of_updates(counters):
                        break
        self._engine.refuse_freezing_within_epoch()
        if data_pass.step < 0:
            raise ValueError(
                f"epoch {counters.current_epoch} gave no batch: the training data yields nothing (any more)."
            )
        self._record("train_loss_epoch", "train")
        run.is_in_epoch, run.pending_evaluation = False, "final"
        self.train_epoch_end()
        self._event("on_train_epoch_end")

    def run_evaluation(self, is_intermediate: bool = True) -> None:
        """Evaluate at once on the evaluation sets of the training run, and go on as if nothing had happened.

        The mode of each module, the random streams and the position in the training data are left as they were found.
        In a callback ``request_evaluation`` is better: a run can be interrupted and resumed within what it asks for.

        Args:
            is_intermediate: passed to the callbacks; False for the evaluation at the end of an epoch.
        """
        run = self.training_run
        first = run.num_evaluated if run.is_evaluating else 0  # after an interruption the sets that are left
        for name, loader in list(run.eval_loaders.items())[first:]:
            prefix = f"eval_{name}" if name else "eval"
            self._run_eval_epoch(loader, f"{prefix}_loss_epoch", prefix, name, is_intermediate)

    def request_evaluation(self) -> None:
        """Ask for an evaluation once all callbacks have heard of the update; call it in ``on_train_update_end``."""
        self.training_run.pending_evaluation = "intermediate"

    def _run_pending_evaluation(self) -> None:
        run = self.training_run
        if run.pending_evaluation is None:
            return
        run.is_evaluating = True
        self.run_evaluation(is_intermediate=run.pending_evaluation == "intermediate")
        run.is_evaluating, run.pending_evaluation, run.num_evaluated = False, None, 0

    def _run_eval_epoch(
        self, loader: data.ShardedDataLoader, loss_name: str, prefix: str, name: str | None, is_intermediate: bool
    ) -> dict[str, Any]:
        facts: dict[str, Any] = {"eval_name": name, "is_intermediate": is_intermediate}
        with runs.evaluating(self, "evaluating", loader, **facts) as data_pass:
            self.eval_epoch_start()
            self._event("on_eval_epoch_begin", **facts)
            loader.limit = self.limit_eval_batches
            # The randomness of evaluation data is that of epoch 0, always, so that evaluations can be compared.
            with contextlib.closing(data_pass.iterate(epoch=0)) as batches:
                for batch in batches:
                    self._event("on_eval_step_begin")
                    batch_output = self._account(batch, self.calculate_eval_batch_loss(batch))
                    self._event("on_eval_step_end", batch=batch, batch_output=batch_output, step=data_pass.step)
            if data_pass.step < 0:
                which = f" {name!r}" if name else ""
                raise ValueError(f"the evaluation set{which} gave no batch: it yields nothing (any more).")
            results = self._record(loss_name, prefix)
            if self._run is not None and self._run.is_evaluating:
                self._run.num_evaluated += 1
            self.eval_epoch_end()
            self._event("on_eval_epoch_end", **facts)
        return results

    # ----------------------------------------------------------------------------------------------------------------
    # Hooks that set up a run
    # ----------------------------------------------------------------------------------------------------------------

    def create_accelerator(self) -> Accelerator:
        """Return the Accelerator; called once, when the trainer is made without one.

        The default makes one without arguments, which takes everything from ``accelerate launch`` and the environment.
        """
        return Accelerator()

    def create_train_dataloader(self, batch_size: int, train_dl_kwargs: dict[str, Any] | None = None) -> Any:
        """Return a DataLoader over all of ``self.train_dataset``, as for a single process; called when training begins.

        The trainer gives each process its part of it, with an order that is a function of seed and epoch where the
        loader's sampler is torch's plain ``RandomSampler``. The default makes one with ``get_default_train_dl_kwargs``,
        over which ``train_dl_kwargs`` win; a dataset that is a DataLoader is returned as it is.

        Args:
            batch_size: samples in a batch of one process.
            train_dl_kwargs: ``train(train_dataloader_kwargs=...)``.
        """
        defaults = self.get_default_train_dl_kwargs(batch_size)
        return data.create_dataloader(self.train_dataset, self.collate_fn, defaults, train_dl_kwargs or {})

    def create_eval_dataloader(self, batch_size: int, eval_dl_kwargs: dict[str, Any] | None = None) -> Any:
        """Return a DataLoader over all of ``self.eval_dataset``; called when training or evaluation begins.

        Where there are several evaluation sets it is called for each, with ``self.eval_dataset`` set to that one.

        Args:
            batch_size: samples in a batch of one process.
            eval_dl_kwargs: ``train(eval_dataloader_kwargs=...)`` or ``evaluate(dataloader_kwargs=...)``.
        """
        defaults = self.get_default_eval_dl_kwargs(batch_size)
        return data.create_dataloader(self.eval_dataset, self.collate_fn, defaults, eval_dl_kwargs or {})

    def create_predict_dataloader(self, batch_size: int, predict_dl_kwargs: dict[str, Any] | None = None) -> Any:
        """Return a DataLoader over all of ``self.predict_dataset``, in order; called when prediction begins.

        Args:
            batch_size: samples in a batch of one process.
            predict_dl_kwargs: ``predict(dataloader_kwargs=...)``.
        """
        defaults = self.get_default_eval_dl_kwargs(batch_size)
        return data.create_dataloader(self.predict_dataset, self.collate_fn, defaults, predict_dl_kwargs or {})

    def get_default_train_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
        """Return the arguments of the training DataLoader that the user's are laid over.

        The default shuffles; the rest goes by device and dataset, see ``data.default_arguments``.
        """
        return {**data.default_arguments(self.train_dataset, self.accelerator, batch_size), "shuffle": True}

    def get_default_eval_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
        """Return the arguments of the evaluation and prediction DataLoaders that the user's are laid over."""
        dataset = self.eval_dataset if self.predict_dataset is None else self.predict_dataset
        return {**data.default_arguments(dataset, self.accelerator, batch_size), "shuffle": False}

    def create_scheduler(self) -> Any:
        """Return the learning rate scheduler, or None; called when training begins, once ``self.run_config`` is there.

        It is stepped once per update by ``scheduler_step``. The default calls ``create_scheduler_fn`` with the
        optimizer, placeholders replaced by their numbers.
        """
        if self.create_scheduler_fn is None:
            return None
        return resolve_placeholders(self.create_scheduler_fn, self.run_config)(raw_optimizer(self.optimizer))

    # ----------------------------------------------------------------------------------------------------------------
    # Hooks of a training run
    # ----------------------------------------------------------------------------------------------------------------

    def training_run_start(self) -> None:
        """Act when a training run begins: everything is prepared. The default does nothing."""

    def train_epoch_start(self) -> None:
        """Act when a pass over the training data begins.

        The default puts the model in training mode if it is not; modules put in evaluation mode inside a model in
        training mode, such as frozen batch norms, stay there.
        """
        if not self.model.training:
            self.model.train()

    def calculate_train_batch_loss(self, batch: Any) -> BatchOutput | Tensor:
        """Return the loss of a training batch; called for each batch.

        The default calls the model with the first element of a batch ``(inputs, targets)`` and the loss function with
        the output and the second. A dict becomes keyword arguments; with a loss function its ``"labels"`` are the
        targets. Without a loss function the whole batch goes to the model, whose own loss is taken.

        Args:
            batch: as the DataLoader made it, on ``self.device``.

        Returns:
            A dict with ``"loss"``, a scalar tensor, the mean over the items of the batch; optionally
            ``"model_outputs"``, which metrics are given; ``"batch_size"``, the samples in the batch, which the trainer
            knows by itself where the loader makes the batches; and ``"num_items_in_batch"``, a number or a scalar
            tensor on the device: how many items (tokens, pixels) the loss is the mean of on this process, where that is
            not the number of samples. Other entries reach the callbacks. Or the loss tensor alone.
        """
        return calculate_batch_loss(self.model, self.loss_func, batch, self.data_pass)

    def backward_step(self, loss: Tensor) -> None:
        """Add the gradients of ``loss`` to those of its window; called for each batch.

        Args:
            loss: scalar tensor, weighed so that the sum over a window has the gradient of the one big batch.
        """
        if self._engine.is_plain:
            loss.backward()  # type: ignore[no-untyped-call]  # Accelerate's backward divides first, one more node per step
        else:
            self.accelerator.backward(loss)

    def clip_gradients(self) -> None:
        """Limit the gradients; called once per update, when they are complete.

        The default applies ``gradient_clip_value``, then ``gradient_clip_norm``, and keeps the total norm before
        clipping in ``self.gradient_norm``, a scalar tensor on the device.
        """
        config = self.run_config
        if config.gradient_clip_value is not None:
            self._engine.clip_values(config.gradient_clip_value)
        if config.gradient_clip_norm is not None:
            clip = nn.utils.clip_grad_norm_ if self._engine.is_plain else self.accelerator.clip_grad_norm_
            self.gradient_norm = clip(self._engine.parameters, config.gradient_clip_norm)

    def optimizer_step(self) -> None:
        """Change the weights; called once per update. The default calls the optimizer's ``step``."""
        self._engine.stepped_optimizer.step()

    def scheduler_step(self) -> None:
        """Change the learning rate; called once per update that was made. The default calls ``scheduler.step()``."""
        if self.scheduler is not None:
            self.scheduler.step()

    def optimizer_zero_grad(self) -> None:
        """Forget the gradients; called once per update. The default sets them to None."""
        self._engine.zero_gradients()

    def train_epoch_end(self) -> None:
        """Act when a pass over the training data is over: its metrics are in the history. The default does nothing."""

    def eval_epoch_start(self) -> None:
        """Act when a pass over evaluation data begins. The default puts the model in evaluation mode.

        Afterwards the trainer gives each module its mode back.
        """
        self.model.eval()

    def calculate_eval_batch_loss(self, batch: Any) -> BatchOutput | Tensor:
        """Return the loss of an evaluation batch; called for each batch, without gradients.

        Takes and returns what ``calculate_train_batch_loss`` does, and does the same by default. On a process that has
        no samples left while others have, the batch is a repeated sample, which is not counted: ``self.has_samples`` is
        False.
        """
        return calculate_batch_loss(self.model, self.loss_func, batch, self.data_pass)

    def eval_epoch_end(self) -> None:
        """Act when a pass over evaluation data is over: its metrics are in the history. The default does nothing."""

    def training_run_end(self) -> None:
        """Act when a training run has come to its end, early or not, but did not fail. The default does nothing."""

    def update_metrics(self, metrics: Metric | MetricCollection, batch: Any, batch_output: BatchOutput) -> None:
        """Add a batch to the metrics; called after each loss where the trainer was given ``metrics``.

        The default takes the predictions from ``batch_output["predictions"]`` if it is there, else
        ``["model_outputs"]`` (its ``logits`` where it is a mapping or an object of another kind), and the targets from
        ``batch_output["targets"]`` if it is there, else from the batch: the second of a pair, ``"labels"`` of a dict.

        Args:
            metrics: a copy of the trainer's metrics for this pass.
            batch: the batch.
            batch_output: what ``calculate_*_batch_loss`` returned.

        Raises:
            BatchError: if there are no predictions or no targets.
        """
        update_metrics(metrics, batch, batch_output)

    # ----------------------------------------------------------------------------------------------------------------
    # Hooks of evaluation and prediction runs
    # ----------------------------------------------------------------------------------------------------------------

    def evaluation_run_start(self) -> None:
        """Act when ``evaluate`` begins. The default does nothing."""

    def evaluation_run_end(self) -> None:
        """Act when ``evaluate`` has come to its end, but did not fail. The default does nothing."""

    def prediction_run_start(self) -> None:
        """Act when ``predict`` begins. The default does nothing."""

    def predict_epoch_start(self) -> None:
        """Act when the pass over the data to predict begins. The default puts the model in evaluation mode."""
        self.model.eval()

    def calculate_predictions(self, batch: Any) -> Any:
        """Return the model's outputs for a batch; called for each batch of ``predict``, without gradients.

        The default calls the model with a tensor, the first element of a tuple or list, or the entries of a dict. Of a
        model that makes its own loss it returns the other entries of its output, as a dict.

        Returns:
            A tensor whose first dimension is the sample, or a nested tuple, list or dict of such.
        """
        if isinstance(batch, Mapping):
            labels = () if self.loss_func is None else ("labels",)
            outputs = self.model(**{key: value for key, value in batch.items() if key not in labels})
        else:
            outputs = self.model(batch[0] if isinstance(batch, list | tuple) else batch)
        return as_predictions(outputs) if self.loss_func is None else outputs

    def predict_epoch_end(self) -> None:
        """Act when the pass over the data to predict is over. The default does nothing."""

    def prediction_run_end(self) -> None:
        """Act when ``predict`` has come to its end, but did not fail. The default does nothing."""

    # ----------------------------------------------------------------------------------------------------------------
    # State
    # ----------------------------------------------------------------------------------------------------------------

    def save_training_state(self, save_dir: str | Path) -> Path:
        """Save the state of the training run as the checkpoint ``save_dir``, and return its path. Collective.

        What is saved is the state at this moment, also in the middle of an event that other callbacks have yet to hear:
        better leave it to ``SaveTrainingStateCallback``, which comes after all others.

        Raises:
            CheckpointError: if there is something at ``save_dir``, it cannot be written, or an update is in progress;
                nothing is left behind.
        """
        return checkpoint.save_state(self, Path(save_dir))

    def load_training_state(self, save_dir: str | Path) -> None:
        """Load all of a checkpoint but its position, to evaluate it; ``train(resume_from=...)`` goes on training.

        Raises:
            CheckpointError: if it is damaged or of another model; nothing has been changed then.
        """
        checkpoint.load_state(self, Path(save_dir))

    def save_model(self, path: str | Path) -> None:
        """Save the weights alone, as ``save_checkpoint`` does. Collective."""
        self.save_checkpoint(path, save_optimizer=False)

    def save_checkpoint(
        self,
        save_path: str | Path,
        checkpoint_kwargs: Mapping[str, Any] | None = None,
        save_optimizer: bool | None = None,
    ) -> None:
        """Save the weights, under the names that the user's module has for them, and the optimizer. Collective.

        Args:
            save_path: ends in ``.safetensors`` for the weights alone, in something else for a file that ``torch.load``
                reads: with the optimizer a dict of ``model_state_dict`` and ``optimizer_state_dict``, without it the
                weights. What is there is replaced at once or not at all.
            checkpoint_kwargs: what else to put into that dict: plain data.
            save_optimizer: None saves it where the file can hold it.

        Raises:
            CheckpointError: if it cannot be written.
            ValueError: if a file of safetensors is to hold more than weights.
        """
        checkpoint.save_portable(self, Path(save_path), checkpoint_kwargs, save_optimizer)

    def load_checkpoint(self, checkpoint_path: str | Path, load_optimizer: bool = True) -> None:
        """Load weights and, where it is there and ``load_optimizer``, the optimizer.

        Args:
            checkpoint_path: what ``save_model`` or ``save_checkpoint`` wrote, a ``state_dict`` of torch, or a
                checkpoint of a run.
            load_optimizer: whether to load the optimizer, too.

        Raises:
            CheckpointError: if it cannot be read, or is of another model; nothing has been changed then.
        """
        checkpoint.load_portable(self, Path(checkpoint_path), load_optimizer)

    def get_extra_state(self) -> Any:
        """Return what else of a subclass must survive an interruption: plain data and tensors; by default None.

        Called on the main process for each checkpoint of a run. Modules that the trainer holds are saved by themselves.
        """
        return None

    def set_extra_state(self, state: Any) -> None:
        """Take up what ``get_extra_state`` returned before the interruption; called on every process, twice."""

    # ----------------------------------------------------------------------------------------------------------------
    # Conveniences
    # ----------------------------------------------------------------------------------------------------------------

    @property
    def training_run(self) -> runs.TrainingRun:
        """Return where the training run stands, or the last one stood. Raises RuntimeError before the first."""
        if self._run is None:
            raise RuntimeError("there has been no training run yet.")
        return self._run

    @property
    def has_training_run(self) -> bool:
        """Return whether there is, or was, a training run."""
        return self._run is not None

    @property
    def device(self) -> torch.device:
        """Return the device of this process."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def last_epoch(self) -> int | None:
        """Return the number of the last epoch of the run; None where only updates limit it."""
        return None if self._run is None else self._run.epoch_limit

    @property
    def has_samples(self) -> bool:
        """Return whether the batch in use is this process's own.

        False while a process for which nothing is left in the last round repeats a sample, which weighs nothing.
        """
        return self.data_pass is None or self.data_pass.loader.has_samples

    def get_model(self, keep_torch_compile: bool = False) -> nn.Module:
        """Return the model without the wrappers of Accelerate and, unless ``keep_torch_compile``, of torch.compile."""
        return unwrapped(self.accelerator, self.model, keep_torch_compile)

    def gather(self, tensor: Any, padding_value: float | None = None) -> Any:
        """Return the rows of ``tensor`` of all processes, joined in their order, on every process.

        Collective: every process must call it. Numbers of rows may differ. During a step, a process that repeats a
        sample because it has none left contributes nothing, so that each sample is there once.

        Args:
            tensor: shape ``(N, ...)``, or a nested tuple, list or dict of such; a scalar counts as one row.
            padding_value: what to fill up with where other dimensions than the first differ between processes.

        Raises:
            ValueError: if such dimensions differ and there is no ``padding_value``.
        """
        return distributed.gather(self.accelerator, tensor, padding_value, contributes=self.has_samples)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print, on the main process only; with a run directory into its ``log.txt``, too."""
        with bars_aside():
            self.accelerator.print(*args, **kwargs)
        if self.recorder is not None and self.accelerator.is_main_process and "file" not in kwargs:
            sep, end = (" " if kwargs.get("sep") is None else kwargs["sep"]), kwargs.get("end")
            self.recorder.write_line(sep.join(map(str, args)) + ("\n" if end is None else end))

    def prepare_model_and_optimizer(self) -> None:
        """Let Accelerate place and wrap model and optimizer, unless it has; every run does it by itself."""
        others = [value for value in vars(self).values() if isinstance(value, nn.Module) and value is not self.model]
        self.model, self.optimizer = self._engine.prepare(self.model, self.optimizer, others)

    @contextlib.contextmanager
    def audit_syncs(self) -> Iterator[SyncAudit]:
        """Find where code waits for the device inside the block, and print the places in the user's own.

        Run a few steps in it: ``with trainer.audit_syncs(): trainer.train(...)``. It yields a ``SyncAudit``, which says
        what counts, and has the places in the library and the optimizer, too.
        """
        with SyncAudit(self.device) as audit:
            yield audit
        self.print(audit)

    def skip_update(self) -> None:
        """Leave out the update about to be made; call it in ``on_optimizer_step_begin``, on every process alike."""
        self.update_is_skipped = True

    # ----------------------------------------------------------------------------------------------------------------
    # Private: one batch
    # ----------------------------------------------------------------------------------------------------------------

    def _event(self, event: str, **kwargs: Any) -> None:
        for listener in self.callback_handler.listeners[event]:  # as call_event does, several times in each step
            listener(self, **kwargs)

    def _account(self, batch: Any, output: BatchOutput | Tensor) -> BatchOutput:
        """Add a batch to the sums of its pass, note what its loss weighs, and return the completed output."""
        data_pass = self.data_pass
        assert data_pass is not None, "a pass is in progress"
        batch_output = data_pass.account(output)
        if data_pass.metrics is not None and data_pass.loader.has_samples:
            self.update_metrics(data_pass.metrics, batch, batch_output)
        return batch_output

    def _count_update(self) -> bool:
        """Count the update, made or skipped, and return whether the weights have changed."""
        is_skipped, self.update_is_skipped = self.update_is_skipped, False
        if not (self._engine.is_plain or is_skipped):
            is_skipped = self._engine.step_was_skipped()
        if is_skipped:
            self.run_history.counters.num_skipped_updates += 1
        else:
            self.run_history.counters.num_updates += 1
        return not is_skipped

    def _record(self, loss_name: str, prefix: str) -> dict[str, Any]:
        """Put the results of the pass into the history, and return them. Collective."""
        assert self.data_pass is not None, "a pass is in progress"
        results = self.data_pass.results(loss_name, prefix)
        for name, value in results.items():
            self.run_history.update_metric(name, value)
        return results

    # ----------------------------------------------------------------------------------------------------------------
    # Private: a run
    # ----------------------------------------------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Give the state back once more, just before the run goes on: hooks at its beginning may have changed it."""
        run = self.training_run
        if run.checkpoint is not None:
            run.checkpoint.restore(self, is_final=True)
            run.checkpoint = None

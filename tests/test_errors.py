"""A table of user mistakes, each with the message it gets; what happens to exceptions of user code."""

from __future__ import annotations

import os
import re
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pytorch_accelerated import StopTrainingError, Trainer, TrainerPlaceholderValues
from pytorch_accelerated.callbacks import EarlyStoppingCallback, LambdaCallback, TrainerCallback
from pytorch_accelerated.errors import BatchError, LaunchError, TrainerError, refuse_near_misses
from pytorch_accelerated.schedulers import CosineLrScheduler
from tests.support import PlainDataset, Stream, assert_equal_weights, make_data, make_mlp, run_processes, weights_of


def make_trainer(trainer_class: type[Trainer] = Trainer, **kwargs: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "model": make_mlp(),
        "loss_func": nn.CrossEntropyLoss(),
        "optimizer": partial(SGD, lr=0.1),
        "callbacks": None,
    }
    return trainer_class(**(defaults | kwargs))


def train(data: Any = None, num_epochs: Any = 1, trainer_kwargs: Any = None, **kwargs: Any) -> None:
    make_trainer(**(trainer_kwargs or {})).train(make_data(8) if data is None else data, num_epochs, **kwargs)


class NoData(Dataset[Any]):
    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("nothing may be fetched from an empty dataset")


def make_loss(loss_func: Callable[[Any, Any], Any]) -> dict[str, Any]:
    return {"trainer_kwargs": {"loss_func": loss_func}}


def other_optimizer() -> Any:
    return SGD(make_mlp(seed=1).parameters(), lr=0.1)


def scheduler_instance() -> Any:
    return torch.optim.lr_scheduler.StepLR(other_optimizer(), 1)


class Three(TensorDataset):
    """Triples, of which the default hooks cannot know what is what."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(8, 4), torch.ones(8, 2), torch.zeros(8, dtype=torch.int64))


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "empty dataset": (
        lambda: train(NoData()),
        ValueError,
        "the dataset (NoData) is empty: there is nothing to iterate over.",
    ),
    "empty evaluation set": (
        lambda: train(eval_dataset=NoData()),
        ValueError,
        "the dataset (NoData) is empty: there is nothing to iterate over.",
    ),
    "zero batches": (
        lambda: train(per_device_batch_size=16, train_dataloader_kwargs={"drop_last": True}),
        ValueError,
        "the dataset (TensorDataset) gives no batch: 8 samples, per_device_batch_size 16, 1 process(es), "
        "drop_last=True. Use a smaller batch size or drop_last=False.",
    ),
    "empty stream": (
        lambda: train(Stream([])),
        ValueError,
        "epoch 1 gave no batch: the training data yields nothing (any more).",
    ),
    "empty evaluation stream": (
        lambda: train(eval_dataset=Stream([])),
        ValueError,
        "the evaluation set gave no batch: it yields nothing (any more).",
    ),
    "no dataset": (
        lambda: train(7),
        TypeError,
        "expected a dataset (with __getitem__, or an IterableDataset) or a DataLoader, got int.",
    ),
    "no model": (lambda: Trainer(len), TypeError, "model must be a torch.nn.Module, got builtin_function_or_method."),
    "no optimizer": (
        lambda: train(trainer_kwargs={"optimizer": None}),
        ValueError,
        "training needs an optimizer: Trainer(model, loss_func, optimizer=...).",
    ),
    "optimizer of a wrong type": (
        lambda: make_trainer(optimizer="adam"),
        TypeError,
        "optimizer must be a torch Optimizer or a function that makes one, got str.",
    ),
    "optimizer over other parameters": (
        lambda: train(trainer_kwargs={"optimizer": other_optimizer()}),
        ValueError,
        "4 of the 4 parameters of the optimizer do not belong to the model (first shape (8, 4)), so training would "
        "not move the model. Was the model, or a layer of it, replaced or copied after the optimizer was made? Make "
        "the optimizer last, or pass a function: optimizer=partial(AdamW, lr=1e-3).",
    ),
    "scheduler instead of factory": (
        lambda: train(create_scheduler_fn=scheduler_instance()),
        TypeError,
        "create_scheduler_fn must be a function that takes the optimizer and returns a scheduler, got "
        "<torch.optim.lr_scheduler.StepLR object at *>. Pass for example partial(StepLR, ...) instead.",
    ),
    "scheduler that needs a metric": (
        lambda: train(create_scheduler_fn=torch.optim.lr_scheduler.ReduceLROnPlateau),
        TypeError,
        "ReduceLROnPlateau moves by a metric, not once per update: leave create_scheduler_fn out, and call its step "
        "in eval_epoch_end: self.plateau.step(self.run_history.get_latest_metric('eval_loss_epoch')).",
    ),
    "no epochs": (lambda: train(num_epochs=0), ValueError, "num_epochs must be a whole number of at least 1, got 0."),
    "negative epochs": (
        lambda: train(num_epochs=-2),
        ValueError,
        "num_epochs must be a whole number of at least 1, got -2.",
    ),
    "half an epoch": (
        lambda: train(num_epochs=0.5),
        ValueError,
        "num_epochs must be a whole number of at least 1, got 0.5.",
    ),
    "no updates": (
        lambda: train(max_num_train_steps=0),
        ValueError,
        "max_num_train_steps must be a whole number of at least 1, got 0.",
    ),
    "no accumulation": (
        lambda: train(gradient_accumulation_steps=0),
        ValueError,
        "gradient_accumulation_steps must be a whole number of at least 1, got 0.",
    ),
    "no batch size": (
        lambda: train(per_device_batch_size=0),
        ValueError,
        "per_device_batch_size must be a whole number of at least 1, got 0.",
    ),
    "no end": (
        lambda: train(Stream(make_data(8)), num_epochs=None),
        ValueError,
        "training would have no end: give num_epochs, max_num_train_steps (in updates), or both.",
    ),
    "schedule over data without length": (
        lambda: train(
            Stream(make_data(8)),
            create_scheduler_fn=partial(
                torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=TrainerPlaceholderValues.NUM_UPDATES
            ),
        ),
        ValueError,
        "TrainerPlaceholderValues needs run_config.num_updates, which this run does not have: that takes data with a "
        "length, or a limit of the run (num_epochs, max_num_train_steps), or an evaluation set. Write the number "
        "into the scheduler factory instead.",
    ),
    "unknown dataloader argument": (
        lambda: train(train_dataloader_kwargs={"num_worker": 2}),
        TypeError,
        "'num_worker' is no argument of torch.utils.data.DataLoader. Did you mean 'num_workers'? It takes: "
        "batch_size, *",
    ),
    "unknown evaluation dataloader argument": (
        lambda: train(eval_dataset=make_data(3), eval_dataloader_kwargs={"batchsize": 2}),
        TypeError,
        "'batchsize' is no argument of torch.utils.data.DataLoader. Did you mean 'batch_size'? It takes: batch_size, *",
    ),
    "arguments for a ready loader": (
        lambda: train(DataLoader(make_data(8)), train_dataloader_kwargs={"num_workers": 2}),
        ValueError,
        "got a DataLoader that makes batches already, so these have no effect: num_workers.",
    ),
    "loss not scalar": (
        lambda: train(**make_loss(nn.CrossEntropyLoss(reduction="none"))),
        BatchError,
        "calculate_train_batch_loss returned a loss of shape (8,); expected a scalar: reduce it, as with loss.mean().",
    ),
    "loss detached": (
        lambda: train(**make_loss(lambda outputs, targets: nn.functional.cross_entropy(outputs, targets).detach())),
        BatchError,
        "calculate_train_batch_loss returned a loss that depends on no trainable parameter: it was detached "
        "(.item(), .detach(), no_grad, numpy), or every parameter is frozen.",
    ),
    "loss a number": (
        lambda: train(**make_loss(lambda outputs, targets: nn.functional.cross_entropy(outputs, targets).item())),
        BatchError,
        "calculate_train_batch_loss returned dict "
        "{'loss': float, 'model_outputs': float32[8, 3] on cpu, 'batch_size': int}; expected a dict with a tensor "
        "under 'loss', or the loss tensor.",
    ),
    "loss on another device": (
        lambda: train(**make_loss(lambda outputs, targets: nn.functional.cross_entropy(outputs, targets).to("meta"))),
        BatchError,
        "calculate_train_batch_loss returned a loss on meta, but the run is on cpu.",
    ),
    "batch that cannot be unpacked": (
        lambda: train(Three()),
        BatchError,
        "the default hooks take a batch (inputs, targets), or a dict with 'labels', but got: list of 3 (float32[8, "
        "4] on cpu, float32[8, 2] on cpu, int64[8] on cpu). Override calculate_train_batch_loss and "
        "calculate_eval_batch_loss to say what goes where.",
    ),
    "no loss anywhere": (
        lambda: train(trainer_kwargs={"loss_func": None}, data=TensorDataset(torch.zeros(8, 4))),
        BatchError,
        "the trainer has no loss_func, and the model's output has no loss of its own: float32[8, 3] on cpu. Pass "
        "loss_func, return 'loss' from the model, or override calculate_train_batch_loss and "
        "calculate_eval_batch_loss.",
    ),
    "reversed clipping": (
        lambda: train(gradient_clip_norm=-1.0),
        ValueError,
        "gradient_clip_norm must be above 0, or None to leave the gradients as they are, got -1.0.",
    ),
    "clipping to nothing": (
        lambda: train(gradient_clip_value=0),
        ValueError,
        "gradient_clip_value must be above 0, or None to leave the gradients as they are, got 0.",
    ),
    "nothing to evaluate": (lambda: make_trainer().evaluate(None), ValueError, "evaluate needs a dataset, got None."),
    "no evaluation set in the dict": (
        lambda: train(eval_dataset={}),
        ValueError,
        "a dict of evaluation sets must hold at least one, each under a string as its name, got {}.",
    ),
    "evaluation set without a name": (
        lambda: make_trainer().evaluate({0: "set"}),
        ValueError,
        "a dict of evaluation sets must hold at least one, each under a string as its name, got {0: 'set'}.",
    ),
    "training inside training": (
        lambda: train(
            trainer_kwargs={"callbacks": [LambdaCallback(on_train_run_begin=lambda t, **_: t.train(make_data(4), 1))]}
        ),
        RuntimeError,
        "train() was called inside a training run of the same trainer; make another Trainer.",
    ),
    "loss function as a class": (
        lambda: make_trainer(loss_func=nn.MSELoss),
        TypeError,
        "loss_func must be a function, or an instance such as nn.MSELoss(), got <class "
        "'torch.nn.modules.loss.MSELoss'>.",
    ),
    "loss function as a name": (
        lambda: make_trainer(loss_func="mse"),
        TypeError,
        "loss_func must be a function, or an instance such as nn.MSELoss(), got 'mse'.",
    ),
    "seed as a text": (lambda: make_trainer(seed="x"), TypeError, "seed must be a whole number or None, got 'x'."),
    "one callback without a list": (
        lambda: make_trainer(callbacks=LambdaCallback()),
        TypeError,
        "callbacks must be a list of callbacks, got <pytorch_accelerated.callbacks.base.LambdaCallback object at *>.",
    ),
    "tensors instead of a dataset": (
        lambda: train(make_data(4).tensors),
        TypeError,
        "expected a dataset, got a tuple of 2 tensors or arrays: wrap them, as "
        "torch.utils.data.TensorDataset(*tensors).",
    ),
    "frozen model": (
        lambda: train(trainer_kwargs={"model": make_mlp().requires_grad_(False)}),
        ValueError,
        "none of the parameters of the optimizer is trainable: all have requires_grad=False. Unfreeze those that are "
        "to be trained.",
    ),
    "both lengths of a warm-up": (
        lambda: CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1, num_warmup_updates=2),
        ValueError,
        "got both num_warmup_updates and num_warmup_epochs; give one of them.",
    ),
    "named sets without a plain loss": (
        lambda: train(
            eval_dataset={"a": make_data(4), "b": make_data(4)}, trainer_kwargs={"callbacks": [EarlyStoppingCallback()]}
        ),
        ValueError,
        "EarlyStoppingCallback watches 'eval_loss_epoch', but with named sets there are: 'eval_a_loss_epoch', "
        "'eval_b_loss_epoch'.",
    ),
    "metrics of a wrong type": (
        lambda: make_trainer(metrics="accuracy"),
        TypeError,
        "metrics must be a torchmetrics Metric, a MetricCollection or a dict of metrics, got str.",
    ),
    "shuffled prediction": (
        lambda: make_trainer().predict(make_data(3), dataloader_kwargs={"shuffle": True}),
        ValueError,
        "predict returns outputs in the order of the dataset, so it cannot take shuffle=True.",
    ),
    "limit that is no number": (
        lambda: os.environ.update(PT_ACC_LIMIT_BATCHES="three") or make_trainer(),
        ValueError,
        "the environment variable PT_ACC_LIMIT_BATCHES must be a positive whole number, got 'three'.",
    ),
    "not a callback": (
        lambda: make_trainer(callbacks=[print]),
        TypeError,
        "a callback must be a TrainerCallback (an instance or a class), got <built-in function print>.",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_its_message(mistake: str) -> None:
    make_it, error_class, message = MISTAKES[mistake]
    with pytest.raises(error_class) as raised:
        make_it()
    assert type(raised.value) is error_class
    pattern = re.escape(message).replace(re.escape("*"), ".*")
    assert re.fullmatch(pattern, str(raised.value)), str(raised.value)


# The rest fail before the first batch; these need one to be seen.
NEED_A_BATCH = {"empty stream", "empty evaluation stream", "batch that cannot be unpacked", "no loss anywhere"} | {
    name for name in MISTAKES if name.startswith("loss ")
}


@pytest.mark.parametrize("mistake", sorted(set(MISTAKES) - NEED_A_BATCH))
def test_a_mistake_is_found_before_the_first_batch(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(Trainer, "calculate_train_batch_loss", lambda self, batch: steps.append(1))
    with pytest.raises(MISTAKES[mistake][1]):
        MISTAKES[mistake][0]()
    assert steps == []


def test_a_mistake_loses_nothing() -> None:
    """History, counters, weights and the run configuration of an earlier run survive a call that is refused."""
    trainer = make_trainer()
    trainer.train(make_data(8), 2, make_data(4))
    before, weights, config = trainer.run_history.state_dict(), weights_of(trainer), trainer.run_config
    for refused in (
        lambda: trainer.train(make_data(8), 0),
        lambda: trainer.train(NoData(), 1),
        lambda: trainer.train(make_data(8), 1, NoData()),
        lambda: trainer.train(make_data(8), 1, train_dataloader_kwargs={"nonsense": 1}),
        lambda: trainer.train(make_data(8), 1, create_scheduler_fn=scheduler_instance()),
        lambda: trainer.evaluate(NoData()),
        lambda: trainer.predict(NoData()),
    ):
        with pytest.raises((TypeError, ValueError)):
            refused()
    assert trainer.run_history.state_dict() == before
    assert_equal_weights(weights_of(trainer), weights)
    assert trainer.run_config is config
    trainer.train(make_data(8), 1, reset_run_history=False)
    assert trainer.current_epoch == 3


def test_a_dataset_smaller_than_one_batch_works() -> None:
    trainer = make_trainer()
    trainer.train(make_data(3), 2, per_device_batch_size=16)
    assert (trainer.num_samples, trainer.num_updates) == (6, 2)


def _train_on_three_samples() -> tuple[int, int]:
    trainer = make_trainer()
    trainer.train(PlainDataset(make_data(1)), 2, make_data(1), per_device_batch_size=16)
    return trainer.num_samples, trainer.num_updates


def test_a_dataset_smaller_than_the_number_of_processes_works() -> None:
    assert run_processes(_train_on_three_samples, 2) == [(2, 2)] * 2


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("calculate_train_batch_los", "calculate_train_batch_loss"),
        ("calculate_batch_loss_train", None),
        ("calculate_train_loss", "calculate_train_batch_loss"),
        ("calculate_batch_loss", "calculate_train_batch_loss"),
        ("zero_grad", "optimizer_zero_grad"),
        ("training_step", "calculate_train_batch_loss"),
        ("validation_step", "calculate_eval_batch_loss"),
        ("compute_loss", "calculate_train_batch_loss"),
        ("step", None),
        ("compute_train_batch_loss", "calculate_train_batch_loss"),
        ("train_epoch_begin", "train_epoch_start"),
        ("training_epoch_end", "train_epoch_end"),
        ("val_epoch_end", "eval_epoch_end"),
        ("create_train_dataloder", "create_train_dataloader"),
        ("create_train_loader", "create_train_dataloader"),
        ("clip_grads", "clip_gradients"),
        ("training_run_epoch_end", "eval_epoch_end"),
        ("_create_accelerator", "create_accelerator"),
        ("_clip_gradients", "clip_gradients"),
        ("my_helper", None),
        ("train_epoch_summary", None),
        ("_train_epoch_begin", None),
    ],
)
def test_a_hook_that_is_almost_spelt_right_is_refused(name: str, meant: str | None) -> None:
    trainer_class = type("Mine", (Trainer,), {name: lambda self: None})
    if meant is None:
        make_trainer(trainer_class)
        return
    with pytest.raises(
        ValueError, match=rf"Mine\.{name} is no hook and would never be called\. Did you mean '{meant}'\?"
    ):
        make_trainer(trainer_class)


def test_an_event_on_a_trainer_is_refused() -> None:
    trainer_class = type("Mine", (Trainer,), {"on_train_epoch_end": lambda self: None})
    with pytest.raises(
        ValueError, match=r"Mine\.on_train_epoch_end has the name of an event, which only callbacks hear"
    ):
        make_trainer(trainer_class)


@pytest.mark.parametrize("name", ["on_train_epoch_ends", "on_validation_end", "on_batch_end"])
def test_an_event_that_does_not_exist_is_refused(name: str) -> None:
    callback = type("Mine", (TrainerCallback,), {name: lambda self, trainer, **kwargs: None})
    with pytest.raises(
        ValueError, match=rf"Mine has a method '{name}', but there is no such event, so it would never be"
    ):
        make_trainer(callbacks=[callback])


def test_no_hook_or_event_of_our_own_is_taken_for_a_misspelling() -> None:
    refuse_near_misses(type("Mine", (Trainer,), dict.fromkeys(Trainer.HOOKS, len)), Trainer, Trainer.HOOKS, ())
    public = [name for name in dir(Trainer) if not name.startswith("_")]
    refuse_near_misses(type("Mine", (Trainer,), dict.fromkeys(public, len)), Trainer, Trainer.HOOKS, ())


def test_processes_that_do_not_know_of_each_other_are_refused() -> None:
    os.environ["WORLD_SIZE"] = "2"
    from accelerate import Accelerator

    lonely = Accelerator(cpu=True) if "RANK" in os.environ else None
    if lonely is None:
        # As `accelerate launch --multi_gpu --num_processes 2` does on a machine without GPUs.
        os.environ.pop("ACCELERATE_USE_CPU", None)
        lonely = Accelerator()
    assert lonely.num_processes == 1
    with pytest.raises(LaunchError) as raised:
        make_trainer(accelerator=lonely)
    assert "WORLD_SIZE=2 processes, but Accelerate counts 1" in str(raised.value)
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2" in str(raised.value)


# --------------------------------------------------------------------------------------------------------------------
# Exceptions of user code
# --------------------------------------------------------------------------------------------------------------------


class OwnError(Exception):
    def __init__(self, code: int) -> None:  # cannot be rebuilt from its message
        super().__init__(f"code {code}")
        self.code = code


def fail_at(step: int) -> Callable[..., None]:
    seen: list[int] = []

    def fail(*args: Any, **kwargs: Any) -> None:
        seen.append(1)
        if len(seen) > step:
            raise OwnError(step)

    return fail


def test_an_exception_keeps_type_and_traceback_and_gets_one_note() -> None:
    class Failing(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> Any:
            if self.num_steps == 5:
                raise OwnError(42)
            return super().calculate_train_batch_loss(batch)

    with pytest.raises(OwnError) as raised:
        make_trainer(Failing).train(make_data(16), 3, per_device_batch_size=4)
    assert raised.value.code == 42
    assert raised.value.__cause__ is None and raised.value.__context__ is None
    assert traceback.extract_tb(raised.tb)[-1].name == "calculate_train_batch_loss"
    assert raised.value.__notes__ == [
        "pytorch_accelerated: while training, process 0 of 1, epoch 2, 5 updates made, batch 2 of 4: list of 2 "
        "(float32[4, 4] on cpu, int64[4] on cpu)"
    ]


class FailingDataset(PlainDataset):
    def __getitem__(self, index: int) -> Any:
        if index == 5:
            raise OwnError(5)
        return super().__getitem__(index)


def test_an_exception_of_a_dataset_says_which_batch_it_was_fetching() -> None:
    with pytest.raises(OwnError) as raised:
        train(FailingDataset(make_data(8)), per_device_batch_size=2, train_dataloader_kwargs={"shuffle": False})
    assert raised.value.__notes__ == [
        "pytorch_accelerated: samples [4, 5] of the dataset",
        "pytorch_accelerated: while training, process 0 of 1, epoch 1, 2 updates made, fetching batch 3 of 4",
    ]


@pytest.mark.parametrize("what", ["train", "evaluate", "predict"])
def test_each_kind_of_run_notes_where_it_failed(what: str) -> None:
    class Failing(Trainer):
        def calculate_eval_batch_loss(self, batch: Any) -> Any:
            raise OwnError(1)

        def calculate_predictions(self, batch: Any) -> Any:
            raise OwnError(2)

    trainer = make_trainer(Failing)
    with pytest.raises(OwnError) as raised:
        if what == "train":
            trainer.train(make_data(8), 1, make_data(8))
        else:
            getattr(trainer, what)(make_data(8))
    [note] = raised.value.__notes__
    assert ("while predicting" if what == "predict" else "while evaluating") in note


class Ends(TrainerCallback):
    """Notes which of the events that tell of an end it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_exception(self, trainer: Trainer, exception: BaseException, **kwargs: Any) -> None:
        self.heard.append(f"exception {type(exception).__name__}")

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        self.heard.append("stop")

    def on_train_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.heard.append("train end")

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.heard.append("evaluation end")

    def on_prediction_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.heard.append("prediction end")


@pytest.mark.parametrize("error", [OwnError(1), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize(
    "event",
    [
        "on_train_run_begin",
        "on_train_step_end",
        "on_optimizer_step_begin",
        "on_train_update_end",
        "on_eval_step_end",
        "on_train_epoch_end",
    ],
)
def test_end_events_come_also_after_a_failure_and_the_trainer_can_be_used_again(error: Any, event: str) -> None:
    def fail(trainer: Trainer, **kwargs: Any) -> None:
        if not ends.heard and (event != "on_train_step_end" or trainer.num_steps == 1):  # with gradients of the first
            trainer.skip_update()  # which is then not made; nor may the first of the next run be skipped for it
            raise error

    ends = Ends()
    trainer = make_trainer(callbacks=[LambdaCallback(**{event: fail}), ends])
    steps = trainer.accelerator.gradient_accumulation_steps
    with pytest.raises(type(error)) as raised:
        trainer.train(make_data(12), 1, make_data(4), per_device_batch_size=4, gradient_accumulation_steps=2)
    assert raised.value is error
    assert ends.heard == [f"exception {type(error).__name__}", "train end"]
    assert trainer.accelerator.gradient_accumulation_steps == steps
    assert trainer.accelerator.sync_gradients
    assert trainer.model.training  # also where the failure was inside an evaluation

    # A run after the failure is the run that a new trainer would make.
    fresh = make_trainer(callbacks=None)
    fresh.model.load_state_dict(weights_of(trainer))
    for one in (trainer, fresh):
        one.seed = 3
        one.train(make_data(12), 1, make_data(4), per_device_batch_size=4, gradient_accumulation_steps=2)
    assert_equal_weights(weights_of(trainer), weights_of(fresh))


@pytest.mark.parametrize("what", ["evaluate", "predict"])
def test_end_events_of_other_runs_come_also_after_a_failure(what: str) -> None:
    ends = Ends()
    event = "on_eval_step_end" if what == "evaluate" else "on_predict_step_end"
    trainer = make_trainer(callbacks=[LambdaCallback(**{event: fail_at(0)}), ends])
    with pytest.raises(OwnError):
        getattr(trainer, what)(make_data(4))
    assert ends.heard == ["exception OwnError", "evaluation end" if what == "evaluate" else "prediction end"]


def test_failures_of_callbacks_at_the_end_hide_nothing() -> None:
    ends = Ends()
    first = LambdaCallback(on_exception=fail_at(0), on_train_run_end=fail_at(0))
    trainer = make_trainer(callbacks=[first, LambdaCallback(on_train_step_end=fail_at(1)), ends])
    with pytest.raises(OwnError) as raised:
        trainer.train(make_data(8), 1, per_device_batch_size=2)
    assert raised.value.code == 1
    assert ends.heard == ["exception OwnError", "train end"]
    assert [note for note in raised.value.__notes__ if "failed as well" in note] == [
        f"pytorch_accelerated: fail_at.<locals>.fail failed as well, at {event}: OwnError: code 0"
        for event in ("on_exception", "on_train_run_end")
    ]


HOOKS_OF_TRAINING = [
    name
    for name in Trainer.HOOKS
    if not name.startswith("create_") and "predict" not in name and "_run_" not in name.replace("training_run", "")
] + ["training_run_start"]


@pytest.mark.parametrize(
    "hook", sorted(set(HOOKS_OF_TRAINING) - {"evaluation_run_start", "evaluation_run_end", "training_run_end"})
)
def test_stop_training_error_ends_the_run_in_good_order_from_any_hook(hook: str) -> None:
    from torchmetrics import MeanMetric

    class Stopping(Trainer):
        def update_metrics(self, metrics: Any, batch: Any, batch_output: Any) -> None:
            metrics.update(1.0)

    def stop(self: Trainer, *args: Any) -> Any:
        raise StopTrainingError("enough")

    ends, finished = Ends(), []
    members = {hook: stop, "training_run_end": lambda self: finished.append(1)}
    trainer = make_trainer(type("Mine", (Stopping,), members), callbacks=[ends], metrics=MeanMetric())
    trainer.train(make_data(8), 3, make_data(4))
    assert ends.heard == ["stop", "train end"]
    assert finished == [1]
    assert trainer.current_epoch <= 1


# --------------------------------------------------------------------------------------------------------------------
# Two processes
# --------------------------------------------------------------------------------------------------------------------


def _fail_on_one(where: str, rank: int) -> tuple[str, str, float]:
    class Failing(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> Any:
            self._fail_if("train")
            return super().calculate_train_batch_loss(batch)

        def calculate_eval_batch_loss(self, batch: Any) -> Any:
            self._fail_if("eval")
            return super().calculate_eval_batch_loss(batch)

        def _fail_if(self, place: str) -> None:
            if (
                place == where
                and self.accelerator.process_index == rank
                and self.num_updates == (2 if place == "train" else 4)
            ):
                raise OwnError(rank)

    trainer = make_trainer(Failing)
    start = time.monotonic()
    try:
        trainer.train(make_data(32), 2, make_data(8), per_device_batch_size=4)
    except Exception as error:
        text = "\n".join([str(error), *(note for note in getattr(error, "__notes__", ()) if "broke" in note)])
        return type(error).__name__, text, time.monotonic() - start
    raise AssertionError("no process failed")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["train", "eval"])
def test_on_two_processes_the_error_of_the_one_that_failed_is_seen_by_both(where: str, rank: int) -> None:
    results = run_processes(_fail_on_one, 2, where, rank)
    name, message, _ = results[rank]
    assert (name, message) == ("OwnError", f"code {rank}")
    name, message, seconds = results[1 - rank]
    assert seconds < 30
    if name == "RuntimeError" and rank == 0:
        # Under this launcher process 0 keeps the store that the message is left in, and may be gone with it.
        assert "the connection to another process broke" in message
        return
    assert name == "ProcessFailedError"
    assert message.startswith(f"process {rank} of 2 failed, so process {1 - rank} cannot go on.")
    assert message.endswith(f"OwnError: code {rank}")


def test_all_errors_of_the_library_have_one_ancestor() -> None:
    import pytorch_accelerated.errors as errors

    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) == 10
    assert all(issubclass(error, TrainerError) for error in classes)


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    trainer = make_trainer()
    trainer.train(make_data(8), np.int64(2), per_device_batch_size=np.int32(4))  # type: ignore[arg-type]
    assert trainer.num_updates == 4


@pytest.mark.parametrize("hook", ["training_run_start", "train_epoch_start", "train_epoch_end", "eval_epoch_end"])
def test_errors_outside_of_the_steps_are_located_too(hook: str) -> None:
    def fail(self: Trainer) -> None:
        raise OwnError(1)

    where = {"training_run_start": "", "train_epoch_start": ", at the beginning of the pass"}
    with pytest.raises(OwnError) as raised:
        make_trainer(type("Mine", (Trainer,), {hook: fail})).train(make_data(8), 1, make_data(8))
    [note] = raised.value.__notes__
    assert note.endswith(f"updates made{where.get(hook, ', at the end of the pass')}")


def test_an_error_in_an_evaluation_inside_an_epoch_has_one_note() -> None:
    class Failing(Trainer):
        def calculate_eval_batch_loss(self, batch: Any) -> Any:
            raise OwnError(1)

    trainer = make_trainer(Failing, callbacks=[LambdaCallback(on_train_update_end=lambda t, **_: t.run_evaluation())])
    with pytest.raises(OwnError) as raised:
        trainer.train(make_data(8), 1, make_data(8))
    [note] = raised.value.__notes__
    assert note.startswith("pytorch_accelerated: while evaluating, ")


def _fail_before_the_first_batch(rank: int) -> list[str]:
    class Failing(Trainer):
        def create_train_dataloader(self, batch_size: int, train_dl_kwargs: Any = None) -> Any:
            if self.accelerator.process_index == rank and is_bad:
                raise OwnError(rank)
            return super().create_train_dataloader(batch_size, train_dl_kwargs)

    is_bad, texts = True, []
    trainer = make_trainer(Failing)
    try:
        trainer.train(make_data(8), 1)
    except Exception as error:
        texts.append(f"{type(error).__name__}: {error}")
    return texts


def test_a_failure_while_setting_up_is_told_to_the_other_process() -> None:
    results = run_processes(_fail_before_the_first_batch, 2, 1)
    assert results[1] == ["OwnError: code 1"]
    assert results[0][0].startswith("ProcessFailedError: process 1 of 2 failed") and "OwnError: code 1" in results[0][0]


def _fail_twice() -> list[str]:
    from pytorch_accelerated.distributed import failing_together, peer_failure

    trainer = make_trainer()
    texts = []
    # Both fail, both catch it and go on; then the connection breaks for a reason that nobody could leave word of.
    for error in (ValueError("the first failure"), RuntimeError("Connection closed by peer")):
        try:
            with failing_together(trainer.accelerator):
                raise error
        except Exception as caught:
            notes = getattr(caught, "__notes__", [])
            texts.append(f"{type(caught).__name__}: {caught}; {len(notes)} note")
    assert peer_failure(trainer.accelerator, ValueError()) is None
    return texts


def test_a_failure_that_was_dealt_with_is_not_taken_for_the_next_one() -> None:
    expected = ["ValueError: the first failure; 0 note", "RuntimeError: Connection closed by peer; 1 note"]
    assert run_processes(_fail_twice, 2) == [expected] * 2


def test_a_helper_may_have_the_name_of_another_librarys_hook() -> None:
    class Mine(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> Any:
            return self.compute_loss(batch)

        def compute_loss(self, batch: Any) -> Any:
            return self.model(batch[0]).square().mean()

    make_trainer(Mine).train(make_data(4), 1)


def test_parameters_that_nobody_moves_are_warned_about() -> None:
    model = make_mlp()
    with pytest.warns(UserWarning, match=r"2 trainable parameters of the model are in no group .* \(first: 0.weight\)"):
        make_trainer(model=model, optimizer=SGD(model[-1].parameters(), lr=0.1)).train(make_data(4), 1)


def test_a_rate_of_zero_that_an_earlier_schedule_left_behind_is_warned_about() -> None:
    trainer = make_trainer()
    schedule = CosineLrScheduler.create_scheduler_fn()
    trainer.train(make_data(16), 1, create_scheduler_fn=schedule)
    with pytest.warns(UserWarning, match="all learning rates are 0, so the weights will not move"):
        trainer.train(make_data(16), 1)
    before = weights_of(trainer)
    trainer.train(make_data(16), 1, create_scheduler_fn=schedule)
    assert any(not torch.equal(value, before[name]) for name, value in weights_of(trainer).items())

"""Schedulers in the manner of timm are told the right counts at the right moments."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pytorch_accelerated import TrainerPlaceholderValues
from pytorch_accelerated.callbacks import LambdaCallback, StepBasedEvaluationCallback, TrainerCallback
from pytorch_accelerated.integrations.timm import TrainerWithTimmScheduler
from tests.support import make_data, make_mlp

Calls = list[tuple[str, Any, Any]]


class TimmLikeScheduler:
    """Has the two methods of timm's schedulers, notes their calls, and makes the rate 1 / (t + 1)."""

    def __init__(self, optimizer: Optimizer, calls: Calls, t_in_epochs: bool = True, t_initial: int = 0) -> None:
        self.optimizer = optimizer
        self.calls = calls
        self.t_in_epochs = t_in_epochs
        self.t_initial = t_initial
        self.set_lr(0)

    def step(self, epoch: int, metric: Any = None) -> None:
        self.calls.append(("epoch", epoch, metric))
        if self.t_in_epochs:
            self.set_lr(epoch)

    def step_update(self, num_updates: int, metric: Any = None) -> None:
        self.calls.append(("update", num_updates, metric))
        if not self.t_in_epochs:
            self.set_lr(num_updates)

    def set_lr(self, t: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 1 / (t + 1)


def noting_in(calls: Calls, t_in_epochs: bool = True) -> Callable[[Optimizer], TimmLikeScheduler]:
    return lambda optimizer: TimmLikeScheduler(optimizer, calls, t_in_epochs)


def make_trainer(calls: Calls, *callbacks: TrainerCallback) -> TrainerWithTimmScheduler:
    """Return a trainer that notes updates and evaluations among the calls of the scheduler."""

    def note_update(trainer: Any, **kwargs: Any) -> None:
        calls.append(("rate", trainer.num_updates + 1, trainer.optimizer.param_groups[0]["lr"]))

    def note_evaluation(trainer: Any, **kwargs: Any) -> None:
        calls.append(("eval", None, trainer.run_history.get_latest_metric("eval_loss_epoch")))

    noting = LambdaCallback(on_optimizer_step_begin=note_update, on_eval_epoch_end=note_evaluation)
    model = make_mlp()
    return TrainerWithTimmScheduler(
        model, nn.CrossEntropyLoss(), SGD(model.parameters(), lr=0.1), callbacks=[noting, *callbacks]
    )


def without_rates(calls: Calls) -> Calls:
    return [call for call in calls if call[0] != "rate"]


def test_timm_is_not_imported() -> None:
    assert "pytorch_accelerated.integrations.timm" in sys.modules
    assert "timm" not in sys.modules


@pytest.mark.parametrize(
    ("t_in_epochs", "rates"), [(True, [1, 1, 1, 1 / 2, 1 / 2, 1 / 2]), (False, [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6])]
)
def test_is_told_updates_and_epochs_done(t_in_epochs: bool, rates: list[float]) -> None:
    """Without an evaluation set; the rates are those that a scheduler in either unit has for each update."""
    calls: Calls = []
    trainer = make_trainer(calls)
    trainer.train(make_data(12), 2, per_device_batch_size=4, create_scheduler_fn=noting_in(calls, t_in_epochs))
    assert calls == [
        ("rate", 1, rates[0]),
        ("update", 1, None),
        ("rate", 2, rates[1]),
        ("update", 2, None),
        ("rate", 3, rates[2]),
        ("update", 3, None),
        ("epoch", 1, None),
        ("rate", 4, rates[3]),
        ("update", 4, None),
        ("rate", 5, rates[4]),
        ("update", 5, None),
        ("rate", 6, rates[5]),
        ("update", 6, None),
        ("epoch", 2, None),
    ]


def test_counts_updates_and_not_micro_batches() -> None:
    calls: Calls = []
    make_trainer(calls).train(
        make_data(10), 2, per_device_batch_size=2, gradient_accumulation_steps=3, create_scheduler_fn=noting_in(calls)
    )
    assert [call[:2] for call in without_rates(calls)] == [
        ("update", 1),
        ("update", 2),
        ("epoch", 1),
        ("update", 3),
        ("update", 4),
        ("epoch", 2),
    ]


def test_an_epoch_cut_short_is_an_epoch_done() -> None:
    calls: Calls = []
    make_trainer(calls).train(
        make_data(12), 5, per_device_batch_size=4, max_num_train_steps=4, create_scheduler_fn=noting_in(calls)
    )
    assert [call[:2] for call in without_rates(calls)] == [
        ("update", 1),
        ("update", 2),
        ("update", 3),
        ("epoch", 1),
        ("update", 4),
        ("epoch", 2),
    ]


def test_evaluation_inside_an_epoch_only_brings_a_newer_metric() -> None:
    calls: Calls = []
    trainer = make_trainer(calls, StepBasedEvaluationCallback(2))
    data = make_data(12)
    history = trainer.train(data, 2, data, per_device_batch_size=4, create_scheduler_fn=noting_in(calls))
    first, second, third, fourth = history.get_metric_values("eval_loss_epoch")
    assert len({first, second, third, fourth}) == 4  # after updates 2, 3, 4 and 6
    assert without_rates(calls) == [
        ("update", 1, None),
        ("update", 2, None),
        ("eval", None, first),
        ("update", 3, first),
        ("eval", None, second),
        ("epoch", 1, second),
        ("update", 4, second),
        ("eval", None, third),
        ("update", 5, third),
        ("update", 6, third),
        ("eval", None, fourth),
        ("epoch", 2, fourth),
    ]


def test_a_later_run_counts_from_its_own_start() -> None:
    calls: Calls = []
    trainer = make_trainer(calls)
    data = make_data(8)
    trainer.train(data, 2, data, per_device_batch_size=4, create_scheduler_fn=noting_in(calls))
    newest = trainer.run_history.get_latest_metric("eval_loss_epoch")
    calls.clear()
    trainer.train(data, 1, per_device_batch_size=4, create_scheduler_fn=noting_in(calls), reset_run_history=False)
    assert without_rates(calls) == [("update", 1, newest), ("update", 2, newest), ("epoch", 1, newest)]
    assert (trainer.num_updates, trainer.current_epoch) == (6, 3)
    calls.clear()
    trainer.train(
        data, 1, per_device_batch_size=4, create_scheduler_fn=noting_in(calls)
    )  # this one forgets the history
    assert without_rates(calls) == [("update", 1, None), ("update", 2, None), ("epoch", 1, None)]


def test_does_without_a_scheduler() -> None:
    calls: Calls = []
    trainer = make_trainer(calls)
    trainer.train(make_data(8), 1, per_device_batch_size=4)
    assert calls == [("rate", 1, 0.1), ("rate", 2, 0.1)]


def test_placeholders_are_filled_in() -> None:
    calls: Calls = []
    trainer = make_trainer(calls)
    factory = partial(TimmLikeScheduler, calls=calls, t_initial=TrainerPlaceholderValues.NUM_EPOCHS)
    trainer.train(make_data(8), 3, per_device_batch_size=4, create_scheduler_fn=factory)
    assert trainer.scheduler.t_initial == 3


class PlateauLikeScheduler:
    """Steps torch's plateau scheduler once per epoch, as timm's PlateauLRScheduler does."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.base = ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=1e9, threshold_mode="abs")

    def step(self, epoch: int, metric: Any = None) -> None:
        self.base.step(metric)

    def step_update(self, num_updates: int, metric: Any = None) -> None:
        """Do nothing."""


def test_a_scheduler_that_moves_by_a_metric_gets_that_of_its_epoch() -> None:
    calls: Calls = []
    trainer = make_trainer(calls)
    data = make_data(8)
    trainer.train(data, 3, data, per_device_batch_size=8, create_scheduler_fn=partial(PlateauLikeScheduler))
    assert [rate for kind, _, rate in calls if kind == "rate"] == [0.1, 0.1, 0.05]

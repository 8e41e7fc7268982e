"""Shorter epochs and evaluations; evaluation in the middle of an epoch; modules on the device."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    LambdaCallback,
    LimitBatches,
    LimitBatchesCallback,
    LimitEvalStepsCallback,
    MoveModulesToDeviceCallback,
    StepBasedEvaluationCallback,
    TrainerCallback,
)
from tests.support import PlainDataset, Stream, assert_equal_weights, make_data, make_mlp, run_processes, weights_of


def make_trainer(*callbacks: Any, **kwargs: Any) -> Trainer:
    return Trainer(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), callbacks, **kwargs)


def count_steps() -> tuple[list[str], LambdaCallback]:
    steps: list[str] = []
    return steps, LambdaCallback(
        on_train_step_end=lambda trainer, **_: steps.append("train"),
        on_eval_step_end=lambda trainer, **_: steps.append("eval"),
    )


# A schedule that ends at zero exactly where the run ends.
SCHEDULE = partial(
    torch.optim.lr_scheduler.LinearLR,
    start_factor=1.0,
    end_factor=0.0,
    total_iters=TrainerPlaceholderValues.NUM_UPDATES,
)


@pytest.mark.parametrize("wrap", [lambda data: data, PlainDataset, Stream])
def test_epochs_are_limited_and_everything_knows(wrap: Any) -> None:
    steps, counter = count_steps()
    trainer = make_trainer(counter, LimitBatchesCallback(3))
    kwargs = {} if wrap is Stream else {"create_scheduler_fn": SCHEDULE}
    trainer.train(wrap(make_data(40)), 2, wrap(make_data(40)), per_device_batch_size=4, **kwargs)
    assert steps == (["train"] * 3 + ["eval"] * 3) * 2
    assert trainer.num_samples == 24
    if wrap is not Stream:
        assert trainer.run_config.train_dataloader_len == 3
        assert trainer.run_config.num_updates == 6
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_a_limit_above_the_length_changes_nothing() -> None:
    trainer = make_trainer(LimitBatchesCallback(100))
    trainer.train(make_data(8), 1, per_device_batch_size=4)
    assert (trainer.num_steps, trainer.run_config.train_dataloader_len) == (2, 2)


def test_the_limited_epoch_is_the_beginning_of_the_whole_one() -> None:
    batches: dict[str, list[Any]] = {"whole": [], "limited": []}
    for name, limit in (("whole", ()), ("limited", (LimitBatchesCallback(2),))):
        note = LambdaCallback(on_train_step_end=lambda trainer, batch, name=name, **_: batches[name].append(batch[1]))
        make_trainer(note, *limit, seed=1).train(make_data(40), 1, per_device_batch_size=4)
    assert len(batches["limited"]) == 2
    assert all(torch.equal(one, other) for one, other in zip(batches["limited"], batches["whole"], strict=False))


def test_the_accumulation_window_ends_with_the_limited_epoch() -> None:
    trainer = make_trainer(LimitBatchesCallback(3))
    trainer.train(make_data(40), 2, per_device_batch_size=4, gradient_accumulation_steps=2)
    assert trainer.num_updates == trainer.run_config.num_updates == 4


def test_the_environment_limits_every_trainer() -> None:
    os.environ["PT_ACC_LIMIT_BATCHES"] = "2"
    trainer = make_trainer()
    trainer.train(make_data(40), 1)
    assert trainer.num_steps == 2
    del os.environ["PT_ACC_LIMIT_BATCHES"]
    with LimitBatches(3):
        inside = make_trainer()
        with LimitBatches(1):
            assert os.environ["PT_ACC_LIMIT_BATCHES"] == "1"
    assert "PT_ACC_LIMIT_BATCHES" not in os.environ
    inside.train(make_data(40), 1)
    outside = make_trainer()
    outside.train(make_data(40), 1)
    assert (inside.num_steps, outside.num_steps) == (3, 5)


@pytest.mark.parametrize(
    "make_it", [LimitBatchesCallback, LimitBatches, LimitEvalStepsCallback, StepBasedEvaluationCallback]
)
def test_limits_below_one_are_refused(make_it: Any) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        make_it(0)


# --------------------------------------------------------------------------------------------------------------------
# Evaluation in the middle of an epoch
# --------------------------------------------------------------------------------------------------------------------


def test_evaluation_every_few_updates_counted_over_the_whole_run() -> None:
    _, counter = count_steps()
    at: list[int] = []
    note = LambdaCallback(
        on_eval_epoch_end=lambda trainer, is_intermediate, **_: at.append(
            trainer.num_updates if is_intermediate else -trainer.num_updates
        )
    )
    trainer = make_trainer(counter, note, StepBasedEvaluationCallback(2))
    trainer.train(make_data(24), 2, make_data(8), per_device_batch_size=4, gradient_accumulation_steps=2)
    assert at == [2, -3, 4, -6]  # where an epoch ends, its evaluation is enough
    counters = trainer.run_history.get_metric_counters("eval_loss_epoch")
    assert [moment["num_updates"] for moment in counters] == [2, 3, 4, 6]


def test_evaluation_sees_the_weights_after_the_update_and_changes_nothing() -> None:
    """Modes, random streams, data and gradients: the training is that without the evaluations, to the bit."""

    def run(*callbacks: Any) -> tuple[dict[str, Any], list[Any], Trainer]:
        modes: list[Any] = []
        note = LambdaCallback(
            on_train_step_begin=lambda trainer, **_: modes.append([m.training for m in trainer.model.modules()])
        )
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for layer in model:
                if hasattr(layer, "reset_parameters"):
                    layer.reset_parameters()
        model[1].eval()  # a frozen batch norm stays frozen
        trainer = Trainer(model, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), [note, *callbacks], seed=3)
        arguments: dict[str, Any] = {"per_device_batch_size": 4, "gradient_accumulation_steps": 2}
        trainer.train(PlainDataset(make_data(24)), 2, make_data(8), **arguments)
        return weights_of(trainer), modes, trainer

    plain, plain_modes, _ = run()
    stepped, modes, trainer = run(StepBasedEvaluationCallback(1))
    assert_equal_weights(stepped, plain)
    assert modes == plain_modes == [[True, True, False, True, True]] * 12
    values = trainer.run_history.get_metric_values("eval_loss_epoch")
    assert len(values) == len(set(values)) == 6


def test_evaluation_every_few_updates_needs_data() -> None:
    with pytest.raises(ValueError, match=r"StepBasedEvaluationCallback needs train\(eval_dataset=...\)"):
        make_trainer(StepBasedEvaluationCallback(1)).train(make_data(8), 1)


@pytest.mark.parametrize("intermediate_only", [True, False])
def test_evaluation_steps_are_limited(intermediate_only: bool) -> None:
    lengths: list[int] = []
    count: list[int] = []
    note = LambdaCallback(
        on_eval_epoch_begin=lambda trainer, **_: count.clear(),
        on_eval_step_end=lambda trainer, **_: count.append(1),
        on_eval_epoch_end=lambda trainer, **_: lengths.append(len(count)),
    )
    callbacks = LimitEvalStepsCallback(2, intermediate_only), StepBasedEvaluationCallback(2), note
    trainer = make_trainer(*callbacks)
    trainer.train(make_data(16), 1, make_data(32), per_device_batch_size=4)
    assert lengths == [2, 8 if intermediate_only else 2]
    trainer.evaluate(make_data(32), per_device_batch_size=4)
    assert lengths[-1] == 8


def _evaluate_in_the_middle() -> tuple[list[float], Any]:
    trainer = make_trainer(StepBasedEvaluationCallback(2), seed=1)
    trainer.train(make_data(32), 2, make_data(7), per_device_batch_size=4)
    return trainer.run_history.get_metric_values("eval_loss_epoch"), weights_of(trainer)


def test_evaluation_in_the_middle_on_two_processes() -> None:
    first, second = run_processes(_evaluate_in_the_middle, 2)
    assert first[0] == second[0] and len(first[0]) == 4
    assert_equal_weights(first[1], second[1])


# --------------------------------------------------------------------------------------------------------------------
# Placement
# --------------------------------------------------------------------------------------------------------------------


def test_modules_of_trainer_and_callbacks_are_moved() -> None:
    """There is one device here; where `to` was called, and that results are used, is what can be seen."""
    moved: list[str] = []

    class Noting(nn.CrossEntropyLoss):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.noted = name

        def to(self, *args: Any, **kwargs: Any) -> Any:
            moved.append(f"{self.noted} {args[0]}")
            return super().to(*args, **kwargs)

    class Holder(TrainerCallback):
        def __init__(self) -> None:
            self.teacher = Noting("teacher")

    trainer = Trainer(
        make_mlp(), Noting("loss"), partial(torch.optim.SGD, lr=0.1), [MoveModulesToDeviceCallback, Holder()]
    )
    for run in (lambda: trainer.train(make_data(4), 1), lambda: trainer.evaluate(make_data(4))):
        moved.clear()
        run()
        assert moved == ["loss cpu", "teacher cpu"]


def test_of_several_limits_the_smallest_wins() -> None:
    with LimitBatches(2):
        trainer = make_trainer(LimitBatchesCallback(4), LimitBatchesCallback(3))
    trainer.train(make_data(80), 1, make_data(80))
    assert trainer.num_steps == 2


def test_a_limit_that_came_too_late_is_refused() -> None:
    trainer = make_trainer()
    trainer.callback_handler.add_callback(LimitBatchesCallback(2))
    with pytest.raises(
        ValueError, match=r"LimitBatchesCallback\(2\) is not in force, the limit is None: pass it to Trai"
    ):
        trainer.train(make_data(8), 1)


def test_limits_of_training_and_of_evaluation_runs_do_not_disturb_each_other() -> None:
    steps, counter = count_steps()
    trainer = make_trainer(LimitBatchesCallback(3), LimitEvalStepsCallback(1), counter)
    for _ in range(2):
        steps.clear()
        trainer.evaluate(make_data(80))
        assert steps == ["eval"] * 3
        trainer.train(make_data(8), 1, make_data(80))


def test_early_stopping_and_evaluation_within_epochs_go_together() -> None:
    """The evaluation at the end of an epoch is not taken for a second one without progress."""
    stopper = EarlyStoppingCallback(early_stopping_patience=1)
    trainer = make_trainer(StepBasedEvaluationCallback(4), stopper)
    trainer.train(make_data(64), 4, make_data(64))
    values = trainer.run_history.get_metric_values("eval_loss_epoch")
    assert values == sorted(values, reverse=True)  # it went on getting better
    assert trainer.current_epoch == 4

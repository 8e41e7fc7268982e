"""Numbers that are not numbers never reach the weights; training ends when a metric stops getting better."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import EarlyStoppingCallback, LambdaCallback, TerminateOnNaNCallback, TrainerCallback
from pytorch_accelerated.errors import NonFiniteError
from tests.support import assert_equal_weights, make_data, make_mlp, run_processes, weights_of

BAD_BATCH = 3


def poisoned(num_samples: int = 24, bad: tuple[int, ...] = (BAD_BATCH,), value: float = math.nan) -> TensorDataset:
    """Return a set whose batches of four with a number in ``bad`` hold one bad number each."""
    x, y = (tensor.clone() for tensor in make_data(num_samples).tensors)
    for batch in bad:
        x[batch * 4 + 1, 2] = value
    return TensorDataset(x, y)


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.1),
    "fused adamw": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "fused sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
}


def train(callback: Any, data: Any, optimizer: str = "adamw", **kwargs: Any) -> tuple[Trainer, list[dict[str, Tensor]]]:
    """Return the trainer and the weights before each update and after the last."""
    weights: list[dict[str, Tensor]] = []
    watch = LambdaCallback(
        on_train_step_begin=lambda trainer, **_: weights.append(weights_of(trainer)),
        on_train_run_end=lambda trainer, **_: weights.append(weights_of(trainer)),
    )
    trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), OPTIMIZERS[optimizer], [callback, watch])
    trainer.weights = weights  # type: ignore[attr-defined]  # for tests in which train raises
    arguments: dict[str, Any] = {"per_device_batch_size": 4, "train_dataloader_kwargs": {"shuffle": False}}
    trainer.train(data, 1, **(arguments | kwargs))
    return trainer, weights


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_raise_names_the_moment_and_leaves_the_weights_finite(optimizer: str, value: float) -> None:
    seen: list[dict[str, Tensor]] = []
    callback = TerminateOnNaNCallback()
    watch = LambdaCallback(on_optimizer_step_begin=lambda trainer, **_: seen.append(weights_of(trainer)))
    trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), OPTIMIZERS[optimizer], [watch, callback])
    # An infinite input leaves tanh and the loss finite; its gradient is NaN.
    what = "loss nan on process 0" if math.isnan(value) else r"loss [\d.]+, but a gradient is not finite \(0.weight\)"
    with pytest.raises(NonFiniteError, match=rf"{what}; epoch 1, step 4, update 4, lr 0.1, 1 process"):
        trainer.train(poisoned(value=value), 1, per_device_batch_size=4, train_dataloader_kwargs={"shuffle": False})
    assert len(seen) == 4
    assert_equal_weights(weights_of(trainer), seen[-1])
    assert trainer.num_updates == 3


def test_stop_ends_the_run_in_good_order(capsys: pytest.CaptureFixture[str]) -> None:
    trainer, weights = train(TerminateOnNaNCallback("stop"), poisoned())
    assert trainer.num_updates == 3
    assert all(torch.isfinite(value).all() for value in weights[-1].values())
    assert "loss nan on process 0; epoch 1, step 4, update 4, lr 0.1" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_skip_equals_a_run_without_the_batch(optimizer: str) -> None:
    trainer, weights = train(TerminateOnNaNCallback("skip"), poisoned(bad=(1, 3)), optimizer)
    x, y = make_data(24).tensors
    kept = [number for number in range(24) if number // 4 not in (1, 3)]
    reference, expected = train(TerminateOnNaNCallback(), TensorDataset(x[kept], y[kept]), optimizer)
    assert (trainer.num_updates, trainer.num_skipped_updates, trainer.num_steps) == (4, 2, 6)
    assert reference.num_updates == 4
    assert_equal_weights(weights[-1], expected[-1])


def test_skip_does_not_advance_the_schedule() -> None:
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    trainer, _ = train(TerminateOnNaNCallback("skip"), poisoned(), create_scheduler_fn=schedule)
    assert trainer.num_updates == 5
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**5)


def test_a_bad_micro_batch_spoils_its_whole_window_and_no_other() -> None:
    trainer, weights = train(TerminateOnNaNCallback("skip"), poisoned(), gradient_accumulation_steps=2)
    assert (trainer.num_updates, trainer.num_skipped_updates) == (2, 1)
    x, y = make_data(24).tensors
    kept = [number for number in range(24) if number // 8 != BAD_BATCH // 2]
    _, expected = train(TerminateOnNaNCallback(), TensorDataset(x[kept], y[kept]), gradient_accumulation_steps=2)
    assert_equal_weights(weights[-1], expected[-1])


class Explode(torch.autograd.Function):
    """Identity with a gradient that is not finite for batches marked by a large first element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, is_bad: bool) -> Tensor:
        ctx.is_bad = is_bad
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * (math.inf if ctx.is_bad else 1.0), None


class FiniteLossBadGradient(Trainer):
    def calculate_train_batch_loss(self, batch: Any) -> Any:
        outputs = Explode.apply(self.model(batch[0]), self.num_steps == BAD_BATCH)
        return {"loss": nn.functional.cross_entropy(outputs, batch[1])}


def test_a_bad_gradient_of_a_finite_loss_is_found_and_named() -> None:
    trainer = FiniteLossBadGradient(make_mlp(), None, OPTIMIZERS["adamw"], [TerminateOnNaNCallback])
    with pytest.raises(
        NonFiniteError, match=r"loss [\d.]+, but a gradient is not finite \(0.weight\); epoch 1, step 4"
    ):
        trainer.train(make_data(24), 1, per_device_batch_size=4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_answers_read_late_still_keep_bad_numbers_from_the_weights(optimizer: str) -> None:
    """The mode of devices that run ahead of the host, driven here on the CPU."""
    trainer, weights = train(TerminateOnNaNCallback("skip", 100), poisoned(bad=(1, 3)), optimizer)
    assert all(torch.isfinite(value).all() for step in weights for value in step.values())
    assert trainer.num_skipped_updates == 2  # read at the end of the epoch
    inner = trainer.optimizer.optimizer
    assert not hasattr(inner, "found_inf")  # nothing of ours is left on the optimizer
    for state in inner.state.values():
        assert all(torch.isfinite(value).all() for value in state.values() if isinstance(value, Tensor))
    if optimizer == "sgd" or optimizer.startswith("fused"):
        # A plain step with zero gradients, and a fused one with found_inf, move nothing.
        for bad in (1, 3):
            assert_equal_weights(weights[bad], weights[bad + 1])
        _, expected = train(TerminateOnNaNCallback("skip"), poisoned(bad=(1, 3)), optimizer)
        assert_equal_weights(weights[-1], expected[-1])


@pytest.mark.parametrize("policy", ["raise", "stop"])
def test_answers_read_late_name_the_first_bad_update(policy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    callback = TerminateOnNaNCallback(policy, read_every_n_updates=5)
    trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), OPTIMIZERS["adamw"], [callback])
    message = "loss nan on process 0"
    try:
        trainer.train(poisoned(bad=(1, 3)), 1, per_device_batch_size=4, train_dataloader_kwargs={"shuffle": False})
    except NonFiniteError as error:
        message = str(error)
    out = message if policy == "raise" else capsys.readouterr().out
    assert "loss nan on process 0; epoch 1, step 2, update 2, lr 0.1, 1 process(es)." in out
    assert "2 updates since the last look were so; this is the first." in out
    assert trainer.num_updates == 5
    assert all(torch.isfinite(value).all() for value in weights_of(trainer).values())


def test_the_check_reads_the_device_once_an_update_or_once_an_interval() -> None:
    """Counted: calls of Tensor.item in a run of 12 updates."""
    counts = {}
    for interval in (1, 4, 100):
        calls: list[int] = []
        original = Tensor.item

        def item(self: Tensor, calls: list[int] = calls, original: Any = original) -> Any:
            calls.append(1)
            return original(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "item", item)
            train(TerminateOnNaNCallback(read_every_n_updates=interval), make_data(48), "sgd")
        counts[interval] = len(calls)
    base = counts[100] - 1  # one look, at the end of the epoch; the rest is not ours
    assert counts[1] - base == 12
    assert counts[4] - base == 4  # three in the epoch, one at its end


def test_parameters_without_gradients_and_sparse_gradients_are_fine() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(10, 3, sparse=True)
            self.unused = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.words(x).mean(1)

    data = TensorDataset(torch.randint(10, (16, 4)), torch.randint(3, (16,)))
    trainer = Trainer(Words(), nn.CrossEntropyLoss(), OPTIMIZERS["sgd"], [TerminateOnNaNCallback])
    assert trainer.train(data, 1).get_latest_metric("train_loss_epoch") > 0


def _train_with_a_bad_rank(policy: Any, gradient_is_bad: bool) -> tuple[str, int, int, dict[str, Tensor]]:
    class Bad(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> Any:
            output = super().calculate_train_batch_loss(batch)
            assert isinstance(output, dict)
            is_bad = self.accelerator.process_index == 1 and self.num_steps == 2
            if not is_bad:
                return output
            # Added, the gradient stays finite, and the other process has nothing to see it by.
            return {**output, "loss": output["loss"] * math.nan if gradient_is_bad else output["loss"] + math.nan}

    trainer = Bad(make_mlp(), nn.CrossEntropyLoss(), OPTIMIZERS["adamw"], [TerminateOnNaNCallback(policy)])
    message = ""
    try:
        trainer.train(make_data(32), 1, per_device_batch_size=4)
    except NonFiniteError as error:
        message = str(error)
    return message, trainer.num_updates, trainer.num_skipped_updates, weights_of(trainer)


@pytest.mark.parametrize("gradient_is_bad", [True, False])
def test_all_processes_act_together_when_one_sees_a_nan(gradient_is_bad: bool) -> None:
    for policy, updates, skipped in (("raise", 2, 0), ("stop", 2, 0), ("skip", 3, 1)):
        first, second = run_processes(_train_with_a_bad_rank, 2, policy, gradient_is_bad)
        assert first[:3] == second[:3]
        assert first[1:3] == (updates, skipped)
        assert_equal_weights(first[3], second[3])
        assert all(torch.isfinite(value).all() for value in first[3].values())
        assert ("loss nan on process 1; epoch 1, step 3" in first[0]) == (policy == "raise")


def test_wrong_arguments_of_the_guard() -> None:
    with pytest.raises(ValueError, match=r"policy must be one of \('raise', 'stop', 'skip'\), got 'ignore'"):
        TerminateOnNaNCallback("ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="read_every_n_updates must be at least 1, got 0"):
        TerminateOnNaNCallback(read_every_n_updates=0)


# --------------------------------------------------------------------------------------------------------------------
# Early stopping
# --------------------------------------------------------------------------------------------------------------------


class Scripted(TrainerCallback):
    """Records given values, one an epoch, under a name."""

    def __init__(self, name: str, values: list[float], main_only: bool = False) -> None:
        self.metric, self.values, self.main_only = name, values, main_only

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if trainer.accelerator.is_main_process or not self.main_only:
            trainer.run_history.update_metric(self.metric, self.values[trainer.current_epoch - 1])


def epochs_until_stop(values: list[float], **kwargs: Any) -> int:
    stopper = EarlyStoppingCallback(watch_metric="score", **({"greater_is_better": True} | kwargs))
    callbacks = [Scripted("score", values), stopper]
    trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), OPTIMIZERS["sgd"], callbacks)
    trainer.train(make_data(4), len(values))
    return trainer.current_epoch


NAN = math.nan


@pytest.mark.parametrize(
    ("values", "kwargs", "epochs"),
    [
        ([1, 2, 3, 4], {}, 4),
        ([1, 2, 1, 3], {}, 3),
        ([1, 2, 2, 3], {}, 3),  # as good is not better
        ([1, 2, 1, 3, 2, 1, 9], {"early_stopping_patience": 2}, 6),
        ([4, 3, 2, 1], {"greater_is_better": False}, 4),
        ([1, 2, 3], {"greater_is_better": False}, 2),
        ([1, 1.05, 1.2, 9], {"early_stopping_threshold": 0.1}, 2),
        ([NAN, 1, 2, 3], {"early_stopping_patience": 2}, 4),  # a first NaN does not become the best
        ([1, NAN, NAN, 5], {"early_stopping_patience": 2}, 3),
        ([NAN, NAN, NAN, NAN], {"early_stopping_patience": 3}, 3),
        ([-math.inf, 1, 2], {}, 3),
    ],
)
def test_training_stops_when_the_metric_has_stopped_getting_better(values: Any, kwargs: Any, epochs: int) -> None:
    assert epochs_until_stop([float(value) for value in values], **kwargs) == epochs


def test_the_evaluation_loss_needs_no_direction_and_others_do() -> None:
    assert EarlyStoppingCallback().greater_is_better is False
    for name in ("eval_accuracy", "constraint_loss", "eval_loss_ratio"):
        with pytest.raises(ValueError, match=f"watch_metric='{name}'.* needs greater_is_better=True or False"):
            EarlyStoppingCallback(watch_metric=name)
    with pytest.raises(ValueError, match=r"got 0 and 0\.0"):
        EarlyStoppingCallback(0)


def test_a_metric_that_cannot_or_does_not_appear_is_an_error() -> None:
    trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), OPTIMIZERS["sgd"], [EarlyStoppingCallback()])
    with pytest.raises(ValueError, match=r"watches 'eval_loss_epoch', but train\(\) got no eval_dataset"):
        trainer.train(make_data(4), 3)
    recorded = r"it recorded \['train_loss_epoch'\]"
    for name, expectation in (
        ("train_loss_epock", pytest.raises(ValueError, match=rf"{recorded}\. Did you mean 'train_loss_epoch'")),
        ("accuracy", pytest.warns(UserWarning, match=rf"which the first epoch did not record; {recorded}")),
    ):
        stopper = EarlyStoppingCallback(watch_metric=name, greater_is_better=True)
        trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), OPTIMIZERS["sgd"], [stopper])
        with expectation:
            trainer.train(make_data(4), 3)


def test_the_best_value_is_forgotten_or_kept_and_survives_as_state() -> None:
    stopper = EarlyStoppingCallback(watch_metric="score", greater_is_better=True)
    kept = EarlyStoppingCallback(watch_metric="score", greater_is_better=True, reset_on_train=False)
    for callback, epochs in ((stopper, 2), (kept, 1)):
        callback.load_state_dict({"best_value": 5.0, "num_worse": 0})
        scripted = Scripted("score", [1.0, 2.0])
        trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), OPTIMIZERS["sgd"], [scripted, callback])
        trainer.train(make_data(4), 2)
        assert trainer.current_epoch == epochs
    assert stopper.state_dict() == {"best_value": 2.0, "num_worse": 0}
    assert kept.state_dict() == {"best_value": 5.0, "num_worse": 1}


def _stop_on_a_metric_of_one_process() -> tuple[int, Any]:
    stopper = EarlyStoppingCallback(watch_metric="score", greater_is_better=True)
    callbacks = [Scripted("score", [1.0, 2.0, 1.0, 5.0], main_only=True), stopper]
    trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), OPTIMIZERS["sgd"], callbacks)
    trainer.train(make_data(8), 4)
    return trainer.current_epoch, stopper.state_dict()


def test_all_processes_stop_together_also_when_only_one_has_the_metric() -> None:
    assert run_processes(_stop_on_a_metric_of_one_process, 2) == [(3, {"best_value": 2.0, "num_worse": 1})] * 2


# --------------------------------------------------------------------------------------------------------------------
# What skipping cannot undo
# --------------------------------------------------------------------------------------------------------------------


def test_skipped_losses_are_left_out_of_the_mean_of_the_epoch() -> None:
    trainer, _ = train(TerminateOnNaNCallback("skip"), poisoned(bad=(1, 3)), "sgd")
    x, y = make_data(24).tensors
    kept = [number for number in range(24) if number // 4 not in (1, 3)]
    reference, _ = train(TerminateOnNaNCallback(), TensorDataset(x[kept], y[kept]), "sgd")
    name = "train_loss_epoch"
    assert trainer.run_history.get_latest_metric(name) == reference.run_history.get_latest_metric(name)


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("interval", [1, 100])
def test_running_statistics_that_took_the_numbers_in_are_named(policy: Any, interval: int) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    guard = TerminateOnNaNCallback(policy, read_every_n_updates=interval)
    trainer = Trainer(model, nn.CrossEntropyLoss(), OPTIMIZERS["sgd"], [guard])
    with pytest.raises(
        NonFiniteError, match=r"These buffers have taken the numbers in: 1.running_mean, 1.running_var\."
    ):
        trainer.train(poisoned(), 1, per_device_batch_size=4)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("interval", [1, 50])
def test_skipping_does_not_go_on_for_ever(interval: int) -> None:
    model = make_mlp()
    torch.nn.init.constant_(model[0].weight, math.nan)
    guard = TerminateOnNaNCallback("skip", read_every_n_updates=interval)
    trainer = Trainer(model, nn.CrossEntropyLoss(), OPTIMIZERS["sgd"], [guard])
    with pytest.raises(NonFiniteError, match=r"So were 1\d\d updates in a row: there is no way on"):
        trainer.train(make_data(24), None, max_num_train_steps=1000)


def test_a_guard_added_in_the_middle_of_a_run_guards() -> None:
    def add(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == 1:
            trainer.callback_handler.add_callback(TerminateOnNaNCallback())

    trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), OPTIMIZERS["sgd"], [LambdaCallback(on_train_update_end=add)])
    with pytest.raises(NonFiniteError):
        trainer.train(poisoned(), 1, per_device_batch_size=4, train_dataloader_kwargs={"shuffle": False})


class LateEmbedding(nn.Module):
    """Has a sparse gradient from its third batch on, and none before."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3, sparse=True)
        self.linear = nn.Linear(4, 3)
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        output = self.linear(x)
        return output + self.embedding(torch.zeros(len(x), dtype=torch.int64)) if self.num_calls > 2 else output


@pytest.mark.parametrize("bad_step", [None, 4])
def test_a_sparse_gradient_that_comes_late_is_checked(bad_step: int | None) -> None:
    model = LateEmbedding()

    class Planted(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> Any:
            output = super().calculate_train_batch_loss(batch)
            if self.num_steps == bad_step:
                model.embedding.weight.register_hook(lambda gradient: gradient * float("nan"))
            return output

    data = TensorDataset(torch.randn(12, 4), torch.randint(3, (12,)))
    trainer = Planted(
        model, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), callbacks=[TerminateOnNaNCallback]
    )
    if bad_step is None:
        trainer.train(data, 1, per_device_batch_size=2)
        assert trainer.num_updates == 6
    else:
        with pytest.raises(NonFiniteError, match="a gradient is not finite"):
            trainer.train(data, 1, per_device_batch_size=2)
        assert trainer.num_updates == 4
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())

"""Schedules: values worked out otherwise, over interruptions, and inside training runs."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from pytorch_accelerated import Trainer, TrainerPlaceholderValues
from pytorch_accelerated.callbacks import LambdaCallback, LimitBatchesCallback, TrainerCallback
from pytorch_accelerated.schedulers import (
    CosineLrScheduler,
    LinearLrScheduler,
    UpdateLrScheduler,
    WSDLrScheduler,
    cosine_lr,
    linear_lr,
    wsd_lr,
)
from tests.support import Stream, make_data, make_mlp, run_processes

# --------------------------------------------------------------------------------------------------------------------
# The functions
# --------------------------------------------------------------------------------------------------------------------

GRID = [
    {"num_updates": length, "num_warmup_updates": warmup, "lr_min": lr_min, "warmup_starting_lr": start}
    for length, warmup, lr_min, start in product((10, 37, 100), (0, 1, 4), (0.0, 0.01), (0.0, 0.02))
]


def curve(lr: Callable[..., float], num_updates: int, **numbers: Any) -> list[float]:
    """Return the learning rates of a run from 0.4, with those after its end."""
    return [lr(update, 0.4, num_updates, **numbers) for update in range(num_updates + 4)]


def expected_curve(
    case: dict[str, Any], fall: Callable[[float], float], num_stable: int, num_after: int
) -> list[float]:
    """Return a straight line up to 0.4, a stable phase, and the share ``fall(x)`` of the rest, with x from 0 to 1."""
    length, warmup, lr_min, start = case.values()
    rising = np.interp(range(warmup), [0, max(warmup, 1)], [start, 0.4]).tolist()
    num_falling = length - warmup - num_stable - num_after
    falling = [lr_min + (0.4 - lr_min) * fall(i / num_falling) for i in range(num_falling)]
    return [*rising, *[0.4] * num_stable, *falling, *[lr_min] * (num_after + 4)]


def test_cosine_takes_the_values_of_a_table() -> None:
    table = [1.0, 0.9619397663, 0.8535533906, 0.6913417162, 0.5, 0.3086582838, 0.1464466094, 0.0380602337, 0.0, 0.0]
    assert [cosine_lr(update, 1.0, 8) for update in range(10)] == pytest.approx(table, abs=1e-10)


@pytest.mark.parametrize("cooldown", [0, 3])
@pytest.mark.parametrize("k", [1.0, 0.5, 2.0])
def test_cosine_is_the_squared_cosine_of_half_the_angle(cooldown: int, k: float) -> None:
    for case in GRID:
        rates = curve(cosine_lr, **case, num_cooldown_updates=cooldown, k_decay=k)
        expected = expected_curve(case, lambda x: math.cos(math.pi / 2 * x**k) ** 2, 0, cooldown)
        assert rates == pytest.approx(expected, abs=1e-12), case
        assert set(rates[-4 - cooldown :]) == {case["lr_min"]}  # to the bit


def test_linear_is_piecewise_linear() -> None:
    for case in GRID:
        rates = curve(linear_lr, **case)
        assert rates == pytest.approx(expected_curve(case, lambda x: 1 - x, 0, 0), abs=1e-12), case
        assert set(rates[-4:]) == {case["lr_min"]}


@pytest.mark.parametrize("num_decay", [1, 5])
@pytest.mark.parametrize(
    ("shape", "fall"),
    [
        ("sqrt", lambda x: 1 - x**0.5),
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: math.cos(math.pi / 2 * x) ** 2),
    ],
)
def test_wsd_rises_stays_and_falls(num_decay: int, shape: str, fall: Callable[[float], float]) -> None:
    for case in GRID:
        rates = curve(wsd_lr, **case, num_decay_updates=num_decay, decay_shape=shape)
        num_stable = case["num_updates"] - case["num_warmup_updates"] - num_decay
        assert rates == pytest.approx(expected_curve(case, fall, num_stable, 0), abs=1e-12), case
        assert rates[case["num_warmup_updates"] : -4 - num_decay] == [0.4] * num_stable
        assert set(rates[-4:]) == {case["lr_min"]}


def test_wsd_without_decay_stays_for_ever() -> None:
    for case in GRID:
        warmup = case["num_warmup_updates"]
        assert set(curve(wsd_lr, **case)[warmup:]) == {0.4}


@pytest.mark.parametrize("function", [cosine_lr, linear_lr, wsd_lr])
def test_warmup_reaches_the_peak_exactly(function: Callable[..., float]) -> None:
    for warmup, base_lr in product((1, 2, 3, 7, 10), (0.1, 1e-3, 3e-4, 1 / 3)):
        rising = [function(u, base_lr, 50, num_warmup_updates=warmup) for u in range(warmup + 1)]
        assert rising[0] == 0
        assert rising[-1] == base_lr
        assert all(before < after for before, after in pairwise(rising))
        assert max(function(u, base_lr, 50, num_warmup_updates=warmup) for u in range(60)) == base_lr
        assert function(0, base_lr, 50, num_warmup_updates=warmup, warmup_starting_lr=1e-5) == 1e-5
        assert function(0, base_lr, 50, warmup_starting_lr=1e-5) == base_lr  # no warm-up, no starting value


@pytest.mark.parametrize(
    ("function", "numbers", "largest_fall"),
    [
        (cosine_lr, {}, math.pi / 2 / 70),
        (cosine_lr, {"num_cooldown_updates": 20}, math.pi / 2 / 50),
        (linear_lr, {}, 1 / 70),
        (wsd_lr, {"num_decay_updates": 25}, 1 / 5),  # the first of 25 steps of a square root
        (wsd_lr, {"num_decay_updates": 25, "decay_shape": "linear"}, 1 / 25),
        (wsd_lr, {"num_decay_updates": 25, "decay_shape": "cosine"}, math.pi / 2 / 25),
    ],
)
def test_falls_without_a_cut(function: Callable[..., float], numbers: dict[str, Any], largest_fall: float) -> None:
    """pytorch-accelerated 0.1.x fell from 0.41 to 0 between updates 69 and 70 of the first case."""
    rates = [function(update, 1.0, 100, num_warmup_updates=30, **numbers) for update in range(30, 110)]
    falls = [before - after for before, after in pairwise(rates)]
    assert min(falls) >= 0
    assert max(falls) <= largest_fall + 1e-12
    assert rates.index(0) == 70 - numbers.get("num_cooldown_updates", 0)


def test_cosine_of_the_published_cut() -> None:
    lr = [cosine_lr(update, 1.0, 100, num_warmup_updates=30) for update in (69, 70)]
    assert lr == pytest.approx([math.cos(math.pi / 2 * 39 / 70) ** 2, math.cos(math.pi / 2 * 40 / 70) ** 2])
    assert lr == pytest.approx([0.4107, 0.3887], abs=1e-4)


def test_larger_k_stays_high_for_longer() -> None:
    plain, slow = ([cosine_lr(update, 1.0, 20, k_decay=k) for update in range(21)] for k in (1.0, 2.0))
    assert all(high > low for high, low in zip(slow[1:-1], plain[1:-1], strict=True))
    assert (slow[0], slow[-1]) == (plain[0], plain[-1]) == (1.0, 0.0)


def test_short_runs_with_any_phases() -> None:
    for length, first, last, lr_min in product(range(1, 6), range(6), range(6), (0.0, 0.01)):
        if first + last > length:
            continue
        numbers: dict[str, Any] = {"num_updates": length, "num_warmup_updates": first, "lr_min": lr_min}
        curves = [
            curve(linear_lr, **numbers),
            curve(cosine_lr, **numbers, num_cooldown_updates=last),
            *(
                curve(wsd_lr, **numbers, num_decay_updates=last, decay_shape=shape)
                for shape in ("sqrt", "linear", "cosine")
            ),
        ]
        for rates in curves:
            assert all(0 <= rate <= 0.4 for rate in rates), numbers
            assert rates[:first] == pytest.approx([0.4 * update / first for update in range(first)])
            assert all(before >= after for before, after in pairwise(rates[first:])), numbers


# --------------------------------------------------------------------------------------------------------------------
# The classes
# --------------------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, tuple[Callable[[Optimizer], UpdateLrScheduler], Callable[[int, float], float]]] = {
    "cosine": (
        partial(
            CosineLrScheduler,
            num_updates=12,
            num_warmup_updates=3,
            num_cooldown_updates=2,
            lr_min=1e-3,
            warmup_starting_lr=1e-4,
            k_decay=1.5,
        ),
        lambda update, lr: cosine_lr(update, lr, 12, 3, 2, 1e-3, 1e-4, 1.5),
    ),
    "linear": (
        partial(LinearLrScheduler, num_updates=12, num_warmup_updates=3, lr_min=1e-3, warmup_starting_lr=1e-4),
        lambda update, lr: linear_lr(update, lr, 12, 3, 1e-3, 1e-4),
    ),
    "wsd": (
        partial(
            WSDLrScheduler,
            num_updates=12,
            num_warmup_updates=3,
            decay_phase_ratio=0.3,
            lr_min=1e-3,
            warmup_starting_lr=1e-4,
            decay_shape="linear",
        ),
        lambda update, lr: wsd_lr(update, lr, 12, 3, 4, 1e-3, 1e-4, "linear"),
    ),
}
KINDS = list(SCHEDULERS)
BASE_LRS = (0.4, 0.05, 3e-3)


def make_optimizer() -> Optimizer:
    """Return an optimizer with several groups, each with its own learning rate."""
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in BASE_LRS]
    return AdamW(groups)


def lrs_of(optimizer: Any) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def step(optimizer: Optimizer, scheduler: Any) -> list[float]:
    """Make one update, and return the learning rates of the next."""
    optimizer.step()
    scheduler.step()
    return lrs_of(optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_each_group_follows_the_function_from_its_own_rate(kind: str) -> None:
    factory, function = SCHEDULERS[kind]
    optimizer = make_optimizer()
    scheduler = factory(optimizer)
    rates = [lrs_of(optimizer), *(step(optimizer, scheduler) for _ in range(15))]
    assert rates == [[function(update, lr) for lr in BASE_LRS] for update in range(16)]
    assert scheduler.get_last_lr() == rates[-1]


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(state)))


def through_torch(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("carry", [through_json, through_torch])
def test_goes_on_to_the_bit_after_an_interruption_anywhere(kind: str, carry: Callable[[Any], Any]) -> None:
    factory, _ = SCHEDULERS[kind]
    optimizer = make_optimizer()
    scheduler = factory(optimizer)
    uninterrupted = [step(optimizer, scheduler) for _ in range(14)]
    for num_done in range(14):
        optimizer = make_optimizer()
        scheduler = factory(optimizer)
        for _ in range(num_done):
            step(optimizer, scheduler)
        states = through_torch(optimizer.state_dict()), carry(scheduler.state_dict())
        optimizer = make_optimizer()
        scheduler = factory(optimizer)
        scheduler.load_state_dict(states[1])
        optimizer.load_state_dict(states[0])
        assert [step(optimizer, scheduler) for _ in range(num_done, 14)] == uninterrupted[num_done:]


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_a_position_and_the_schedule_is_the_new_ones(kind: str) -> None:
    """A run that is resumed with other limits follows its own schedule, from where the other was."""
    factory, function = SCHEDULERS[kind]
    other = make_optimizer()
    before = type(factory(make_optimizer()))(other, num_updates=5)
    step(other, before)
    optimizer = make_optimizer()
    for group in optimizer.param_groups:
        group["lr"] = 7.0
    scheduler = factory(optimizer)
    scheduler.load_state_dict(before.state_dict())
    assert step(optimizer, scheduler) == [function(2, lr) for lr in BASE_LRS]


def test_a_tensor_as_rate_is_changed_in_place() -> None:
    rate = torch.tensor(0.4)
    optimizer = SGD([nn.Parameter(torch.ones(2))], lr=rate)
    scheduler = LinearLrScheduler(optimizer, num_updates=4)
    values = [step(optimizer, scheduler)[0] for _ in range(4)]
    assert all(value is optimizer.param_groups[0]["lr"] for value in values)
    assert isinstance(values[-1], torch.Tensor)
    assert values[-1].item() == 0
    assert scheduler.base_lrs[0] == pytest.approx(0.4)


@pytest.mark.parametrize("update_class", [CosineLrScheduler, LinearLrScheduler, WSDLrScheduler])
def test_a_second_scheduler_begins_from_the_first_rates(update_class: Any) -> None:
    optimizer = make_optimizer()
    for _ in range(2):
        scheduler = update_class(optimizer, num_updates=3)
        assert lrs_of(optimizer) == list(BASE_LRS)
        for _ in range(3):
            step(optimizer, scheduler)
        assert lrs_of(optimizer) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            partial(CosineLrScheduler, num_updates=10, num_warmup_updates=8, num_cooldown_updates=3),
            "the phases of the schedule must fit into num_updates=10, got num_warmup_updates=8, "
            "num_cooldown_updates=3.",
        ),
        (
            partial(CosineLrScheduler, num_updates=10, num_cooldown_updates=-1),
            "the phases of the schedule must fit into num_updates=10, got num_warmup_updates=0, "
            "num_cooldown_updates=-1.",
        ),
        (
            partial(LinearLrScheduler, num_updates=10, num_warmup_updates=11),
            "the phases of the schedule must fit into num_updates=10, got num_warmup_updates=11.",
        ),
        (
            partial(LinearLrScheduler, num_updates=10, num_warmup_updates=-2),
            "the phases of the schedule must fit into num_updates=10, got num_warmup_updates=-2.",
        ),
        (
            partial(LinearLrScheduler, num_updates=0),
            "the phases of the schedule must fit into num_updates=0, got num_warmup_updates=0.",
        ),
        (
            partial(WSDLrScheduler, num_updates=10, num_warmup_updates=6, decay_phase_ratio=0.5),
            "the phases of the schedule must fit into num_updates=10, got num_warmup_updates=6, num_decay_updates=5.",
        ),
        (
            partial(WSDLrScheduler, num_updates=10, decay_phase_ratio=1.5),
            "decay_phase_ratio must be between 0 and 1 and decay_shape one of ('sqrt', 'linear', 'cosine'), got 1.5 "
            "and 'sqrt'.",
        ),
        (
            partial(WSDLrScheduler, num_updates=10, decay_shape="exponential"),
            "decay_phase_ratio must be between 0 and 1 and decay_shape one of ('sqrt', 'linear', 'cosine'), got 0.1 "
            "and 'exponential'.",
        ),
    ],
)
def test_refuses_what_cannot_be(make: Callable[[Optimizer], Any], message: str) -> None:
    optimizer = make_optimizer()
    with pytest.raises(ValueError) as caught:
        make(optimizer)
    assert str(caught.value) == message
    assert lrs_of(optimizer) == list(BASE_LRS)


def test_wsd_decays_for_its_share_rounded_up() -> None:
    for num_updates, ratio, expected in [(12, 0.3, 4), (10, 0.1, 1), (11, 0.1, 2), (1, 0.1, 1), (9, 0.0, 0), (9, 1, 9)]:
        assert WSDLrScheduler(make_optimizer(), num_updates, decay_phase_ratio=ratio).num_decay_updates == expected


def test_wsd_share_does_not_suffer_from_rounding() -> None:
    assert WSDLrScheduler(make_optimizer(), 100, 45, decay_phase_ratio=0.55).num_decay_updates == 55


# --------------------------------------------------------------------------------------------------------------------
# In a training run
# --------------------------------------------------------------------------------------------------------------------


class LrKeeper(TrainerCallback):
    """Notes the learning rate of each update, and that after the last."""

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        self.rates: list[float] = []

    def on_optimizer_step_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        self.rates += lrs_of(trainer.optimizer)

    def on_train_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.rates += lrs_of(trainer.optimizer)


def make_trainer(*callbacks: TrainerCallback, lr: float = 0.4) -> tuple[Trainer, LrKeeper]:
    model, keeper = make_mlp(), LrKeeper()
    trainer = Trainer(model, nn.CrossEntropyLoss(), SGD(model.parameters(), lr=lr), callbacks=[*callbacks, keeper])
    return trainer, keeper


def rates_of_run(num_samples: int, num_epochs: int | None, factory: Any, **arguments: Any) -> list[float]:
    """Return the learning rates of a run with batches of 2."""
    trainer, keeper = make_trainer()
    trainer.train(make_data(num_samples), num_epochs, per_device_batch_size=2, create_scheduler_fn=factory, **arguments)
    return keeper.rates


@pytest.mark.parametrize(
    ("num_samples", "num_epochs", "arguments", "num_updates"),
    [
        (20, 3, {}, 30),
        (19, 3, {}, 30),
        (20, 3, {"gradient_accumulation_steps": 5}, 6),
        (20, 3, {"gradient_accumulation_steps": 4}, 9),  # windows of 4, 4 and 2
        (20, 3, {"gradient_accumulation_steps": 64}, 3),
        (20, 3, {"max_num_train_steps": 7, "gradient_accumulation_steps": 4}, 7),
        (20, None, {"max_num_train_steps": 13}, 13),
        (20, 1, {"max_num_train_steps": 13}, 10),
    ],
)
def test_steps_once_per_update_down_to_the_minimum(
    num_samples: int, num_epochs: int | None, arguments: dict[str, Any], num_updates: int
) -> None:
    factory = CosineLrScheduler.create_scheduler_fn(num_warmup_updates=2, lr_min=0.01)
    rates = rates_of_run(num_samples, num_epochs, factory, **arguments)
    assert rates == [cosine_lr(update, 0.4, num_updates, 2, lr_min=0.01) for update in range(num_updates + 1)]
    assert rates[-1] == 0.01


@pytest.mark.parametrize(
    ("scheduler_class", "in_epochs", "in_updates"),
    [
        (CosineLrScheduler, {"num_warmup_epochs": 1}, {"num_warmup_updates": 8}),
        (CosineLrScheduler, {"num_warmup_epochs": 0.25}, {"num_warmup_updates": 2}),
        (CosineLrScheduler, {"num_warmup_epochs": 0.7}, {"num_warmup_updates": 6}),  # 5.6
        (
            CosineLrScheduler,
            {"num_warmup_epochs": 1.5, "num_cooldown_epochs": 0.5},
            {"num_warmup_updates": 12, "num_cooldown_updates": 4},
        ),
        (CosineLrScheduler, {"num_epochs": 2}, {"num_updates": 16}),
        (LinearLrScheduler, {"num_warmup_epochs": 0.1, "lr_min": 0.1}, {"num_warmup_updates": 1, "lr_min": 0.1}),
        (
            WSDLrScheduler,
            {"num_warmup_epochs": 2, "decay_shape": "linear"},
            {"num_warmup_updates": 16, "decay_shape": "linear"},
        ),
        (WSDLrScheduler, {"num_warmup_epochs": 0}, {}),
    ],
)
def test_lengths_in_epochs_are_those_in_updates(
    scheduler_class: type[UpdateLrScheduler], in_epochs: dict[str, Any], in_updates: dict[str, Any]
) -> None:
    rates = rates_of_run(15, 3, scheduler_class.create_scheduler_fn(**in_epochs))
    optimizer = SGD([nn.Parameter(torch.ones(()))], lr=0.4)
    scheduler = scheduler_class(optimizer, **{"num_updates": 24, **in_updates})
    assert rates == [*lrs_of(optimizer), *(step(optimizer, scheduler)[0] for _ in range(24))]


def test_parts_of_an_epoch_fit_into_it() -> None:
    factory = CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=0.5, num_cooldown_epochs=0.5)
    assert len(rates_of_run(14, 1, factory)) == 8


def test_the_limit_of_batches_shortens_the_schedule() -> None:
    trainer, keeper = make_trainer(LimitBatchesCallback(3))
    trainer.train(
        make_data(20), 2, per_device_batch_size=2, create_scheduler_fn=LinearLrScheduler.create_scheduler_fn()
    )
    assert keeper.rates == [linear_lr(update, 0.4, 6) for update in range(7)]


def test_stream_needs_a_limit_in_updates() -> None:
    trainer, keeper = make_trainer()
    factory = LinearLrScheduler.create_scheduler_fn()
    data = Stream(make_data(20))
    with pytest.raises(ValueError, match=r"run_config.num_updates, which this run does not have"):
        trainer.train(data, 2, create_scheduler_fn=factory)
    trainer.train(data, None, per_device_batch_size=2, max_num_train_steps=14, create_scheduler_fn=factory)
    assert keeper.rates == [linear_lr(update, 0.4, 14) for update in range(15)]


def test_a_skipped_update_is_no_step_of_the_schedule() -> None:
    seen: list[int] = []

    def skip_second(trainer: Trainer, **kwargs: Any) -> None:
        seen.append(trainer.num_updates)
        if len(seen) == 2:
            trainer.skip_update()

    trainer, keeper = make_trainer(LambdaCallback(on_optimizer_step_begin=skip_second))
    trainer.train(make_data(8), 1, per_device_batch_size=2, create_scheduler_fn=LinearLrScheduler.create_scheduler_fn())
    assert seen == [0, 1, 1, 2]
    assert keeper.rates == [linear_lr(update, 0.4, 4) for update in (0, 1, 1, 2, 3)]


def test_an_earlier_scheduler_does_not_go_on() -> None:
    trainer, keeper = make_trainer()
    data = make_data(20)
    factory = CosineLrScheduler.create_scheduler_fn(lr_min=0.01)
    trainer.train(data, None, max_num_train_steps=10, create_scheduler_fn=factory)
    scheduler = trainer.scheduler
    trainer.train(data, 4, reset_run_history=False)
    assert trainer.scheduler is None
    assert set(keeper.rates) == {0.01}
    assert scheduler.last_epoch == 10
    trainer.train(data, None, max_num_train_steps=5, create_scheduler_fn=factory, reset_run_history=False)
    assert keeper.rates == [cosine_lr(update, 0.4, 5, lr_min=0.01) for update in range(6)]


@pytest.mark.parametrize(
    "factory",
    [
        partial(OneCycleLR, max_lr=0.5, total_steps=TrainerPlaceholderValues.NUM_UPDATES),
        partial(
            OneCycleLR,
            max_lr=0.5,
            epochs=TrainerPlaceholderValues.NUM_EPOCHS,
            steps_per_epoch=TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
        ),
        partial(CosineAnnealingLR, T_max=TrainerPlaceholderValues.NUM_UPDATES * 2),
        partial(LambdaLR, lr_lambda=lambda update: 0.9**update),
    ],
)
def test_schedulers_of_torch(factory: Any) -> None:
    rates = rates_of_run(19, 2, factory, gradient_accumulation_steps=4)
    numbers = {"total_steps": 6, "epochs": 2, "steps_per_epoch": 3, "T_max": 12}
    optimizer = SGD([nn.Parameter(torch.ones(()))], lr=0.4)
    scheduler = factory.func(optimizer, **{name: numbers.get(name, value) for name, value in factory.keywords.items()})
    assert rates == [*lrs_of(optimizer), *(step(optimizer, scheduler)[0] for _ in range(6))]


def test_a_scheduler_that_moves_by_a_metric_is_refused() -> None:
    trainer, _ = make_trainer()
    with pytest.raises(TypeError, match="ReduceLROnPlateau moves by a metric, not once per update"):
        trainer.train(make_data(8), 1, create_scheduler_fn=partial(ReduceLROnPlateau, patience=2))


CASES = [(40, 2, 1, 20), (37, 2, 1, 20), (37, 2, 4, 6), (1, 5, 1, 5)]
"""Samples, epochs, accumulation and the updates that these make on two processes, with batches of 2."""


def rates_of_cases() -> list[list[float]]:
    factory = CosineLrScheduler.create_scheduler_fn(num_warmup_updates=3)
    return [rates_of_run(size, epochs, factory, gradient_accumulation_steps=steps) for size, epochs, steps, _ in CASES]


def test_two_processes_follow_the_schedule_of_one() -> None:
    """pytorch-accelerated 0.1.x stepped once per process, or half as far."""
    for rates_of_process in run_processes(rates_of_cases, 2):
        for (*_, num_updates), rates in zip(CASES, rates_of_process, strict=True):
            assert rates == [cosine_lr(update, 0.4, num_updates, 3) for update in range(num_updates + 1)]
            assert rates[-1] == 0

"""The Trainer against loops written by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import MoveModulesToDeviceCallback, TerminateOnNaNCallback
from pytorch_accelerated.errors import BatchError
from tests.support import (
    PlainDataset,
    Stream,
    assert_equal_weights,
    make_data,
    make_mlp,
    relative_error,
    run_processes,
    weights_of,
)


class Recorder(Trainer):
    """Notes the loss of each batch."""

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        output = super().calculate_train_batch_loss(batch)
        self.losses = [*getattr(self, "losses", []), output["loss"].item()]
        return output


def train_by_hand(
    data: Any,
    batch_size: int,
    num_epochs: int,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    step_size: int | None = None,
    optimizer_class: Any = partial(torch.optim.SGD, lr=0.1, momentum=0.9),
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Return batch losses, epoch losses and weights of the loop that anyone would write."""
    model = make_mlp()
    optimizer = optimizer_class(model.parameters())
    scheduler = StepLR(optimizer, step_size, gamma=0.5) if step_size else None
    losses, epoch_losses = [], []
    x, y = data.tensors
    for _ in range(num_epochs):
        total = 0.0
        for start in range(0, len(x), batch_size):
            inputs, targets = x[start : start + batch_size], y[start : start + batch_size]
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            if clip_value:
                nn.utils.clip_grad_value_(model.parameters(), clip_value)
            if clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            if scheduler:
                scheduler.step()
            losses.append(loss.item())
            total += loss.item() * len(inputs)
        epoch_losses.append(total / len(x))
    return losses, epoch_losses, model.state_dict()


@pytest.mark.parametrize("kind", ["tensors", "plain", "stream"])
@pytest.mark.parametrize(
    ("by_hand", "by_trainer"),
    [
        ({}, {}),
        ({"clip_norm": 0.1}, {"gradient_clip_norm": 0.1}),
        ({"clip_value": 0.01}, {"gradient_clip_value": 0.01}),
        ({"step_size": 3}, {"create_scheduler_fn": partial(StepLR, step_size=3, gamma=0.5)}),
    ],
    ids=["plain", "norm", "value", "scheduler"],
)
def test_equals_loop_by_hand_to_the_bit(by_hand: dict[str, Any], by_trainer: dict[str, Any], kind: str) -> None:
    data = make_data(22)
    losses, epoch_losses, weights = train_by_hand(data, 4, 3, **by_hand)
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Recorder(model, nn.CrossEntropyLoss(), optimizer)
    dataset = {"tensors": data, "plain": PlainDataset(data), "stream": Stream(data)}[kind]
    history = trainer.train(
        dataset,
        3,
        per_device_batch_size=4,
        train_dataloader_kwargs={} if kind == "stream" else {"shuffle": False},
        **by_trainer,
    )
    assert trainer.losses == losses
    assert_equal_weights(weights_of(trainer), weights)
    assert history.get_metric_values("train_loss_epoch") == epoch_losses
    assert (trainer.num_updates, trainer.num_steps, trainer.num_samples, trainer.current_epoch) == (18, 18, 66, 3)


# --------------------------------------------------------------------------------------------------------------------
# One update of any window is the update of the one big batch
# --------------------------------------------------------------------------------------------------------------------

LENGTHS = [5, 1, 3, 0, 7, 2, 4, 4, 1, 6, 2, 2, 9, 1, 3, 5, 2, 8, 1, 1, 4, 6, 3, 2]  # of tokens, by sample


class TokenTrainer(Trainer):
    """A loss that is a mean over tokens: each sample has its own number of them."""

    as_tensor = True

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        x, y, lengths = batch
        losses = nn.functional.cross_entropy(self.model(x), y, reduction="none") * lengths
        num_items = lengths.sum()
        loss = losses.sum() / num_items.clamp(min=1)
        return {"loss": loss, "num_items_in_batch": num_items if self.as_tensor else int(num_items)}


def make_token_data(num_samples: int) -> torch.utils.data.TensorDataset:
    data = make_data(num_samples)
    return torch.utils.data.TensorDataset(*data.tensors, torch.tensor(LENGTHS[:num_samples]))


def updates_by_hand(
    data: Any, update_size: int, weighs_tokens: bool, clip_norm: float | None
) -> list[dict[str, Tensor]]:
    """Return the gradients of the updates of one epoch, each made of one big batch, with SGD in between."""
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = []
    for start in range(0, len(data), update_size):
        x, y, *rest = (tensor[start : start + update_size] for tensor in data.tensors)
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        weights = rest[0].float() if weighs_tokens else torch.ones(len(x))
        optimizer.zero_grad()
        ((losses * weights).sum() / weights.sum()).backward()
        if clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return gradients


class GradientKeeper(Trainer):
    """Notes the gradients of each update as the optimizer will see them."""

    def optimizer_step(self) -> None:
        named = self.get_model().named_parameters()
        self.gradients = [*getattr(self, "gradients", []), {name: p.grad.clone() for name, p in named}]
        super().optimizer_step()


class TokenKeeper(GradientKeeper, TokenTrainer):
    """Both."""


def train_updates(
    num_samples: int, batch_size: int, steps: int, mode: str, stream: bool, clip_norm: float | None
) -> tuple[list[dict[str, Tensor]], Any]:
    torch.set_num_threads(1)
    weighs_tokens = mode.startswith("tokens")
    model = make_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = (TokenKeeper if weighs_tokens else GradientKeeper)(
        model, nn.CrossEntropyLoss(), optimizer, callbacks=None
    )
    if weighs_tokens:
        trainer.as_tensor = mode == "tokens as tensor"
    data = make_token_data(num_samples) if weighs_tokens else make_data(num_samples)
    trainer.train(
        Stream(data) if stream else data,
        1,
        per_device_batch_size=batch_size,
        gradient_accumulation_steps=steps,
        gradient_clip_norm=clip_norm,
        train_dataloader_kwargs={} if stream else {"shuffle": False},
    )
    assert trainer.num_samples == num_samples
    return trainer.gradients, trainer.run_history.get_latest_metric("train_loss_epoch")


def train_all(cases: list[tuple[Any, ...]]) -> list[Any]:
    return [train_updates(*case) for case in cases]


def make_cases(num_processes: int) -> list[tuple[Any, ...]]:
    """Return (samples, batch, accumulation, mode, stream, clip): full and partial windows, equal and ragged batches."""
    cases: list[tuple[Any, ...]] = []
    for steps in (1, 2, 3, 4):
        window = 2 * num_processes * steps
        for num_samples in sorted({window * 2, window + 2 * num_processes, window + 3, 13, 24} & set(range(1, 25))):
            for mode in ("samples", "tokens as tensor", "tokens as int"):
                cases += [(num_samples, 2, steps, mode, stream, None) for stream in (False, True)]
            cases.append((num_samples, 2, steps, "samples", False, 0.05))
            cases.append((num_samples, 2, steps, "tokens as tensor", False, 0.05))
    return cases


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_update_equals_that_of_the_big_batch(num_processes: int) -> None:
    """Accumulation 1-4, full and partial windows, equal, ragged and token-weighted batches, clipping, streams."""
    cases = make_cases(num_processes)
    assert len(cases) > 50
    by_process = run_processes(train_all, num_processes, cases)
    worst = 0.0
    for number, (num_samples, batch_size, steps, mode, _, clip_norm) in enumerate(cases):
        weighs_tokens = mode.startswith("tokens")
        data = make_token_data(num_samples) if weighs_tokens else make_data(num_samples)
        expected = updates_by_hand(data, batch_size * steps * num_processes, weighs_tokens, clip_norm)
        for results in by_process:
            gradients, _ = results[number]
            assert len(gradients) == len(expected)
            for found, wanted in zip(gradients, expected, strict=True):
                worst = max(worst, relative_error(found, wanted))
        assert len({results[number][1] for results in by_process}) == 1  # all report the same loss
    assert worst < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_reported_loss_does_not_depend_on_accumulation(steps: int) -> None:
    model = make_mlp()
    trainer = Trainer(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=1e-30), callbacks=None)
    data = make_data(22)
    history = trainer.train(data, 1, data, per_device_batch_size=4, gradient_accumulation_steps=steps)
    expected = nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).item()
    assert history.get_latest_metric("train_loss_epoch") == pytest.approx(expected, rel=1e-6)
    assert history.get_latest_metric("eval_loss_epoch") == pytest.approx(expected, rel=1e-6)


def test_what_the_hook_returned_is_not_changed() -> None:
    kept = []

    class Keeper(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> Any:
            output = super().calculate_train_batch_loss(batch)
            del output["batch_size"]  # which the trainer knows by itself, and must not write here
            kept.append((output, dict(output), output["loss"].item()))
            return output

    model = make_mlp()
    trainer = Keeper(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), callbacks=None)
    trainer.train(make_data(10), 1, per_device_batch_size=3, gradient_accumulation_steps=3)
    for output, copy, loss in kept:
        assert output.keys() == copy.keys() and all(output[name] is copy[name] for name in copy)
        assert output["loss"].item() == loss


# --------------------------------------------------------------------------------------------------------------------
# Odd counts and kinds of parameters
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("unit", [0.1, 0.25, 3.0])
def test_counts_may_be_weights_below_one(unit: float, as_tensor: bool) -> None:
    """The unit in which items are counted cancels out."""

    class Weighted(GradientKeeper):
        def calculate_train_batch_loss(self, batch: Any) -> Any:
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            count = torch.tensor(unit * len(batch[0])) if as_tensor else unit * len(batch[0])
            return {"loss": loss, "num_items_in_batch": count}

    trainer = Weighted(make_mlp(), None, partial(torch.optim.SGD, lr=0.1), callbacks=None)
    order = {"train_dataloader_kwargs": {"shuffle": False}}
    trainer.train(make_data(10), 1, per_device_batch_size=4, gradient_accumulation_steps=3, **order)
    [expected] = updates_by_hand(make_data(10), 10, weighs_tokens=False, clip_norm=None)
    assert relative_error(trainer.gradients[0], expected) < 1e-6


IGNORED = -100


def train_with_empty_batches(counts_as: str) -> tuple[list[dict[str, Tensor]], float]:
    """Train on 8 batches of 2, some without a label that is not ignored, whose mean is NaN."""

    class Masked(GradientKeeper):
        def calculate_train_batch_loss(self, batch: Any) -> Any:
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1], ignore_index=IGNORED)
            count = (batch[1] != IGNORED).sum()
            return {"loss": loss, "num_items_in_batch": count if counts_as == "tensor" else int(count)}

    x, y = make_data(16).tensors
    y = y.clone()
    y[[2, 3, 6, 7, 8, 9, 10, 11, 15]] = IGNORED
    trainer = Masked(make_mlp(), None, partial(torch.optim.SGD, lr=0.1), [TerminateOnNaNCallback])
    order = {"train_dataloader_kwargs": {"shuffle": False}}
    steps = 4 // trainer.accelerator.num_processes
    data = torch.utils.data.TensorDataset(x, y)
    history = trainer.train(data, 1, per_device_batch_size=2, gradient_accumulation_steps=steps, **order)
    return trainer.gradients, history.get_latest_metric("train_loss_epoch")


@pytest.mark.parametrize("counts_as", ["tensor", "int"])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_batch_or_process_without_items_weighs_nothing(num_processes: int, counts_as: str) -> None:
    model = make_mlp()
    x, y = make_data(16).tensors
    kept = torch.tensor([n not in (2, 3, 6, 7, 8, 9, 10, 11, 15) for n in range(16)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected, total = [], 0.0
    for part in (slice(0, 8), slice(8, 16)):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[part][kept[part]]), y[part][kept[part]])
        loss.backward()
        expected.append({name: p.grad.clone() for name, p in model.named_parameters()})
        total += loss.item() * int(kept[part].sum())
        optimizer.step()
    for gradients, reported in run_processes(train_with_empty_batches, num_processes, counts_as):
        assert len(gradients) == 2
        assert max(relative_error(found, wanted) for found, wanted in zip(gradients, expected, strict=True)) < 1e-6
        assert reported == pytest.approx(total / int(kept.sum()), rel=1e-6)


def test_counts_that_are_no_counts_are_refused() -> None:
    for count in (-1, "3", torch.ones(1)):

        class Odd(Trainer):
            def calculate_train_batch_loss(self, batch: Any, count: Any = count) -> Any:
                return {"loss": self.model(batch[0]).mean(), "num_items_in_batch": count}

        with pytest.raises(
            BatchError, match=r"returned num_items_in_batch .*; expected a number >= 0, or a scalar tens"
        ):
            Odd(make_mlp(), None, partial(torch.optim.SGD, lr=0.1), callbacks=None).train(make_data(4), 1)


def test_the_correction_of_a_window_is_exact_for_mixed_kinds_of_parameters() -> None:
    """A bf16 and a complex parameter come first; the float32 ones must not lose digits to them."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
            self.complex = nn.Parameter(torch.ones(3, dtype=torch.complex64))
            self.net = make_mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * self.low * self.complex.real

    class Counting(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> Any:
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            return {"loss": loss, "num_items_in_batch": torch.tensor(len(batch[0]))}

        def optimizer_step(self) -> None:
            self.gradient = {name: p.grad.clone() for name, p in self.get_model().net.named_parameters()}

    gradients = []
    for batch_size, steps in ((10, 1), (3, 4)):
        trainer = Counting(Mixed(), None, partial(torch.optim.SGD, lr=0.1), callbacks=None)
        order = {"train_dataloader_kwargs": {"shuffle": False}}
        trainer.train(make_data(10), 1, per_device_batch_size=batch_size, gradient_accumulation_steps=steps, **order)
        gradients.append(trainer.gradient)
    assert relative_error(gradients[1], gradients[0]) < 1e-6


# --------------------------------------------------------------------------------------------------------------------
# Losses of torch that are means over something else than samples
# --------------------------------------------------------------------------------------------------------------------

WEIGHTED_LOSSES: dict[str, Any] = {
    "class weights": lambda: nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 5.0])),
    "class weights, smoothing": lambda: nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 5.0]), label_smoothing=0.1),
    "ignored class": lambda: nn.CrossEntropyLoss(ignore_index=1),
    "ignored class outside": lambda: nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 5.0]), ignore_index=7),
    "log likelihood": lambda: nn.NLLLoss(weight=torch.tensor([0.2, 1.0, 5.0])),
    "pixels": lambda: nn.CrossEntropyLoss(),
    "probabilities": lambda: nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 5.0])),
}


class Pixels(nn.Module):
    """Gives each sample five outputs of three classes: (N, 3, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_mlp(outputs=15)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).unflatten(1, (3, 5))


def train_weighted(kind: str, split: bool) -> tuple[dict[str, Tensor], float, float]:
    data = make_data(22, outputs=3)
    x, y = data.tensors
    model: nn.Module = make_mlp()
    loss_func = WEIGHTED_LOSSES[kind]()
    if kind == "ignored class outside":
        y = torch.where(torch.arange(22) % 4 == 0, 7, y)
    elif kind == "pixels":
        model = Pixels()
        y = torch.where(
            torch.rand(22, 5, generator=torch.Generator().manual_seed(1)) < 0.4, -100, y[:, None].expand(22, 5)
        )
    elif kind == "probabilities":
        y = nn.functional.one_hot(y, 3).float()
    elif kind == "log likelihood":
        model = nn.Sequential(model, nn.LogSoftmax(-1))
    trainer = Trainer(model, loss_func, partial(torch.optim.SGD, lr=0.5), [MoveModulesToDeviceCallback])
    num_processes = trainer.accelerator.num_processes
    batch = {"per_device_batch_size": 3, "gradient_accumulation_steps": 8 // num_processes} if split else {}
    data = torch.utils.data.TensorDataset(x, y)
    arguments: dict[str, Any] = {"per_device_batch_size": 22, "train_dataloader_kwargs": {"shuffle": False}, **batch}
    history = trainer.train(data, 2, data, **arguments)
    weights = {name: value.clone() for name, value in trainer.get_model().state_dict().items()}
    return weights, history.get_latest_metric("train_loss_epoch"), history.get_latest_metric("eval_loss_epoch")


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("kind", WEIGHTED_LOSSES)
def test_weighted_losses_of_torch_split_like_any_other(kind: str, num_processes: int) -> None:
    whole, train_loss, eval_loss = train_weighted(kind, split=False)
    for weights, split_train_loss, split_eval_loss in run_processes(train_weighted, num_processes, kind, True):
        assert relative_error(weights, whole) < 1e-6
        assert split_train_loss == pytest.approx(train_loss, rel=1e-5)
        assert split_eval_loss == pytest.approx(eval_loss, rel=1e-5)


def test_a_loss_that_is_a_sum_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="reduction='sum', but losses are taken for means"):
        Trainer(make_mlp(), nn.CrossEntropyLoss(reduction="sum"), callbacks=None)


def _count_reductions(steps: int) -> list[int]:
    counts = []
    for num_samples in (32, 96):
        trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), callbacks=None)
        calls: list[int] = []
        reduce = trainer.accelerator.reduce
        trainer.accelerator.reduce = lambda *args, calls=calls, reduce=reduce, **kw: (
            calls.append(1) or reduce(*args, **kw)
        )
        trainer.train(make_data(num_samples), 1, per_device_batch_size=4, gradient_accumulation_steps=steps)
        counts.append(len(calls))
    return counts


@pytest.mark.parametrize("steps", [1, 2])
def test_plain_training_reduces_nothing_but_gradients_until_the_epoch_ends(steps: int) -> None:
    """Counted: the loader knows how many samples the others have, so nobody has to ask."""
    assert run_processes(_count_reductions, 2, steps) == [[1, 1]] * 2

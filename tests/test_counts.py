"""What a step costs, in counts: calls, operations, frames, modules and objects. They do not vary with the machine.

Where a gate fails, something has been added to each step. The figures are those of the versions in constraints.txt.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pytorch_accelerated
from pytorch_accelerated import DEFAULT_CALLBACKS, Trainer
from pytorch_accelerated.callbacks import TrainerCallback
from tests.support import PlainDataset

PACKAGE = str(Path(pytorch_accelerated.__file__).parent)
FIRST, LAST = 20, 60  # the steps that are counted
NUM_SAMPLES, BATCH_SIZE = 32 * 80, 32


class Watched(nn.Module):
    """A tiny MLP that calls a function when a batch reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.num_steps = 0
        self.watch: Callable[[int], None] = lambda step: None

    def forward(self, x: Tensor) -> Tensor:
        self.num_steps += 1
        self.watch(self.num_steps)
        return self.layers(x)  # type: ignore[no-any-return]


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def make_datasets() -> dict[str, Dataset[Any]]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(NUM_SAMPLES, 64), torch.randint(10, (NUM_SAMPLES,)))
    return {"Python dataset": PlainDataset(data), "in memory": data}


def by_hand(model: nn.Module, dataset: Dataset[Any]) -> None:
    optimizer, loss_func = SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    total = torch.zeros(())
    for inputs, targets in DataLoader(dataset, BATCH_SIZE, shuffle=True):
        loss = loss_func(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()


def by_trainer(model: nn.Module, dataset: Dataset[Any], callbacks: Any = DEFAULT_CALLBACKS, **kwargs: Any) -> None:
    trainer = Trainer(model, nn.CrossEntropyLoss(), partial(SGD, lr=0.1), callbacks=callbacks)
    trainer.train(dataset, 1, per_device_batch_size=BATCH_SIZE, **kwargs)


def count_calls(run: Callable[[nn.Module], None]) -> Counter[str]:
    """Return the Python calls in a step by file, averaged over the steps that are counted."""
    calls: Counter[str] = Counter()

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            calls[frame.f_code.co_filename] += 1

    model = Watched()
    model.watch = lambda step: sys.setprofile(profile if FIRST <= step < LAST else None)
    try:
        run(model)
    finally:
        sys.setprofile(None)
    assert model.num_steps == NUM_SAMPLES // BATCH_SIZE
    return Counter({file: round(number / (LAST - FIRST)) for file, number in calls.items()})


def count_operations(run: Callable[[nn.Module], None]) -> Counter[str]:
    """Return the operations in a step by name, averaged over the steps that are counted."""
    at: dict[int, Counter[str]] = {}
    model, operations = Watched(), Operations()

    def watch(step: int) -> None:
        if step in (FIRST, LAST):
            at[step] = Counter(operations.counts)

    model.watch = watch
    with operations:
        run(model)
    found = at[LAST] - at[FIRST]
    return Counter({name: round(number / (LAST - FIRST)) for name, number in found.items() if number >= 20})


# Calls in files of the library; and in all of a step, beyond what the loop written by hand makes.
CALL_GATES = [
    ("Python dataset", "default", 48, -60),
    ("Python dataset", "bare", 39, -70),
    ("in memory", "default", 40, -195),
    ("in memory", "bare", 31, -205),
]


@pytest.mark.parametrize("dataset, callbacks, most_own, most_beyond", CALL_GATES)
def test_calls_of_a_step(dataset: str, callbacks: str, most_own: int, most_beyond: int) -> None:
    data = make_datasets()[dataset]
    theirs = count_calls(partial(by_hand, dataset=data))
    ours = count_calls(partial(by_trainer, dataset=data, callbacks=[] if callbacks == "bare" else DEFAULT_CALLBACKS))
    own = sum(number for file, number in ours.items() if file.startswith(PACKAGE))
    assert 10 < own <= most_own, ours
    assert sum(ours.values()) - sum(theirs.values()) <= most_beyond, (ours - theirs, theirs - ours)


@pytest.mark.parametrize("dataset", ["Python dataset", "in memory"])
def test_operations_of_a_step(dataset: str) -> None:
    data = make_datasets()[dataset]
    theirs = count_operations(partial(by_hand, dataset=data))
    ours = count_operations(partial(by_trainer, dataset=data))
    # The mean loss is added up in numbers: one read, where the loop by hand has a detach and an add. The check for
    # numbers that are not finite is one operation over all gradients, and one read of its answer.
    more = {name.removesuffix(".default"): number for name, number in (ours - theirs).items()}
    assert more.pop("aten._local_scalar_dense") == 2
    assert more.pop("aten._amp_foreach_non_finite_check_and_unscale_") == 1
    assert set(more) <= {"aten.slice.Tensor", "aten.index_select"}, more
    assert sum(ours.values()) <= sum(theirs.values()) + 3


def test_accumulation_clipping_and_a_schedule_add_little() -> None:
    data = make_datasets()["Python dataset"]
    plain = sum(count_calls(partial(by_trainer, dataset=data)).values())
    full = count_calls(
        partial(
            by_trainer,
            dataset=data,
            gradient_accumulation_steps=4,
            gradient_clip_norm=1.0,
            create_scheduler_fn=partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda update: 1.0),
        )
    )
    assert sum(full.values()) <= plain + 15, full


class Listens(TrainerCallback):
    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        pass


class ListensToNothing(TrainerCallback):
    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        pass


def test_a_callback_costs_a_call_where_it_listens_and_nothing_elsewhere() -> None:
    data = make_datasets()["Python dataset"]

    def count(*callbacks: TrainerCallback) -> int:
        return sum(count_calls(partial(by_trainer, dataset=data, callbacks=callbacks)).values())

    none = count()
    assert count(*(ListensToNothing() for _ in range(50))) == none
    assert count(*(Listens() for _ in range(50))) == none + 50


def test_nothing_grows_with_the_steps() -> None:
    counts: list[int] = []

    def watch(step: int) -> None:
        if step in (100, 1900):
            gc.collect()
            counts.append(len(gc.get_objects()))

    model = Watched()
    model.watch = watch
    data = TensorDataset(torch.randn(2000, 64), torch.randint(10, (2000,)))
    trainer = Trainer(model, nn.CrossEntropyLoss(), partial(SGD, lr=0.1))
    trainer.train(data, 1, per_device_batch_size=1)
    assert trainer.num_steps == 2000
    assert abs(counts[1] - counts[0]) < 50, counts


def test_the_import_adds_few_modules() -> None:
    script = (
        "import sys, torch, accelerate; before = set(sys.modules); import pytorch_accelerated; "
        "new = set(sys.modules) - before; print(len(new)); "
        "print(sorted({name.split('.')[0] for name in new if not name.startswith('pytorch_accelerated')}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    number, others = done.stdout.splitlines()
    assert int(number) <= 75, others
    for name in ("torchmetrics", "tqdm", "tensorboard", "pandas", "matplotlib", "filelock", "PIL", "smtplib"):
        assert f"'{name}'" not in others

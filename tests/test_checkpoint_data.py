"""Going on in the middle of an epoch, whatever makes the batches: exact, or told in words."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
    get_worker_info,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback
from pytorch_accelerated.errors import CheckpointError, CheckpointMismatchError
from tests.support import Interruption, interrupt_at, run_processes

# torchdata 0.11 calls what torch 2.13 has deprecated, each time a loader is made.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

NUM_SAMPLES, NUM_EPOCHS = 45, 3


def value_of(index: int, has_noise: bool = True) -> tuple[Tensor, int]:
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(4, generator=generator)
    if has_noise:
        x = x + torch.randn(4) + random.random() + float(np.random.rand())
    return x, index


class Numbers(Dataset[Any]):
    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return value_of(index)


class Shards(IterableDataset[Any]):
    """Each worker yields its own samples."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(first, NUM_SAMPLES, step):
            yield value_of(index)


class ShardsWithState(IterableDataset[Any]):
    """Can say where it is; counts the samples it makes, in the main process."""

    num_made = 0

    def __init__(self) -> None:
        self.position = 0
        self.order: list[int] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        if self.order is None:
            own = list(range(first, NUM_SAMPLES, step))
            random.shuffle(own)  # a state that no epoch number tells
            self.order = own
        while self.position < len(self.order):
            index = self.order[self.position]
            self.position += 1
            ShardsWithState.num_made += 1
            yield value_of(index)
        self.position, self.order = 0, None

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "order": self.order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position, self.order = state_dict["position"], state_dict["order"]


class OwnSampler(Sampler[int]):
    """Draws from a random.Random of its own, which goes on from epoch to epoch."""

    def __init__(self) -> None:
        self.random = random.Random(3)

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __iter__(self) -> Iterator[int]:
        yield from self.random.sample(range(NUM_SAMPLES), NUM_SAMPLES)


class SamplerWithState(OwnSampler):
    """Hides what it draws from, and says where it is."""

    def __init__(self) -> None:
        self.inner = [np.random.default_rng(3)]
        self.num_epochs = 0

    def __iter__(self) -> Iterator[int]:
        self.num_epochs += 1
        yield from np.random.default_rng(self.num_epochs).permutation(NUM_SAMPLES).tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"num_epochs": self.num_epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_epochs = state_dict["num_epochs"]


class ForgetfulSampler(Sampler[int]):
    """Keeps what it draws from where nobody finds it."""

    def __init__(self) -> None:
        self.hidden = [random.Random(3)]

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __iter__(self) -> Iterator[int]:
        yield from self.hidden[0].sample(range(NUM_SAMPLES), NUM_SAMPLES)


class LengthsSampler(Sampler[list[int]]):
    """Batches of different sizes, in an order drawn from torch's global stream."""

    def __len__(self) -> int:
        return 15

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(NUM_SAMPLES).tolist()
        start = 0
        for number in range(15):
            size = 1 + number % 5
            yield order[start : start + size]
            start += size


class OwnLoader:
    """Not a DataLoader at all: makes the same batches each time."""

    def __len__(self) -> int:
        return 9

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(NUM_SAMPLES).tolist()
        for start in range(0, NUM_SAMPLES, 5):
            values = [value_of(index) for index in order[start : start + 5]]
            yield torch.stack([x for x, _ in values]), torch.tensor([index for _, index in values])


class OwnLoaderWithState(OwnLoader):
    """The same, and can go on from where it was, with an order that goes on from epoch to epoch."""

    num_made = 0

    def __init__(self) -> None:
        self.position, self.order, self.random = 0, None, random.Random(4)

    def __iter__(self) -> Iterator[Any]:
        if self.order is None:
            self.order = self.random.sample(range(NUM_SAMPLES), NUM_SAMPLES)
        while self.position < NUM_SAMPLES:
            values = [value_of(index) for index in self.order[self.position : self.position + 5]]
            self.position += 5
            OwnLoaderWithState.num_made += 1
            yield torch.stack([x for x, _ in values]), torch.tensor([index for _, index in values])
        self.position, self.order = 0, None

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "order": self.order, "random": self.random.getstate()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position, self.order = state_dict["position"], state_dict["order"]
        self.random.setstate(state_dict["random"])


def with_workers(maker: Callable[..., Any], num_workers: int, **kwargs: Any) -> Any:
    extra = {"multiprocessing_context": "fork"} if num_workers else {}
    return maker(num_workers=num_workers, **extra, **kwargs)


LOADERS: dict[str, Callable[[int], Any]] = {
    "map-style": lambda w: with_workers(partial(DataLoader, Numbers(), 5, shuffle=True), w),
    "persistent workers": lambda w: with_workers(
        partial(DataLoader, Numbers(), 5, shuffle=True), w, persistent_workers=w > 0
    ),
    "drop_last": lambda w: with_workers(partial(DataLoader, Numbers(), 4, shuffle=True, drop_last=True), w),
    "generator": lambda w: with_workers(
        partial(DataLoader, Numbers(), 5, shuffle=True, generator=torch.Generator().manual_seed(8)), w
    ),
    "sampler": lambda w: with_workers(partial(DataLoader, Numbers(), 5, sampler=OwnSampler()), w),
    "sampler with state": lambda w: with_workers(partial(DataLoader, Numbers(), 5, sampler=SamplerWithState()), w),
    "weighted": lambda w: with_workers(
        partial(DataLoader, Numbers(), 5, sampler=WeightedRandomSampler([1.0] * NUM_SAMPLES, NUM_SAMPLES)), w
    ),
    "replacement": lambda w: with_workers(
        partial(DataLoader, Numbers(), 5, sampler=RandomSampler(Numbers(), replacement=True, num_samples=45)), w
    ),
    "batch sampler": lambda w: with_workers(partial(DataLoader, Numbers(), batch_sampler=LengthsSampler()), w),
    "own batches": lambda w: with_workers(
        partial(DataLoader, Numbers(), batch_sampler=BatchSampler(OwnSampler(), 5, drop_last=False)), w
    ),
    "iterable": lambda w: with_workers(partial(DataLoader, Shards(), 5), w),
    "iterable with state": lambda w: with_workers(partial(DataLoader, ShardsWithState(), 5), w),
    "iterable with state, persistent": lambda w: with_workers(
        partial(DataLoader, ShardsWithState(), 5), w, persistent_workers=w > 0
    ),
    "StatefulDataLoader": lambda w: with_workers(partial(StatefulDataLoader, Numbers(), 5, shuffle=True), w),
    "StatefulDataLoader, iterable": lambda w: with_workers(partial(StatefulDataLoader, ShardsWithState(), 5), w),
    "own loader": lambda w: OwnLoader(),
    "own loader with state": lambda w: OwnLoaderWithState(),
}


class IndexTrainer(Trainer):
    """Notes the samples of each epoch; they are part of its state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[int, list[int]] = {}

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        x, indices = batch
        self.seen.setdefault(self.current_epoch, []).extend(self.gather(indices).tolist())
        return self.model(x).square().mean()

    def get_extra_state(self) -> Any:
        return {epoch: list(indices) for epoch, indices in self.seen.items()}

    def set_extra_state(self, state: Any) -> None:
        self.seen = {epoch: list(indices) for epoch, indices in state.items()}


def train(kind: str, num_workers: int, directory: Path | None, stop_at: int | None, **kwargs: Any) -> IndexTrainer:
    """Train from where the directory says; an Interruption comes in the step after ``stop_at`` updates."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    callbacks: list[Any] = [interrupt_at(stop_at)]
    if directory is not None:
        callbacks.append(SaveTrainingStateCallback(directory, save_every_n_updates=1, max_checkpoints=3))
    trainer = IndexTrainer(model, None, partial(torch.optim.AdamW, lr=0.01), callbacks)
    random.seed(2)
    np.random.seed(2)
    resume_from = None if directory is None else "latest"
    with suppress(Interruption):
        trainer.train(LOADERS[kind](num_workers), NUM_EPOCHS, resume_from=resume_from, **kwargs)
    return trainer


def outcome_of(trainer: IndexTrainer) -> tuple[Any, ...]:
    weights = {name: value.tolist() for name, value in trainer.get_model().state_dict().items()}
    return weights, trainer.seen, trainer.run_history.state_dict()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", LOADERS)
def test_goes_on_in_the_middle_of_an_epoch(kind: str, num_workers: int, tmp_path: Path) -> None:
    if kind.startswith("own loader") and num_workers:
        num_workers = 0  # it has none
    expected = outcome_of(train(kind, num_workers, None, None))
    for stop_at in (4, 16):  # in the first epoch; in the second, after a resume
        train(kind, num_workers, tmp_path, stop_at)
    resumed = train(kind, num_workers, tmp_path, None)
    assert outcome_of(resumed) == expected
    if kind not in ("weighted", "replacement", "drop_last"):
        assert all(sorted(indices) == list(range(NUM_SAMPLES)) for indices in resumed.seen.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["map-style", "generator", "sampler", "batch sampler", "iterable with state", "own loader"]
)
def test_goes_on_with_two_processes(kind: str, tmp_path: Path) -> None:
    expected = run_processes(resume_in_processes, 2, kind, None)
    assert run_processes(resume_in_processes, 2, kind, tmp_path, 3) == [None, None]
    assert run_processes(resume_in_processes, 2, kind, tmp_path, 7) == [None, None]
    assert run_processes(resume_in_processes, 2, kind, tmp_path) == expected


def resume_in_processes(kind: str, directory: Path | None, stop_at: int | None = None) -> Any:
    trainer = train(kind, 0, directory, stop_at)
    assert trainer.accelerator.num_processes == 2
    return None if stop_at is not None else outcome_of(trainer)


@pytest.mark.parametrize("kind", ["iterable with state", "own loader with state"])
def test_a_stream_that_can_go_on_is_not_read_again(kind: str, tmp_path: Path) -> None:
    train(kind, 0, tmp_path, 16)  # nine updates in an epoch, so seven of the second are done
    counted = ShardsWithState if kind == "iterable with state" else OwnLoaderWithState
    counted.num_made = 0
    train(kind, 0, tmp_path, 17)
    # One batch that was interrupted, the next one, and the one that tells that there is another.
    assert counted.num_made <= (15 if counted is ShardsWithState else 3)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "iterable",
            "(Shards) has no state_dict and load_state_dict: after an interruption within an epoch it is read",
        ),
        ("own loader", "OwnLoader iterates in its own way and has no state_dict and load_state_dict"),
    ],
)
def test_what_it_costs_to_go_on_is_told_in_words(
    kind: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(kind, 0, tmp_path, None)
    assert capsys.readouterr().out.count(words) == 1
    train("map-style", 0, tmp_path / "other", None)
    assert "Note on resuming" not in capsys.readouterr().out


def test_a_sampler_that_cannot_be_resumed_is_noticed(tmp_path: Path) -> None:
    LOADERS["forgetful"] = lambda w: DataLoader(Numbers(), 5, sampler=ForgetfulSampler())
    try:
        train("forgetful", 0, tmp_path, 13)
        with pytest.warns(UserWarning, match="ForgetfulSampler has drawn other samples for epoch 2 than before"):
            train("forgetful", 0, tmp_path, None)
        train("forgetful", 0, tmp_path / "first", 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # in the first epoch it draws what it drew
            train("forgetful", 0, tmp_path / "first", None)
    finally:
        del LOADERS["forgetful"]


def test_a_stream_divided_between_other_workers_is_refused(tmp_path: Path) -> None:
    train("iterable with state", 2, tmp_path, 4)
    with pytest.raises(CheckpointError, match="begun with num_workers=2 and cannot go on with num_workers=0"):
        train("iterable with state", 0, tmp_path, None)


def test_map_style_data_may_have_other_workers(tmp_path: Path) -> None:
    expected = outcome_of(train("map-style", 0, None, None))
    train("map-style", 2, tmp_path, 13)
    assert outcome_of(train("map-style", 0, tmp_path, None)) == expected


class Grid(Dataset[Any]):
    """Without noise, for runs whose batches differ."""

    def __init__(self, num_samples: int = 50) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return value_of(index, has_noise=False)


def train_split(
    directory: Path | None,
    batch_size: int,
    accumulation: int,
    stop_at: int | None,
    num_samples: int = 50,
    **kwargs: Any,
) -> Any:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    callbacks: list[Any] = [interrupt_at(stop_at)]
    if directory is not None:
        callbacks.append(SaveTrainingStateCallback(directory, save_every_n_updates=1))
    trainer = IndexTrainer(model, None, partial(torch.optim.SGD, lr=0.05, momentum=0.9), callbacks, seed=4)
    try:
        trainer.train(
            Grid(num_samples),
            3,
            per_device_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            resume_from=None if directory is None else "latest",
            **kwargs,
        )
    except Interruption:
        return trainer.accelerator.num_processes
    weights = torch.cat([value.flatten().double() for value in trainer.get_model().state_dict().values()])
    losses = trainer.run_history.get_metric_values("train_loss_epoch")
    return trainer.accelerator.num_processes, weights, losses, trainer.seen, trainer.num_updates, trainer.num_samples


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 4, 1), (1, 8, 1)), ((1, 8, 1), (2, 4, 1)), ((2, 2, 2), (1, 4, 2)), ((1, 2, 4), (2, 2, 2))],
)
def test_goes_on_with_another_number_of_processes(
    before: tuple[int, int, int], after: tuple[int, int, int], tmp_path: Path
) -> None:
    """The same total batch in other parts: each sample once, the same updates but for rounding."""
    [expected, *_] = run_processes(train_split, 1, None, 8, 1, None)
    for stop_at, (num_processes, batch_size, accumulation) in ((3, before), (10, after)):
        found = run_processes(train_split, num_processes, tmp_path, batch_size, accumulation, stop_at)
        assert found == [num_processes] * num_processes
    num_processes, batch_size, accumulation = before
    resumed = run_processes(train_split, num_processes, tmp_path, batch_size, accumulation, None)
    for own in resumed:
        assert own[0] == num_processes
        assert (own[1] - expected[1]).norm() / expected[1].norm() < 1e-6
        assert own[2] == pytest.approx(expected[2], rel=1e-6)
        assert all(sorted(indices) == list(range(50)) for indices in own[3].values())
        assert own[4:] == expected[4:] == (21, 150)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 4}, r"samples in an update .*: 8 in .*, 4 in this run"),
        ({"accumulation": 2}, r"samples in an update .*: 8 in .*, 16 in this run"),
        ({"num_samples": 49}, r"samples in the training data: 50 in .*, 49 in this run"),
    ],
)
def test_another_batch_size_or_dataset_is_refused(change: dict[str, int], words: str, tmp_path: Path) -> None:
    train_split(tmp_path, 8, 1, 3)
    arguments = {"batch_size": 8, "accumulation": 1, "num_samples": 50} | change
    with pytest.raises(CheckpointMismatchError, match=words):
        train_split(tmp_path, stop_at=None, **arguments)

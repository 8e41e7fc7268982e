"""Order, sharding and randomness of the data."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product, zip_longest
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LambdaCallback
from pytorch_accelerated.data import (
    choose_num_workers,
    create_dataloader,
    default_arguments,
    describe,
    look_ahead,
    shard_dataloader,
)
from pytorch_accelerated.randomness import mix
from tests.support import PlainDataset, Stream, assert_equal_weights, make_data, make_mlp, run_processes, weights_of


class Augmented(Dataset[Any]):
    """Each sample is its number and what the three random libraries gave while it was made."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(()).item(), np.random.rand(), random.random()], dtype=torch.float64)


class AugmentedStream(IterableDataset[Any]):
    def __init__(self, size: int) -> None:
        self.source = Augmented(size)

    def __iter__(self) -> Any:
        return (self.source[index] for index in range(len(self.source)))


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x.sum()).mean()}


class Seen(Trainer):
    """Keeps the batches that training brings, by epoch."""

    def train_epoch_start(self) -> None:
        super().train_epoch_start()
        self.epochs = [*getattr(self, "epochs", []), []]

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        if self.has_samples:
            self.epochs[-1].append(batch.clone())
        return super().calculate_train_batch_loss(batch)


def see(
    seed: int | None = None,
    size: int = 11,
    batch_size: int = 3,
    num_epochs: int = 2,
    workers: int = 0,
    stream: bool = False,
    **kwargs: Any,
) -> list[list[torch.Tensor]]:
    model = Sum()
    trainer = Seen(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), callbacks=None, seed=seed)
    dataset: Any = AugmentedStream(size) if stream else Augmented(size)
    trainer.train(
        dataset,
        num_epochs,
        per_device_batch_size=batch_size,
        train_dataloader_kwargs={"num_workers": workers, "persistent_workers": workers > 1, **kwargs},
    )
    return trainer.epochs


def joined(epochs: list[list[torch.Tensor]]) -> torch.Tensor:
    return torch.cat([torch.cat(epoch) for epoch in epochs])


@pytest.mark.parametrize("stream", [False, True])
def test_same_seed_same_data_for_any_number_of_workers(stream: bool) -> None:
    """Order and augmentation by torch, numpy and random, to the bit, with persistent workers too."""
    reference = joined(see(seed=5, stream=stream))
    assert torch.equal(joined(see(seed=5, stream=stream)), reference)
    if stream:  # each worker of a stream reads a copy of it, as torch has it; one worker reads what none would
        assert torch.equal(joined(see(seed=5, stream=stream, workers=1)), reference)
        return
    for workers in (1, 2):
        assert torch.equal(joined(see(seed=5, workers=workers)), reference)


@pytest.mark.parametrize("stream", [False, True])
def test_two_workers_are_reproducible(stream: bool) -> None:
    first, second = (joined(see(seed=5, stream=stream, workers=2)) for _ in range(2))
    assert torch.equal(first, second)


def test_another_seed_gives_another_order_and_augmentation() -> None:
    first, second = joined(see(seed=5)), joined(see(seed=6))
    assert not torch.equal(first[:, 0], second[:, 0])
    assert not set(first[:, 1].tolist()) & set(second[:, 1].tolist())


@pytest.mark.parametrize("stream", [False, True])
def test_augmentation_differs_between_samples_batches_and_epochs(stream: bool) -> None:
    epochs = see(seed=5, stream=stream)
    for column in (1, 2, 3):
        values = joined(epochs)[:, column].tolist()
        assert len(set(values)) == len(values) == 22
    first, second = (torch.cat(epoch)[:, 0].tolist() for epoch in epochs)
    assert sorted(first) == sorted(second) == list(range(11))
    assert stream or first != second


def see_in_process(stream: bool) -> Any:
    return [[batch.tolist() for batch in epoch] for epoch in see(seed=5, size=19, batch_size=3, stream=stream)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_an_epoch_and_its_order(num_processes: int, stream: bool) -> None:
    """Batch i of the global order goes to process i mod n; each sample once; augmentation differs between processes."""
    alone = see(seed=5, size=19, batch_size=3, stream=stream)
    by_process = run_processes(see_in_process, num_processes, stream)
    for epoch in range(2):
        batches = [results[epoch] for results in by_process]
        rounds_by_process = list(
            zip_longest(*batches, fillvalue=[])
        )  # one with nothing left in the last round kept nothing
        rounds = [[row for batch in round_ for row in batch] for round_ in rounds_by_process]
        order = [row[0] for round_ in rounds for row in round_]
        assert order == torch.cat(alone[epoch])[:, 0].tolist()
        num_full_rounds = 19 // (3 * num_processes)
        sizes = [len(batch) for batch in rounds_by_process[-1]]
        assert sum(sizes) == 19 % (3 * num_processes) and max(sizes) - min(sizes) <= 1
        values = [row[1] for round_ in rounds for row in round_]
        assert len(set(values)) == len(values)
        if not stream:  # full rounds are, augmentation included, what one process sees
            num_same = num_full_rounds * num_processes * 3
            assert values[:num_same] == torch.cat(alone[epoch])[:num_same, 1].tolist()


# --------------------------------------------------------------------------------------------------------------------
# The user's own random streams
# --------------------------------------------------------------------------------------------------------------------


def streams() -> tuple[float, float, float]:
    return torch.rand(()).item(), np.random.rand(), random.random()


def seed_streams(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_without_a_seed_the_users_seed_rules_and_his_streams_are_left_alone(workers: int, stream: bool) -> None:
    runs = []
    for seed in (1, 1, 2):
        seed_streams(seed)
        data = joined(see(workers=workers, stream=stream))
        runs.append((data, streams()))
    seed_streams(1)
    assert streams() == runs[0][1] == runs[1][1]
    assert torch.equal(runs[0][0], runs[1][0])
    assert not set(runs[0][0][:, 1].tolist()) & set(runs[2][0][:, 1].tolist())


def test_a_second_run_does_not_repeat_the_order_of_the_first() -> None:
    torch.manual_seed(0)
    model = Sum()
    trainer = Seen(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), callbacks=None)
    for _ in range(2):
        trainer.train(Augmented(11), 1)
    assert not torch.equal(torch.cat(trainer.epochs[0]), torch.cat(trainer.epochs[1]))
    assert trainer.run_config.seed is not None


def test_importing_draws_nothing_and_configures_nothing() -> None:
    code = """
import logging, random, sys, warnings
import numpy as np, torch, accelerate
torch.manual_seed(7); np.random.seed(7); random.seed(7)
before = torch.initial_seed(), torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
filters, level, handlers = list(warnings.filters), logging.root.level, list(logging.root.handlers)
import pytorch_accelerated, pytorch_accelerated.callbacks, pytorch_accelerated.schedulers
after = torch.initial_seed(), torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
assert before[0] == after[0] and torch.equal(before[1], after[1]) and before[2:] == after[2:]
assert (filters, level, handlers) == (list(warnings.filters), logging.root.level, list(logging.root.handlers))
loaded = {"torchmetrics", "tensorboard", "matplotlib", "pandas"} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def dropout_weights(seed: int | None) -> Any:
    if seed is None:
        torch.manual_seed(3)
    trainer = Trainer(make_mlp(dropout=0.5), nn.CrossEntropyLoss(), lambda p: torch.optim.SGD(p, lr=0.1), seed=seed)
    masks = []

    def note(trainer: Any, **kwargs: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            masks.append(torch.rand(4).tolist())

    from pytorch_accelerated.callbacks import LambdaCallback

    trainer.callback_handler.add_callback(LambdaCallback(on_train_step_begin=note))
    trainer.train(make_data(12), 1, per_device_batch_size=2)
    return masks


def test_a_seed_makes_dropout_differ_between_processes() -> None:
    first, second = run_processes(dropout_weights, 2, 5)
    assert first != second
    assert run_processes(dropout_weights, 2, 5) == [first, second]
    users = run_processes(dropout_weights, 2, None)
    assert users[0] == users[1]  # the user seeded both alike, and is left in charge


@pytest.mark.parametrize("workers", [0, 2])
def test_two_runs_with_one_seed_are_bit_equal(workers: int) -> None:
    class Noisy(PlainDataset):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return x + torch.randn(4) * np.random.rand() * random.random(), y

    def train(seed: int) -> Any:
        trainer = Trainer(
            make_mlp(dropout=0.3),
            nn.CrossEntropyLoss(),
            lambda p: torch.optim.Adam(p, lr=0.01),
            callbacks=None,
            seed=seed,
        )
        trainer.train(Noisy(make_data(20)), 2, Noisy(make_data(6)), train_dataloader_kwargs={"num_workers": workers})
        return weights_of(trainer), trainer.run_history.state_dict()

    first, second, other = train(1), train(1), train(2)
    assert_equal_weights(first[0], second[0])
    assert first[1] == second[1]
    assert first[1] != other[1]


# --------------------------------------------------------------------------------------------------------------------
# Samplers, datasets, loaders
# --------------------------------------------------------------------------------------------------------------------


def order_of(loader: Any, epochs: int = 2, seed: int = 0) -> list[list[float]]:
    sharded = shard_dataloader(loader, Accelerator(cpu=True), seed)
    return [[row[0] for batch in sharded.iterate(epoch) for row in batch.tolist()] for epoch in range(1, epochs + 1)]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    for workers in (0, 2):
        loader = DataLoader(Augmented(50), batch_size=4, shuffle=True, num_workers=workers)
        first, second = order_of(loader)
        assert first != second and sorted(first) == sorted(second) == list(range(50))
        assert order_of(loader) == [first, second]
        assert order_of(loader, seed=1)[0] != first


@pytest.mark.parametrize(
    "make_sampler",
    [
        lambda: RandomSampler(range(20), replacement=True, num_samples=13),
        lambda: WeightedRandomSampler([0.1] * 10 + [1.0] * 10, 13),
    ],
)
def test_samplers_that_draw_follow_seed_and_epoch_too(make_sampler: Any) -> None:
    def order(seed: int) -> Any:
        torch.manual_seed(torch.seed() % 1000)  # whatever the global stream is
        before = torch.get_rng_state()
        result = order_of(DataLoader(Augmented(20), batch_size=4, sampler=make_sampler()), seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        return result

    first, second = order(0)
    assert first != second and len(first) == 13
    assert order(0) == [first, second] != order(1)


def test_set_epoch_reaches_samplers_and_datasets_in_persistent_workers() -> None:
    class Epochs(Dataset[Any]):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor([self.epoch])

    class EpochStream(IterableDataset[Any]):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Any:
            yield from [torch.tensor([self.epoch])] * 3

    for dataset, workers in product((Epochs(), EpochStream()), (0, 1, 2)):
        loader = DataLoader(dataset, batch_size=2, num_workers=workers, persistent_workers=workers > 0)
        for epoch, values in enumerate(order_of(loader), 1):
            assert set(values) == {epoch}

    class Sampler:
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Any:
            return iter([self.epoch, 0])

    assert order_of(DataLoader(Augmented(5), sampler=Sampler())) == [[1, 0], [2, 0]]


def test_in_memory_tensors_are_fetched_a_batch_at_a_time() -> None:
    class Counting(torch.Tensor):
        calls: list[Any] = []

        def __getitem__(self, index: Any) -> Any:
            self.calls.append(index)
            return super().__getitem__(index).as_subclass(torch.Tensor)

    x = torch.arange(10.0)[:, None].as_subclass(Counting)
    batches = list(shard_dataloader(DataLoader(TensorDataset(x), batch_size=4), Accelerator(cpu=True), 0).iterate(1))
    assert [batch[0].flatten().tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(Counting.calls) == 3


def test_datasets_that_fetch_batches_themselves_are_asked_for_batches() -> None:
    asked = []

    class Batched(Augmented):
        def __getitems__(self, indices: list[int]) -> Any:
            asked.append(indices)
            return [self[index] for index in indices]

    order_of(DataLoader(Batched(5), batch_size=2), epochs=1)
    assert asked == [[0, 1], [2, 3], [4]]


def test_a_distributed_sampler_is_refused() -> None:
    loader = DataLoader(Augmented(5), sampler=DistributedSampler(Augmented(5), num_replicas=2, rank=0))
    with pytest.raises(ValueError, match="got a DistributedSampler; the Trainer gives each process its part"):
        shard_dataloader(loader, Accelerator(cpu=True), 0)


def test_a_limit_shortens_epoch_and_length() -> None:
    for dataset in (Augmented(10), AugmentedStream(10)):
        loader = shard_dataloader(DataLoader(dataset, batch_size=2), Accelerator(cpu=True), 0)
        loader.limit = 3
        batches = []
        for batch in loader.iterate(1):
            batches.append((batch[:, 0].tolist(), loader.is_last))
        assert batches == [([0, 1], False), ([2, 3], False), ([4, 5], True)]
    assert shard_dataloader(DataLoader(Augmented(10), batch_size=2), Accelerator(cpu=True), 0).num_steps == 5


def test_own_loader_of_a_subclass_is_used() -> None:
    class Own(Seen):
        def create_train_dataloader(self, batch_size: int, train_dl_kwargs: Any = None) -> Any:
            assert (batch_size, train_dl_kwargs) == (3, {"num_workers": 0})
            self.own = DataLoader(self.train_dataset, batch_size=4, sampler=range(9, -1, -1))
            return self.own

    model = Sum()
    trainer = Own(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), callbacks=None)
    trainer.train(Augmented(10), 1, per_device_batch_size=3, train_dataloader_kwargs={"num_workers": 0})
    assert torch.cat(trainer.epochs[0])[:, 0].tolist() == list(range(9, -1, -1))
    assert trainer.run_config.train_per_device_batch_size == 4


def test_collate_functions_are_used_and_draw_keyed_randomness() -> None:
    def collate(samples: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(samples) + torch.rand(()).double()

    model = Sum()
    results = []
    for _ in range(2):
        trainer = Seen(model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-30), callbacks=None, seed=1)
        trainer.train(Augmented(6), 1, per_device_batch_size=3, collate_fn=collate)
        results.append(joined(trainer.epochs))
    assert torch.equal(*results)
    assert (results[0][:, 0] % 1).unique().numel() == 2  # one number for each batch


@pytest.mark.parametrize("data", [make_data(9), PlainDataset(make_data(9)), Stream(make_data(9))])
def test_drop_last_drops_the_incomplete_round(data: Any) -> None:
    model = make_mlp()
    trainer = Trainer(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), callbacks=None)
    trainer.train(data, 2, per_device_batch_size=4, train_dataloader_kwargs={"drop_last": True})
    assert (trainer.num_samples, trainer.num_steps) == (16, 4)


def test_mix_is_a_fixed_function() -> None:
    assert mix(1, "order", 2) == mix(1, "order", 2)
    assert len({mix(seed, epoch) for seed in range(100) for epoch in range(100)}) == 10_000
    assert all(0 <= mix(n) < 2**63 for n in range(100))
    assert mix(0, "order", 1) == 2002067703672271585  # a change would change every run ever recorded


def test_describe_says_structure_and_no_values() -> None:
    batch = {"x": torch.zeros(2, 3), "meta": [("a", 1), np.zeros(2)], "n": None}
    assert describe(batch) == (
        "dict {'x': float32[2, 3] on cpu, 'meta': list of 2 (tuple of 2 (str, int), numpy float64[2]), 'n': NoneType}"
    )


def test_create_dataloader_gives_plain_torch_loaders() -> None:
    loader = create_dataloader(Augmented(5), None, {"batch_size": 2, "shuffle": True}, {"batch_size": 3})
    assert type(loader) is DataLoader and loader.batch_size == 3 and type(loader.sampler) is RandomSampler
    batches = create_dataloader(
        Augmented(5), None, {"batch_size": 2, "shuffle": True}, {"batch_sampler": [[0], [1, 2]]}
    )
    assert [len(batch) for batch in batches] == [1, 2]


# --------------------------------------------------------------------------------------------------------------------
# Loaders and samplers that have a will of their own
# --------------------------------------------------------------------------------------------------------------------


class PlusHundred(DataLoader[Any]):
    """A DataLoader that changes what it yields."""

    def __iter__(self) -> Any:
        for [number] in super().__iter__():
            yield [number + 100]


class Batches:
    """Ready batches of 2, 3, 2, 3, 1 numbers; no DataLoader."""

    def __iter__(self) -> Any:
        numbers = torch.arange(11.0)
        return iter([[part] for part in numbers.split([2, 3, 2, 3, 1])])


class OwnGenerator:
    """A sampler that draws from the operating system: other numbers on each process."""

    def __iter__(self) -> Any:
        return iter(np.random.default_rng().permutation(11).tolist())

    def __len__(self) -> int:
        return 11


def numbers_in_training(kind: str) -> tuple[list[float], int]:
    from accelerate import Accelerator

    accelerator = Accelerator()
    data = TensorDataset(torch.arange(11.0))
    generator = torch.Generator()
    generator.seed()  # from the operating system
    loaders: dict[str, Any] = {
        "own __iter__": lambda: PlusHundred(data, batch_size=2, shuffle=True),
        "own __iter__, batch sampler": lambda: PlusHundred(
            data, batch_sampler=[[0, 1, 2], [3], [4, 5, 6], [7, 8], [9, 10]]
        ),
        "own __iter__, stream": lambda: PlusHundred(Stream(data), batch_size=2),
        "batches": Batches,
        "generator": lambda: DataLoader(data, batch_size=2, shuffle=True, generator=generator),
        "sampler": lambda: DataLoader(data, batch_size=2, sampler=OwnGenerator()),
        "sampler, workers": lambda: DataLoader(data, batch_size=2, sampler=OwnGenerator(), num_workers=2),
        "batch sampler": lambda: DataLoader(
            data, batch_sampler=torch.utils.data.BatchSampler(OwnGenerator(), 2, False)
        ),
        "prepared": lambda: accelerator.prepare_data_loader(DataLoader(data, batch_size=2, shuffle=True)),
    }

    class Noting(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> Any:
            if self.has_samples:
                seen.extend(batch[0].tolist())
            return self.model(batch[0][:, None]).mean()

    seen: list[float] = []
    trainer = Noting(nn.Linear(1, 1), None, lambda p: torch.optim.SGD(p, lr=0.1), None, accelerator=accelerator)
    trainer.train(loaders[kind](), 2)
    return seen, trainer.num_samples


KINDS = [
    "own __iter__",
    "own __iter__, batch sampler",
    "own __iter__, stream",
    "batches",
    "generator",
    "sampler",
    "sampler, workers",
    "batch sampler",
    "prepared",
]


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_is_seen_once_whatever_makes_the_batches(kind: str, num_processes: int) -> None:
    results = run_processes(numbers_in_training, num_processes, kind)
    seen = sorted(number for numbers, _ in results for number in numbers)
    first = 100 if kind.startswith("own") else 0
    assert seen == sorted([first + number for number in range(11)] * 2)
    assert {num_samples for _, num_samples in results} == {22}


class Numbered(IterableDataset[Any]):
    """Divides itself between workers the way that torch's documentation shows."""

    def __init__(self) -> None:
        self.start, self.end = 0, 12

    def __iter__(self) -> Any:
        return iter(torch.arange(self.start, self.end).float()[:, None])


def divide(worker_id: int) -> None:
    info: Any = torch.utils.data.get_worker_info()
    half = (info.dataset.end - info.dataset.start) // info.num_workers
    info.dataset.start = worker_id * half
    info.dataset.end = info.dataset.start + half


class Opened(Dataset[Any]):
    """Needs what its worker_init_fn puts on it."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        assert torch.utils.data.get_worker_info().dataset is self  # type: ignore[union-attr]
        return torch.tensor([float(self.offset + index)])  # type: ignore[attr-defined]


def open_it(worker_id: int) -> None:
    torch.utils.data.get_worker_info().dataset.offset = 0  # type: ignore[union-attr]


@pytest.mark.parametrize(("dataset", "worker_init_fn"), [(Numbered(), divide), (Opened(), open_it)])
def test_worker_init_functions_find_the_users_dataset(dataset: Any, worker_init_fn: Any) -> None:
    arguments = {"num_workers": 2, "worker_init_fn": worker_init_fn}
    numbers = Trainer(nn.Identity(), callbacks=None).predict(
        dataset, per_device_batch_size=3, dataloader_kwargs=arguments
    )
    assert sorted(numbers.flatten().tolist()) == list(range(12))


def test_a_dataset_shared_with_evaluation_is_told_its_epoch_again() -> None:
    class Told(PlainDataset):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.calls = [*getattr(self, "calls", []), epoch]
            self.epoch = epoch

        def __getitem__(self, index: int) -> Any:
            epochs.append(self.epoch)
            return super().__getitem__(index)

    epochs: list[int] = []
    data = Told(make_data(8))
    at: list[Any] = []
    callback = LambdaCallback(
        on_train_step_begin=lambda trainer, **_: at.append((trainer.current_epoch, epochs[-1])),
        on_train_update_end=lambda trainer, **_: trainer.run_evaluation(),
    )
    trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), lambda p: torch.optim.SGD(p, lr=0.1), [callback])
    trainer.train(data, 2, data, per_device_batch_size=4)
    assert at == [(1, 1), (1, 1), (2, 2), (2, 2)]
    assert data.calls[:2] == [1, 0] and len(data.calls) < 12  # told when it changes, not for each batch


def test_predict_refuses_loaders_that_shuffle() -> None:
    trainer = Trainer(nn.Identity(), callbacks=None)
    data = TensorDataset(torch.arange(8.0))
    for arguments in ({"shuffle": True}, {"sampler": WeightedRandomSampler([1.0] * 8, 8)}):
        with pytest.raises(
            ValueError, match="predict returns outputs in the order of the dataset, but its DataLoader sh"
        ):
            trainer.predict(DataLoader(data, **arguments))
    with pytest.raises(ValueError, match="its DataLoader shuffles"):
        trainer.predict(data, dataloader_kwargs={"sampler": RandomSampler(data)})


# --------------------------------------------------------------------------------------------------------------------
# Batches ahead, workers, and batches to the bit
# --------------------------------------------------------------------------------------------------------------------


class Copies:
    """Notes what is done with the batches, which are numbers; the copy of a number is a tuple of it."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.log: list[tuple[str, int]] = []
        self._fails_at = fails_at

    def begin(self, number: Any) -> Any:
        self.log.append(("begin", number))
        if number == self._fails_at:
            raise MemoryError(number)
        return (number,)

    def end(self, copied: Any) -> None:
        [number] = copied
        self.log.append(("end", number))

    def use(self, copied: Any) -> None:
        [number] = copied
        self.log.append(("use", number))

    def make(self, size: int, fails: bool = False) -> Iterator[Any]:
        for number in range(size):
            self.log.append(("make", number))
            yield number
        if fails:
            raise ZeroDivisionError(size)


@pytest.mark.parametrize("size", [0, 1, 2, 5])
def test_the_copy_of_the_next_batch_is_on_its_way_before_a_batch_is_used(size: int) -> None:
    copies = Copies()
    for copied in look_ahead(copies.make(size), copies):
        copies.use(copied)
    expected = [("make", 0), ("begin", 0)] if size else []
    for number in range(size):
        expected.append(("end", number))
        if number + 1 < size:
            expected += [("make", number + 1), ("begin", number + 1)]
        expected.append(("use", number))
    assert copies.log == expected


@pytest.mark.parametrize("what", ["making", "copying"])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_an_error_in_a_batch_is_raised_when_those_before_it_have_been_used(number: int, what: str) -> None:
    copies = Copies(number if what == "copying" else None)
    batches = copies.make(number, fails=True) if what == "making" else copies.make(number + 3)
    with pytest.raises(ZeroDivisionError if what == "making" else MemoryError) as raised:
        for copied in look_ahead(batches, copies):
            copies.use(copied)
    assert raised.value.args == (number,)
    assert [used for event, used in copies.log if event == "use"] == list(range(number))
    assert not [made for event, made in copies.log if made > number]


class OnDevice(PlainDataset):
    """Holds a tensor elsewhere than on the CPU."""

    def __init__(self, device: str) -> None:
        super().__init__(make_data(3))
        self.table = torch.zeros(2, device=device)


def test_workers_are_chosen_where_they_help() -> None:
    accelerator_device, cpu = torch.device("cuda"), torch.device("cpu")
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for num_processes in (1, 2, 4, 1000):
        expected = max(0, min(8, num_cores // num_processes - 1))
        for dataset in (Augmented(5), PlainDataset(make_data(5)), OnDevice("cpu"), [1, 2, 3]):
            assert choose_num_workers(dataset, accelerator_device, num_processes) == expected
            assert choose_num_workers(dataset, cpu, num_processes) == 0
    for dataset in (make_data(5), Stream(make_data(5)), AugmentedStream(5), OnDevice("meta")):
        assert choose_num_workers(dataset, accelerator_device, 1) == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen on this system")
def test_workers_leave_a_core_to_the_main_process() -> None:
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert choose_num_workers(Augmented(5), torch.device("cuda"), 1) == 0
    finally:
        os.sched_setaffinity(0, cores)


def test_on_the_cpu_there_are_no_workers_and_nothing_is_pinned() -> None:
    arguments = default_arguments(Augmented(5), Accelerator(cpu=True), 4)
    assert arguments == {"batch_size": 4, "pin_memory": False, "num_workers": 0, "persistent_workers": False}


class Changeable(Dataset[Any]):
    """Samples are the number of the worker's process and what an attribute says."""

    def __init__(self) -> None:
        self.stage = 1.0

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        assert get_worker_info() is not None
        return torch.tensor([os.getpid(), self.stage], dtype=torch.float64)


@pytest.mark.parametrize("changes", [True, False])
def test_workers_that_persist_see_attributes_that_are_changed_between_epochs(changes: bool) -> None:
    class Staged(Seen):
        def train_epoch_start(self) -> None:
            super().train_epoch_start()
            if changes and self.current_epoch == 2:
                self.train_dataset.stage = 2.0

    model = Sum()
    trainer = Staged(model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-30), callbacks=None)
    arguments = {"num_workers": 2, "persistent_workers": True}
    trainer.train(Changeable(), 3, per_device_batch_size=2, train_dataloader_kwargs=arguments)
    workers, stages = [], []
    for epoch in trainer.epochs:
        numbers, values = torch.cat(epoch).T.tolist()
        workers.append(set(numbers))
        stages.append(set(values))
    assert stages == ([{1.0}, {2.0}, {2.0}] if changes else [{1.0}] * 3)
    assert [len(numbers) for numbers in workers] == [2, 2, 2] and os.getpid() not in workers[0]
    assert workers[1] == workers[2]
    assert not workers[0] & workers[1] if changes else workers[0] == workers[1]


class Pair(NamedTuple):
    x: torch.Tensor
    y: Any


class Marked(torch.Tensor):
    """A tensor of a type of its own."""


def row(index: int) -> torch.Tensor:
    return torch.randn(3, generator=torch.Generator().manual_seed(index))


ROWS: dict[str, Callable[[int], Any]] = {
    "tuples of tensors": lambda i: (row(i), torch.tensor(i)),
    "tuples of one": lambda i: (row(i),),
    "empty tuples": lambda i: (),
    "tensors": row,
    "mixed": lambda i: (row(i), i),
    "a tensor, then a number": lambda i: (row(i), torch.tensor(i) if i % 2 == 0 else i),
    "a number, then a tensor": lambda i: (row(i), torch.tensor(i) if i % 2 else i),
    "a tensor, then an array": lambda i: (row(i) if i % 2 == 0 else row(i).numpy(),),
    "floats and words": lambda i: (row(i), i / 7, str(i), None if i > 90 else True),
    "arrays": lambda i: (row(i).numpy(), np.float32(i)),
    "lists": lambda i: [row(i), torch.tensor(i)],
    "a tuple, then a list": lambda i: (row(i), row(i)) if i % 2 == 0 else [row(i), row(i)],
    "dicts": lambda i: {"x": row(i), "y": i},
    "nested": lambda i: ({"x": row(i)}, (row(i), [i])),
    "named tuples": lambda i: Pair(row(i), i),
    "named tuples of tensors": lambda i: Pair(row(i), row(i + 1)),
    "a tuple, then a named tuple": lambda i: (row(i), row(i)) if i % 2 == 0 else Pair(row(i), row(i)),
    "a subclass": lambda i: (row(i).as_subclass(Marked), torch.tensor(i)),
    "a tensor, then a subclass": lambda i: (row(i) if i % 2 == 0 else row(i).as_subclass(Marked),),
    "parameters": lambda i: (nn.Parameter(row(i)), row(i)),
    "with gradient": lambda i: (row(i).requires_grad_(), row(i)),
    "other types of numbers": lambda i: (row(i) if i % 2 == 0 else row(i).double(),),
    "half": lambda i: (row(i).bfloat16(), row(i) > 0),
    "different lengths": lambda i: (row(i),) * (1 + i % 2),
    "different lengths, the longer first": lambda i: (row(i),) * (2 - i % 2),
    "different shapes": lambda i: (torch.zeros(1 + i),),
    "a tuple, then a number": lambda i: (row(i),) if i % 2 == 0 else i,
    "sparse": lambda i: (row(i).to_sparse(), row(i)),
    "things": lambda i: (row(i), object()),
}


def outcome(make: Callable[[], Any]) -> Any:
    """Return what ``make`` returns, or the type of the error it raises."""
    try:
        return make()
    except Exception as error:
        return type(error)


def assert_same(first: Any, second: Any) -> None:
    """Check that two batches are the same to the bit, and of the same types."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert (first.dtype, first.shape, first.requires_grad) == (second.dtype, second.shape, second.requires_grad)
        assert torch.equal(first.as_subclass(torch.Tensor), second.as_subclass(torch.Tensor))
    elif isinstance(first, dict):
        assert_same(list(first.items()), list(second.items()))
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


@pytest.mark.parametrize("kind", ROWS)
def test_batches_are_those_of_torchs_default_to_the_bit(kind: str) -> None:
    rows = [ROWS[kind](index) for index in range(5)]
    loader = shard_dataloader(DataLoader(PlainDataset(rows), batch_size=3), Accelerator(cpu=True), 0)
    expected = outcome(lambda: [default_collate(rows[:3]), default_collate(rows[3:])])
    for _ in range(2):
        assert_same(outcome(lambda: list(loader.iterate(0))), expected)

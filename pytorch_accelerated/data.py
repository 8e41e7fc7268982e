"""Order, sharding and randomness of the data: functions of (seed, epoch, position), not states.

A DataLoader, whoever made it, describes one stream of batches. ``shard_dataloader`` turns it into this process's part
of that stream: batch ``i`` goes to process ``i mod n``; the last round, where it is incomplete, is divided so that each
sample is used once and every process has a part. A process for which nothing is left repeats a sample with weight zero,
because models and callbacks may talk to each other in every step.
"""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import broadcast_object_list, find_batch_size, send_to_device, slice_tensors
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from pytorch_accelerated.errors import did_you_mean

# --------------------------------------------------------------------------------------------------------------------
# Randomness
# --------------------------------------------------------------------------------------------------------------------


def mix(*key: int | str) -> int:
    """Return a seed below 2**63 that is a function of ``key`` alone; nearby keys give unrelated seeds."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def peek_at_torch_stream() -> int:
    """Return the number that torch's global stream (CPU) would give next, without drawing it."""
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return int(torch.randint(2**62, (), generator=generator))


def seed_host_streams(seed: int) -> None:
    """Seed the global random streams of torch (CPU only), numpy and random."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reset the devices' streams
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_all_streams(seed: int) -> None:
    """Seed the global random streams of torch (all devices), numpy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _get_host_streams() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_host_streams(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


@contextmanager
def host_streams_preserved() -> Iterator[None]:
    """Put the global random streams of torch (CPU), numpy and random back as they were when the block began."""
    states = _get_host_streams()
    try:
        yield
    finally:
        _set_host_streams(states)


@contextmanager
def random_streams_preserved(device: torch.device) -> Iterator[None]:
    """Put the global random streams, that of ``device`` included, back as they were when the block began."""
    with host_streams_preserved():
        if device.type in ("cpu", "meta", "xla"):
            yield
        else:
            with torch.random.fork_rng(devices=[device], device_type=device.type):
                yield


def _chunks(iterable: Iterable[Any], size: int, seed: int) -> Iterator[list[Any]]:
    """Yield the items of ``iterable`` in lists of ``size``, on random streams of its own that begin at ``seed``."""
    iterator: Iterator[Any] | None = None
    states: tuple[Any, ...] = ()
    while True:
        with host_streams_preserved():
            if iterator is None:
                seed_host_streams(seed)
                iterator = iter(iterable)
            else:
                _set_host_streams(states)
            chunk = list(islice(iterator, size))
            states = _get_host_streams()
        if not chunk:
            return
        yield chunk


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Run the block on streams seeded with ``seed``; in the main process, whose streams others use, put them back."""
    if get_worker_info() is None:
        with host_streams_preserved():
            seed_host_streams(seed)
            yield
    else:
        seed_host_streams(seed)
        yield


# --------------------------------------------------------------------------------------------------------------------
# What travels from the samplers through the workers to the loop
# --------------------------------------------------------------------------------------------------------------------


class _Deal(NamedTuple):
    """What one process fetches in one round."""

    indices: Any  # list or tensor of indices into the dataset; of repeated samples where num_samples is 0
    seed: int  # of the randomness while fetching
    epoch: int
    num_samples: int | None  # of this process; None if the dataset makes whole batches
    round_samples: int | None  # of all processes
    is_last: bool


class _Fetched(NamedTuple):
    """One batch as it comes out of the dataset."""

    batch: Any
    num_samples: int | None
    round_samples: int | None
    is_last: bool


def _as_is(data: Any) -> Any:
    return data


def _tell_epoch(dataset: Any, epoch: int) -> None:
    """Call ``set_epoch`` of a dataset that has it, where the epoch is not the one it was told last.

    It may be costly; and training and evaluation may share a dataset, so that only the dataset knows what it was told.
    """
    if hasattr(dataset, "set_epoch") and getattr(dataset, "_pytorch_accelerated_epoch", None) != epoch:
        dataset.set_epoch(epoch)
        with suppress(AttributeError):  # a dataset that takes no attributes is told each time
            dataset._pytorch_accelerated_epoch = epoch


class _WorkerInit:
    """Let ``get_worker_info().dataset`` be the user's dataset, then call the user's ``worker_init_fn``."""

    def __init__(self, function: Callable[[int], Any] | None) -> None:
        self._function = function

    def __call__(self, worker_id: int) -> None:
        info: Any = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)  # its own __setattr__ refuses everything
        if self._function is not None:
            self._function(worker_id)


def _share(num_samples: int, batch_size: int | None, process: int, num_processes: int) -> slice:
    """Return the part of a round of ``num_samples`` that belongs to ``process``."""
    if batch_size is not None and num_samples == batch_size * num_processes:
        return slice(process * batch_size, (process + 1) * batch_size)
    size, rest = divmod(num_samples, num_processes)
    start = process * size + min(process, rest)
    return slice(start, start + size + (process < rest))


_ROUNDS_IN_A_MESSAGE = 16


class _RoundSampler:
    """Deal the batches of an epoch to the processes, round by round; a batch sampler for ``_KeyedDataset``."""

    def __init__(self, loader: DataLoader[Any], seed: int, process: int, num_processes: int) -> None:
        self._seed = seed
        self._process = process
        self._num_processes = num_processes
        self.limit: int | None = None
        self.epoch = 0
        self.as_tensor = False
        self.batch_sampler = loader.batch_sampler
        self.sampler = loader.sampler
        self.batch_size: int | None = None
        self._drop_last = False
        if type(loader.batch_sampler) is BatchSampler:
            self.sampler = loader.batch_sampler.sampler
            self.batch_size = loader.batch_sampler.batch_size
            self._drop_last = loader.batch_sampler.drop_last
        for sampler in (self.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)):
            if isinstance(sampler, DistributedSampler):
                raise ValueError(
                    "got a DistributedSampler; the Trainer gives each process its part of the data by itself, and "
                    "would divide that part again. Pass the sampler for one process (shuffle=True, or your own "
                    "sampler)."
                )

    def __len__(self) -> int:
        """Return the rounds in an epoch. Raises TypeError when the sampler has no length."""
        if self.batch_size is None:
            source: Any = self.batch_sampler if self.batch_sampler is not None else self.sampler
            return -(-len(source) // self._num_processes)
        total = self.batch_size * self._num_processes
        num_samples = len(self.sampler)  # type: ignore[arg-type]
        return num_samples // total if self._drop_last else -(-num_samples // total)

    def __iter__(self) -> Iterator[_Deal]:
        samplers: tuple[Any, ...] = (self.sampler, self.batch_sampler)
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
        rounds = self._rounds()
        upcoming = next(rounds, None)
        for number in count():
            if upcoming is None:
                return
            indices, upcoming = upcoming, next(rounds, None)
            is_last = upcoming is None or number + 1 == self.limit
            yield self._deal(indices, number, is_last)
            if is_last:
                return

    def _deal(self, drawn: Any, number: int, is_last: bool) -> _Deal:
        """Return this process's part of round ``number``, for which the sampler has ``drawn`` indices or batches."""
        process, num_processes = self._process, self._num_processes
        seed = mix(self._seed, "batch", self.epoch, number * num_processes + process)
        if self.batch_sampler is None:  # an index stands for a whole batch
            has_own = process < len(drawn)
            own = [drawn[process if has_own else 0]]
            return _Deal(own, seed, self.epoch, None if has_own else 0, None, is_last)
        if self.batch_size is None:  # batches of any size
            indices = [index for batch in drawn for index in batch]
            is_full = len(drawn) == num_processes
            own = drawn[process] if is_full else indices[_share(len(indices), None, process, num_processes)]
        else:
            indices = drawn
            own = indices[_share(len(indices), self.batch_size, process, num_processes)]
        num_own = len(own)
        return _Deal(own if num_own else indices[:1], seed, self.epoch, num_own, len(indices), is_last)

    def _rounds(self) -> Iterator[Any]:
        """Yield what is drawn for each round: a list or tensor of indices, or a list of batches where these vary."""
        seed = mix(self._seed, "sampler", self.epoch)
        if self.batch_size is None:
            source: Any = self.sampler if self.batch_sampler is None else self.batch_sampler
            yield from self._from_main(_chunks(source, self._num_processes, seed))
            return
        total = self.batch_size * self._num_processes
        order = self._known_order()
        if order is None:
            for indices in self._from_main(_chunks(self.sampler, total, seed)):
                if len(indices) == total or not self._drop_last:
                    yield indices
            return
        stop = len(order) - len(order) % total if self._drop_last else len(order)
        for start in range(0, stop, total):
            part = order[start : min(start + total, stop)]
            yield part if self.as_tensor else part.tolist()  # waits for nothing: the order is made on the CPU

    def _from_main(self, rounds: Iterator[list[Any]]) -> Iterator[list[Any]]:
        """Yield the rounds that the main process has drawn: others may draw others, from generators of their own."""
        if self._num_processes == 1:
            yield from rounds
            return
        while True:
            part = list(islice(rounds, _ROUNDS_IN_A_MESSAGE)) if self._process == 0 else None
            received: list[Any] = broadcast_object_list([part])[0]  # collective; every process draws in the same steps
            yield from received
            if len(received) < _ROUNDS_IN_A_MESSAGE:
                return

    def _known_order(self) -> Tensor | None:
        """Return the order of the whole epoch where it is ours to say, as an int64 tensor."""
        sampler = self.sampler
        if type(sampler) is SequentialSampler:
            return torch.arange(len(sampler))
        if (
            type(sampler) is RandomSampler
            and sampler.generator is None
            and not sampler.replacement
            and sampler.num_samples == len(sampler.data_source)
        ):
            generator = torch.Generator().manual_seed(mix(self._seed, "order", self.epoch))
            return torch.randperm(len(sampler), generator=generator)
        return None


class _KeyedDataset:
    """Fetch and collate the samples of a deal, with randomness that is a function of the deal's seed."""

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any], makes_batches: bool) -> None:
        self.dataset = dataset
        self._collate_fn = collate_fn
        self._makes_batches = makes_batches
        # In-memory tensors are indexed a batch at a time and draw no randomness.
        self.is_in_memory = type(dataset) is TensorDataset and collate_fn is default_collate and not makes_batches

    def __getitems__(self, deal: _Deal) -> _Fetched:
        if self.is_in_memory:
            batch = [tensor[deal.indices] for tensor in self.dataset.tensors]
            return _Fetched(batch, deal.num_samples, deal.round_samples, deal.is_last)
        # Here and not in the main process: workers that persist keep a copy of the dataset.
        _tell_epoch(self.dataset, deal.epoch)
        try:
            with _seeded(deal.seed):
                batch = self._collate_fn(self._samples(deal.indices))
        except Exception as error:
            some, rest = list(deal.indices)[:16], len(deal.indices) - 16
            error.add_note(
                f"pytorch_accelerated: samples {some}{f' and {rest} more' if rest > 0 else ''} of the dataset"
            )
            raise
        return _Fetched(batch, deal.num_samples, deal.round_samples, deal.is_last)

    def _samples(self, indices: Any) -> Any:
        if self._makes_batches:
            return self.dataset[indices[0]]
        if getattr(self.dataset, "__getitems__", None):
            return self.dataset.__getitems__(indices)
        return [self.dataset[index] for index in indices]


class _RoundStream(IterableDataset[_Fetched]):
    """Read an iterable dataset in rounds and keep this process's part of each.

    Every process reads the whole stream, which must be the same everywhere, so all see its end at the same moment.
    """

    def __init__(self, loader: DataLoader[Any], seed: int, process: int, num_processes: int) -> None:
        super().__init__()
        self.dataset: Any = loader.dataset
        self._collate_fn: Callable[[Any], Any] = loader.collate_fn
        self._batch_size = loader.batch_size
        self._drop_last = bool(loader.drop_last)
        self._seed = seed
        self._process = process
        self._num_processes = num_processes
        # Shared memory reaches workers that persist, too.
        self.epoch: Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __iter__(self) -> Iterator[_Fetched]:
        epoch = int(self.epoch)
        _tell_epoch(self.dataset, epoch)
        worker = get_worker_info()
        key = (self._seed, "stream", epoch, worker.id if worker else 0)
        round_size = (self._batch_size or 1) * self._num_processes
        iterator: Iterator[Any] | None = None
        for number in count():
            with _seeded(mix(*key, number)):
                if iterator is None:
                    iterator = iter(self.dataset)
                samples = list(islice(iterator, round_size))
            if not samples or (self._drop_last and len(samples) < round_size):
                return
            with _seeded(mix(*key, number, self._process)):
                fetched = self._collate(samples)
            yield fetched

    def _collate(self, samples: list[Any]) -> _Fetched:
        share = _share(len(samples), self._batch_size or 1, self._process, self._num_processes)
        own = samples[share]
        if self._batch_size is None:  # each item is a whole batch
            return _Fetched(self._collate_fn((own or samples)[0]), None if own else 0, None, is_last=False)
        return _Fetched(self._collate_fn(own or samples[:1]), len(own), len(samples), is_last=False)


# --------------------------------------------------------------------------------------------------------------------
# Loaders
# --------------------------------------------------------------------------------------------------------------------


class ShardedDataLoader:
    """Iterate over this process's part of a DataLoader, with batches on the device.

    While a batch is in use, ``num_samples``, ``round_samples``, ``has_samples`` and ``is_last`` describe it.
    """

    knows_sizes = True
    """Whether the loader knows the number of samples in a batch, and does not count the rows of what it is given."""

    limit: int | None = None
    """Steps after which an epoch ends; None for no limit."""

    def __init__(self, dataloader: Any, accelerator: Accelerator, seed: int) -> None:
        """Store what all kinds of loaders need: the loader as it was given, the processes, and the seed."""
        self.dataloader = dataloader
        self._accelerator = accelerator
        self._seed = seed
        # Copies to the CPU are no copies, and the look through the batch costs as much as a small collate.
        self._places = accelerator.device.type != "cpu"
        self._non_blocking = bool(getattr(dataloader, "pin_memory", False))
        self.num_samples = 0
        self.round_samples = 0
        self.has_samples = True
        self.is_last = False

    @property
    def num_steps(self) -> int | None:
        """Return the steps in an epoch, None where the data has no known length."""
        try:
            num_steps = self._length()
        except (TypeError, NotImplementedError):
            return None
        return num_steps if self.limit is None else min(num_steps, self.limit)

    def _length(self) -> int:
        raise NotImplementedError

    @property
    def batch_size(self) -> int | None:
        """Return the samples in a full batch of this process, None where batches vary."""
        size = getattr(self.dataloader, "batch_size", None)
        return size if size is None else int(size)

    def __len__(self) -> int:
        """Return the steps in an epoch. Raises TypeError where the data has no known length."""
        if self.num_steps is None:
            raise TypeError(f"{type(self.dataloader).__name__} over {_name_of(self.dataloader)} has no known length")
        return self.num_steps

    def iterate(self, epoch: int) -> Generator[Any, None, None]:
        """Yield the batches of epoch ``epoch``."""
        for fetched in self._fetch(epoch):
            batch = fetched.batch
            if self._places:
                batch = send_to_device(batch, self._accelerator.device, non_blocking=self._non_blocking)
            self.is_last = fetched.is_last
            self.has_samples = fetched.num_samples != 0
            if fetched.num_samples is None or fetched.round_samples is None:
                self._count(fetched.batch)
            else:
                self.num_samples = fetched.num_samples
                self.round_samples = fetched.round_samples
            yield batch

    def _fetch(self, epoch: int) -> Iterator[_Fetched]:
        raise NotImplementedError

    def _count(self, batch: Any) -> None:
        """Count the samples in a batch that the dataset or a foreign loader made."""
        self.num_samples = (find_batch_size(batch) or 1) if self.has_samples else 0
        self.round_samples = self.num_samples
        if self._accelerator.num_processes > 1:
            # Collective: nobody but the loader knows how large its batches are.
            samples = torch.tensor(self.num_samples, device=self._accelerator.device)
            self.round_samples = int(self._accelerator.reduce(samples).item())  # waits: the counters live on the host


class _KeyedLoader(ShardedDataLoader):
    """Rebuild a torch DataLoader around keyed order and randomness."""

    def __init__(self, dataloader: DataLoader[Any], accelerator: Accelerator, seed: int) -> None:
        super().__init__(dataloader, accelerator, seed)
        processes = accelerator.process_index, accelerator.num_processes
        arguments: dict[str, Any] = {
            name: getattr(dataloader, name)
            for name in ("num_workers", "pin_memory", "timeout", "persistent_workers", "in_order")
        }
        if dataloader.num_workers > 0:
            arguments["prefetch_factor"] = dataloader.prefetch_factor
            arguments["worker_init_fn"] = _WorkerInit(dataloader.worker_init_fn)
            arguments["multiprocessing_context"] = dataloader.multiprocessing_context
        # A private generator: torch draws the base seed of the workers from it, and from the global stream without it.
        self._generator = torch.Generator()
        self.knows_sizes = dataloader.batch_sampler is not None or dataloader.batch_size is not None
        self._sampler: _RoundSampler | None = None
        self._stream: _RoundStream | None = None
        if isinstance(dataloader.dataset, IterableDataset):
            self._stream = _RoundStream(dataloader, seed, *processes)
            self._loader: DataLoader[Any] = DataLoader(
                self._stream, batch_size=None, collate_fn=_as_is, generator=self._generator, **arguments
            )
        else:
            makes_batches = dataloader.batch_sampler is None
            dataset = _KeyedDataset(dataloader.dataset, dataloader.collate_fn, makes_batches)
            self._sampler = _RoundSampler(dataloader, seed, *processes)
            # Tensors of indices are quick to index with and slow to send to a worker.
            self._sampler.as_tensor = dataset.is_in_memory and dataloader.num_workers == 0
            self._loader = DataLoader(
                dataset,  # type: ignore[arg-type]  # a duck: it has __getitems__ alone
                batch_sampler=self._sampler,  # type: ignore[arg-type]  # yields deals, not lists
                collate_fn=_as_is,
                generator=self._generator,
                **arguments,
            )

    def _length(self) -> int:
        if self._sampler is not None:
            return len(self._sampler)
        total = (self.dataloader.batch_size or 1) * self._accelerator.num_processes
        num_samples = len(self.dataloader.dataset)
        return int(num_samples // total if self.dataloader.drop_last else -(-num_samples // total))

    def _fetch(self, epoch: int) -> Iterator[_Fetched]:
        self._generator.manual_seed(mix(self._seed, "workers", epoch))
        if self._sampler is not None:
            self._sampler.epoch = epoch
            self._sampler.limit = self.limit
            yield from self._loader
        else:
            assert self._stream is not None
            self._stream.epoch.fill_(epoch)
            yield from _mark_last(self._loader, self.limit)


class _ForeignLoader(ShardedDataLoader):
    """Iterate over a loader that decides by itself how to iterate.

    Every process goes through all of it and keeps its batches; one that Accelerate has divided already is used as it
    is, without the samples that Accelerate repeats.
    """

    knows_sizes = False

    def __init__(self, dataloader: Any, accelerator: Accelerator, seed: int) -> None:
        super().__init__(dataloader, accelerator, seed)
        self._is_divided = isinstance(dataloader, DataLoaderShard | DataLoaderDispatcher)

    def _length(self) -> int:
        return len(self.dataloader) if self._is_divided else -(-len(self.dataloader) // self._accelerator.num_processes)

    def _fetch(self, epoch: int) -> Iterator[_Fetched]:
        loader = self.dataloader
        for part in (loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler"))):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        _tell_epoch(getattr(loader, "dataset", None), epoch)
        seed = mix(self._seed, "foreign", epoch)
        if not self._is_divided:
            rounds = _chunks(loader, self._accelerator.num_processes, seed)
            yield from _mark_last((self._deal(batches) for batches in rounds), self.limit)
            return
        try:
            yield from _mark_last((self._without_repeats(batch) for [batch] in _chunks(loader, 1, seed)), self.limit)
        finally:
            # A loader left before its end stays on Accelerate's global list of loaders in use (accelerate#4248).
            loader.end()

    def _deal(self, batches: list[Any]) -> _Fetched:
        """Return this process's batch of a round."""
        sizes = [find_batch_size(batch) or 1 for batch in batches]
        process = self._accelerator.process_index
        has_own = process < len(batches)
        own = process if has_own else 0
        return _Fetched(batches[own], sizes[own] if has_own else 0, sum(sizes), is_last=False)

    def _without_repeats(self, batch: Any) -> _Fetched:
        """Cut off the samples that Accelerate repeats to give every process a full last batch."""
        state = self._accelerator.gradient_state
        if self._accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return _Fetched(batch, None, None, is_last=False)
        size = find_batch_size(batch) or 1
        left = max(0, min(size, state.remainder - size * self._accelerator.process_index))
        return _Fetched(slice_tensors(batch, slice(0, max(left, 1))), None if left else 0, None, is_last=False)


def _mark_last(items: Iterable[_Fetched], limit: int | None) -> Iterator[_Fetched]:
    """Yield at most ``limit`` items, looking one ahead to mark the last."""
    iterator = iter(items)
    upcoming = next(iterator, None)
    for number in count(1):
        if upcoming is None:
            return
        item = upcoming
        upcoming = None if number == limit else next(iterator, None)
        yield item._replace(is_last=upcoming is None)


def shard_dataloader(dataloader: Any, accelerator: Accelerator, seed: int) -> ShardedDataLoader:
    """Return this process's part of a DataLoader.

    Args:
        dataloader: a torch DataLoader over the whole data, or any iterable of batches, the same on every process; or
            one that Accelerate has prepared.
        accelerator: the processes and the device.
        seed: of the order and of the randomness in the dataset.

    Raises:
        ValueError: if the loader has no batches, or has been divided between the processes already.
    """
    if accelerator.split_batches:
        raise ValueError(
            "Accelerate is configured with split_batches=True, but per_device_batch_size counts the samples of one "
            "process. Leave split_batches out and divide the batch size by the number of processes."
        )
    own_way = type(dataloader).__iter__ is not DataLoader.__iter__
    loader = (_ForeignLoader if own_way else _KeyedLoader)(dataloader, accelerator, seed)
    if loader.num_steps == 0:
        try:
            size = f"{len(dataloader.dataset)} samples"
        except (AttributeError, TypeError):
            size = "its length"
        raise ValueError(
            f"{_name_of(dataloader)} gives no batch: {size}, per_device_batch_size {loader.batch_size}, "
            f"{accelerator.num_processes} process(es), drop_last={getattr(dataloader, 'drop_last', None)}. Use a "
            "smaller batch size or drop_last=False."
        )
    return loader


def is_shuffled(dataloader: Any) -> bool:
    """Return whether a DataLoader gives the samples in a random order, as far as its samplers tell."""
    samplers = (
        getattr(dataloader, "sampler", None),
        getattr(getattr(dataloader, "batch_sampler", None), "sampler", None),
    )
    return any(isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler) for sampler in samplers)


def name_datasets(dataset: Any) -> dict[str | None, Any]:
    """Return a dict of datasets by name as it is, and a single one as that without a name.

    Raises:
        ValueError: if the dict is empty, or a name is no string.
    """
    if not isinstance(dataset, dict):
        return {None: dataset}
    if not dataset or not all(isinstance(name, str) and name for name in dataset):
        raise ValueError(
            f"a dict of evaluation sets must hold at least one, each under a string as its name, got {dataset!r}."
        )
    return dataset


def total_length(loaders: Iterable[ShardedDataLoader]) -> int | None:
    """Return the steps of all loaders together; None if there is no loader, or one has no known length."""
    lengths = [loader.num_steps for loader in loaders]
    return sum(length for length in lengths if length is not None) if lengths and None not in lengths else None


def common_batch_size(loaders: Iterable[ShardedDataLoader]) -> int | None:
    """Return the samples in a batch of one process, None where that is not the same for all loaders."""
    sizes = {loader.batch_size for loader in loaders}
    return sizes.pop() if len(sizes) == 1 else None


def create_dataloader(
    dataset: Any,
    collate_fn: Callable[[Any], Any] | None,
    defaults: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> Any:
    """Return a plain DataLoader over the whole dataset, or ``dataset`` itself where it is a DataLoader already.

    Args:
        dataset: map-style dataset, iterable dataset, or anything that yields batches and is no dataset.
        collate_fn: makes a batch of a list of samples; None for torch's default.
        defaults: arguments of ``torch.utils.data.DataLoader``, dropped where they do not fit the dataset or the
            arguments.
        arguments: arguments of ``torch.utils.data.DataLoader``, which win over all others.

    Raises:
        TypeError: if ``arguments`` has a name that DataLoader does not know, or the dataset is neither kind.
        ValueError: if the dataset is empty, or is a DataLoader and there are arguments.
    """
    known = list(inspect.signature(DataLoader.__init__).parameters)[2:]
    for name in arguments:
        if name not in known:
            hint = did_you_mean(name, known)
            raise TypeError(
                f"{name!r} is no argument of torch.utils.data.DataLoader.{hint} It takes: {', '.join(known)}."
            )
    is_stream = isinstance(dataset, IterableDataset)
    if isinstance(dataset, tuple) and any(isinstance(part, Tensor | np.ndarray) for part in dataset):
        raise TypeError(
            f"expected a dataset, got a tuple of {len(dataset)} tensors or arrays: wrap them, as "
            "torch.utils.data.TensorDataset(*tensors)."
        )
    if isinstance(dataset, DataLoader) or not (is_stream or hasattr(dataset, "__getitem__")):
        if not hasattr(dataset, "__iter__"):
            raise TypeError(
                "expected a dataset (with __getitem__, or an IterableDataset) or a DataLoader, got "
                f"{_type_name(dataset)}."
            )
        if arguments or collate_fn is not None:
            names = [*arguments, *(["collate_fn"] if collate_fn is not None else [])]
            raise ValueError(
                f"got a {_type_name(dataset)} that makes batches already, so these have no effect: {', '.join(names)}."
            )
        return dataset
    try:
        is_empty = len(dataset) == 0
    except (TypeError, NotImplementedError):
        is_empty = False
    if is_empty:
        raise ValueError(f"the dataset ({_type_name(dataset)}) is empty: there is nothing to iterate over.")
    kwargs: dict[str, Any] = {"collate_fn": collate_fn, **defaults, **arguments}
    excluded = {"shuffle"} if is_stream or arguments.get("sampler") is not None else set()
    if arguments.get("batch_sampler") is not None:
        excluded |= {"batch_size", "shuffle", "sampler", "drop_last"}
    for name in excluded - set(arguments):
        kwargs.pop(name, None)
    return DataLoader(dataset, **kwargs)


# --------------------------------------------------------------------------------------------------------------------
# Batches in words
# --------------------------------------------------------------------------------------------------------------------


def describe(data: Any, depth: int = 3) -> str:
    """Return the structure of a batch in words: types, shapes, dtypes and devices, no values."""
    if isinstance(data, Tensor):
        return f"{str(data.dtype).removeprefix('torch.')}{list(data.shape)} on {data.device}"
    if isinstance(data, np.ndarray):
        return f"numpy {data.dtype}{list(data.shape)}"
    if depth == 0 or isinstance(data, str | bytes):
        return _type_name(data)
    if isinstance(data, Mapping):
        parts = [f"{key!r}: {describe(value, depth - 1)}" for key, value in islice(data.items(), 8)]
        return f"{_type_name(data)} {{{', '.join(parts)}{', ...' if len(data) > 8 else ''}}}"
    if isinstance(data, Sequence):
        parts = [describe(value, depth - 1) for value in islice(data, 4)]
        return f"{_type_name(data)} of {len(data)} ({', '.join(parts)}{', ...' if len(data) > 4 else ''})"
    return _type_name(data)


def _type_name(value: Any) -> str:
    return type(value).__name__


def _name_of(dataloader: Any) -> str:
    return f"the dataset ({_type_name(getattr(dataloader, 'dataset', dataloader))})"

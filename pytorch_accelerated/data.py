"""Order, sharding and randomness of the data: functions of (seed, epoch, position), not states.

A DataLoader, whoever made it, describes one stream of batches. ``shard_dataloader`` turns it into this process's part
of that stream: batch ``i`` goes to process ``i mod n``; the last round, where it is incomplete, is divided so that each
sample is used once and every process has a part. A process for which nothing is left repeats a sample with weight zero,
because models and callbacks may talk to each other in every step.
"""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import find_batch_size, recursively_apply, send_to_device, slice_tensors
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from pytorch_accelerated.dealing import (
    Fetched,
    KeyedDataset,
    Origin,
    RoundSampler,
    RoundStream,
    WorkerInit,
    as_is,
    end_workers,
    remember_workers,
    signals_held_back,
    tell_epoch,
)
from pytorch_accelerated.errors import CheckpointMismatchError, did_you_mean
from pytorch_accelerated.randomness import OwnStreams, chunks, mix, set_states_of, states_of

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

    seconds_waiting: float | None = None
    """Seconds in which the host waited for batches, without their way to the device.

    None until a callback sets it to 0.0 at the beginning of an epoch, before which nothing is measured.
    """

    def __init__(self, dataloader: Any, accelerator: Accelerator, seed: int) -> None:
        """Store what all kinds of loaders need: the loader as it was given, the processes, and the seed."""
        self.dataloader = dataloader
        self._accelerator = accelerator
        self._seed = seed
        # Copies to the CPU are no copies, and the look through the batch costs as much as a small collate.
        self._places = accelerator.device.type != "cpu"
        self._non_blocking = self._places and bool(getattr(dataloader, "pin_memory", False))
        self.num_samples = 0
        self.round_samples = 0
        self.has_samples = True
        self.is_last = False
        self._start = 0
        self._origins: dict[int, Origin] = {}
        self._last_worker = -1

    @property
    def resume_note(self) -> str | None:
        """Say in words what going on in the middle of an epoch costs; None where it is exact and costs nothing."""
        return None

    def state_dict(self, num_steps: int | None) -> dict[str, Any]:
        """Return what it takes to go on elsewhere, besides the number of the step.

        Args:
            num_steps: steps of the epoch in progress that the loop has gone through; None between epochs.
        """
        origins = {} if num_steps is None else {worker: tuple(origin) for worker, origin in self._origins.items()}
        return {"origins": origins, "last_worker": self._last_worker}

    def go_on(self, epoch: int, num_steps: int | None, state_dict: dict[str, Any]) -> None:
        """Let the next pass begin where another process stopped.

        Args:
            epoch: the epoch that was in progress.
            num_steps: steps of it to leave out, in batches of this loader; None between epochs.
            state_dict: what ``state_dict`` returned there.
        """
        self._start = num_steps or 0
        self._origins = {worker: Origin(*origin) for worker, origin in state_dict["origins"].items()}
        self._last_worker = state_dict["last_worker"]

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

    @property
    def num_dataset_samples(self) -> int | None:
        """Return the samples in the dataset; None where it has no length, or is not known."""
        try:
            return len(self.dataloader.dataset)
        except (AttributeError, TypeError, NotImplementedError):
            return None

    def iterate(self, epoch: int) -> Generator[Any, None, None]:
        """Yield the batches of epoch ``epoch``, after an interruption those that are left of it."""
        start, self._start = self._start, 0
        if not start:
            self._origins, self._last_worker = {}, -1
        fetches = self._fetch(epoch, start)
        if self.seconds_waiting is not None:
            fetches = self._timed(fetches)
        is_ahead = self._non_blocking and hasattr(torch.get_device_module(self._accelerator.device), "Stream")
        if is_ahead:
            fetches = look_ahead(fetches, _Copies(self._accelerator.device))
        for fetched in fetches:
            if fetched.origin is not None:
                self._last_worker = fetched.origin.worker
                self._origins[self._last_worker] = fetched.origin
            batch = fetched.batch
            if self._places and not is_ahead:
                batch = send_to_device(batch, self._accelerator.device, non_blocking=self._non_blocking)
            self.is_last = fetched.is_last
            self.has_samples = fetched.num_samples != 0
            if fetched.num_samples is None or fetched.round_samples is None:
                self._count(fetched.batch)
            else:
                self.num_samples = fetched.num_samples
                self.round_samples = fetched.round_samples
            yield batch

    def _fetch(self, epoch: int, start: int) -> Iterator[Fetched]:
        raise NotImplementedError

    def _timed(self, fetches: Iterator[Fetched]) -> Iterator[Fetched]:
        """Yield what ``fetches`` yields, and add up the seconds it takes to."""
        while True:
            start = time.perf_counter()
            fetched = next(fetches, None)
            self.seconds_waiting = (self.seconds_waiting or 0.0) + time.perf_counter() - start
            if fetched is None:
                return
            yield fetched

    def _count(self, batch: Any) -> None:
        """Count the samples in a batch that the dataset or a foreign loader made."""
        self.num_samples = (find_batch_size(batch) or 1) if self.has_samples else 0
        self.round_samples = self.num_samples
        if self._accelerator.num_processes > 1:
            # Collective: nobody but the loader knows how large its batches are.
            samples = torch.tensor(self.num_samples, device=self._accelerator.device)
            self.round_samples = int(self._accelerator.reduce(samples).item())  # waits: the counters live on the host


class _Copies:
    """Copy batches to a device on a stream of their own, while it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)
        self._stream = self._module.Stream(device)

    def begin(self, fetched: Fetched) -> Fetched:
        """Queue the copy of a batch in pinned memory."""
        with self._module.stream(self._stream):
            return fetched._replace(batch=send_to_device(fetched.batch, self._device, non_blocking=True))

    def end(self, fetched: Fetched) -> None:
        """Let the computation wait for the copies queued so far; the host does not."""
        current = self._module.current_stream(self._device)
        current.wait_stream(self._stream)
        # The memory is the copying stream's: it must not be used again before the computation is through with it.
        recursively_apply(lambda tensor: tensor.record_stream(current), fetched.batch)


def look_ahead(fetches: Iterator[Fetched], copies: Any) -> Iterator[Fetched]:
    """Yield batches on the device, the copy of the next one queued before each.

    An error in making the next batch is raised when it is its turn.

    Args:
        fetches: batches on the host.
        copies: ``begin`` returns what was fetched with its copy on the way; ``end`` makes the copy good to use.
    """
    upcoming = next(fetches, None)
    if upcoming is not None:
        upcoming = copies.begin(upcoming)
    while upcoming is not None:
        fetched, upcoming = upcoming, None
        copies.end(fetched)  # before the next copy is queued, which it must not wait for
        failure: Exception | None = None
        try:
            upcoming = next(fetches, None)
            if upcoming is not None:
                upcoming = copies.begin(upcoming)
        except Exception as error:
            failure = error
        yield fetched
        if failure is not None:
            raise failure


class _KeyedLoader(ShardedDataLoader):
    """Rebuild a torch DataLoader around keyed order and randomness."""

    def __init__(self, dataloader: DataLoader[Any], accelerator: Accelerator, seed: int) -> None:
        super().__init__(dataloader, accelerator, seed)
        processes = accelerator.process_index, accelerator.num_processes
        arguments: dict[str, Any] = {
            name: getattr(dataloader, name)
            for name in ("num_workers", "pin_memory", "timeout", "persistent_workers", "in_order")
            if hasattr(dataloader, name)  # torchdata 0.11's loaders have no in_order
        }
        if dataloader.num_workers > 0:
            arguments["prefetch_factor"] = dataloader.prefetch_factor
            arguments["worker_init_fn"] = WorkerInit(dataloader.worker_init_fn)
            arguments["multiprocessing_context"] = dataloader.multiprocessing_context
        # A private generator: torch draws the base seed of the workers from it, and from the global stream without it.
        self._generator = torch.Generator()
        self.knows_sizes = dataloader.batch_sampler is not None or dataloader.batch_size is not None
        self._attributes: dict[str, Any] = {}  # of the dataset, when the workers that persist were started
        self._sampler: RoundSampler | None = None
        self._stream: RoundStream | None = None
        if isinstance(dataloader.dataset, IterableDataset):
            self._stream = RoundStream(dataloader, seed, *processes)
            self._loader: DataLoader[Any] = DataLoader(
                self._stream, batch_size=None, collate_fn=as_is, generator=self._generator, **arguments
            )
        else:
            makes_batches = dataloader.batch_sampler is None
            dataset = KeyedDataset(dataloader.dataset, dataloader.collate_fn, makes_batches, seed)
            self._sampler = RoundSampler(dataloader, seed, *processes)
            # Tensors of indices are quick to index with and slow to send to a worker.
            self._sampler.as_tensor = dataset.is_in_memory and dataloader.num_workers == 0
            self._loader = DataLoader(
                dataset,  # type: ignore[arg-type]  # a duck: it has __getitems__ alone
                batch_sampler=self._sampler,  # type: ignore[arg-type]  # yields deals, not lists
                collate_fn=as_is,
                generator=self._generator,
                **arguments,
            )

    def _length(self) -> int:
        if self._sampler is not None:
            return len(self._sampler)
        total = (self.dataloader.batch_size or 1) * self._accelerator.num_processes
        num_samples = len(self.dataloader.dataset)
        return int(num_samples // total if self.dataloader.drop_last else -(-num_samples // total))

    @property
    def resume_note(self) -> str | None:
        """Say in words what going on in the middle of an epoch costs; None where it is exact and costs nothing."""
        if self._stream is None or self._stream.has_state:
            return None
        return (
            f"{_name_of(self.dataloader)} has no state_dict and load_state_dict: after an interruption within an "
            "epoch it is read from the beginning again, and the samples that were used before are thrown away. That "
            "is exact if it yields the same samples each time."
        )

    def state_dict(self, num_steps: int | None) -> dict[str, Any]:
        """Return what it takes to go on elsewhere, besides the number of the step; see the base class."""
        state = super().state_dict(num_steps)
        if self._sampler is not None:
            # With its last batch an epoch has drawn all it will.
            state |= self._sampler.state_dict(None if self.is_last else num_steps)
        return state | {"num_workers": self._loader.num_workers}

    def go_on(self, epoch: int, num_steps: int | None, state_dict: dict[str, Any]) -> None:
        """Let the next pass begin where another process stopped; see the base class.

        Raises:
            CheckpointMismatchError: if a stream is divided between another number of workers.
        """
        super().go_on(epoch, num_steps, state_dict)
        num_workers = self._loader.num_workers
        if self._sampler is not None:
            set_states_of(self._sampler.parts, state_dict.get("samplers", []))
            self._sampler.digest_at_start = state_dict.get("digest")
        elif num_steps:
            assert self._stream is not None
            if max(num_workers, 1) != max(state_dict["num_workers"], 1):
                raise CheckpointMismatchError(
                    f"the epoch was begun with num_workers={state_dict['num_workers']} and cannot go on with "
                    f"num_workers={num_workers}: {_name_of(self.dataloader)} is iterable, so its samples are divided "
                    f"between the workers. Use num_workers={state_dict['num_workers']}."
                )
            next_worker = (self._last_worker + 1) % max(num_workers, 1)
            self._stream.resumption = {"epoch": epoch, "next_worker": next_worker, "workers": state_dict["origins"]}

    def _fetch(self, epoch: int, start: int) -> Iterator[Fetched]:
        self._generator.manual_seed(mix(self._seed, "workers", epoch))
        # Where there is nothing else for it to do, torch's loader takes as long as a small model's forward pass.
        is_direct = not self._loader.num_workers and not self._loader.pin_memory
        if self._sampler is not None:
            self._sampler.epoch = epoch
            self._sampler.limit = self.limit
            self._sampler.start = start
            dataset: Any = self._loader.dataset
            return map(dataset.__getitems__, self._sampler) if is_direct else self._iterate_loader()
        assert self._stream is not None
        self._stream.epoch.fill_(epoch)
        return _mark_last(self._stream if is_direct else self._iterate_loader(), self.limit, start)

    def _iterate_loader(self) -> Generator[Fetched, None, None]:
        if self._loader.persistent_workers:
            # Workers have the dataset as it was when they started. Where attributes have changed since, others start.
            attributes = _attributes_of(self.dataloader.dataset)
            known, self._attributes = self._attributes, attributes
            if known.keys() != attributes.keys() or any(known[name] is not attributes[name] for name in known):
                self._loader._iterator = None
        with signals_held_back() if self._loader.num_workers else nullcontext():
            iterator: Any = iter(self._loader)
        workers = list(getattr(iterator, "_workers", []))
        if self._loader.persistent_workers:
            remember_workers(workers)
            workers = []
        try:
            yield from iterator
        finally:
            del iterator  # which asks the workers to end, and waits for a while
            end_workers(workers)


class _ForeignLoader(ShardedDataLoader):
    """Iterate over a loader that decides by itself how to iterate.

    Every process goes through all of it and keeps its batches; one that Accelerate has divided already is used as it
    is, without the samples that Accelerate repeats.
    """

    knows_sizes = False

    def __init__(self, dataloader: Any, accelerator: Accelerator, seed: int) -> None:
        super().__init__(dataloader, accelerator, seed)
        self._is_divided = isinstance(dataloader, DataLoaderShard | DataLoaderDispatcher)
        self._states: list[dict[str, Any]] | None = None  # of the samplers when the epoch began

    def _length(self) -> int:
        return len(self.dataloader) if self._is_divided else -(-len(self.dataloader) // self._accelerator.num_processes)

    @property
    def _has_state(self) -> bool:
        # Accelerate's loaders have the methods, and nothing behind them unless they hold a stateful loader.
        is_own = not self._is_divided or self.dataloader.use_stateful_dataloader
        return is_own and hasattr(self.dataloader, "state_dict") and hasattr(self.dataloader, "load_state_dict")

    @property
    def _parts(self) -> list[Any]:
        return [getattr(self.dataloader, name, None) for name in ("sampler", "batch_sampler")]

    @property
    def resume_note(self) -> str | None:
        """Say in words what going on in the middle of an epoch costs; None where it is exact and costs nothing."""
        name = _type_name(self.dataloader)
        if not self._has_state:
            return (
                f"{name} iterates in its own way and has no state_dict and load_state_dict: after an interruption "
                "within an epoch its batches are made from the beginning again, and those that were used before are "
                "thrown away. That is exact if it makes the same batches each time."
            )
        if getattr(self.dataloader, "num_workers", 0):
            return (
                f"{name} iterates in its own way, with workers: after an interruption within an epoch it goes on with "
                "the right samples, but what the dataset draws at random in the workers (augmentation) differs."
            )
        return None

    def state_dict(self, num_steps: int | None) -> dict[str, Any]:
        """Return what it takes to go on elsewhere, besides the number of the step; see the base class."""
        is_between = num_steps is None or self._states is None or self.is_last
        return super().state_dict(num_steps) | {"samplers": states_of(self._parts) if is_between else self._states}

    def go_on(self, epoch: int, num_steps: int | None, state_dict: dict[str, Any]) -> None:
        """Let the next pass begin where another process stopped; see the base class."""
        super().go_on(epoch, num_steps, state_dict)
        set_states_of(self._parts, state_dict.get("samplers", []))

    def _fetch(self, epoch: int, start: int) -> Iterator[Fetched]:
        loader = self.dataloader
        for part in (loader, *self._parts):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        tell_epoch(getattr(loader, "dataset", None), epoch)
        self._states = states_of(self._parts)
        try:
            yield from _mark_last(self._rounds(epoch, start), self.limit, start)
        finally:
            if self._is_divided:
                # A loader left before its end stays on Accelerate's global list of loaders in use (accelerate#4248).
                loader.end()

    def _rounds(self, epoch: int, start: int) -> Iterator[Fetched]:
        streams = OwnStreams(mix(self._seed, "foreign", epoch))
        first = 0
        if start and self._has_state and (state := self._origins[0].state) is not None:
            self.dataloader.load_state_dict(state["loader"])
            streams.load_state_dict(state["streams"])
            first = start
        size = 1 if self._is_divided else self._accelerator.num_processes
        for number, batches in enumerate(chunks(self.dataloader, size, streams), first + 1):
            if number <= start:
                continue  # used before the interruption, and made again because the loader cannot go on from there
            state = None
            if self._has_state:
                # Now, because the next batch will have been made when this one is used.
                state = {"loader": copy.deepcopy(self.dataloader.state_dict()), "streams": streams.state_dict()}
            fetched = self._without_repeats(batches[0]) if self._is_divided else self._deal(batches)
            yield fetched._replace(origin=Origin(0, number, number, is_exhausted=False, state=state))

    def _deal(self, batches: list[Any]) -> Fetched:
        """Return this process's batch of a round."""
        sizes = [find_batch_size(batch) or 1 for batch in batches]
        process = self._accelerator.process_index
        has_own = process < len(batches)
        own = process if has_own else 0
        return Fetched(batches[own], sizes[own] if has_own else 0, sum(sizes), is_last=False)

    def _without_repeats(self, batch: Any) -> Fetched:
        """Cut off the samples that Accelerate repeats to give every process a full last batch."""
        state = self._accelerator.gradient_state
        if self._accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return Fetched(batch, None, None, is_last=False)
        size = find_batch_size(batch) or 1
        left = max(0, min(size, state.remainder - size * self._accelerator.process_index))
        return Fetched(slice_tensors(batch, slice(0, max(left, 1))), None if left else 0, None, is_last=False)


def _mark_last(items: Iterable[Fetched], limit: int | None, start: int) -> Iterator[Fetched]:
    """Yield items up to number ``limit``, looking one ahead to mark the last; the first is number ``start``."""
    if limit is not None and start >= limit:
        return
    iterator = iter(items)
    upcoming = next(iterator, None)
    for number in count(start + 1):
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
    # torchdata's StatefulDataLoader describes its batches as a DataLoader does; what it adds to that we do ourselves.
    maker: Any = type(dataloader).__iter__
    own_way = maker is not DataLoader.__iter__ and not maker.__module__.startswith("torchdata.stateful_dataloader")
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


def default_arguments(dataset: Any, accelerator: Accelerator, batch_size: int) -> dict[str, Any]:
    """Return the arguments of a DataLoader that the user's are laid over.

    On an accelerator, memory is pinned, so that copies overlap with computation, and there are workers that stay from
    epoch to epoch, as many as ``choose_num_workers`` says.

    Args:
        dataset: the dataset.
        accelerator: the processes and the device.
        batch_size: samples in a batch of one process.
    """
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    num_workers = choose_num_workers(dataset, accelerator.device, num_local_processes)
    return {
        "batch_size": int(batch_size),
        "pin_memory": accelerator.device.type == "cuda",
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
    }


def choose_num_workers(dataset: Any, device: torch.device, num_local_processes: int) -> int:
    """Return how many workers should make batches where the user does not say.

    None on the CPU, whose cores have the model to compute; for tensors in memory, which are fetched a batch at a time;
    for iterable datasets, which each worker would read from the beginning; for datasets that hold tensors on a device,
    which forked processes cannot use; and where processes are not forked, as the script may not be made for that. Else
    all cores but one that this process has, at most 8.

    Args:
        dataset: the dataset.
        device: what the model computes on.
        num_local_processes: processes on this machine.
    """
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if (
        device.type == "cpu"
        or method != "fork"
        or isinstance(dataset, TensorDataset | IterableDataset)
        or any(isinstance(value, Tensor) and value.device.type != "cpu" for value in _attributes_of(dataset).values())
    ):
        return 0
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, num_cores // num_local_processes - 1))


def _attributes_of(dataset: Any) -> dict[str, Any]:
    return dict(getattr(dataset, "__dict__", {}))


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
    if not kwargs.get("num_workers"):
        excluded |= {"persistent_workers"}  # torch refuses it
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

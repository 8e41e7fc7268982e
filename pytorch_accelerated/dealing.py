"""How the batches of an epoch are dealt to processes and fetched by workers, with randomness keyed by position.

The samplers deal in the main process; the datasets and streams fetch, there or in workers. Both begin anywhere in an
epoch, where a run that was interrupted goes on.
"""

from __future__ import annotations

import atexit
import copy
import functools
import hashlib
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, islice
from multiprocessing import resource_tracker
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
    get_worker_info,
)
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

from pytorch_accelerated.randomness import OwnStreams, SeededCalls, chunks, mix, seeded, states_of
from pytorch_accelerated.signals import WATCHED


class Deal(NamedTuple):
    """What one process fetches in one round."""

    indices: Any  # list or tensor of indices into the dataset; of repeated samples where num_samples is 0
    position: int  # of the batch in the epoch, over all processes
    epoch: int
    num_samples: int | None  # of this process; None if the dataset makes whole batches
    round_samples: int | None  # of all processes
    is_last: bool


class Fetched(NamedTuple):
    """One batch as it comes out of the dataset."""

    batch: Any
    num_samples: int | None
    round_samples: int | None
    is_last: bool
    origin: Origin | None = None


class Origin(NamedTuple):
    """How far a reader had come with a batch of data that has no order of ours."""

    worker: int
    num_rounds: int
    num_items: int  # read by this worker for all processes
    is_exhausted: bool
    state: Any  # of the dataset or loader after the batch; None where it has none


def as_is(data: Any) -> Any:
    """Return what was fetched as it is: it has been collated."""
    return data


def tell_epoch(dataset: Any, epoch: int) -> None:
    """Call ``set_epoch`` of a dataset that has it, where the epoch is not the one it was told last.

    It may be costly; and training and evaluation may share a dataset, so that only the dataset knows what it was told.
    """
    if hasattr(dataset, "set_epoch") and getattr(dataset, "_pytorch_accelerated_epoch", None) != epoch:
        dataset.set_epoch(epoch)
        with suppress(AttributeError):  # a dataset that takes no attributes is told each time
            dataset._pytorch_accelerated_epoch = epoch


@functools.cache
def _num_runs_in_progress() -> Tensor:
    """Return a counter in shared memory, which the workers of this process see."""
    counter = torch.zeros((), dtype=torch.int64)
    counter.share_memory_()  # type: ignore[no-untyped-call]
    # Run in the opposite order, and before the interpreter waits for the workers: a thread may still be training then,
    # and a worker that persists may hang in C, where no handler runs.
    atexit.register(lambda: end_workers(list(_persistent_workers)))
    atexit.register(counter.zero_)
    return counter


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Hold signals back while workers are started, who are to handle them in their own way from their first moment."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Python 3.11's start of this helper of multiprocessing lets the signals through again, so it goes first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_persistent_workers: WeakSet[Any] = WeakSet()


def remember_workers(workers: list[Any]) -> None:
    """Let workers that persist be ended with the interpreter at the latest."""
    _persistent_workers.update(workers)


def end_workers(workers: list[Any]) -> None:
    """Kill the workers that have not ended although they were asked to: one may wait in C, where no handler runs."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()


@contextmanager
def workers_outlive_signals() -> Iterator[None]:
    """Let workers that are signalled along with the main process live on: it decides when the run is over."""
    counter = _num_runs_in_progress()
    counter += 1
    try:
        yield
    finally:
        counter -= 1


class WorkerInit:
    """Let ``get_worker_info().dataset`` be the user's dataset, then call the user's ``worker_init_fn``.

    Schedulers and terminals signal whole process groups. A worker that dies of that takes the update with it that the
    main process is about to finish and save; so while a run is in progress it stays. When the main process dies, torch
    ends the workers within seconds.
    """

    def __init__(self, function: Callable[[int], Any] | None) -> None:
        self._function = function
        self._num_runs = _num_runs_in_progress()

    def __call__(self, worker_id: int) -> None:
        """Set a worker up; torch calls it there."""
        for number in WATCHED:
            signal.signal(number, self._end_unless_in_a_run if number == signal.SIGTERM else signal.SIG_IGN)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)  # held back while this process was started
        info: Any = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)  # its own __setattr__ refuses everything
        if self._function is not None:
            self._function(worker_id)

    def _end_unless_in_a_run(self, signal_number: int, frame: Any) -> None:
        if not int(self._num_runs):
            signal.signal(signal_number, signal.SIG_DFL)
            os.kill(os.getpid(), signal_number)


def _share(num_samples: int, batch_size: int | None, process: int, num_processes: int) -> slice:
    """Return the part of a round of ``num_samples`` that belongs to ``process``."""
    if batch_size is not None and num_samples == batch_size * num_processes:
        return slice(process * batch_size, (process + 1) * batch_size)
    size, rest = divmod(num_samples, num_processes)
    start = process * size + min(process, rest)
    return slice(start, start + size + (process < rest))


_ROUNDS_IN_A_MESSAGE = 16
_MAX_ROUNDS_AHEAD = 4096  # that workers and messages may be ahead of the loop


class RoundSampler:
    """Deal the batches of an epoch to the processes, round by round; a batch sampler for ``KeyedDataset``."""

    def __init__(self, loader: DataLoader[Any], seed: int, process: int, num_processes: int) -> None:
        self._seed = seed
        self._process = process
        self._num_processes = num_processes
        self.limit: int | None = None
        self.epoch = 0
        self.start = 0
        """Rounds of the next epoch that are left out, because they were dealt before an interruption."""
        self.digest_at_start: str | None = None
        """What the digest of the rounds left out must be; None where it is not known."""
        self.as_tensor = False
        self._states: list[dict[str, Any]] | None = None  # of the samplers when the epoch began
        self._digests: deque[tuple[int, str]] = deque(maxlen=_MAX_ROUNDS_AHEAD)
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

    @property
    def parts(self) -> list[Any]:
        """Return the samplers, which may hold generators of their own."""
        parts = [self.sampler, self.batch_sampler, getattr(self.batch_sampler, "sampler", None)]
        return [part for number, part in enumerate(parts) if not any(part is other for other in parts[:number])]

    def state_dict(self, num_rounds: int | None) -> dict[str, Any]:
        """Return what it takes to deal on after ``num_rounds`` rounds of the epoch; None between epochs."""
        digests = dict(self._digests)
        is_between = num_rounds is None or self._states is None
        return {
            "samplers": states_of(self.parts) if is_between else self._states,
            "digest": None if num_rounds is None else digests.get(num_rounds),
        }

    def __iter__(self) -> Iterator[Deal]:
        # A generator: torch's loader asks for two where there are workers, and uses the second.
        start, self.start = self.start, 0
        if self.limit is not None and start >= self.limit:
            return
        samplers: tuple[Any, ...] = (self.sampler, self.batch_sampler)
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
        order = self._known_order()
        self._states = states_of(self.parts) if order is None else None
        yield from self._dealt(start) if order is None else self._slices(order, start)

    def _dealt(self, start: int) -> Iterator[Deal]:
        """Yield this process's part of each round from round ``start`` on, as the user's sampler draws them."""
        rounds = self._drawn(start)
        upcoming = next(rounds, None)
        for number in count(start):
            if upcoming is None:
                return
            indices, upcoming = upcoming, next(rounds, None)
            is_last = upcoming is None or number + 1 == self.limit
            yield self._deal(indices, number, is_last)
            if is_last:
                return

    def _deal(self, drawn: Any, number: int, is_last: bool) -> Deal:
        """Return this process's part of round ``number``, for which the sampler has ``drawn`` indices or batches."""
        process, num_processes = self._process, self._num_processes
        position = number * num_processes + process
        if self.batch_sampler is None:  # an index stands for a whole batch
            has_own = process < len(drawn)
            own = [drawn[process if has_own else 0]]
            return Deal(own, position, self.epoch, None if has_own else 0, None, is_last)
        indices = drawn
        if self.batch_size is None:  # batches of any size
            indices = [index for batch in drawn for index in batch]
        if self.batch_size is None and len(drawn) == num_processes:
            own = drawn[process]
        else:
            own = indices[_share(len(indices), self.batch_size, process, num_processes)]
        num_own = len(own)
        return Deal(own if num_own else indices[:1], position, self.epoch, num_own, len(indices), is_last)

    def _slices(self, order: Tensor | range, start: int) -> Iterator[Deal]:
        """Yield this process's part of each round from round ``start`` on, where the order of the epoch is known."""
        assert self.batch_size is not None
        process, num_processes, size, epoch = self._process, self._num_processes, self.batch_size, self.epoch
        total = size * num_processes
        num_samples = len(order)
        num_rounds = num_samples // total if self._drop_last else -(-num_samples // total)
        if self.limit is not None:
            num_rounds = min(num_rounds, self.limit)
        for number in range(start, num_rounds):
            first = number * total
            num_in_round = min(total, num_samples - first)
            begin, end = first + process * size, first + process * size + size
            if num_in_round < total:
                share = _share(num_in_round, None, process, num_processes)
                begin, end = first + share.start, first + share.stop
            num_own = end - begin
            own: Any = order[begin:end] if num_own else order[first : first + 1]
            if isinstance(own, range):
                own = torch.arange(own.start, own.stop) if self.as_tensor else list(own)
            elif not self.as_tensor:
                own = own.tolist()  # waits for nothing: the order is made on the CPU
            yield Deal(own, number * num_processes + process, epoch, num_own, num_in_round, number == num_rounds - 1)

    def _drawn(self, start: int) -> Iterator[Any]:
        """Yield what the user's sampler draws for each round: a list of indices, or of batches where these vary.

        The first ``start`` rounds are drawn and left out, which reads no sample.
        """
        streams = OwnStreams(mix(self._seed, "sampler", self.epoch))
        source: Any = self.sampler
        size = self._num_processes
        if self.batch_size is None:
            source = self.sampler if self.batch_sampler is None else self.batch_sampler
        else:
            size *= self.batch_size
        digest = hashlib.blake2b(digest_size=16)
        self._digests.clear()
        for number, drawn in enumerate(self._from_main(chunks(source, size, streams)), 1):
            if self._drop_last and len(drawn) < size:
                return
            digest.update("".join(map("{},".format, drawn)).encode())
            self._digests.append((number, digest.hexdigest()))
            if number > start:
                yield drawn
            elif number == start and self.digest_at_start not in (None, digest.hexdigest()) and self._process == 0:
                warnings.warn(
                    f"{type(source).__name__} has drawn other samples for epoch {self.epoch} than before the "
                    "interruption, so some samples of this epoch will be seen twice and others not at all. Let it "
                    "draw from the global streams or from a torch.Generator that it holds, or give it state_dict and "
                    "load_state_dict.",
                    stacklevel=2,
                )

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

    def _known_order(self) -> Tensor | range | None:
        """Return the order of the whole epoch where it is ours to say."""
        sampler = self.sampler
        if self.batch_size is None:
            return None
        if type(sampler) is SequentialSampler:
            return range(len(sampler))
        if (
            type(sampler) is RandomSampler
            and sampler.generator is None
            and not sampler.replacement
            and sampler.num_samples == len(sampler.data_source)
        ):
            generator = torch.Generator().manual_seed(mix(self._seed, "order", self.epoch))
            # The same order in either type, and half of the memory.
            dtype = torch.int32 if len(sampler) < 2**31 else torch.int64
            return torch.randperm(len(sampler), generator=generator, dtype=dtype)
        return None


class KeyedDataset:
    """Fetch and collate the samples of a deal, with randomness that is a function of seed, epoch and position."""

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any], makes_batches: bool, seed: int) -> None:
        self.dataset = dataset
        self._seed = seed
        self._collate_fn = collate_fn
        self._makes_batches = makes_batches
        self._has_epochs = hasattr(dataset, "set_epoch")
        self._calls = SeededCalls()
        self._stacks = collate_fn is default_collate and default_collate_fn_map.get(Tensor) is collate_tensor_fn
        # In-memory tensors are indexed a batch at a time and draw no randomness.
        self.is_in_memory = type(dataset) is TensorDataset and collate_fn is default_collate and not makes_batches

    def __getitems__(self, deal: Deal) -> Fetched:
        if self.is_in_memory:
            indices = deal.indices
            if not isinstance(indices, Tensor):
                indices = torch.tensor(indices)
            batch = [
                tensor.index_select(0, indices) if type(tensor) is Tensor else tensor[indices]
                for tensor in self.dataset.tensors
            ]
            return Fetched(batch, deal.num_samples, deal.round_samples, deal.is_last)
        if self._has_epochs:
            # Here and not in the main process: workers that persist keep a copy of the dataset.
            tell_epoch(self.dataset, deal.epoch)
        try:
            seed = mix(self._seed, "batch", deal.epoch, deal.position)
            batch = self._calls(seed, self._make_batch, deal.indices)
        except Exception as error:
            some, rest = list(deal.indices)[:16], len(deal.indices) - 16
            error.add_note(
                f"pytorch_accelerated: samples {some}{f' and {rest} more' if rest > 0 else ''} of the dataset"
            )
            raise
        return Fetched(batch, deal.num_samples, deal.round_samples, deal.is_last)

    def _make_batch(self, indices: Any) -> Any:
        dataset = self.dataset
        if self._makes_batches:
            return self._collate_fn(dataset[indices[0]])
        if getattr(dataset, "__getitems__", None):
            return self._collate_fn(dataset.__getitems__(indices))
        rows = [dataset[index] for index in indices]
        first = rows[0]
        if (
            self._stacks
            and type(first) is tuple
            and set(map(type, first)) == {Tensor}
            and {value.layout for value in first} == {torch.strided}
            and len(set(map(len, rows))) == 1
            and get_worker_info() is None  # where batches go into shared memory
        ):
            # What torch's default does with tuples of tensors, without looking for what else they could be.
            return [torch.stack(column) for column in zip(*rows, strict=True)]
        return self._collate_fn(rows)


_BEGINNING = (0, 0, 0, False, None)


class RoundStream(IterableDataset[Fetched]):
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

        self.resumption: dict[str, Any] | None = None
        """For one epoch: its number, the worker whose turn it is, and how far each worker has come."""
        self._worker: int | None = None

    @property
    def has_state(self) -> bool:
        """Whether the dataset can say where it is, and go on from there."""
        return hasattr(self.dataset, "state_dict") and hasattr(self.dataset, "load_state_dict")

    def __iter__(self) -> Iterator[Fetched]:
        epoch = int(self.epoch)
        tell_epoch(self.dataset, epoch)
        resumption = self.resumption if self.resumption and self.resumption["epoch"] == epoch else None
        worker = self._take_turn(resumption["next_worker"] if resumption else 0)
        origin = Origin(*resumption["workers"].get(worker, _BEGINNING)) if resumption else Origin(*_BEGINNING)
        if origin.is_exhausted:
            return
        round_size = (self._batch_size or 1) * self._num_processes
        key = (self._seed, "stream", epoch, worker)
        iterator: Iterator[Any] | None = None
        if origin.state is not None:
            self.dataset.load_state_dict(origin.state)
            with seeded(mix(*key, 0)):
                iterator = iter(self.dataset)
        num_seen = -(-origin.num_items // round_size)  # rounds of another size, where the number of processes changed
        first = num_seen if origin.state is not None else 0
        num_items = origin.num_items if origin.state is not None else 0
        for number in count(first):
            with seeded(mix(*key, number)):
                if iterator is None:
                    iterator = iter(self.dataset)
                samples = list(islice(iterator, round_size))
            if not samples or (self._drop_last and len(samples) < round_size):
                return
            num_items += len(samples)
            if number < num_seen:
                continue  # read before the interruption, and read again because the dataset cannot go on from there
            with seeded(mix(*key, number, self._process)):
                fetched = self._collate(samples)
            state = copy.deepcopy(self.dataset.state_dict()) if self.has_state else None
            origin = Origin(worker, number + 1, num_items, len(samples) < round_size, state)
            yield fetched._replace(origin=origin)

    def _take_turn(self, next_worker: int) -> int:
        """Return the number of this worker; torch asks worker 0 first, which after an interruption is ``next_worker``.

        The dataset sees it as ``get_worker_info().id``.
        """
        info: Any = get_worker_info()
        if info is None:
            return 0
        if self._worker is None:
            self._worker = int(info.id)
        worker = (self._worker + next_worker) % int(info.num_workers)
        object.__setattr__(info, "id", worker)  # its own __setattr__ refuses everything
        return worker

    def _collate(self, samples: list[Any]) -> Fetched:
        share = _share(len(samples), self._batch_size or 1, self._process, self._num_processes)
        own = samples[share]
        if self._batch_size is None:  # each item is a whole batch
            return Fetched(self._collate_fn((own or samples)[0]), None if own else 0, None, is_last=False)
        return Fetched(self._collate_fn(own or samples[:1]), len(own), len(samples), is_last=False)

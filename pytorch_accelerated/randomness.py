"""Random streams: seeds that are functions of a key, and the states of streams to put back, to save and to load."""

from __future__ import annotations

import ctypes
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import get_worker_info

T = TypeVar("T")

_NUMPY: Any = np.random  # whose stubs leave out the functions that exchange its generator
_LEGACY: Any = np.random.normal.__self__  # type: ignore[attr-defined]  # the object that numpy's functions are of
_RANDOM: random.Random = random.random.__self__  # type: ignore[attr-defined]  # whose methods are random's functions


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


Streams = tuple[Any, ...]
"""States of the global random streams: torch's on the CPU, numpy's, random's and, where there is one, a device's."""


def get_host_streams() -> Streams:
    """Return the states of the global random streams of torch (CPU), numpy and random."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def set_host_streams(streams: Streams) -> None:
    """Put the global random streams of torch (CPU), numpy and random into the states that are given."""
    torch.set_rng_state(streams[0])
    np.random.set_state(streams[1])
    random.setstate(streams[2])


def get_streams(device: torch.device) -> Streams:
    """Return the states of the global random streams, that of ``device`` included."""
    module = _device_module(device)
    return (*get_host_streams(), *(() if module is None else (module.get_rng_state(),)))


def set_streams(streams: Streams, device: torch.device) -> None:
    """Put the global random streams, that of ``device`` included, into the states that are given."""
    set_host_streams(streams)
    module = _device_module(device)
    if module is not None and len(streams) > 3:
        module.set_rng_state(streams[3])


def _device_module(device: torch.device) -> Any:
    """Return torch's module for a device that has a random stream of its own, such as torch.cuda; else None."""
    module = None if device.type == "cpu" else getattr(torch, device.type, None)
    return module if hasattr(module, "get_rng_state") else None


def pack_streams(streams: Streams) -> dict[str, Any]:
    """Return the states of random streams in a form that ``torch.load(weights_only=True)`` reads."""
    return {
        "torch": streams[0],
        "numpy": _pack_numpy(streams[1]),
        "random": [streams[2][0], torch.tensor(streams[2][1], dtype=torch.int64), streams[2][2]],
        "device": streams[3] if len(streams) > 3 else None,
    }


def unpack_streams(packed: dict[str, Any]) -> Streams:
    """Return the states of random streams from what ``pack_streams`` made of them."""
    version, numbers, next_gaussian = packed["random"]
    host = (
        packed["torch"],
        _unpack_numpy(packed["numpy"]),
        (version, tuple(numbers.tolist()), next_gaussian),  # waits for nothing: it was loaded to the CPU
    )
    return host if packed["device"] is None else (*host, packed["device"])


def _pack_numpy(state: Any) -> list[Any]:
    """Return the state of a stream of numpy's older kind in a form that torch reads: it has no unsigned numbers."""
    name, keys, position, has_gauss, cached_gaussian = state
    return [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached_gaussian)]


def _unpack_numpy(packed: list[Any]) -> tuple[Any, ...]:
    name, keys, *rest = packed
    return name, keys.numpy().astype(np.uint32), *rest


class _Marks:
    """What tells whether the global streams of numpy and random have been drawn from, without reading their states.

    Reading takes 50 microseconds for numpy's and 10 for random's, several times what it takes to make a small batch.
    Both streams are 624 words and a position. A draw moves the position and, when all words are used up, makes all of
    them anew; so four words and the position will do. The second number of a pair of normal ones, which waits for the
    next call, is an attribute of random's object and lies inside of numpy's.
    """

    def __init__(self) -> None:
        head = object.__basicsize__
        size = 625 * 4
        self._knows_random = type(_RANDOM).__basicsize__ >= head + size
        if self._knows_random:
            # Where CPython keeps the state of the object: the position and the words, behind the head of the object.
            *words, position = random.getstate()[1]
            self._random = (ctypes.c_char * 20).from_address(id(_RANDOM) + head)
            memory = ctypes.string_at(id(_RANDOM) + head, size)
            self._knows_random = memory == np.array([position, *words], np.uint32).tobytes()

        own = np.random.RandomState(0)
        size = type(own).__basicsize__ - head
        own.normal()
        memory = ctypes.string_at(id(own) + head, size)
        own.normal()
        self._knows_numpy = type(own) is type(_LEGACY) and memory != ctypes.string_at(id(own) + head, size)
        self._legacy = (ctypes.c_char * size).from_address(id(_LEGACY) + head)
        self._generator: Any = None

    def read(self) -> tuple[Any, Any]:
        """Return the marks of the streams of numpy and random, each None where such a stream is not known well enough.

        That is so for generators of numpy's newer kinds, and for other Pythons than CPython.
        """
        generator = _NUMPY.get_bit_generator()
        if generator is not self._generator:
            self._generator, self._words = generator, None
            if type(generator) is np.random.MT19937 and self._knows_numpy:
                # https://numpy.org/doc/stable/reference/random/bit_generators/generated/numpy.random.MT19937.ctypes.html
                address = generator.ctypes.state_address
                self._words = (ctypes.c_char * 16).from_address(address)
                self._position = (ctypes.c_char * 4).from_address(address + 624 * 4)
        return (
            None if self._words is None else (self._legacy.raw, self._words.raw, self._position.raw),
            (self._random.raw, _RANDOM.gauss_next) if self._knows_random else None,  # type: ignore[attr-defined]
        )


_marks = _Marks()


class _NumpyStream:
    """A stream of numpy's that is the global one at times: the generator behind the global functions.

    Generators are exchanged as a whole, and their states are not touched. The exchange forgets one thing, the second
    number of a pair of normal ones; where there is such a number, and only there, the state is written back.
    """

    _read: dict[int, tuple[Any, Any, Any]] = {}
    """The generators whose states were read last, by id, with their marks and states."""

    def __init__(self, generator: Any, state: Any) -> None:
        self._generator = generator
        self._state = state  # None where there is no such number

    @classmethod
    def take_out(cls) -> _NumpyStream:
        """Return the stream that is the global one, for another to take its place."""
        state = cls.read()
        return cls(_NUMPY.get_bit_generator(), state if state["has_gauss"] else None)

    @classmethod
    def read(cls) -> Any:
        """Return the state of the global stream, which is one that was read before if it has not changed since."""
        generator, mark = _NUMPY.get_bit_generator(), _marks.read()[0]
        known = cls._read.get(id(generator))
        if mark is not None and known is not None and known[1] == mark:
            return known[2]
        state: Any = np.random.get_state(legacy=False)
        if mark is not None:
            if len(cls._read) > 8:
                cls._read.clear()
            cls._read[id(generator)] = generator, mark, state
        return state

    def put_in(self) -> None:
        """Let the stream be the global one."""
        _NUMPY.set_bit_generator(self._generator)
        if self._state is not None:
            np.random.set_state(self._state)


class _RandomStream:
    """Python's global stream, whose state is read only where it has changed."""

    _mark: Any = None
    _words: tuple[int, ...] = ()

    def read(self) -> Any:
        """Return what ``random.getstate()`` returns."""
        mark = _marks.read()[1]
        if mark is None:
            return random.getstate()
        if mark != self._mark:
            self._mark, self._words = mark, random.getstate()[1]
        return _RANDOM.VERSION, self._words, mark[1]


_random_stream = _RandomStream()


class _HostStreams:
    """The streams of torch (CPU), numpy and random that are the global ones, for others to take their place."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._random = _random_stream.read()
        self._numpy = _NumpyStream.take_out()

    def put_in(self) -> None:
        """Let the streams be the global ones again."""
        self._numpy.put_in()
        torch.set_rng_state(self._torch)
        random.setstate(self._random)


class OwnStreams:
    """Streams that a piece of code draws from in place of the global ones; they begin at a seed and go on in turns."""

    def __init__(self, seed: int) -> None:
        """Begin at ``seed``."""
        self._seed = seed
        self._states: Streams | None = None  # after a break that a checkpoint made
        self._streams: _HostStreams | None = None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the global streams be these inside the block."""
        aside = _HostStreams()
        try:
            if self._streams is not None:
                self._streams.put_in()
            else:
                _NUMPY.set_bit_generator(np.random.MT19937(0))
                if self._states is None:
                    seed_host_streams(self._seed)
                else:
                    set_host_streams(self._states)
            yield
            self._streams = _HostStreams()
        finally:
            aside.put_in()

    def state_dict(self) -> dict[str, Any]:
        """Return where the streams are; empty before they are first used."""
        if self._streams is not None:
            aside = _HostStreams()
            self._streams.put_in()
            self._states = get_host_streams()
            aside.put_in()
        return {} if self._states is None else pack_streams(self._states)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned."""
        self._states, self._streams = unpack_streams(state_dict) if state_dict else None, None


def chunks(iterable: Iterable[Any], size: int, streams: OwnStreams) -> Iterator[list[Any]]:
    """Yield the items of ``iterable`` in lists of ``size``; what is drawn to make them is drawn from ``streams``."""
    iterator: Iterator[Any] | None = None
    while True:
        with streams.in_use():
            iterator = iter(iterable) if iterator is None else iterator
            chunk = list(islice(iterator, size))
        if not chunk:
            return
        yield chunk


class seeded:  # noqa: N801  # used as a function; a generator for each batch takes longer than the seeding
    """Run the block on streams seeded with ``seed``; in the main process, whose streams others use, put them back."""

    _generators: list[Any] = []  # of numpy's, to lend to blocks

    def __init__(self, seed: int) -> None:
        """Take the seed."""
        self._seed = seed

    def __enter__(self) -> None:
        """Put the global streams aside, except in a worker, and seed those in their place."""
        self._aside: _HostStreams | None = None
        if get_worker_info() is None:
            self._aside = _HostStreams()
            self._generator = self._generators.pop() if self._generators else np.random.MT19937(0)
            _NUMPY.set_bit_generator(self._generator)
        seed_host_streams(self._seed)

    def __exit__(self, *error: object) -> None:
        """Put the global streams back."""
        if self._aside is not None:
            self._aside.put_in()
            self._generators.append(self._generator)


class SeededCalls:
    """Call a function time and again on seeded streams, and spare those that it does not draw from.

    Seeding all streams and putting them back takes as long as making a small batch. In the main process, a function
    that has not drawn from the streams of numpy and random so far is called without that, and the streams are watched.
    If it draws after all, they are put back and it is called once more on seeded ones, and so from then on.
    """

    def __init__(self) -> None:
        """Begin with a call on seeded streams."""
        self._draws: bool | None = None
        self._marks: Any = None  # of the states that follow
        self._states: Any = None

    def __call__(self, seed: int, function: Callable[[Any], T], argument: Any) -> T:
        """Return ``function(argument)``, whose random draws are a function of ``seed``."""
        if self._draws is not False or not self._can_watch():
            return self._seeded(seed, function, argument)
        generator = torch.default_generator
        torch_state = generator.get_state()
        generator.manual_seed(seed)
        error: Exception | None = None
        try:
            result = function(argument)
        except Exception as raised:
            error = raised
        finally:
            generator.set_state(torch_state)
            has_drawn = _marks.read() != self._marks
            if has_drawn:
                np.random.set_state(self._states[0])
                random.setstate(self._states[1])
        if has_drawn:
            self._draws = True
            return self._seeded(seed, function, argument)
        if error is not None:
            raise error
        return result

    def _can_watch(self) -> bool:
        marks = _marks.read()
        if marks != self._marks:
            self._marks, self._states = marks, (_NumpyStream.read(), _random_stream.read())
        return None not in marks

    def _seeded(self, seed: int, function: Callable[[Any], T], argument: Any) -> T:
        with seeded(seed):
            before = _marks.read()
            result = function(argument)
            if self._draws is None:
                is_watchable = None not in before and get_worker_info() is None
                self._draws = not is_watchable or before != _marks.read()
        return result


def states_of(owners: Iterable[Any]) -> list[dict[str, Any]]:
    """Return, for each object, the states of the random generators it holds, and its own where it has a state_dict."""
    found: list[dict[str, Any]] = []
    for owner in owners:
        states: dict[str, Any] = {}
        if _has_state(owner):
            states["state_dict"] = owner.state_dict()
        for name, value in getattr(owner, "__dict__", {}).items():
            if isinstance(value, torch.Generator):
                states[name] = value.get_state()
            elif isinstance(value, np.random.Generator):
                states[name] = value.bit_generator.state
            elif isinstance(value, np.random.RandomState):
                states[name] = _pack_numpy(value.get_state())
            elif isinstance(value, random.Random):
                states[name] = value.getstate()
        found.append(states)
    return found


def set_states_of(owners: Iterable[Any], found: list[dict[str, Any]]) -> None:
    """Give each object the states back that ``states_of`` returned, unless they were of another number of objects."""
    owners = list(owners)
    if len(owners) != len(found):
        return
    for owner, states in zip(owners, found, strict=True):
        for name, state in states.items():
            if name == "state_dict" and _has_state(owner):
                owner.load_state_dict(state)
                continue
            value = getattr(owner, name, None)
            if isinstance(value, torch.Generator):
                value.set_state(state)
            elif isinstance(value, np.random.Generator):
                value.bit_generator.state = state
            elif isinstance(value, np.random.RandomState):
                value.set_state(_unpack_numpy(state))
            elif isinstance(value, random.Random):
                value.setstate(state)


def _has_state(owner: Any) -> bool:
    return hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict")

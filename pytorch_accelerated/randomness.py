"""Random streams: seeds that are functions of a key, and the states of streams to put back, to save and to load."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info


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


@contextmanager
def host_streams_preserved() -> Iterator[None]:
    """Put the global random streams of torch (CPU), numpy and random back as they were when the block began."""
    streams = get_host_streams()
    try:
        yield
    finally:
        set_host_streams(streams)


class OwnStreams:
    """Streams that a piece of code draws from in place of the global ones; they begin at a seed and go on in turns."""

    def __init__(self, seed: int) -> None:
        """Begin at ``seed``."""
        self._seed = seed
        self._streams: Streams | None = None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the global streams be these inside the block."""
        with host_streams_preserved():
            if self._streams is None:
                seed_host_streams(self._seed)
            else:
                set_host_streams(self._streams)
            yield
            self._streams = get_host_streams()

    def state_dict(self) -> dict[str, Any]:
        """Return where the streams are; empty before they are first used."""
        return {} if self._streams is None else pack_streams(self._streams)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned."""
        self._streams = unpack_streams(state_dict) if state_dict else None


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


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the block on streams seeded with ``seed``; in the main process, whose streams others use, put them back."""
    if get_worker_info() is None:
        with host_streams_preserved():
            seed_host_streams(seed)
            yield
    else:
        seed_host_streams(seed)
        yield


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

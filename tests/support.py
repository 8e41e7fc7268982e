"""What several tests need: small models and data, and real processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LambdaCallback

_CONTEXT = multiprocessing.get_context("forkserver")
# Children are forked from a server that has imported these once, so that they start in well under a second. The first
# optimizer would import torch._dynamo.
_CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "accelerate", "torchmetrics", "tests.support"])


def run_processes(function: Callable[..., Any], num_processes: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``function(*args)`` in real processes that know of each other (gloo), and return what each returned.

    With ``num_processes=0`` there is one that no launcher started, which Accelerate does not take for distributed.

    Raises RuntimeError with the traceback if one raised.
    """
    results = _CONTEXT.Queue()
    processes = _start(_enter, function, args, num_processes, results)
    try:
        returned: dict[int, Any] = {}
        for _ in processes:
            try:
                rank, is_fine, result = results.get(timeout=timeout)
            except queue.Empty:
                raise RuntimeError(f"processes {set(range(num_processes)) - set(returned)} hang") from None
            if not is_fine:
                raise RuntimeError(f"process {rank} of {num_processes} failed:\n{result}")
            returned[rank] = pickle.loads(result)
        for process in processes:
            process.join(timeout)
        return [returned[rank] for rank in range(len(processes))]
    finally:
        for process in processes:
            process.kill()


def run_until_killed(function: Callable[..., Any], num_processes: int, *args: Any, timeout: float = 120) -> list[int]:
    """Call ``function(*args)`` in real processes; when one dies, kill the others, as a launcher does.

    Returns the exit codes, negative for a signal. What a process printed comes with the error if one raised.
    """
    with tempfile.TemporaryDirectory() as log:
        processes = _start(_enter_unheard, function, args, num_processes, log)
        deadline = time.monotonic() + timeout
        sentinels = [process.sentinel for process in processes]
        try:
            while any(process.exitcode is None for process in processes):
                assert time.monotonic() < deadline, "processes hang"
                multiprocessing.connection.wait(sentinels, timeout=1)
                if any(process.exitcode not in (None, 0) for process in processes):
                    break
                sentinels = [process.sentinel for process in processes if process.exitcode is None]
        finally:
            for process in processes:
                process.kill()
                process.join()
        failures = [path.read_text() for path in sorted(Path(log).glob("*.error"))]
        assert not failures, "\n".join(failures)
        return [process.exitcode or 0 for process in processes]


def _start(enter: Callable[..., None], function: Callable[..., Any], args: Any, num_processes: int, sink: Any) -> Any:
    """Start the processes, in each of which ``enter`` calls the function and tells ``sink`` what came of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        _CONTEXT.Process(target=enter, args=(function, args, rank, num_processes, port, sink))
        for rank in range(max(num_processes, 1))
    ]
    for process in processes:
        process.start()
    return processes


def _enter_unheard(function: Callable[..., Any], args: Any, rank: int, num_processes: int, port: int, log: str) -> None:
    results: queue.Queue[Any] = queue.Queue()
    with open(f"{log}/{rank}.out", "w") as out, contextlib.redirect_stdout(out):
        _enter(function, args, rank, num_processes, port, results)
    _, is_fine, result = results.get()
    # A process whose peer was killed fails of that; the test is about the other.
    if not is_fine and "connection" not in result.lower():
        Path(f"{log}/{rank}.error").write_text(result)
    os._exit(0 if is_fine else 1)


def _enter(function: Callable[..., Any], args: Any, rank: int, num_processes: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launched = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if num_processes > 0:
        os.environ |= launched
    try:
        result = function(*args)
        # A test that believes to run in two processes and runs in one proves nothing.
        from accelerate import PartialState

        assert PartialState().num_processes == max(num_processes, 1)
        assert num_processes < 2 or torch.distributed.get_world_size() == num_processes
        # Pickled here: a queue would send tensors as handles, which die with their process.
        results.put((rank, True, pickle.dumps(result)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def make_mlp(seed: int = 0, inputs: int = 4, outputs: int = 3, dropout: float = 0.0) -> nn.Module:
    """Return a small network with the same weights for the same seed, drawing from no global stream."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, outputs))


def make_data(num_samples: int, seed: int = 0, inputs: int = 4, outputs: int = 3) -> TensorDataset:
    """Return a classification set: x of shape (N, inputs), y of shape (N,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, inputs, generator=generator)
    return TensorDataset(x, torch.randint(outputs, (num_samples,), generator=generator))


class Interruption(Exception):
    """Ends a run where a test wants it to end."""


def interrupt_at(update: int | None) -> LambdaCallback:
    """Raise in the step after the given number of updates; None for never."""

    def interrupt(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == update:
            raise Interruption

    return LambdaCallback(on_train_step_end=interrupt)


class PlainDataset(Dataset[Any]):
    """A map-style dataset in Python, over the samples of another."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        return self.source[index]


class Stream(IterableDataset[Any]):
    """An iterable dataset without length, over the samples of another."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __iter__(self) -> Any:
        for index in range(len(self.source)):
            yield self.source[index]


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return a copy of the weights of a trainer's model."""
    return {name: value.detach().clone() for name, value in trainer.get_model().state_dict().items()}


def assert_equal_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Check that two sets of weights are the same to the bit."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs by {(value - second[name]).abs().max()}"


def relative_error(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference of two sets of tensors, relative to the norm of the second."""
    flat = [torch.cat([tensors[name].double().flatten() for name in sorted(tensors)]) for tensors in (first, second)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())

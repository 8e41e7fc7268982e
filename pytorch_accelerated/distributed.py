"""Work that concerns several processes: gathering, reducing, agreeing, taking turns, and failing together."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate import notebook_launcher as notebook_launcher
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, recursively_apply
from torch import Tensor

from pytorch_accelerated.errors import LaunchError, ProcessFailedError

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

P = ParamSpec("P")
T = TypeVar("T")

_MAX_DIMS = 8
_run_numbers = count(1)  # the processes go through the same runs, so that the number tells which run a failure was of
_failure_key = "pytorch_accelerated/failure"
_SECONDS_TO_WAIT_FOR_A_FAILURE = 3.0
_NOTE = (
    "pytorch_accelerated: the connection to another process broke, because that process failed or was ended. Its own "
    "output says why."
)


def check_launch(accelerator: Accelerator) -> None:
    """Refuse to run when a launcher started several processes that Accelerate does not know of.

    Raises:
        LaunchError: if ``WORLD_SIZE`` is above one and Accelerate counts one process. Each would take itself for the
            only one, train on all the data, and write the same files.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and accelerator.num_processes == 1:
        raise LaunchError(
            f"the launcher started WORLD_SIZE={world_size} processes, but Accelerate counts 1: each of them would "
            "train on its own. On a machine without GPUs, set ACCELERATE_USE_CPU=true, as in: "
            f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {world_size} --num_machines 1 "
            "--mixed_precision no --dynamo_backend no script.py, or ACCELERATE_USE_CPU=true torchrun "
            f"--nproc_per_node {world_size} script.py. On a machine with GPUs, check that torch.cuda.is_available() "
            f"and that there are {world_size} of them."
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether weights and optimizer are spread over the processes, so that none holds them whole."""
    return accelerator.distributed_type in (
        DistributedType.FSDP,
        DistributedType.DEEPSPEED,
        DistributedType.MEGATRON_LM,
    )


def gather(accelerator: Accelerator, data: Any, padding_value: float | None = None, contributes: bool = True) -> Any:
    """Return the rows of ``data`` of all processes, joined in the order of the processes, on every process.

    Collective: every process must call it. The numbers of rows may differ between processes, and may be zero. With
    several processes this waits for the device, because the shapes must be known on the host.

    Args:
        accelerator: the processes.
        data: a tensor of shape ``(N, ...)``, or a nested tuple, list or dict of such. A scalar counts as one row. A
            list without any tensor, or of dicts as object detectors return, is taken for N rows of Python objects.
        padding_value: what to fill up with where other dimensions than the first differ between processes.
        contributes: whether this process's rows are wanted; if not, it only helps to gather those of the others.

    Raises:
        TypeError: if ``data`` is something else.
        ValueError: if other dimensions than the first differ and no ``padding_value`` was given, or if the numbers of
            dimensions differ; on all processes alike.
    """
    if isinstance(data, Tensor):
        return _gather_tensor(accelerator, data, padding_value, contributes)
    if isinstance(data, Mapping):
        return _rebuild(
            data, {key: gather(accelerator, value, padding_value, contributes) for key, value in data.items()}
        )
    if is_nested(data):
        return _rebuild(data, [gather(accelerator, value, padding_value, contributes) for value in data])
    if data is None:
        return None
    if not isinstance(data, list | tuple | str | bytes | int | float):
        raise TypeError(
            f"cannot join {type(data).__name__} over batches and processes; expected tensors, nested tuples, lists "
            "and dicts of tensors, or lists of one object for each sample. Override calculate_predictions to return "
            "such."
        )
    rows = list(data) if isinstance(data, list | tuple) else [data]
    # A device that only this process has must not travel along.
    joined: list[Any] = gather_object(to_host(rows) if contributes else [])
    return joined


def to_host(data: Any) -> Any:
    """Return ``data`` with the tensors of its nested structure on the CPU, which waits for the device."""
    return recursively_apply(lambda tensor: tensor.cpu(), data)  # the caller asks for exactly this wait


def concatenate(parts: list[Any]) -> Any:
    """Return nested structures of the same kind joined along the first dimension of their tensors, lists end to end.

    Raises:
        ValueError: if there are no parts, or if tensors differ in other dimensions than the first.
    """
    if not parts:
        raise ValueError("there is nothing to join: the data gave no batch.")
    first = parts[0]
    if isinstance(first, Tensor):
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = sorted({tuple(part.shape[1:]) for part in parts})
            raise ValueError(
                "the outputs of different batches cannot be joined, their shapes after the first dimension are "
                f"{shapes}. Override calculate_predictions to return outputs of one shape, for example padded to a "
                "fixed length."
            )
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return _rebuild(first, {key: concatenate([part[key] for part in parts]) for key in first})
    if first is None:
        return None
    if is_nested(first):
        if len({len(part) for part in parts}) > 1:
            raise ValueError(
                "the outputs of different batches cannot be joined, they have "
                f"{sorted({len(part) for part in parts})} elements. Override calculate_predictions to return tensors "
                "whose first dimension is the sample."
            )
        return _rebuild(first, [concatenate(list(values)) for values in zip(*parts, strict=True)])
    return [row for part in parts for row in part]


def is_nested(data: Any) -> bool:
    """Return whether a list or tuple holds parts of the output of a batch, and not one object for each sample.

    A list of dicts holds one for each sample, as object detectors return it.
    """
    is_rows = isinstance(data, list) and all(isinstance(row, Mapping) for row in data)
    return isinstance(data, list | tuple) and _has_tensor(data) and not is_rows


def _has_tensor(data: Any) -> bool:
    if isinstance(data, Mapping):
        return any(_has_tensor(value) for value in data.values())
    return isinstance(data, Tensor) or (isinstance(data, list | tuple) and any(_has_tensor(value) for value in data))


def _rebuild(like: Any, content: Any) -> Any:
    """Return ``content`` in the container type of ``like``."""
    if isinstance(like, Mapping):
        # Hugging Face's ModelOutput is a mapping and a dataclass; of other mappings the content is what counts.
        return type(like)(**content) if is_dataclass(like) else content
    return type(like)(*content) if hasattr(like, "_fields") else type(like)(content)  # a named tuple has _fields


def _gather_tensor(accelerator: Accelerator, tensor: Tensor, padding_value: float | None, contributes: bool) -> Tensor:
    tensor = tensor.detach()
    if tensor.ndim == 0:
        tensor = tensor[None]
    if not contributes:
        tensor = tensor[:0]
    if accelerator.num_processes == 1:
        return tensor
    if tensor.ndim > _MAX_DIMS:
        raise ValueError(f"gather takes tensors of at most {_MAX_DIMS} dimensions, got shape {tuple(tensor.shape)}.")
    tensor = tensor.to(accelerator.device).contiguous()
    # Unequal shapes abort the process (gloo) or hang (NCCL), so the shapes go first.
    header = [tensor.ndim, *tensor.shape] + [0] * (_MAX_DIMS - tensor.ndim)
    sent = torch.tensor([header], device=accelerator.device)
    headers = accelerator.gather(sent).tolist()  # waits for the device: the host has to know how much to make room for
    shapes = [tuple(row[1 : 1 + row[0]]) for row in headers]
    if len({len(shape) for shape in shapes}) > 1 or (
        padding_value is None and len({shape[1:] for shape in shapes}) > 1
    ):
        raise ValueError(
            f"gather got tensors that do not fit together, by process: {shapes}. All must have the same number of "
            "dimensions, and may differ in other dimensions than the first only if a padding_value is given."
        )
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    if largest[0] == 0:
        return tensor.new_empty(largest)
    if list(tensor.shape) != largest:
        padded = tensor.new_full(largest, 0 if padding_value is None else padding_value)
        padded[tuple(slice(size) for size in tensor.shape)] = tensor
        tensor = padded
    joined = accelerator.gather(tensor)
    rows = [joined[number * largest[0] :][: shape[0]] for number, shape in enumerate(shapes)]
    return torch.cat(rows)


def reduce_sum(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """Return the sum of ``tensor`` over all processes, without waiting for the device. Collective."""
    return tensor if accelerator.num_processes == 1 else accelerator.reduce(tensor, reduction="sum")


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return, on every process alike, whether ``flag`` is true on at least one. Collective; waits for the device."""
    if accelerator.num_processes == 1:
        return flag
    flags = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device))
    return bool(flags.item() > 0)  # waits for the device: the caller goes one way or the other by the answer


def gather_rows(accelerator: Accelerator, value: T) -> list[T]:
    """Return ``value`` of each process, on every process. Collective; ``value`` must be picklable and on the CPU."""
    if accelerator.num_processes == 1:
        return [value]
    rows: list[T] = gather_object([value])
    return rows


def on_main_process(accelerator: Accelerator, function: Callable[[], T], failure: type[Exception]) -> T:
    """Return what ``function``, called on the main process, returns there, on every process. Collective.

    Raises:
        Exception: what ``function`` raised, on the main process; ``failure`` with the same words on the others.
    """
    result: T | None = None
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            result = function()
        except Exception as raised:
            error = raised
    result, message = broadcast_from_main(accelerator, (result, None if error is None else str(error)))
    if error is not None:
        raise error
    if message is not None:
        raise failure(message)
    return result  # type: ignore[return-value]  # None only if the function returns it


class PeriodicAgreement:
    """Let processes agree on what to do about once a second, without an exchange in every step."""

    def __init__(self, accelerator: Accelerator, seconds: float = 1.0, max_calls: int = 64) -> None:
        """Begin with an exchange at the next call.

        Args:
            accelerator: the processes.
            seconds: the time that should lie between two exchanges.
            max_calls: calls after which there is an exchange even if they took less.
        """
        self._accelerator = accelerator
        self._seconds = seconds
        self._max_calls = max_calls
        self.restart()

    def restart(self) -> None:
        """Let the next call exchange: what comes may take longer than what was. Every process must do the same."""
        self._num_calls, self._left = 1, 1
        self._last = time.monotonic()

    def ask(self, *values: int) -> tuple[int, ...] | None:
        """Return the largest value on any process for each of ``values``; None where it is not yet time to ask.

        Collective where it is time; every process must call it in the same steps. Waits for the device then.
        """
        if self._accelerator.num_processes == 1:
            return values
        self._left -= 1
        if self._left > 0:
            return None
        now = time.monotonic()
        per_call = (now - self._last) / self._num_calls
        upcoming = int(min(self._seconds / max(per_call, 1e-6), 2 * self._num_calls, self._max_calls))
        row = torch.tensor([[*values, max(upcoming, 1)]], device=self._accelerator.device)
        rows = self._accelerator.gather(row).tolist()  # waits for the device, about once a second
        self._num_calls = self._left = rows[0][-1]  # the main process says when to ask again
        self._last = now
        return tuple(max(column) for column in zip(*(row[:-1] for row in rows), strict=True))


def broadcast_from_main(accelerator: Accelerator, value: T) -> T:
    """Return the main process's ``value`` on every process. Collective; ``value`` must be picklable."""
    if accelerator.num_processes == 1:
        return value
    result: T = broadcast_object_list([value])[0]
    return result


@contextmanager
def main_process_first(accelerator: Accelerator, local: bool = False) -> Iterator[None]:
    """Run the block on the main process, then on the others; a failure on one does not leave the others waiting.

    Args:
        accelerator: the processes that take turns.
        local: whether to let one process of each machine go first instead of one in all.
    """
    first = accelerator.is_local_main_process if local else accelerator.is_main_process
    if not first:
        accelerator.wait_for_everyone()
    try:
        yield
    finally:
        if first:
            accelerator.wait_for_everyone()


def main_process_only(function: Callable[P, T]) -> Callable[P, T | None]:
    """Let only the main process run the function; the others wait for it and get None.

    When the function raises, the main process raises the error once the others have stopped waiting.
    """
    return _only_where(function, local=False)


def local_main_process_only(function: Callable[P, T]) -> Callable[P, T | None]:
    """Let only one process of each machine run the function; the others wait for it and get None.

    When the function raises, that process raises the error once the others have stopped waiting.
    """
    return _only_where(function, local=True)


def _only_where(function: Callable[P, T], local: bool) -> Callable[P, T | None]:
    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T | None:
        state = PartialState()
        try:
            chosen = state.is_local_main_process if local else state.is_main_process
            return function(*args, **kwargs) if chosen else None
        finally:
            state.wait_for_everyone()

    return wrapper


def fill_empty_states(metric: Metric | MetricCollection) -> None:
    """Give the list states of a metric that saw no sample on this process the type and shape they have elsewhere.

    Torchmetrics 1.9 sends an empty state as a one-dimensional float32 tensor, which breaks the exchange when the others
    send integers or matrices. Remove when its ``_sync_dist`` learns the type from the other processes. Collective.
    """
    from torchmetrics import Metric

    for part in metric.modules():
        if not isinstance(part, Metric):
            continue
        lists = {name: state for name, state in part.metric_state.items() if isinstance(state, list)}
        mine = {name: (state[0].dtype, tuple(state[0].shape[1:])) for name, state in lists.items() if state}
        theirs: dict[str, Any] = {}
        for states in gather_object([mine]):
            theirs.update(states)
        for name, state in lists.items():
            if not state and name in theirs:
                dtype, shape = theirs[name]
                state.append(torch.empty((0, *shape), dtype=dtype, device=part.device))


@contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """Let the failure of one process in the block be told to the others, which would only see a broken connection.

    Raises:
        ProcessFailedError: where this process failed only because another one did.
    """
    global _failure_key
    _failure_key = f"pytorch_accelerated/failure/{next(_run_numbers)}"
    try:
        yield
    except BaseException as error:
        report_failure(accelerator, error)
        if (cause := peer_failure(accelerator, error)) is not None:
            raise cause from None
        raise


def report_failure(accelerator: Accelerator, error: BaseException) -> None:
    """Leave word of a failure for the other processes, which will only see that the connection broke."""
    if accelerator.num_processes > 1 and dist.is_initialized() and not _is_lost_connection(error):
        message = f"{type(error).__name__}: {error}"
        # Where the store went with its process, nothing is lost: the error itself is about to be raised and seen.
        with suppress(RuntimeError, ValueError):
            _store().set(_failure_key, f"{accelerator.process_index}\n{message}")


def peer_failure(accelerator: Accelerator, error: BaseException) -> ProcessFailedError | None:
    """Return the error to raise in place of ``error`` if that only says that another process is gone, else None.

    Where that process left no word, as when it was killed, ``error`` gets a note instead.
    """
    if accelerator.num_processes == 1 or not _is_lost_connection(error) or _NOTE in getattr(error, "__notes__", ()):
        return None
    deadline = time.monotonic() + _SECONDS_TO_WAIT_FOR_A_FAILURE
    with suppress(RuntimeError, ValueError):  # the store went with its process
        while time.monotonic() < deadline:
            if _store().check([_failure_key]):
                process, message = _store().get(_failure_key).decode().split("\n", 1)
                return ProcessFailedError(
                    f"process {process} of {accelerator.num_processes} failed, so process {accelerator.process_index} "
                    f"cannot go on. The error of process {process}, whose traceback it prints itself: {message}"
                )
            time.sleep(0.05)
    error.add_note(_NOTE)
    return None


def _is_lost_connection(error: BaseException) -> bool:
    # gloo raises plain RuntimeErrors; NCCL's have a type of their own.
    signs = ("Connection closed by peer", "Connection reset by peer", "connection was closed", "Broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign.lower() in str(error).lower() for sign in signs)
    )


def _store() -> Any:
    # There is no public way to the store that torch keeps for its own rendezvous; drop when torch offers one.
    return dist.distributed_c10d._get_default_store()

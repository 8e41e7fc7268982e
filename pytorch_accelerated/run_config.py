"""The facts of one run, and stand-ins for them in the arguments of a scheduler factory."""

from __future__ import annotations

import dataclasses
import math
import operator
import warnings
from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclasses.dataclass(frozen=True)
class TrainerRunConfig:
    """Hold what is fixed for the length of one run.

    A step is one batch on every process at once; an update is one optimizer step. What a run does not have (an
    evaluation set, a known length) is None.
    """

    num_epochs: int | None = None
    """Passes over the training data, None when only updates limit the run."""
    max_num_train_steps: int | None = None
    """Upper limit of the run in updates, None when only epochs limit it."""
    train_dataloader_len: int | None = None
    """Steps in one epoch."""
    eval_dataloader_len: int | None = None
    """Steps in one evaluation, summed over the evaluation sets."""
    train_per_device_batch_size: int | None = None
    """Samples in one batch of one process."""
    eval_per_device_batch_size: int | None = None
    """Samples in one evaluation batch of one process."""
    train_dl_kwargs: dict[str, Any] | None = None
    """Arguments for the training DataLoader, as the user gave them."""
    eval_dl_kwargs: dict[str, Any] | None = None
    """Arguments for the evaluation DataLoader, as the user gave them."""
    gradient_accumulation_steps: int = 1
    """Steps whose gradients are summed for one update."""
    gradient_clip_value: float | None = None
    """Largest magnitude of an element of a gradient."""
    gradient_clip_norm: float | None = None
    """Largest total norm of all gradients together."""
    seed: int | None = None
    """Seed of the order of the samples and of the randomness in the datasets."""
    num_processes: int = 1
    """Processes of the run, over all machines."""
    mixed_precision: str = "no"
    """Precision that Accelerate runs the model in."""
    is_main_process: bool = True
    """Whether this is the one process of the run that writes."""
    is_local_main_process: bool = True
    """Whether this is the one process of its machine that writes."""

    @classmethod
    def of_run(cls, accelerator: Accelerator, **facts: Any) -> TrainerRunConfig:
        """Return the given facts together with those that the Accelerator knows."""
        return cls(
            num_processes=accelerator.num_processes,
            mixed_precision=accelerator.mixed_precision,
            is_main_process=accelerator.is_main_process,
            is_local_main_process=accelerator.is_local_main_process,
            **facts,
        )

    @property
    def is_distributed(self) -> bool:
        """Tell whether the run has more than one process."""
        return self.num_processes > 1

    @property
    def num_update_steps_per_epoch(self) -> int | None:
        """Return the updates in one whole epoch; None when the data has no known length."""
        steps = self.train_dataloader_len
        return None if steps is None else -(-steps // self.gradient_accumulation_steps)

    @property
    def num_updates(self) -> int | None:
        """Return the updates that the run will make, the smaller of the two limits; None when that is not known."""
        per_epoch = self.num_update_steps_per_epoch
        by_epochs = None if per_epoch is None or self.num_epochs is None else per_epoch * self.num_epochs
        return min((limit for limit in (by_epochs, self.max_num_train_steps) if limit is not None), default=None)

    @property
    def train_total_batch_size(self) -> int | None:
        """Return the samples in one update: of all processes and of the whole accumulation window."""
        size = self.train_per_device_batch_size
        return None if size is None else size * self.num_processes * self.gradient_accumulation_steps

    @property
    def eval_total_batch_size(self) -> int | None:
        """Return the samples in one evaluation step of all processes."""
        size = self.eval_per_device_batch_size
        return None if size is None else size * self.num_processes

    @property
    def num_local_update_steps_per_epoch(self) -> int | None:
        """Return the updates in one epoch: they are the same on every process, whatever its share of the data."""
        return self.num_update_steps_per_epoch

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as a new dict; values that JSON has no form for become their ``repr``."""
        derived = [name for name, value in vars(type(self)).items() if isinstance(value, property)]
        return {
            name: _plain(getattr(self, name))
            for name in [*(field.name for field in dataclasses.fields(self)), *derived]
        }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return value if isinstance(value, str | float | bool | None) else repr(value)


def check_trainer_arguments(model: Any, loss_func: Any, optimizer: Any, seed: Any) -> None:
    """Refuse arguments of ``Trainer`` that cannot be what they are to be.

    Raises:
        TypeError: if one is of a wrong type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if loss_func is not None and (isinstance(loss_func, type) or not callable(loss_func)):
        raise TypeError(f"loss_func must be a function, or an instance such as nn.MSELoss(), got {loss_func!r}.")
    if optimizer is not None and not callable(optimizer) and not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"optimizer must be a torch Optimizer or a function that makes one, got {type(optimizer).__name__}."
        )
    if seed is not None and not isinstance(seed, Integral):
        raise TypeError(f"seed must be a whole number or None, got {seed!r}.")
    if getattr(loss_func, "reduction", None) == "sum":
        warnings.warn(
            "loss_func has reduction='sum', but losses are taken for means over the samples of a batch: the size of "
            "an update will depend on the batch size. Use reduction='mean'.",
            stacklevel=3,
        )


def check_train_arguments(
    *,
    num_epochs: Any,
    max_num_train_steps: Any,
    per_device_batch_size: Any,
    gradient_accumulation_steps: Any,
    gradient_clip_value: Any,
    gradient_clip_norm: Any,
    create_scheduler_fn: Any,
) -> None:
    """Refuse arguments of ``Trainer.train`` that make no sense, before anything is done.

    Raises:
        TypeError: if the scheduler factory is something else.
        ValueError: if a count is no whole number of at least one, a limit of gradients not above zero, or the run has
            no end.
    """
    counts = {
        "num_epochs": num_epochs,
        "max_num_train_steps": max_num_train_steps,
        "per_device_batch_size": per_device_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
    }
    for name, count in counts.items():
        may_be_none = name in ("num_epochs", "max_num_train_steps")
        is_whole = isinstance(count, Integral) and not isinstance(count, bool)
        if not (count is None and may_be_none) and not (is_whole and count >= 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}.")
    for name, limit in {"gradient_clip_value": gradient_clip_value, "gradient_clip_norm": gradient_clip_norm}.items():
        if limit is not None and not (isinstance(limit, Real) and float(limit) > 0):
            raise ValueError(f"{name} must be above 0, or None to leave the gradients as they are, got {limit!r}.")
    if num_epochs is None and max_num_train_steps is None:
        raise ValueError("training would have no end: give num_epochs, max_num_train_steps (in updates), or both.")
    if create_scheduler_fn is not None and not callable(create_scheduler_fn):
        example = type(create_scheduler_fn).__name__ if hasattr(create_scheduler_fn, "step") else "StepLR"
        raise TypeError(
            "create_scheduler_fn must be a function that takes the optimizer and returns a scheduler, got "
            f"{create_scheduler_fn!r}. Pass for example partial({example}, ...) instead."
        )


def _round(number: float) -> int:
    return math.ceil(round(number, 6) - 0.5)


class Placeholder:
    """Stand for a number that is known only when the run begins; arithmetic on it gives another placeholder."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], description: str) -> None:
        """Store how to find the number.

        Args:
            function: called with the arguments once these are numbers.
            arguments: placeholders, numbers, or for a fact of the run the name of its field in ``TrainerRunConfig``.
            description: what to call the number in messages.
        """
        self._function = function
        self._arguments = arguments
        self._description = description

    def __repr__(self) -> str:
        return self._description

    @classmethod
    def of_field(cls, name: str) -> Placeholder:
        """Return a placeholder for a field or property of ``TrainerRunConfig``."""
        return cls(getattr, (name,), f"TrainerPlaceholderValues({name})")

    def resolve(self, run_config: TrainerRunConfig) -> Any:
        """Return the number for this run. Raises ValueError if the run does not have it."""
        if self._function is not getattr:
            return self._function(*(resolve_placeholders(argument, run_config) for argument in self._arguments))
        value = getattr(run_config, *self._arguments)
        if value is None:
            raise ValueError(
                f"TrainerPlaceholderValues needs run_config.{self._arguments[0]}, which this run does not have: that "
                "takes data with a length, or a limit of the run (num_epochs, max_num_train_steps), or an evaluation "
                "set. Write the number into the scheduler factory instead."
            )
        return value

    def _combine(self, function: Callable[[Any, Any], Any], sign: str, left: Any, right: Any) -> Placeholder:
        return Placeholder(function, (left, right), f"({left!r} {sign} {right!r})")

    def rounded(self) -> Placeholder:
        """Return a placeholder for the nearest whole number; of two the lower, so that halves fit into a whole."""
        return Placeholder(_round, (self,), f"round({self!r})")

    def __add__(self, other: Any) -> Placeholder:
        return self._combine(operator.add, "+", self, other)

    def __radd__(self, other: Any) -> Placeholder:
        return self._combine(operator.add, "+", other, self)

    def __sub__(self, other: Any) -> Placeholder:
        return self._combine(operator.sub, "-", self, other)

    def __rsub__(self, other: Any) -> Placeholder:
        return self._combine(operator.sub, "-", other, self)

    def __mul__(self, other: Any) -> Placeholder:
        return self._combine(operator.mul, "*", self, other)

    def __rmul__(self, other: Any) -> Placeholder:
        return self._combine(operator.mul, "*", other, self)

    def __truediv__(self, other: Any) -> Placeholder:
        return self._combine(operator.truediv, "/", self, other)

    def __rtruediv__(self, other: Any) -> Placeholder:
        return self._combine(operator.truediv, "/", other, self)

    def __floordiv__(self, other: Any) -> Placeholder:
        return self._combine(operator.floordiv, "//", self, other)

    def __rfloordiv__(self, other: Any) -> Placeholder:
        return self._combine(operator.floordiv, "//", other, self)


class TrainerPlaceholderValues:
    """Name the facts of a run that a scheduler factory may need before they are known.

    Use them as arguments of a ``functools.partial`` (positional or by keyword, also inside lists, tuples and dicts),
    with ``+ - * / //`` where needed; ``Trainer.create_scheduler`` puts the numbers in. All counts are in updates of one
    process, which are the updates of the run.
    """

    NUM_EPOCHS = Placeholder.of_field("num_epochs")
    NUM_UPDATES = Placeholder.of_field("num_updates")
    NUM_UPDATE_STEPS_PER_EPOCH = Placeholder.of_field("num_update_steps_per_epoch")
    PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH = Placeholder.of_field("num_local_update_steps_per_epoch")
    TRAIN_DATALOADER_LEN = Placeholder.of_field("train_dataloader_len")
    EVAL_DATALOADER_LEN = Placeholder.of_field("eval_dataloader_len")


def resolve_placeholders(value: Any, run_config: TrainerRunConfig) -> Any:
    """Return ``value`` with every placeholder in it replaced by the number of this run.

    Args:
        value: a placeholder, a ``functools.partial``, or a list, tuple or dict of such; anything else is returned as it
            is.
        run_config: the facts of the run.

    Raises:
        ValueError: if the run does not have a number that is asked for.
    """
    if isinstance(value, Placeholder):
        return value.resolve(run_config)
    if isinstance(value, partial):
        args = [resolve_placeholders(item, run_config) for item in value.args]
        return partial(value.func, *args, **resolve_placeholders(value.keywords, run_config))
    if type(value) not in (dict, list, tuple):
        return value
    items = list(value.values() if type(value) is dict else value)
    resolved = [resolve_placeholders(item, run_config) for item in items]
    if all(new is old for new, old in zip(resolved, items, strict=True)):
        return value  # it may be someone's to share
    return dict(zip(value, resolved, strict=True)) if type(value) is dict else type(value)(resolved)

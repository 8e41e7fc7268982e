"""Shorter epochs and evaluations, for trying things out."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

LIMIT_BATCHES_ENV_VAR = "PT_ACC_LIMIT_BATCHES"


class LimitBatchesCallback(TrainerCallback):
    """End each pass over training or evaluation data after a number of batches; of several limits the smallest wins.

    Schedulers and progress bars know of the shorter epochs. Setting the environment variable ``PT_ACC_LIMIT_BATCHES``
    to a number gives every new trainer this callback.
    """

    def __init__(self, num_batches: int) -> None:
        """Take the number of batches, counted on one process. Raises ValueError if it is below one."""
        self.num_batches = _positive("num_batches", num_batches)

    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Set the limits, before any loader is made."""
        trainer.limit_train_batches = min(self.num_batches, trainer.limit_train_batches or self.num_batches)
        trainer.limit_eval_batches = min(self.num_batches, trainer.limit_eval_batches or self.num_batches)

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check that the limits are in force. Raises ValueError if the callback came after the trainer was made."""
        if trainer.limit_train_batches is None or trainer.limit_train_batches > self.num_batches:
            raise ValueError(
                f"LimitBatchesCallback({self.num_batches}) is not in force, the limit is "
                f"{trainer.limit_train_batches}: pass it to Trainer(callbacks=...). Added later it comes after the "
                "loaders and the schedule."
            )


class LimitEvalStepsCallback(TrainerCallback):
    """End each evaluation during training after a number of batches; the metrics cover what was seen."""

    def __init__(self, num_eval_steps: int, limit_intermediate_only: bool = True) -> None:
        """Take the limit.

        Args:
            num_eval_steps: batches of one process.
            limit_intermediate_only: whether evaluations at the end of an epoch are left whole, and only those in
                between, which ``StepBasedEvaluationCallback`` asks for, are limited.

        Raises:
            ValueError: if the number is below one.
        """
        self.num_eval_steps = _positive("num_eval_steps", num_eval_steps)
        self.limit_intermediate_only = limit_intermediate_only
        self._usual_limit: int | None = None

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Note the usual limit."""
        self._usual_limit = trainer.limit_eval_batches

    def on_eval_epoch_begin(self, trainer: Trainer, is_intermediate: bool = False, **kwargs: Any) -> None:
        """Set the limit for this pass."""
        if trainer.is_training_run:
            is_limited = is_intermediate or not self.limit_intermediate_only
            trainer.limit_eval_batches = self.num_eval_steps if is_limited else self._usual_limit

    def on_train_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Take the limit back."""
        trainer.limit_eval_batches = self._usual_limit


class LimitBatches:
    """Give every trainer that is made inside this context the ``LimitBatchesCallback``."""

    def __init__(self, num_batches: int) -> None:
        """Take the number of batches, counted on one process. Raises ValueError if it is below one."""
        self.num_batches = _positive("num_batches", num_batches)

    def __enter__(self) -> LimitBatches:
        """Set the environment variable."""
        self._previous = os.environ.get(LIMIT_BATCHES_ENV_VAR)
        os.environ[LIMIT_BATCHES_ENV_VAR] = str(self.num_batches)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, exc_traceback: TracebackType | None
    ) -> None:
        """Put the environment variable back as it was."""
        if self._previous is None:
            del os.environ[LIMIT_BATCHES_ENV_VAR]
        else:
            os.environ[LIMIT_BATCHES_ENV_VAR] = self._previous


def limit_from_environment() -> LimitBatchesCallback | None:
    """Return the callback that ``PT_ACC_LIMIT_BATCHES`` asks for, None if it is not set.

    Raises:
        ValueError: if it is set to something other than a positive whole number.
    """
    text = os.environ.get(LIMIT_BATCHES_ENV_VAR)
    if text is None:
        return None
    if not text.isdigit():
        raise ValueError(
            f"the environment variable {LIMIT_BATCHES_ENV_VAR} must be a positive whole number, got {text!r}."
        )
    return LimitBatchesCallback(int(text))


def _positive(name: str, number: int) -> int:
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}.")
    return number

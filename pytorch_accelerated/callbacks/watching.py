"""What callbacks that watch a metric of the run history have in common."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

from pytorch_accelerated import distributed
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.errors import did_you_mean

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


class MetricWatcher(TrainerCallback):
    """Find the new values of a metric in the run history, the same on every process."""

    def __init__(self, watch_metric: str, greater_is_better: bool | None) -> None:
        """Take the name of the metric and the direction, which may be left out only for the trainer's own losses.

        Raises:
            ValueError: if the direction is missing.
        """
        if greater_is_better is None:
            if not watch_metric.endswith("loss_epoch"):
                raise ValueError(
                    f"{type(self).__name__}(watch_metric={watch_metric!r}) needs greater_is_better=True or False: "
                    "which values are good cannot be told from a name."
                )
            greater_is_better = False
        self.watch_metric = watch_metric
        self.greater_is_better = greater_is_better
        self._num_seen = 0
        self._is_first_epoch = True

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check that the metric can appear. Raises ValueError if it cannot."""
        self._is_first_epoch = True
        self._num_seen = self._num_values(trainer)
        name = type(self).__name__
        if self.watch_metric.startswith("eval_") and trainer.eval_dataset is None:
            raise ValueError(f"{name} watches {self.watch_metric!r}, but train() got no eval_dataset.")
        if self.watch_metric == "eval_loss_epoch" and isinstance(trainer.eval_dataset, dict):
            names = ", ".join(f"'eval_{name}_loss_epoch'" for name in trainer.eval_dataset)
            raise ValueError(f"{name} watches 'eval_loss_epoch', but with named sets there are: {names}.")

    def on_train_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Warn if the metric has not appeared in the first epoch, as it may come later.

        Raises:
            ValueError: if another metric has appeared whose name is much like it.
        """
        is_first, self._is_first_epoch = self._is_first_epoch, False
        if is_first or self._num_values(trainer) or not trainer.accelerator.is_main_process:
            return
        names = sorted(trainer.run_history.get_metric_names())
        hint = did_you_mean(self.watch_metric, names)
        message = (
            f"{type(self).__name__} watches {self.watch_metric!r}, which the first epoch did not record; it recorded "
        )
        if hint:
            raise ValueError(f"{message}{names}.{hint}")
        warnings.warn(f"{message}{names}. Without it, it does nothing.", stacklevel=5)

    def find_new_value(self, trainer: Trainer) -> float | None:
        """Return the newest value if it is new since the last call, the main process's on every process. Collective."""
        value = None
        if trainer.accelerator.is_main_process and self._num_values(trainer) > self._num_seen:
            self._num_seen = self._num_values(trainer)
            value = float(trainer.run_history.get_latest_metric(self.watch_metric))
        # A metric recorded on one process only must not part the ways of the processes.
        return distributed.broadcast_from_main(trainer.accelerator, value)

    def is_better(self, value: float, best: float | None, threshold: float = 0.0) -> bool:
        """Return whether a value beats the best by more than ``threshold``; any number beats None, a NaN nothing."""
        if best is None:
            return not math.isnan(value)
        return (value - best if self.greater_is_better else best - value) > threshold

    def _num_values(self, trainer: Trainer) -> int:
        history = trainer.run_history
        names = history.get_metric_names()
        return len(history.get_metric_values(self.watch_metric)) if self.watch_metric in names else 0

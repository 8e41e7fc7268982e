"""Schedulers in the manner of timm, which are told the counts instead of keeping them."""

from __future__ import annotations

from typing import Any

from pytorch_accelerated.trainer import Trainer


class TrainerWithTimmScheduler(Trainer):
    """Train with a scheduler that has ``step_update(num_updates, metric)`` and ``step(epoch, metric)``, as timm's have.

    ``step_update`` is called after each update with the updates of the run so far, ``step`` after each epoch and its
    evaluation with the number of epochs done, so that a scheduler in either unit, as its ``t_in_epochs`` says, is
    where it should be when the next update or epoch begins. There need not be an evaluation set.
    """

    def scheduler_step(self) -> None:
        """Tell the scheduler the number of updates made."""
        if self.scheduler is not None:
            num_updates = self.num_updates - self.training_run.first_update
            self.scheduler.step_update(num_updates=num_updates, metric=self._latest_metric())

    def run_evaluation(self, is_intermediate: bool = True) -> None:
        """Evaluate and, at the end of an epoch, tell the scheduler the number of epochs done."""
        super().run_evaluation(is_intermediate)
        if self.scheduler is not None and not is_intermediate:
            num_epochs = self.current_epoch - self.training_run.first_epoch
            self.scheduler.step(num_epochs, metric=self._latest_metric())

    def _latest_metric(self) -> Any:
        """Return the newest evaluation loss, for schedulers that react to it; None before the first."""
        name = "eval_loss_epoch"
        return self.run_history.get_latest_metric(name) if name in self.run_history.get_metric_names() else None

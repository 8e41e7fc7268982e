"""Evaluation at other times than the end of an epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


class StepBasedEvaluationCallback(TrainerCallback):
    """Evaluate every so many updates within an epoch, besides the evaluation at the end of each.

    The results go to the history under their usual names, with the counters of the moment. Training goes on as if
    nothing had happened: the mode of each module, the random streams and the position in the data are what they were.
    """

    def __init__(self, eval_every_n_steps: int) -> None:
        """Take the interval in updates, counted over the whole run. Raises ValueError if it is below one."""
        if eval_every_n_steps < 1:
            raise ValueError(f"eval_every_n_steps must be at least 1, got {eval_every_n_steps}.")
        self.eval_every_n_steps = eval_every_n_steps

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check that there is something to evaluate on. Raises ValueError if not."""
        if trainer.eval_dataset is None:
            raise ValueError("StepBasedEvaluationCallback needs train(eval_dataset=...), which this run does not have.")

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Evaluate if it is time."""
        assert trainer.data_pass is not None, "the event is one of a pass"
        # After the last update of an epoch the evaluation at its end is about to come, of the same weights.
        if trainer.num_updates % self.eval_every_n_steps == 0 and not trainer.data_pass.loader.is_last:
            trainer.request_evaluation()

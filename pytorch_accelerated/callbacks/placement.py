"""Where modules live."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn import Module

from pytorch_accelerated.callbacks.base import TrainerCallback

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


class MoveModulesToDeviceCallback(TrainerCallback):
    """Move the modules that the trainer and its callbacks hold besides the model to the device when a run begins.

    Such are loss functions with weights, torchmetrics objects, teachers.
    """

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Move the modules."""
        for holder in (trainer, *trainer.callback_handler):
            for value in vars(holder).values():
                if isinstance(value, Module) and value is not trainer.model:
                    value.to(trainer.device)

    on_evaluation_run_begin = on_train_run_begin
    on_prediction_run_begin = on_train_run_begin

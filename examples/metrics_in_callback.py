"""Compute a metric in a callback: a confusion matrix of the test images after each epoch.

python examples/metrics_in_callback.py
"""

from functools import partial
from typing import Any

import torch
from quickstart import create_model, load_data
from torch import nn
from torchmetrics.classification import MulticlassConfusionMatrix

from pytorch_accelerated import DEFAULT_CALLBACKS, Trainer
from pytorch_accelerated.callbacks import TrainerCallback


class ConfusionMatrixCallback(TrainerCallback):
    """Count which digits the model takes for which; exact on any number of processes."""

    def __init__(self) -> None:
        # A module: MoveModulesToDeviceCallback, one of the defaults, puts it on the device.
        self.matrix = MulticlassConfusionMatrix(num_classes=10, sync_on_compute=False)

    def on_eval_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        self.matrix.reset()

    def on_eval_step_end(self, trainer: Trainer, batch: Any, batch_output: dict[str, Any], **kwargs: Any) -> None:
        # gather brings the rows of all processes, each once; so each process has the whole matrix, and none is to sync.
        self.matrix.update(*trainer.gather((batch_output["model_outputs"], batch[1])))

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        trainer.run_history.update_metric("eval_confusion_matrix", self.matrix.compute())


def main() -> None:
    """Train, and print what is confused most."""
    train_data, test_data = load_data()
    trainer = Trainer(
        create_model(),
        nn.CrossEntropyLoss(),
        partial(torch.optim.AdamW, lr=3e-3),
        callbacks=[*DEFAULT_CALLBACKS[:-1], ConfusionMatrixCallback],
        seed=0,
    )
    history = trainer.train(train_data, num_epochs=3, eval_dataset=test_data, per_device_batch_size=32)
    matrix = torch.tensor(history.get_latest_metric("eval_confusion_matrix"))
    trainer.print(f"{int(matrix.trace())} of {int(matrix.sum())} test images are right")
    matrix.fill_diagonal_(0)
    digit, taken_for = divmod(int(matrix.argmax()), 10)
    trainer.print(f"most common mistake: a {digit} taken for a {taken_for}, {int(matrix.max())} time(s)")


if __name__ == "__main__":
    main()

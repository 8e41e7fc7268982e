"""Give a Trainer an event of its own: callbacks hear of each batch whose loss is far above the average.

python examples/custom_event.py
"""

from functools import partial
from typing import Any

import torch
from quickstart import create_model, load_data
from torch import nn

from pytorch_accelerated import DEFAULT_CALLBACKS, Trainer
from pytorch_accelerated.callbacks import TrainerCallback


class SurpriseTrainer(Trainer):
    """Call ``on_surprise`` when the loss of a batch is more than twice the average of its epoch so far."""

    EVENTS = (*Trainer.EVENTS, "on_surprise")

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        average = self.data_pass.mean_loss_so_far() if self.data_pass else None
        output = super().calculate_train_batch_loss(batch)
        if average is not None and output["loss"].item() > 2 * average:
            self.callback_handler.call_event("on_surprise", self, loss=output["loss"].item(), average=average)
        return output


class CountSurprisesCallback(TrainerCallback):
    """Count and print the surprises."""

    num_surprises = 0

    def on_surprise(self, trainer: Trainer, loss: float, average: float, **kwargs: Any) -> None:
        self.num_surprises += 1
        trainer.print(f"step {trainer.num_steps}: loss {loss:.3f}, average so far {average:.3f}")


def main() -> None:
    """Train with so high a learning rate that there are surprises."""
    train_data, _ = load_data()
    counter = CountSurprisesCallback()
    trainer = SurpriseTrainer(
        create_model(),
        nn.CrossEntropyLoss(),
        partial(torch.optim.SGD, lr=0.5),
        callbacks=[*DEFAULT_CALLBACKS, counter],
        seed=0,
    )
    trainer.train(train_data, num_epochs=3, per_device_batch_size=16)
    trainer.print(f"{counter.num_surprises} surprises")


if __name__ == "__main__":
    main()

"""Change the loss of training by overriding one hook: mixup (Zhang et al. 2018) on handwritten digits.

python examples/override_a_hook.py
"""

from functools import partial
from typing import Any

import torch
from quickstart import create_model, load_data
from torch import nn

from pytorch_accelerated import Trainer


class MixupTrainer(Trainer):
    """Train on mixtures of two samples; evaluate on samples as they are."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        """Return the loss of a batch whose samples are mixed with one another."""
        images, digits = batch
        share = torch.distributions.Beta(0.4, 0.4).sample().to(self.device)
        partners = torch.randperm(len(images), device=self.device)
        outputs = self.model(share * images + (1 - share) * images[partners])
        loss = share * self.loss_func(outputs, digits) + (1 - share) * self.loss_func(outputs, digits[partners])
        return {"loss": loss, "model_outputs": outputs}


def main() -> None:
    """Train with mixup and print the loss on samples as they are."""
    train_data, test_data = load_data()
    trainer = MixupTrainer(create_model(), nn.CrossEntropyLoss(), partial(torch.optim.AdamW, lr=3e-3), seed=0)
    history = trainer.train(train_data, num_epochs=3, eval_dataset=test_data, per_device_batch_size=32)
    trainer.print(f"loss on mixtures: {history.get_metric_values('train_loss_epoch')}")
    trainer.print(f"loss on test images: {history.get_metric_values('eval_loss_epoch')}")


if __name__ == "__main__":
    main()

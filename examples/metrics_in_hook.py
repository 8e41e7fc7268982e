"""Compute metrics in hooks: per-class recall, with states that torchmetrics exchanges between processes.

python examples/metrics_in_hook.py
"""

from functools import partial
from typing import Any

import torch
from quickstart import create_model, load_data
from torch import nn
from torchmetrics.classification import MulticlassRecall

from pytorch_accelerated import Trainer


class RecallTrainer(Trainer):
    """Record the lowest recall of all digits after each evaluation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recall = MulticlassRecall(num_classes=10, average="none")

    def eval_epoch_start(self) -> None:
        super().eval_epoch_start()
        self.recall.reset()

    def calculate_eval_batch_loss(self, batch: Any) -> Any:
        output = super().calculate_eval_batch_loss(batch)
        if self.has_samples:  # False where a process repeats a sample, because others still have some and it has none
            self.recall.update(output["model_outputs"], batch[1])
        return output

    def eval_epoch_end(self) -> None:
        recall = self.recall.compute()
        self.run_history.update_metric("eval_lowest_recall", recall.min())
        self.run_history.update_metric("eval_hardest_digit", recall.argmin())


def main() -> None:
    """Train, and print which digit is found least."""
    train_data, test_data = load_data()
    trainer = RecallTrainer(create_model(), nn.CrossEntropyLoss(), partial(torch.optim.AdamW, lr=3e-3), seed=0)
    history = trainer.train(train_data, num_epochs=3, eval_dataset=test_data, per_device_batch_size=32)
    digit, recall = (history.get_latest_metric(name) for name in ("eval_hardest_digit", "eval_lowest_recall"))
    trainer.print(f"hardest digit: {digit}, of which {recall:.1%} are found")


if __name__ == "__main__":
    main()

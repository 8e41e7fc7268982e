"""See a run: its directory, its log, TensorBoard, and a page with everything on it; half a minute.

A small CNN learns digits while the log, images and a histogram are kept; afterwards the report is written, which needs
no network: open the file that is printed.

python examples/see_a_run.py [--run-dir runs/digits]
"""

import argparse
from functools import partial
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from pytorch_accelerated import DEFAULT_CALLBACKS, RunHistory, Trainer
from pytorch_accelerated.callbacks import ReportCallback, SaveTrainingStateCallback, SystemStatsCallback
from pytorch_accelerated.schedulers import CosineLrScheduler


class DigitsTrainer(Trainer):
    """Logs a part of its loss, and what the first layer has learnt."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        images, digits = batch
        outputs = self.model(images)
        cross_entropy = nn.functional.cross_entropy(outputs, digits)
        confidence = outputs.logsumexp(dim=-1).square().mean()
        return {"loss": cross_entropy + 1e-3 * confidence, "model_outputs": outputs, "loss_z": confidence.detach()}

    def train_epoch_end(self) -> None:
        filters = self.get_model()[0].weight.detach()
        low, high = filters.min(), filters.max()
        self.log_images("filters", (filters[:8] - low) / (high - low), captions=[f"filter {i}" for i in range(8)])
        self.log_histogram("filters", filters)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", default="runs/digits")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--num-epochs", type=int, default=8)
    arguments = parser.parse_args()

    images, digits = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    digits = torch.tensor(digits)
    train_data, test_data = TensorDataset(images[:1300], digits[:1300]), TensorDataset(images[1300:], digits[1300:])

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    trainer = DigitsTrainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.AdamW, lr=arguments.lr),
        metrics={"accuracy": MulticlassAccuracy(num_classes=10, average="micro")},
        callbacks=[
            *DEFAULT_CALLBACKS,
            SaveTrainingStateCallback(save_every_n_epochs=2, max_checkpoints=1),
            SystemStatsCallback(every_n_seconds=1),
            ReportCallback(class_names=[str(digit) for digit in range(10)]),
        ],
        run_dir=arguments.run_dir,
        log_every=10,
        config=arguments,
        seed=0,
    )
    trainer.train(
        train_data,
        num_epochs=arguments.num_epochs,
        eval_dataset=test_data,
        per_device_batch_size=32,
        gradient_clip_norm=1.0,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1),
    )

    history = RunHistory.read_log(trainer.run_dir)
    print(f"{len(history.get_metric_values('train_loss'))} rows within epochs in {trainer.run_dir / 'metrics.jsonl'}")
    print(f"best test accuracy {max(history.get_metric_values('eval_accuracy')):.1%}")
    print(f"open {trainer.run_dir / 'report.html'}")


if __name__ == "__main__":
    main()

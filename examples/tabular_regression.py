"""Predict the progression of diabetes from ten measurements of a patient, and stop when it no longer gets better.

python examples/tabular_regression.py
"""

from functools import partial

import torch
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.regression import MeanAbsoluteError, R2Score

from pytorch_accelerated import DEFAULT_CALLBACKS, Trainer
from pytorch_accelerated.callbacks import EarlyStoppingCallback


def load_data() -> list[TensorDataset]:
    """Return 353 patients for training and 89 for testing; targets are scaled to mean 0 and deviation 1."""
    measurements, progression = load_diabetes(return_X_y=True)
    targets = (progression - progression.mean()) / progression.std()
    parts = train_test_split(measurements * 20, targets, test_size=0.2, random_state=0)
    x_train, x_test, y_train, y_test = (torch.tensor(part, dtype=torch.float32) for part in parts)
    return [TensorDataset(x_train, y_train), TensorDataset(x_test, y_test)]


def main() -> None:
    """Train until the error on the test patients has not fallen for five epochs."""
    torch.manual_seed(0)
    train_data, test_data = load_data()
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1), nn.Flatten(0))
    trainer = Trainer(
        model,
        nn.MSELoss(),
        partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1),
        callbacks=[
            *DEFAULT_CALLBACKS,
            EarlyStoppingCallback(early_stopping_patience=5, watch_metric="eval_r2", greater_is_better=True),
        ],
        metrics={"r2": R2Score(), "error": MeanAbsoluteError()},
        seed=0,
    )
    history = trainer.train(train_data, num_epochs=100, eval_dataset=test_data, per_device_batch_size=16)
    trainer.print(
        f"stopped after {trainer.current_epoch} of 100 epochs, best R2 {max(history.get_metric_values('eval_r2')):.3f}"
    )


if __name__ == "__main__":
    main()

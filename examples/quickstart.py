"""Train a small convolutional network on real handwritten digits; under a minute on two cores.

python examples/quickstart.py
accelerate launch --config_file accelerate_config.yaml examples/quickstart.py
"""

from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from pytorch_accelerated import Trainer
from pytorch_accelerated.schedulers import CosineLrScheduler


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,438 images for training and 359 for testing, of shape (1, 8, 8), with their digits."""
    images, digits = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(digits))
    train_data, test_data = random_split(data, [0.8, 0.2], generator=torch.Generator().manual_seed(0))
    return TensorDataset(*data[train_data.indices]), TensorDataset(*data[test_data.indices])


def create_model() -> nn.Module:
    """Return a network with 57 thousand parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 4 * 4, 36),
        nn.ReLU(),
        nn.Linear(36, 10),
    )


def main() -> float:
    """Train, and return the accuracy on the test images."""
    torch.manual_seed(0)
    train_data, test_data = load_data()
    trainer = Trainer(
        create_model(),
        loss_func=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        metrics={"accuracy": MulticlassAccuracy(num_classes=10, average="micro")},
        seed=0,
    )
    trainer.train(
        train_data,
        num_epochs=10,
        eval_dataset=test_data,
        per_device_batch_size=32,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1),
    )
    accuracy: float = trainer.evaluate(test_data, per_device_batch_size=64)["evaluation_accuracy"]
    digits = trainer.predict(test_data, per_device_batch_size=64).argmax(dim=-1)
    trainer.print(f"\nfirst ten test images: {test_data.tensors[1][:10].tolist()}, predicted: {digits[:10].tolist()}")
    trainer.print(f"test accuracy: {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    main()

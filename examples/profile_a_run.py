"""See where the time of a run goes: its throughput, what it waits for, and a trace of three updates; some seconds.

The same digits are read twice: as they are, and with an augmentation in Python that the model has to wait for.

python examples/profile_a_run.py
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import ProfilerCallback, ThroughputCallback

NUM_HIDDEN = 512


def load_data() -> TensorDataset:
    """Return 1,797 images of shape (64,) with their digits."""
    images, digits = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(digits))


class Augmented(Dataset):
    """Shift and smear each image, one at a time, as many an augmentation does."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, digit = self.data[index]
        for _ in range(8):
            image = 0.9 * image + 0.1 * torch.roll(image, int(torch.randint(-1, 2, ())))
        return image, digit


def train(data: Any, directory: Path) -> Trainer:
    """Train for two epochs, and record the first one's updates 8 to 10."""
    model = nn.Sequential(nn.Linear(64, NUM_HIDDEN), nn.ReLU(), nn.Linear(NUM_HIDDEN, 10))
    # Two operations for each weight in the forward pass, and twice as many in the backward pass.
    flops_per_sample = 6 * sum(weight.numel() for weight in model.parameters() if weight.ndim == 2)
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        partial(torch.optim.AdamW, lr=1e-3),
        callbacks=[
            # The peak is that of two cores at 3 GHz with 32 operations a cycle: put in what your device can do. Those
            # of well-known GPUs are known.
            ThroughputCallback(flops_per_sample=flops_per_sample, peak_flops=2 * 3e9 * 32),
            ProfilerCallback(directory, wait=5, warmup=2, active=3, row_limit=5),
        ],
        seed=0,
    )
    trainer.train(data, num_epochs=2, per_device_batch_size=64)
    return trainer


def main() -> None:
    """Train on both kinds of data, and print what was measured."""
    data = load_data()
    with tempfile.TemporaryDirectory() as directory:
        for name, kind in {"tensors": data, "augmented": Augmented(data)}.items():
            trainer = train(kind, Path(directory) / name)
            trainer.print(f"{name}: {len(list((Path(directory) / name).glob('trace*.json')))} trace(s)")
            for metric in sorted(trainer.run_history.get_metric_names()):
                trainer.print(f"    {metric:32} {trainer.run_history.get_latest_metric(metric):12.4f}")


if __name__ == "__main__":
    main()

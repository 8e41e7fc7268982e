"""Make the checkpoint of the present format that tests keep: ``python -m tests.checkpoints.make``.

Run it when FORMAT_VERSION has grown, and commit what it makes. Those of former formats stay as they are.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback
from pytorch_accelerated.checkpoint.files import FORMAT_VERSION

NUM_EPOCHS = 2


def make_trainer(save_dir: Path, every: int = 2) -> Trainer:
    """Return the trainer of the run, with weights that are written here and drawn by nobody."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -0.25]]))
        model.bias.fill_(0.125)
    saver = SaveTrainingStateCallback(save_dir, save_every_n_updates=every, save_at_end=False)
    return Trainer(model, nn.MSELoss(), partial(torch.optim.Adam, lr=0.1), [saver], seed=5)


def train(trainer: Trainer, **kwargs: Any) -> dict[str, Any]:
    """Train to the end: three updates in each epoch. Return the weights as lists."""
    x = torch.arange(12, dtype=torch.float32).reshape(6, 2) / 4 - 1
    y = x.sum(1, keepdim=True) ** 2
    trainer.train(TensorDataset(x, y), NUM_EPOCHS, per_device_batch_size=2, **kwargs)
    return {name: value.tolist() for name, value in trainer.get_model().state_dict().items()}


def main() -> None:
    """Write the checkpoint in the middle of the first epoch, and what the run ends with."""
    directory = Path(__file__).parent / f"format-{FORMAT_VERSION}"
    shutil.rmtree(directory, ignore_errors=True)
    weights = train(make_trainer(directory))
    for later in directory.glob("checkpoint-*"):
        if not later.name.startswith("checkpoint-000001-"):
            shutil.rmtree(later)
    (directory / "expected.json").write_text(json.dumps(weights, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Train on a device that holds no numbers, so that whatever reads one is noticed; prints who waited, as JSON.

Torch's meta device computes shapes only and refuses to give values. ``Answers`` gives zeros in their place, so that
log points go on. For the library it is a device like any other: batches are copied to it, flags stay on it. What it
cannot show is pinned memory, so copies to it wait; these are left out.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset, TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.syncs import SyncAudit

META = torch.device("meta")
NUM_UPDATES = 120


class Answers(TorchDispatchMode):
    """Give zeros where a value of the meta device is read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].device == META:
            if func is torch.ops.aten._local_scalar_dense.default:
                return torch.zeros((), dtype=args[0].dtype).item()
            if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 4 * NUM_UPDATES

    def __getitem__(self, index: int) -> Any:
        return torch.full((8,), float(index)), torch.tensor(index % 3)


class Reading(Trainer):
    """Reads each loss, as users do."""

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        output = super().calculate_train_batch_loss(batch)
        assert isinstance(output, dict)
        output["shown"] = output["loss"].item()
        return output


def find_waits(
    trainer_class: type[Trainer] = Trainer, optimizer: Any = SGD, **kwargs: Any
) -> list[tuple[str, str, int]]:
    """Return owner, place and number of the waits in a training run of 120 updates with the default callbacks."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator()
    accelerator.state.device = PartialState().device = META
    with META:
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3))
    trainer = trainer_class(model, nn.CrossEntropyLoss(), partial(optimizer, lr=0.1), accelerator=accelerator)
    dataset = kwargs.pop("dataset", None) or Rows()
    steps = kwargs.get("gradient_accumulation_steps", 1)
    with Answers(), SyncAudit(trainer.device) as audit:
        trainer.train(dataset, num_epochs=steps, per_device_batch_size=4, max_num_train_steps=NUM_UPDATES, **kwargs)
    assert trainer.num_updates == NUM_UPDATES
    waits = [(sync, number) for sync, number in audit.counts.items() if not sync.operation.startswith("copy from cpu")]
    return [(sync.owner, f"{sync.path}:{sync.line} {sync.function}", number) for sync, number in waits]


def in_memory() -> TensorDataset:
    return TensorDataset(torch.randn(4 * NUM_UPDATES, 8), torch.randint(3, (4 * NUM_UPDATES,)))


CASES: dict[str, Any] = {
    "default": {},
    "in memory": {"dataset": in_memory()},
    "AdamW, clipping and a schedule": {
        "optimizer": AdamW,
        "gradient_clip_norm": 1.0,
        "gradient_clip_value": 0.1,
        "create_scheduler_fn": partial(LambdaLR, lr_lambda=lambda update: 1 / (1 + update)),
    },
    "accumulation": {"gradient_accumulation_steps": 4},
    "a reading hook": {"trainer_class": Reading},
}

if __name__ == "__main__":
    names = sys.argv[1:] or list(CASES)
    print(json.dumps({name: find_waits(**CASES[name]) for name in names}))

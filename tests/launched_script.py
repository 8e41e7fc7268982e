"""The script that test_launch.py starts in several ways; argument: what to do."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import Any

import torch
from torch import nn

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LogMetricsCallback, PrintProgressCallback, TerminateOnNaNCallback
from tests.support import make_data, make_mlp

TOTAL_BATCH_SIZE = 12


def train() -> dict[str, Any]:
    """Train with the same total batch on however many processes there are."""
    torch.set_num_threads(1)
    trainer = Trainer(
        make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.AdamW, lr=0.01), [TerminateOnNaNCallback], seed=3
    )
    num_processes = trainer.accelerator.num_processes
    history = trainer.train(
        make_data(70), 3, make_data(23), per_device_batch_size=TOTAL_BATCH_SIZE // num_processes, gradient_clip_norm=1.0
    )
    return {
        "num_processes": num_processes,
        "train": history.get_metric_values("train_loss_epoch"),
        "eval": history.get_metric_values("eval_loss_epoch"),
        "counters": [trainer.num_samples, trainer.num_steps, trainer.num_updates, trainer.current_epoch],
    }


class FailingTrainer(Trainer):
    """Fails on process 1 in the third step."""

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        if self.num_steps == 2 and self.accelerator.process_index == 1:
            raise ZeroDivisionError("a bug of the user")
        return super().calculate_train_batch_loss(batch)


def fail() -> None:
    """Train until process 1 fails."""
    callbacks = PrintProgressCallback, LogMetricsCallback
    trainer = FailingTrainer(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), callbacks)
    trainer.train(make_data(64), 1, per_device_batch_size=4)


def main() -> None:
    """Do what the argument says; the main process prints the result as JSON."""
    if sys.argv[1] == "fail":
        fail()
        return
    if sys.argv[1] == "notebook":
        from pytorch_accelerated import notebook_launcher

        # As in a notebook: this process launches, and its children train.
        notebook_launcher(write_result, (sys.argv[2],), num_processes=2)
        return
    write_result(sys.argv[2])


def write_result(path: str) -> None:
    """Train, and write the result of each process to a file of its own."""
    result = train()
    with open(f"{path}.{os.environ.get('RANK', 0)}", "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()

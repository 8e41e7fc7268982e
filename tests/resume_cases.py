"""A run that has everything in it that could make a resumed run differ, and ways to kill it."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    TerminateOnNaNCallback,
    TrainerCallback,
)
from pytorch_accelerated.schedulers import CosineLrScheduler

NUM_SAMPLES = 46  # divides neither by the batch nor by two of them
PLACES = ("step", "loss", "update", "eval_loss", "callback", "sync", "rename")


@dataclasses.dataclass(frozen=True)
class Case:
    """How a run is made."""

    num_workers: int = 0
    persistent_workers: bool = False
    accumulation: int = 1
    per_device_batch_size: int = 4
    num_epochs: int = 3
    save_every: int | None = 2
    asynchronous: bool = False
    mixed_precision: str = "no"
    is_compiled: bool = False
    has_augmentation: bool = True
    dropout: float = 0.2


@dataclasses.dataclass(frozen=True)
class Kill:
    """Where a process ends itself by SIGKILL: at which occurrence of what, on which process."""

    place: str
    count: int
    process: int = 0


class Noisy(Dataset[Any]):
    """Samples with noise of torch, numpy and random, and their number."""

    def __init__(self, num_samples: int, has_noise: bool) -> None:
        generator = torch.Generator().manual_seed(11)
        self.x = torch.randn(num_samples, 4, generator=generator)
        self.y = torch.randint(3, (num_samples,), generator=generator)
        self.has_noise = has_noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x = self.x[index]
        if self.has_noise:
            x = x + 0.3 * torch.randn(4) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return x, self.y[index], index


class Countdown:
    """End this process at the n-th occurrence of something."""

    def __init__(self, kill: Kill | None, process: int) -> None:
        self.place = kill.place if kill is not None and kill.process == process else None
        self.left = 0 if kill is None else kill.count

    def at(self, place: str) -> None:
        if place == self.place:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class CaseTrainer(Trainer):
    """Takes batches of three; a mark of its own is part of its state."""

    countdown = Countdown(None, 0)
    mark = 0.0

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        x, y, _ = batch
        outputs = self.model(x)
        self.countdown.at("loss")
        self.mark += float(torch.rand(()))  # of the main stream
        return {"loss": nn.functional.cross_entropy(outputs, y), "model_outputs": outputs, "targets": y}

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        x, y, _ = batch
        self.countdown.at("eval_loss")
        outputs = self.model(x)
        return {"loss": nn.functional.cross_entropy(outputs, y), "model_outputs": outputs, "targets": y}

    def get_extra_state(self) -> Any:
        return {"mark": self.mark}

    def set_extra_state(self, state: Any) -> None:
        if self.accelerator.is_main_process:  # of which alone the mark is saved
            self.mark = state["mark"]


class Witness(TrainerCallback):
    """Records which samples were used, as a part of its state, and is a place to be killed at."""

    def __init__(self, countdown: Countdown) -> None:
        self.countdown = countdown
        self.seen: dict[int, list[int]] = {}
        self.rates: list[float] = []

    def on_train_step_end(self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any) -> None:
        self.countdown.at("step")
        self.seen.setdefault(trainer.current_epoch, []).extend(trainer.gather(batch[2]).tolist())

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.rates.append(trainer.optimizer.param_groups[0]["lr"])
        self.countdown.at("update")

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.countdown.at("callback")

    on_eval_epoch_end = on_eval_epoch_begin = on_train_epoch_begin = on_train_epoch_end

    def state_dict(self) -> dict[str, Any]:
        return {"seen": {epoch: list(indices) for epoch, indices in self.seen.items()}, "rates": list(self.rates)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen, self.rates = state_dict["seen"], state_dict["rates"]


def count_system_calls(countdown: Countdown) -> None:
    """Let the countdown see the flushes and renames of this process, before and after they happen."""
    for name, place in (("fsync", "sync"), ("replace", "rename")):
        original = getattr(os, name)

        def counted(*args: Any, original: Any = original, place: str = place) -> Any:
            countdown.at(place)
            result = original(*args)
            countdown.at(place)
            return result

        setattr(os, name, counted)


def make_model(case: Case) -> nn.Module:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(case.dropout), nn.Linear(8, 3))
    return torch.compile(model, backend="eager") if case.is_compiled else model  # type: ignore[return-value]


def run_case(case: Case, directory: str | None, result: str | None, kill: Kill | None = None, **kwargs: Any) -> Any:
    """Train; ``directory`` is where state is saved and resumed from, ``result`` the file that gets the outcome."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=case.mixed_precision)
    countdown = Countdown(kill, accelerator.process_index)
    count_system_calls(countdown)
    witness = Witness(countdown)
    callbacks: list[TrainerCallback] = []
    best = None
    if directory is not None:
        callbacks.append(
            SaveTrainingStateCallback(
                Path(directory) / "state",
                save_every_n_updates=case.save_every,
                save_every_n_epochs=1,
                max_checkpoints=2,
                asynchronous=case.asynchronous,
            )
        )
        best = SaveBestModelCallback(
            Path(directory) / "best.safetensors", "eval_first_loss_epoch", load_best_at_end=False
        )
        callbacks.append(best)
    # After the saver in the list: it must not matter.
    callbacks += [
        witness,
        EarlyStoppingCallback(50, watch_metric="eval_first_loss_epoch"),
        StepBasedEvaluationCallback(3),
        TerminateOnNaNCallback(),
    ]
    trainer = CaseTrainer(
        make_model(case),
        optimizer=partial(torch.optim.AdamW, lr=0.02),
        callbacks=callbacks,
        accelerator=accelerator,
        metrics={"accuracy": MulticlassAccuracy(3), "auroc": MulticlassAUROC(3)},
    )
    trainer.countdown = countdown
    torch.manual_seed(9)
    np.random.seed(9)
    random.seed(9)
    workers: dict[str, Any] = {"num_workers": case.num_workers, "persistent_workers": case.persistent_workers}
    if case.num_workers:
        workers["multiprocessing_context"] = "fork"  # in a child of a forkserver the default is to start another
    history = trainer.train(
        Noisy(NUM_SAMPLES, case.has_augmentation),
        case.num_epochs,
        {"first": Noisy(11, False), "second": Noisy(7, True)},
        per_device_batch_size=case.per_device_batch_size,
        gradient_accumulation_steps=case.accumulation,
        gradient_clip_norm=1.0,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=0.5),
        train_dataloader_kwargs=workers,
        resume_from=None if directory is None else "latest",
        **kwargs,
    )
    outcome = {
        "weights": {name: value.clone() for name, value in trainer.get_model().state_dict().items()},
        "optimizer": trainer.optimizer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "history": history.state_dict(),
        "seen": witness.seen,
        "rates": witness.rates,
        "mark": trainer.mark if accelerator.is_main_process else None,
        "stream": torch.get_rng_state(),
        "num_processes": accelerator.num_processes,
    }
    if result is not None:
        temporary = f"{result}.{accelerator.process_index}.part"
        torch.save(outcome, temporary)
        os.rename(temporary, f"{result}.{accelerator.process_index}")
    return outcome

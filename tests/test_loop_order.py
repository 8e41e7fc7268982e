"""A real run does what README's pseudocode says, in that order."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pytorch_accelerated.trainer
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import TrainerCallback
from pytorch_accelerated.callbacks.base import EVENTS
from tests.support import make_data, make_mlp

README = Path(__file__).parent.parent / "README.md"


def pseudocode() -> str:
    [block] = re.findall(r"```text\n(train_dataloader.*?)```", README.read_text(), re.DOTALL)
    return str(block)


def run_pseudocode(text: str, num_epochs: int, num_steps: int, num_eval_steps: int, steps_per_update: int) -> list[str]:
    """Return the names of hooks and events in the order in which the pseudocode would call them."""
    lines = [line for line in text.splitlines() if line.strip()]
    trace: list[str] = []

    def names(line: str) -> list[str]:
        return re.findall(r"\b((?:create|calculate)_\w+|on_\w+|\w+(?=\(\)|\(batch))", line)

    def body(start: int) -> int:
        indent = len(lines[start]) - len(lines[start].lstrip())
        end = start + 1
        while end < len(lines) and len(lines[end]) - len(lines[end].lstrip()) > indent:
            end += 1
        return end

    def run(start: int, end: int, last_step: bool, step: int) -> None:
        number, once_per_update = start, False
        while number < end:
            line = lines[number].strip()
            if line.startswith("for "):
                stop = body(number)
                loops = {"epoch": num_epochs, "train": num_steps, "eval": num_eval_steps}
                kind = "epoch" if "epoch in" in line else "train" if "train_dataloader" in line else "eval"
                for turn in range(loops[kind]):
                    run(number + 1, stop, turn == loops[kind] - 1, turn)
                number = stop
                continue
            if line.startswith("#"):
                once_per_update = True
            elif not once_per_update or last_step or (step + 1) % steps_per_update == 0:
                trace.extend(names(line))
            number += 1

    run(0, len(lines), False, 0)
    return trace


def make_recorder(trace: list[str]) -> tuple[type[Trainer], TrainerCallback]:
    """Return a Trainer all of whose hooks, and a callback all of whose events, add their name to ``trace``."""

    def hook(name: str) -> Any:
        def call(self: Trainer, *args: Any, **kwargs: Any) -> Any:
            trace.append(name)
            return getattr(Trainer, name)(self, *args, **kwargs)

        return call

    def event(name: str) -> Any:
        return lambda self, trainer, **kwargs: trace.append(name)

    trainer_class = type("Recorder", (Trainer,), {name: hook(name) for name in Trainer.HOOKS})
    return trainer_class, type("Events", (TrainerCallback,), {name: event(name) for name in EVENTS})()


@pytest.mark.parametrize("num_epochs", [1, 2])
@pytest.mark.parametrize("steps_per_update", [1, 2, 3])
def test_a_run_follows_the_pseudocode(num_epochs: int, steps_per_update: int) -> None:
    trace: list[str] = []
    trainer_class, callback = make_recorder(trace)
    trainer = trainer_class(make_mlp(), nn.CrossEntropyLoss(), lambda p: torch.optim.SGD(p, lr=0.1), [callback])
    assert trace == ["create_accelerator", "on_init_end"]
    trace.clear()
    trainer.train(
        make_data(20), num_epochs, make_data(5), per_device_batch_size=4, gradient_accumulation_steps=steps_per_update
    )
    expected = run_pseudocode(pseudocode(), num_epochs, 5, 2, steps_per_update)
    assert len(expected) > 40 * num_epochs
    assert trace == expected


def test_the_pseudocode_names_all_hooks_and_events_of_training() -> None:
    named = set(run_pseudocode(pseudocode(), 1, 1, 1, 1))
    others = {
        "accelerator",
        "predict",
        "evaluation_run",
        "prediction_run",
        "metrics",
        "init",
        "exception",
        "stop_training",
    }
    for name in (*Trainer.HOOKS, *EVENTS):
        assert (name in named) != any(other in name for other in others), name


def test_the_trainers_docstring_is_the_readmes_pseudocode() -> None:
    docstring = inspect.getdoc(pytorch_accelerated.trainer) or ""
    block = docstring.split("::\n\n")[1]
    assert inspect.cleandoc(block) == pseudocode().strip()


def test_evaluation_and_prediction_have_the_same_shape() -> None:
    trace: list[str] = []
    trainer_class, callback = make_recorder(trace)
    trainer = trainer_class(make_mlp(), nn.CrossEntropyLoss(), callbacks=[callback])
    trace.clear()
    trainer.evaluate(make_data(3), per_device_batch_size=2)
    batch = ["on_eval_step_begin", "calculate_eval_batch_loss", "on_eval_step_end"]
    assert trace == [
        "create_eval_dataloader",
        "evaluation_run_start",
        "on_evaluation_run_begin",
        "eval_epoch_start",
        "on_eval_epoch_begin",
        *batch,
        *batch,
        "eval_epoch_end",
        "on_eval_epoch_end",
        "evaluation_run_end",
        "on_evaluation_run_end",
    ]
    trace.clear()
    trainer.predict(make_data(3), per_device_batch_size=2)
    batch = ["on_predict_step_begin", "calculate_predictions", "on_predict_step_end"]
    assert trace == [
        "create_predict_dataloader",
        "prediction_run_start",
        "on_prediction_run_begin",
        "predict_epoch_start",
        "on_predict_epoch_begin",
        *batch,
        *batch,
        "predict_epoch_end",
        "on_predict_epoch_end",
        "prediction_run_end",
        "on_prediction_run_end",
    ]


def test_every_hook_can_be_overridden() -> None:
    """Each hook replaced by one that calls nothing of the default: the override is what runs."""
    model = make_mlp()
    called: list[str] = []

    class Own(Trainer):
        def create_accelerator(self) -> Any:
            called.append("create_accelerator")
            from accelerate import Accelerator

            return Accelerator(cpu=True)

        def create_train_dataloader(self, batch_size: int, train_dl_kwargs: Any = None) -> Any:
            called.append("create_train_dataloader")
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=2)

        def create_eval_dataloader(self, batch_size: int, eval_dl_kwargs: Any = None) -> Any:
            called.append("create_eval_dataloader")
            return torch.utils.data.DataLoader(self.eval_dataset, batch_size=2)

        def create_predict_dataloader(self, batch_size: int, predict_dl_kwargs: Any = None) -> Any:
            called.append("create_predict_dataloader")
            return torch.utils.data.DataLoader(self.predict_dataset, batch_size=2)

        def create_scheduler(self) -> Any:
            called.append("create_scheduler")
            return torch.optim.lr_scheduler.ConstantLR(self.optimizer.optimizer, factor=0.5, total_iters=100)

        def calculate_train_batch_loss(self, batch: Any) -> Any:
            called.append("calculate_train_batch_loss")
            return self.model(batch[0]).square().mean()  # a bare tensor

        def calculate_eval_batch_loss(self, batch: Any) -> Any:
            called.append("calculate_eval_batch_loss")
            return {"loss": self.model(batch[0]).square().mean(), "batch_size": len(batch[0])}

        def calculate_predictions(self, batch: Any) -> Any:
            called.append("calculate_predictions")
            return self.model(batch[0]) * 0 + 7

        def backward_step(self, loss: Any) -> None:
            called.append("backward_step")
            self.accelerator.backward(loss)

        def clip_gradients(self) -> None:
            called.append("clip_gradients")
            for parameter in self.model.parameters():
                parameter.grad.clamp_(-1e-3, 1e-3)

        def optimizer_step(self) -> None:
            called.append("optimizer_step")
            self.optimizer.step()

        def scheduler_step(self) -> None:
            called.append("scheduler_step")
            self.scheduler.step()

        def optimizer_zero_grad(self) -> None:
            called.append("optimizer_zero_grad")
            self.optimizer.zero_grad()

        def update_metrics(self, metrics: Any, batch: Any, batch_output: Any) -> None:
            called.append("update_metrics")
            metrics.update(torch.tensor(1.0))

    simple = [name for name in Trainer.HOOKS if name.endswith(("_start", "_end"))]
    for name in simple:
        setattr(Own, name, lambda self, name=name: called.append(name))
    from torchmetrics import MeanMetric

    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Own(model, None, optimizer, callbacks=None, metrics={"one": MeanMetric()})
    history = trainer.train(make_data(4), 1, make_data(4))
    trainer.evaluate(make_data(4))
    assert trainer.predict(make_data(4)).eq(7).all()
    assert set(called) == set(Trainer.HOOKS)
    assert called.count("optimizer_step") == 2
    largest = max((p - q).abs().max().item() for p, q in zip(model.parameters(), before, strict=True))
    assert 0 < largest <= 1.01 * 2 * 0.05 * 1e-3  # clipped, at half the rate, twice (1.01: rounding)
    assert history.get_latest_metric("eval_one") == 1.0

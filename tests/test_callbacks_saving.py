"""When state is saved, what becomes of it, and the best model."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    EarlyStoppingCallback,
    LambdaCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    TerminateOnNaNCallback,
    TrainerCallback,
    WSDCheckpointCallback,
)
from pytorch_accelerated.checkpoint import list_checkpoints, verify
from pytorch_accelerated.errors import (
    CheckpointError,
    CheckpointMismatchError,
    NonFiniteError,
    TrainingInterrupted,
)
from pytorch_accelerated.run_config import TrainerPlaceholderValues
from pytorch_accelerated.schedulers import LinearLrScheduler, WSDLrScheduler
from tests.support import (
    Interruption,
    assert_equal_weights,
    interrupt_at,
    make_data,
    make_mlp,
    run_processes,
    weights_of,
)


def make_trainer(*callbacks: Any, optimizer: Any = None, trainer_class: type[Trainer] = Trainer, **kwargs: Any) -> Any:
    optimizer = optimizer or partial(AdamW, lr=0.05)
    return trainer_class(make_mlp(dropout=0.3), nn.CrossEntropyLoss(), optimizer, list(callbacks), seed=1, **kwargs)


def names_in(directory: Path) -> list[str]:
    """Return epoch and update of the checkpoints, oldest first; all are whole."""
    paths = list_checkpoints(directory)
    for path in paths:
        verify(path)
    return [path.name.split("-", 2)[2] for path in reversed(paths)]


# 20 samples in batches of 4: five updates in an epoch.
DATA, EVAL_DATA = make_data(20), make_data(8, seed=1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["epoch-2-update-10"]),
        ({"save_at_end": False}, []),
        ({"save_every_n_epochs": 1}, ["epoch-1-update-5", "epoch-2-update-10"]),
        ({"save_every_n_epochs": 2, "save_at_end": False}, ["epoch-2-update-10"]),
        (
            {"save_every_n_updates": 4},
            ["epoch-1-update-4", "epoch-2-update-8", "epoch-2-update-10"],
        ),
        (
            {"save_every_n_updates": 5, "save_every_n_epochs": 1},
            ["epoch-1-update-5", "epoch-1-update-5", "epoch-2-update-10", "epoch-2-update-10"],
        ),
        ({"save_every_n_updates": 1, "max_checkpoints": 2}, ["epoch-2-update-10", "epoch-2-update-10"]),
        (
            {"save_every_n_updates": 4, "asynchronous": True},
            ["epoch-1-update-4", "epoch-2-update-8", "epoch-2-update-10"],
        ),
        ({"save_every_n_seconds": 1e-9, "save_at_end": False}, None),
    ],
)
@pytest.mark.parametrize("has_evaluation", [False, True])
def test_saves_when_it_is_time(
    options: dict[str, Any], expected: list[str] | None, has_evaluation: bool, tmp_path: Path
) -> None:
    trainer = make_trainer(SaveTrainingStateCallback(tmp_path, **options))
    trainer.train(DATA, 2, EVAL_DATA if has_evaluation else None, per_device_batch_size=4)
    if expected is None:  # at every update, evaluation step and end of a pass
        assert len(names_in(tmp_path)) == (10 + 2 + 2 * (2 + 1) if has_evaluation else 12)
    else:
        assert names_in(tmp_path) == expected


def test_saves_about_every_n_seconds(tmp_path: Path) -> None:
    saver = SaveTrainingStateCallback(tmp_path, save_every_n_seconds=1000.0, save_at_end=False)
    make_trainer(saver).train(DATA, 2, per_device_batch_size=4)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "options",
    [
        {"save_every_n_updates": 0},
        {"save_every_n_epochs": -1},
        {"max_checkpoints": 0},
        {"save_every_n_seconds": 0},
        {"time_budget": -1.0},
    ],
)
def test_intervals_that_make_no_sense_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be (at least 1|above 0 seconds), or None"):
        SaveTrainingStateCallback(tmp_path, **options)


def test_resuming_reaches_the_same_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of four epochs are done: two more, not four; a finished run trains none; a higher target trains on."""
    expected = make_trainer()
    expected.train(DATA, 4, EVAL_DATA, per_device_batch_size=4)
    make_trainer(SaveTrainingStateCallback(tmp_path)).train(DATA, 2, EVAL_DATA, per_device_batch_size=4)
    epochs: list[int] = []
    for _ in range(2):
        resumed = make_trainer(
            SaveTrainingStateCallback(tmp_path),
            LambdaCallback(on_train_epoch_begin=lambda t, **k: epochs.append(t.current_epoch)),
        )
        history = resumed.train(DATA, 4, EVAL_DATA, per_device_batch_size=4, resume_from="latest")
        assert epochs == [3, 4]
        assert_equal_weights(weights_of(resumed), weights_of(expected))
        assert history.state_dict() == expected.run_history.state_dict()
    assert "Nothing is left of the run to do: its limits are reached." in capsys.readouterr().out


def test_a_limit_in_updates_is_a_target_too(tmp_path: Path) -> None:
    for limit in (3, 7):
        trainer = make_trainer(SaveTrainingStateCallback(tmp_path))
        trainer.train(DATA, None, max_num_train_steps=limit, per_device_batch_size=4, resume_from="latest")
        assert trainer.num_updates == limit
    straight = make_trainer()
    straight.train(DATA, None, max_num_train_steps=7, per_device_batch_size=4)
    # The first run ended its only epoch after three updates, so the second began another.
    assert trainer.current_epoch == 2
    assert straight.current_epoch == 2


def test_counting_on_from_an_earlier_run_survives_an_interruption(tmp_path: Path) -> None:
    def train_twice(directory: Path | None, interruption: Any, resume_from: str | None) -> Any:
        trainer = make_trainer()
        trainer.train(DATA, 1, per_device_batch_size=4)
        if directory is not None:
            trainer.callback_handler.add_callbacks([SaveTrainingStateCallback(directory, 1), interruption])
        with suppress(Interruption):
            trainer.train(DATA, 2, per_device_batch_size=4, reset_run_history=False, resume_from=resume_from)
        return trainer

    expected = train_twice(None, None, None)
    train_twice(tmp_path, interrupt_at(8), "latest")
    resumed = train_twice(tmp_path, LambdaCallback(), "latest")
    assert resumed.current_epoch == expected.current_epoch == 3
    assert resumed.run_history.state_dict() == expected.run_history.state_dict()
    assert_equal_weights(weights_of(resumed), weights_of(expected))


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def train() -> Any:
        early = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)
        trainer = make_trainer(early, SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1))
        trainer.train(DATA, 9, EVAL_DATA, per_device_batch_size=4, resume_from="latest")
        return trainer

    first, again = train(), train()
    assert first.current_epoch == again.current_epoch == 2
    assert_equal_weights(weights_of(first), weights_of(again))
    assert "Nothing is left of the run to do: it was stopped early." in capsys.readouterr().out


def test_an_older_checkpoint_begins_another_line_and_the_newest_written_counts(tmp_path: Path) -> None:
    saver = SaveTrainingStateCallback(tmp_path, save_every_n_updates=2)
    make_trainer(saver).train(DATA, 2, per_device_batch_size=4)
    first = list_checkpoints(tmp_path)[-1]
    with suppress(Interruption):
        trainer = make_trainer(SaveTrainingStateCallback(tmp_path, save_every_n_updates=1), interrupt_at(3))
        trainer.train(DATA, 2, per_device_batch_size=4, resume_from=first)
    newest = list_checkpoints(tmp_path)[0]
    assert newest.name.endswith("epoch-1-update-3")
    trainer = make_trainer(SaveTrainingStateCallback(tmp_path, save_at_end=False))
    trainer.train(DATA, None, max_num_train_steps=3, per_device_batch_size=4, resume_from="latest")
    assert trainer.num_updates == 3


@pytest.mark.parametrize("moment", ["batch", "loss", "backward", "after update", "epoch end", "evaluation"])
def test_an_exception_saves_the_state_after_the_last_update(moment: str, tmp_path: Path) -> None:
    """The error propagates, and the run that is resumed ends as if nothing had happened."""

    class FailingTrainer(Trainer):
        fails = True

        def check(self, here: str) -> None:
            if self.fails and here == moment and self.num_updates == 7:
                raise ZeroDivisionError(here)

        def calculate_train_batch_loss(self, batch: Any) -> Any:
            output = super().calculate_train_batch_loss(batch)
            self.check("loss")
            return output

        def backward_step(self, loss: Any) -> None:
            super().backward_step(loss)
            self.check("backward")

        def train_epoch_end(self) -> None:
            if self.num_updates == 10 and self.fails and moment == "epoch end":
                raise ZeroDivisionError

        def calculate_eval_batch_loss(self, batch: Any) -> Any:
            if self.num_updates == 10 and self.fails and moment == "evaluation":
                raise ZeroDivisionError
            return super().calculate_eval_batch_loss(batch)

    def fail_after_update(trainer: Any, **kwargs: Any) -> None:
        trainer.check("after update")

    class FailingData(torch.utils.data.Dataset[Any]):
        trainer: Any = None

        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> Any:
            if self.trainer is not None:
                self.trainer.check("batch")
            return DATA[index]

    def train(directory: Path | None, fails: bool) -> Any:
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.fill_(0.1 * (number + 1)).view(-1)[0] = -0.3
        callbacks: list[Any] = [LambdaCallback(on_train_update_end=fail_after_update)]
        if directory is not None:
            callbacks.append(SaveTrainingStateCallback(directory, save_on_exception=True, save_at_end=False))
        trainer = FailingTrainer(model, nn.CrossEntropyLoss(), partial(AdamW, lr=0.1), callbacks, seed=2)
        trainer.fails = fails
        data = FailingData()
        data.trainer = trainer if fails else None
        trainer.train(data, 3, EVAL_DATA, per_device_batch_size=4, resume_from=directory and "latest")
        return trainer

    expected = train(None, fails=False)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, fails=True)
    assert names_in(tmp_path) == [f"epoch-2-update-{10 if moment in ('epoch end', 'evaluation') else 7}"]
    resumed = train(tmp_path, fails=False)
    assert_equal_weights(weights_of(resumed), weights_of(expected))
    assert resumed.run_history.state_dict() == expected.run_history.state_dict()


def test_an_exception_while_the_weights_change_saves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class FailingTrainer(Trainer):
        def optimizer_step(self) -> None:
            super().optimizer_step()
            if self.num_updates == 3:
                raise ZeroDivisionError

    trainer = make_trainer(SaveTrainingStateCallback(tmp_path, save_on_exception=True), trainer_class=FailingTrainer)
    with pytest.raises(ZeroDivisionError) as caught:
        trainer.train(DATA, 1, per_device_batch_size=4)
    assert names_in(tmp_path) == []
    assert "The state was not saved: the exception came while the weights" in capsys.readouterr().out
    assert not any("failed as well" in note for note in caught.value.__notes__)


def test_an_exception_saves_nothing_unless_that_was_asked_for(tmp_path: Path) -> None:
    trainer = make_trainer(SaveTrainingStateCallback(tmp_path), interrupt_at(3))
    with pytest.raises(Interruption):
        trainer.train(DATA, 1, per_device_batch_size=4)
    assert names_in(tmp_path) == []


def fail_on(process: int, directory: Path) -> tuple[int, str]:
    def fail(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == 2 and trainer.accelerator.process_index == process:
            raise ZeroDivisionError

    saver = SaveTrainingStateCallback(directory, save_on_exception=True)
    trainer = make_trainer(LambdaCallback(on_train_step_end=fail), saver)
    try:
        trainer.train(DATA, 2, per_device_batch_size=2)
    except Exception as error:
        return trainer.num_updates, type(error).__name__
    return trainer.num_updates, "none"


@pytest.mark.parametrize("process", [0, 1])
def test_the_main_process_saves_when_any_of_two_fails(process: int, tmp_path: Path) -> None:
    found = run_processes(fail_on, 2, process, tmp_path)
    assert found[process] == (2, "ZeroDivisionError")
    # When the main process is gone, so is the store in which it left word.
    assert found[1 - process] in [(2, "ProcessFailedError"), *([(2, "RuntimeError")] if process == 0 else [])]
    assert names_in(tmp_path) == ["epoch-1-update-2"]
    [finished, other] = run_processes(go_on_in_processes, 2, tmp_path)
    assert finished == other == (10, 40)


def go_on_in_processes(directory: Path) -> tuple[int, int]:
    trainer = make_trainer()
    trainer.train(DATA, 2, per_device_batch_size=2, resume_from=directory)
    return trainer.num_updates, trainer.num_samples


def test_a_failed_save_in_the_background_is_raised_at_the_next_update(tmp_path: Path) -> None:
    updates: list[int] = []
    directory = tmp_path / "state"

    def spoil(trainer: Trainer, **kwargs: Any) -> None:
        updates.append(trainer.num_updates)
        if trainer.num_updates == 2:  # before the saver hears of it
            directory.rmdir()
            directory.write_text("in the way")
        if trainer.num_updates == 3:
            for thread in threading.enumerate():
                if thread.name.startswith("save"):
                    saver._in_background and saver._in_background.exception(timeout=30)

    saver = SaveTrainingStateCallback(directory, save_every_n_updates=2, asynchronous=True)
    trainer = make_trainer(LambdaCallback(on_train_update_end=spoil), saver)
    with pytest.raises(CheckpointError, match=r"cannot (save|look into) .*state"):
        trainer.train(DATA, 2, per_device_batch_size=4)
    assert updates == [1, 2, 3]


def test_a_failed_save_in_the_background_is_raised_at_the_end_at_the_latest(tmp_path: Path) -> None:
    directory = tmp_path / "state"

    def spoil(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == 5:
            directory.rmdir()
            directory.write_text("in the way")

    saver = SaveTrainingStateCallback(directory, save_every_n_updates=5, asynchronous=True, save_at_end=False)
    trainer = make_trainer(LambdaCallback(on_train_update_end=spoil), saver)
    with pytest.raises(CheckpointError):
        trainer.train(DATA, 1, per_device_batch_size=4)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_background_save_is_of_its_moment(asynchronous: bool, tmp_path: Path) -> None:
    """What training does while a checkpoint is written does not reach it."""
    saver = SaveTrainingStateCallback(tmp_path, save_every_n_updates=1, asynchronous=asynchronous)
    weights: dict[int, dict[str, Any]] = {}

    def note(trainer: Trainer, **kwargs: Any) -> None:
        weights[trainer.num_updates] = weights_of(trainer)

    make_trainer(LambdaCallback(on_train_update_end=note), saver).train(DATA, 1, per_device_batch_size=4)
    for path in list_checkpoints(tmp_path):
        facts = json.loads((path / "run.json").read_text())
        assert_equal_weights(
            load_file(path / "model.safetensors"), weights[facts["history"]["counters"]["num_updates"]]
        )


def test_a_directory_that_cannot_be_written_to_is_noticed_before_the_first_batch(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    steps: list[int] = []
    trainer = make_trainer(
        SaveTrainingStateCallback(tmp_path / "file" / "state"),
        LambdaCallback(on_train_step_begin=lambda t, **k: steps.append(1)),
    )
    with pytest.raises(CheckpointError, match=r"cannot (save|look into) .*Not a directory"):
        trainer.train(DATA, 1)
    assert steps == []


def save_in_an_impossible_place(directory: Path) -> str:
    saver = SaveTrainingStateCallback(directory, save_every_n_updates=2)

    def spoil(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == 2 and trainer.accelerator.is_main_process:
            directory.rmdir()
            directory.write_text("in the way")

    trainer = make_trainer(LambdaCallback(on_train_update_end=spoil), saver)
    try:
        trainer.train(DATA, 1, per_device_batch_size=2)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_failed_save_is_raised_on_every_process(tmp_path: Path) -> None:
    first, second = run_processes(save_in_an_impossible_place, 2, tmp_path / "state")
    assert first == second != ""


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    def spoil(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == 3:
            with torch.no_grad():
                trainer.get_model()[0].weight[0, 0] = math.nan

    saver = SaveTrainingStateCallback(tmp_path, save_every_n_updates=1)
    with pytest.raises(
        NonFiniteError, match=r"weights are not finite \(0.weight\), and the newest checkpoint always is"
    ):
        make_trainer(LambdaCallback(on_train_update_end=spoil), saver).train(DATA, 1, per_device_batch_size=4)
    assert names_in(tmp_path) == ["epoch-1-update-1", "epoch-1-update-2"]


def test_callbacks_after_the_saver_in_the_list_are_saved_after_they_have_heard(tmp_path: Path) -> None:
    class Counter(TrainerCallback):
        count = 0

        def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
            self.count += 1

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.count = state_dict["count"]

    saver, counter = SaveTrainingStateCallback(tmp_path, save_every_n_updates=1), Counter()
    with suppress(Interruption):
        make_trainer(saver, counter, interrupt_at(7)).train(DATA, 2, per_device_batch_size=4)
    assert counter.count == 7
    again = Counter()
    make_trainer(saver, again).train(DATA, 2, per_device_batch_size=4, resume_from="latest")
    assert again.count == 10


class RowWriter(TrainerCallback):
    """Appends a row for each update to a file that other processes may be reading."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        with self.path.open("a") as file:
            file.write(f"{trainer.num_updates}\n")

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.path.stat().st_size if self.path.exists() else 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.path.touch()
        os.truncate(self.path, state_dict["size"])


def test_each_row_of_a_log_is_there_once_after_any_number_of_interruptions(tmp_path: Path) -> None:
    rows, state = tmp_path / "rows.txt", tmp_path / "state"
    for update in (2, 5, 6, 9, None):
        callbacks = [RowWriter(rows), SaveTrainingStateCallback(state, save_every_n_updates=2)]
        if update is not None:
            callbacks.append(interrupt_at(update))  # type: ignore[arg-type]
        with suppress(Interruption):
            make_trainer(*callbacks).train(DATA, 2, per_device_batch_size=4, resume_from="latest")
    assert rows.read_text().split() == [str(update) for update in range(1, 11)]


def test_a_state_that_could_not_be_loaded_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    class Odd(TrainerCallback):
        def state_dict(self) -> dict[str, Any]:
            return {"path": tmp_path}

    with pytest.raises(TypeError, match=r"state\['callbacks'\]\['.*Odd'\]\['path'\] is of type PosixPath"):
        make_trainer(Odd(), SaveTrainingStateCallback(tmp_path)).train(DATA, 1)


# --------------------------------------------------------------------------------------------------------------------
# What else is state
# --------------------------------------------------------------------------------------------------------------------


def resumed_and_expected(make: Any, directory: Path, stop_at: int, **kwargs: Any) -> tuple[Any, Any]:
    """Return a trainer that was interrupted and resumed, and one that was not."""
    expected = make()
    expected.train(DATA, 3, EVAL_DATA, per_device_batch_size=4, **kwargs)
    interrupted = make()
    interrupted.callback_handler.add_callbacks([SaveTrainingStateCallback(directory, 1), interrupt_at(stop_at)])
    with pytest.raises(Interruption):
        interrupted.train(DATA, 3, EVAL_DATA, per_device_batch_size=4, **kwargs)
    resumed = make()
    resumed.train(DATA, 3, EVAL_DATA, per_device_batch_size=4, resume_from=directory, **kwargs)
    assert_equal_weights(weights_of(resumed), weights_of(expected))
    assert resumed.run_history.state_dict() == expected.run_history.state_dict()
    return resumed, expected


class UnfreezingTrainer(Trainer):
    """Unfreezes the first layer in the second epoch, and gives it a group of its own."""

    def train_epoch_start(self) -> None:
        super().train_epoch_start()
        if self.current_epoch == 2:
            parameters = list(self.get_model()[0].parameters())
            for parameter in parameters:
                parameter.requires_grad_(True)
            self.optimizer.optimizer.add_param_group({"params": parameters, "lr": 0.01})


@pytest.mark.parametrize("stop_at", [3, 7, 12])
def test_frozen_layers_and_groups_that_hooks_added_are_state(stop_at: int, tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        model = make_mlp(dropout=0.3)
        model[0].requires_grad_(False)
        head = SGD(model[3].parameters(), lr=0.1, momentum=0.9)
        return UnfreezingTrainer(model, nn.CrossEntropyLoss(), head, None, seed=3)

    resumed, _ = resumed_and_expected(make, tmp_path, stop_at)
    assert resumed.get_model()[0].weight.requires_grad
    assert len(resumed.optimizer.param_groups) == 2


class RateTrainer(Trainer):
    """Halves the learning rate at the beginning of each epoch, without a schedule."""

    def train_epoch_start(self) -> None:
        super().train_epoch_start()
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5


def test_what_hooks_at_the_beginning_of_an_epoch_change_is_changed_once(tmp_path: Path) -> None:
    resumed, _ = resumed_and_expected(partial(make_trainer, trainer_class=RateTrainer), tmp_path, 12)
    assert resumed.optimizer.param_groups[0]["lr"] == 0.05 / 8


def test_modules_and_parameters_of_the_loss_are_state(tmp_path: Path) -> None:
    class CenterLoss(nn.Module):
        """Has a parameter that is trained and a buffer that moves."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.register_buffer("center", torch.zeros(3))

        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            self.center = 0.9 * self.center + 0.1 * outputs.detach().mean(0)
            return nn.functional.cross_entropy((outputs - self.center) * self.scale, targets)

    def make() -> Any:
        model, loss = make_mlp(dropout=0.2), CenterLoss()
        return Trainer(model, loss, AdamW([*model.parameters(), *loss.parameters()], lr=0.05), None, seed=1)

    resumed, expected = resumed_and_expected(make, tmp_path, 8)
    assert torch.equal(resumed.loss_func.scale, expected.loss_func.scale)
    assert torch.equal(resumed.loss_func.center, expected.loss_func.center)


@pytest.mark.parametrize("stop_at", [2, 7, 11])
def test_schedules_of_torch_go_on(stop_at: int, tmp_path: Path) -> None:
    def schedule(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)

    resumed_and_expected(make_trainer, tmp_path, stop_at, create_scheduler_fn=schedule)


def test_a_single_module_in_evaluation_mode_stays_there(tmp_path: Path) -> None:
    class FrozenDropoutTrainer(Trainer):
        def training_run_start(self) -> None:
            if self.current_epoch == 0:
                self.get_model()[2].eval()

    resumed, _ = resumed_and_expected(partial(make_trainer, trainer_class=FrozenDropoutTrainer), tmp_path, 7)
    assert not resumed.get_model()[2].training
    assert resumed.get_model()[1].training


def test_clipping_guards_and_intermediate_evaluations_go_on(tmp_path: Path) -> None:
    def make() -> Any:
        return make_trainer(StepBasedEvaluationCallback(2), TerminateOnNaNCallback(read_every_n_updates=4))

    resumed_and_expected(make, tmp_path, 7, gradient_clip_norm=0.1, gradient_accumulation_steps=1)


# --------------------------------------------------------------------------------------------------------------------
# What does not fit
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_mlp(inputs=4, outputs=5), r"3.weight has shape \(3, 8\) there and \(5, 8\) in the model"),
        (lambda: nn.Sequential(make_mlp()), r"it has no 0.0.weight; it has no 0.0.bias"),
    ],
)
def test_another_model_is_refused_and_left_as_it_is(make: Any, words: str, tmp_path: Path) -> None:
    make_trainer(SaveTrainingStateCallback(tmp_path)).train(DATA, 1)
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(model, nn.CrossEntropyLoss(), partial(AdamW, lr=0.05), None)
    with pytest.raises(CheckpointMismatchError, match=words):
        trainer.train(DATA, 2, resume_from=tmp_path)
    assert_equal_weights(model.state_dict(), before)


@pytest.mark.parametrize(
    ("arguments", "run", "words"),
    [
        ({"optimizer": partial(SGD, lr=0.05)}, {}, "optimizer: AdamW in .*, SGD in this run"),
        (
            {},
            {"create_scheduler_fn": LinearLrScheduler.create_scheduler_fn()},
            "scheduler: None in .*, LinearLrScheduler in this run",
        ),
    ],
)
def test_another_optimizer_or_schedule_is_refused(arguments: Any, run: Any, words: str, tmp_path: Path) -> None:
    make_trainer(SaveTrainingStateCallback(tmp_path)).train(DATA, 1)
    with pytest.raises(CheckpointMismatchError, match=words):
        make_trainer(**arguments).train(DATA, 2, resume_from=tmp_path, **run)


def test_another_seed_is_refused_and_none_takes_that_of_the_checkpoint(tmp_path: Path) -> None:
    make_trainer(SaveTrainingStateCallback(tmp_path)).train(DATA, 1)
    trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), partial(AdamW, lr=0.05), None, seed=7)
    with pytest.raises(CheckpointMismatchError, match=r"seed: 1 in .*, 7 in this run"):
        trainer.train(DATA, 2, resume_from=tmp_path)
    trainer = Trainer(make_mlp(dropout=0.3), nn.CrossEntropyLoss(), partial(AdamW, lr=0.05), None)
    trainer.train(DATA, 2, resume_from=tmp_path)
    assert trainer.run_config.seed == 1


def test_other_groups_of_the_optimizer_are_refused(tmp_path: Path) -> None:
    make_trainer(SaveTrainingStateCallback(tmp_path)).train(DATA, 1)
    model = make_mlp(dropout=0.3)
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters()}]
    trainer = Trainer(model, nn.CrossEntropyLoss(), AdamW(groups, lr=0.05), None)
    with pytest.raises(CheckpointMismatchError, match=r"groups of \[4\] parameters in .*, and AdamW of \[2, 2\] in"):
        trainer.train(DATA, 2, resume_from=tmp_path)


def test_another_learning_rate_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(SaveTrainingStateCallback(tmp_path)).train(DATA, 1)
    make_trainer(optimizer=partial(AdamW, lr=0.01)).train(DATA, 2, resume_from=tmp_path)
    assert "lr of the optimizer was 0.05 and is 0.01 here; it goes on with 0.05." in capsys.readouterr().out


def test_another_learning_rate_is_told_as_often_as_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the run's own that counts, and not that of the script which went on with it last."""

    def train(lr: float, num_epochs: int) -> str:
        trainer = make_trainer(SaveTrainingStateCallback(tmp_path), optimizer=partial(AdamW, lr=lr))
        schedule = partial(LinearLrScheduler, num_updates=100)
        trainer.train(DATA, num_epochs, per_device_batch_size=4, create_scheduler_fn=schedule, resume_from="latest")
        return capsys.readouterr().out

    note = "lr of the optimizer was 0.05 and is 0.01 here; it goes on with 0.05."
    assert "Note" not in train(0.05, 1)
    assert note in train(0.01, 2)
    assert note in train(0.01, 3)
    assert "Note" not in train(0.05, 4)


def test_another_learning_rate_of_one_group_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def make(lr: float) -> Any:
        model = make_mlp(dropout=0.3)
        groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": lr}]
        return Trainer(model, nn.CrossEntropyLoss(), AdamW(groups, lr=0.05), [SaveTrainingStateCallback(tmp_path)])

    make(0.2).train(DATA, 1)
    make(0.1).train(DATA, 2, resume_from="latest")
    notes = [line for line in capsys.readouterr().out.splitlines() if "Note" in line]
    assert notes == [
        "Note on resuming: lr of group 1 of the optimizer was 0.2 and is 0.1 here; it goes on with 0.2.",
    ]


def test_a_schedule_that_does_not_know_of_a_longer_run_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(num_epochs: int, schedule: Any) -> list[str]:
        trainer = make_trainer(SaveTrainingStateCallback(tmp_path / schedule.func.__name__))
        trainer.train(DATA, num_epochs, per_device_batch_size=4, create_scheduler_fn=schedule, resume_from="latest")
        return [line for line in capsys.readouterr().out.splitlines() if "Note" in line]

    torchs = partial(CosineAnnealingLR, T_max=TrainerPlaceholderValues.NUM_UPDATES)
    ours = partial(LinearLrScheduler, num_updates=TrainerPlaceholderValues.NUM_UPDATES)
    assert train(1, torchs) == train(1, ours) == train(2, ours) == []
    assert train(2, torchs) == [
        "Note on resuming: the run is 10 updates long instead of 5, but CosineAnnealingLR goes on with the schedule it "
        "had."
    ]


def test_a_run_that_is_to_stop_saves_also_where_the_save_in_the_background_has_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "state"
    saver = SaveTrainingStateCallback(directory, save_every_n_updates=2, asynchronous=True)

    def spoil(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == 2:  # before the saver hears of it
            directory.rmdir()
            directory.write_text("in the way")

    def repair(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == 2:  # after it has
            saver._in_background and saver._in_background.exception(timeout=30)
            directory.unlink()
            saver._raise_failure = lambda: None  # as if it failed a moment later
            os.kill(os.getpid(), signal.SIGTERM)

    early, late = LambdaCallback(on_train_update_end=spoil), LambdaCallback(on_train_update_end=repair)
    late.order = 3
    with pytest.raises(TrainingInterrupted):
        make_trainer(early, saver, late).train(DATA, 2, per_device_batch_size=4)
    said = capsys.readouterr().out
    assert "The save in the background has failed: cannot" in said and "SIGTERM: saved" in said
    assert names_in(directory) == ["epoch-1-update-3"]


def test_latest_needs_to_know_where(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="resume_from='latest' looks where SaveTrainingStateCallback saves"):
        make_trainer().train(DATA, 1, resume_from="latest")
    with pytest.raises(CheckpointError, match="there is no such directory"):
        make_trainer().train(DATA, 1, resume_from=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="there is no such directory"):
        make_trainer().train(DATA, 1, resume_from="")


# --------------------------------------------------------------------------------------------------------------------
# The best model
# --------------------------------------------------------------------------------------------------------------------


class Scripted(TrainerCallback):
    """Records values that a test has chosen, one at the end of each epoch."""

    def __init__(self, *values: float, name: str = "score") -> None:
        self.values, self.metric = values, name
        self.weights: list[Any] = []

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.weights.append(weights_of(trainer))
        trainer.run_history.update_metric(self.metric, self.values[trainer.current_epoch - 1])


@pytest.mark.parametrize(("greater", "best"), [(True, 2), (False, 0)])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_the_best_weights_are_saved_and_loaded_at_the_end(
    suffix: str, greater: bool, best: int, tmp_path: Path
) -> None:
    path = tmp_path / f"best{suffix}"
    script = Scripted(1.0, math.nan, 3.0, 2.0)
    saver = SaveBestModelCallback(path, "score", greater_is_better=greater)
    trainer = make_trainer(saver, script)
    trainer.train(DATA, 4, per_device_batch_size=4)
    assert saver.best_value == script.values[best]
    assert_equal_weights(weights_of(trainer), script.weights[best])
    other = make_trainer()
    other.load_checkpoint(path)
    assert_equal_weights(weights_of(other), script.weights[best])


def test_several_best_models_at_once(tmp_path: Path) -> None:
    high = SaveBestModelCallback(tmp_path / "high.safetensors", "score", True, load_best_at_end=False)
    low = SaveBestModelCallback(tmp_path / "low.pt", "score", False, save_optimizer=True, load_best_at_end=False)
    script = Scripted(2.0, 1.0, 3.0, 2.5)
    make_trainer(high, low, script).train(DATA, 4, per_device_batch_size=4)
    assert_equal_weights(load_file(high.save_path), script.weights[2])
    content = torch.load(low.save_path, weights_only=True)
    assert_equal_weights(content["model_state_dict"], script.weights[1])
    assert content["optimizer_state_dict"]["state"][0]["step"] == 10


def test_a_stale_file_is_never_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither where no value appeared, nor where somebody else wrote the file in the meantime."""
    path = tmp_path / "best.safetensors"
    make_trainer(SaveBestModelCallback(path, "score", True), Scripted(1.0)).train(DATA, 1)
    trainer = make_trainer(SaveBestModelCallback(path, "score", True))
    before = path.read_bytes()
    trainer.train(DATA, 1)
    assert "'score' had no value, so nothing was saved or loaded" in capsys.readouterr().out
    assert path.read_bytes() == before
    straight = make_trainer()
    straight.train(DATA, 1)
    assert_equal_weights(weights_of(trainer), weights_of(straight))

    def overwrite(trainer: Trainer, **kwargs: Any) -> None:
        path.write_bytes(before)

    trainer = make_trainer(
        SaveBestModelCallback(path, "score", True), Scripted(1.0, 0.5), LambdaCallback(on_train_epoch_begin=overwrite)
    )
    with pytest.raises(CheckpointError, match="is not the best model of this run any more"):
        trainer.train(DATA, 2)


def test_the_best_value_is_remembered_over_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"

    def train(*more: Any, values: tuple[float, ...] = (5.0, 9.0, 7.0)) -> tuple[Any, Any]:
        script, best = Scripted(*values), SaveBestModelCallback(path, "score", True)
        trainer = make_trainer(script, best, SaveTrainingStateCallback(tmp_path / "state", 1), *more)
        with suppress(Interruption):
            trainer.train(DATA, 3, per_device_batch_size=4, resume_from="latest")
        return trainer, script

    _, script = train(interrupt_at(12))
    saved = load_file(path)
    assert_equal_weights(saved, script.weights[1])
    resumed, _ = train()
    assert_equal_weights(load_file(path), saved)
    assert_equal_weights(weights_of(resumed), saved)


def test_a_better_model_of_a_part_that_was_undone_is_the_best(tmp_path: Path) -> None:
    """It was saved after the last checkpoint, and what is trained again does not reach it."""
    path = tmp_path / "best.safetensors"

    def train(values: tuple[float, ...], *more: Any) -> Any:
        best = SaveBestModelCallback(path, "score", True)
        state = SaveTrainingStateCallback(tmp_path / "state", save_every_n_updates=7, save_at_end=False)
        trainer = make_trainer(Scripted(*values), best, state, *more)
        with suppress(Interruption):
            trainer.train(DATA, 3, per_device_batch_size=4, resume_from="latest")
        return trainer

    train((5.0, 9.0, 7.0), interrupt_at(11))
    saved = load_file(path)
    assert_equal_weights(weights_of(train((5.0, 6.0, 7.0))), saved)


def save_best_in_processes(path: Path) -> tuple[Any, Any]:
    saver = SaveBestModelCallback(path, "score", True)
    script = Scripted(1.0, 3.0, 2.0)
    trainer = make_trainer(saver, script)
    trainer.train(DATA, 3, per_device_batch_size=2)
    return weights_of(trainer), script.weights[1]


def test_two_processes_have_the_same_best(tmp_path: Path) -> None:
    for final, best in run_processes(save_best_in_processes, 2, tmp_path / "best.safetensors"):
        assert_equal_weights(final, best)


def test_a_metric_that_cannot_be_watched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs greater_is_better"):
        SaveBestModelCallback(tmp_path / "x.pt", "score")
    with pytest.raises(ValueError, match="hold weights alone"):
        SaveBestModelCallback(tmp_path / "x.safetensors", save_optimizer=True)
    with pytest.raises(ValueError, match="got no eval_dataset"):
        make_trainer(SaveBestModelCallback(tmp_path / "x.pt")).train(DATA, 1)


# --------------------------------------------------------------------------------------------------------------------
# Before the decay
# --------------------------------------------------------------------------------------------------------------------


def test_a_longer_run_goes_on_from_before_the_decay(tmp_path: Path) -> None:
    schedule = WSDLrScheduler.create_scheduler_fn(decay_phase_ratio=0.4)
    make_trainer(WSDCheckpointCallback(tmp_path)).train(DATA, 2, per_device_batch_size=4, create_scheduler_fn=schedule)
    assert names_in(tmp_path) == ["epoch-2-update-6"]

    def train(epochs: int, resume_from: Path | None) -> Any:
        rates: list[float] = []
        trainer = make_trainer(
            LambdaCallback(on_train_update_end=lambda t, **k: rates.append(t.optimizer.param_groups[0]["lr"]))
        )
        trainer.train(DATA, epochs, per_device_batch_size=4, create_scheduler_fn=schedule, resume_from=resume_from)
        return trainer, rates

    straight, rates = train(4, None)
    longer, rates_after = train(4, tmp_path)
    assert rates_after == rates[6:]
    assert rates_after[5] == 0.05 > rates_after[7]
    assert_equal_weights(weights_of(longer), weights_of(straight))


def test_the_schedule_must_have_a_decay(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a WSDLrScheduler, got NoneType"):
        make_trainer(WSDCheckpointCallback(tmp_path)).train(DATA, 1)

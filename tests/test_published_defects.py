"""Each defect found in pytorch-accelerated 0.1.61 (research/seeds.md, 4.1): its test, or the name of its test."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LambdaCallback, TrainerCallback
from tests.support import make_data, make_mlp, run_processes

TESTS = Path(__file__).parent
LATER = "not in this version: averaged weights"

# By the number of the row: what went wrong, and the tests that show that it does not.
DEFECTS: dict[int, tuple[str, list[str]]] = {
    1: ("import seeds", ["test_architecture::test_importing_is_light"]),
    2: ("user's seed ignored", ["test_data::test_without_a_seed_the_users_seed_rules_and_his_streams_are_left_alone"]),
    3: ("workers not reproducible", ["test_data::test_two_workers_are_reproducible"]),
    4: ("loss divided by accumulation", ["test_numerics::test_reported_loss_does_not_depend_on_accumulation"]),
    5: ("division in place", ["test_numerics::test_what_the_hook_returned_is_not_changed"]),
    6: ("partial window by full count", ["test_numerics::test_update_equals_that_of_the_big_batch"]),
    7: ("clipping on partial sums", ["test_published_defects::test_clipping_acts_once_per_update"]),
    8: ("token counts times processes", ["test_numerics::test_update_equals_that_of_the_big_batch"]),
    9: ("schedule times processes", ["test_schedulers::test_two_processes_follow_the_schedule_of_one"]),
    10: (
        "units of max_num_train_steps",
        ["test_published_defects::test_the_smaller_limit_wins_on_any_number_of_proce"],
    ),
    11: (
        "model left in evaluation mode",
        ["test_callbacks_limits::test_evaluation_sees_the_weights_after_the_update_and_changes_nothing"],
    ),
    12: (
        "evaluation inside a step",
        ["test_callbacks_limits::test_evaluation_every_few_updates_counted_over_the_whole_run"],
    ),
    13: ("LimitEvalSteps without effect", ["test_callbacks_limits::test_evaluation_steps_are_limited"]),
    14: ("resume repeats epochs", ["test_callbacks_saving::test_resuming_reaches_the_same_target"]),
    15: (
        "history, best values and position lost",
        [
            "test_checkpoint_resume::test_killed_anywhere_and_run_again_it_ends_the_same",
            "test_callbacks_saving::test_the_best_value_is_remembered_over_an_interruption",
        ],
    ),
    16: (
        "later saves cannot be loaded",
        ["test_checkpoint_resume::test_killed_anywhere_and_run_again_it_ends_the_same"],
    ),
    17: ("saved before the update", ["test_callbacks_saving::test_a_background_save_is_of_its_moment"]),
    18: (LATER, []),
    19: (
        "missing attributes swallowed",
        [
            "test_callbacks_base::test_a_missing_attribute_inside_a_callback_is_an_error",
            "test_published_defects::test_callbacks_can_be_copied_and_asked",
        ],
    ),
    20: (
        "two of one class forbidden",
        ["test_callbacks_base::test_callbacks_are_called_in_list_order_and_several_of_one_class_are_welcome"],
    ),
    21: ("NaN by sys.exit", ["test_callbacks_stopping::test_all_processes_act_together_when_one_sees_a_nan"]),
    22: ("stale best model", ["test_callbacks_saving::test_a_stale_file_is_never_loaded"]),
    23: ("ragged gathers abort", ["test_distributed::test_ragged_tensors_are_gathered_whole_and_in_order"]),
    24: ("padding cuts values", ["test_distributed::test_ragged_tensors_are_gathered_whole_and_in_order"]),
    25: ("cosine cut off", ["test_schedulers::test_cosine_of_the_published_cut"]),
    26: (
        "WSD state, decay and short runs",
        [
            "test_schedulers::test_goes_on_to_the_bit_after_an_interruption_anywhere",
            "test_schedulers::test_wsd_rises_stays_and_falls",
            "test_schedulers::test_short_runs_with_any_phases",
        ],
    ),
    27: (
        "ModelFreezer",
        [
            "test_finetuning::test_eval_mode_is_set_as_well_as_frozen",
            "test_finetuning::test_unfreezes_whatever_the_mode",
            "test_finetuning::test_parameters_that_inner_modules_own_are_frozen",
        ],
    ),
    28: (
        "iterable datasets and batch samplers",
        [
            "test_evaluation::test_each_sample_counts_once",
            "test_evaluation::test_ready_loaders_and_samplers",
        ],
    ),
    29: ("stale scheduler", ["test_schedulers::test_an_earlier_scheduler_does_not_go_on"]),
    30: ("evaluate wipes history", ["test_evaluation::test_evaluation_leaves_training_history_alone_and_adds_to_it"]),
    31: (
        "forward left wrapped",
        ["test_engine::test_bf16_is_used_by_every_trainer_and_the_model_is_left_as_it_was"],
    ),
    32: (
        "no end events after a failure",
        ["test_errors::test_end_events_come_also_after_a_failure_and_the_trainer_can_be_used_again"],
    ),
    33: (
        "placeholders",
        [
            "test_run_config::test_arithmetic_on_both_sides",
            "test_run_config::test_found_wherever_they_are",
            "test_run_config::test_no_text_is_run_as_code",
        ],
    ),
    34: (
        "run_config.to_dict",
        [
            "test_run_config::test_a_run_without_evaluation_knows_its_facts",
            "test_run_config::test_the_dict_is_apart_from_the_facts",
        ],
    ),
    35: (
        "names with 'train', NaN as best",
        [
            "test_callbacks_progress::test_new_metrics_are_logged_once_at_the_end_of_their_pass",
            "test_callbacks_stopping::test_training_stops_when_the_metric_has_stopped_getting_better",
        ],
    ),
}


def test_each_defect_has_its_test() -> None:
    assert sorted(DEFECTS) == list(range(1, 36))
    for number, (name, tests) in DEFECTS.items():
        assert tests or name == LATER, number
        for test in tests:
            file, function = test.split("::")
            assert re.search(rf"^def {function}", (TESTS / f"{file}.py").read_text(), re.MULTILINE), test


def make_trainer(*callbacks: Any) -> Trainer:
    return Trainer(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), callbacks)


def test_clipping_acts_once_per_update() -> None:
    calls: list[int] = []

    class Counting(Trainer):
        def clip_gradients(self) -> None:
            calls.append(self.num_steps)
            super().clip_gradients()

    trainer = Counting(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), None)
    trainer.train(make_data(32), 1, per_device_batch_size=4, gradient_accumulation_steps=4, gradient_clip_norm=1.0)
    assert calls == [4, 8]


def _train_with_limits(limits: list[tuple[int | None, int | None]]) -> list[tuple[int, ...]]:
    counted = []
    for num_epochs, max_num_train_steps in limits:
        trainer = make_trainer()
        num_processes = trainer.accelerator.num_processes
        trainer.train(
            make_data(24),
            num_epochs,
            per_device_batch_size=4 // num_processes,
            max_num_train_steps=max_num_train_steps,
            gradient_accumulation_steps=2,
        )
        counted.append((trainer.current_epoch, trainer.num_updates, trainer.num_steps, trainer.num_samples))
    return counted


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_smaller_limit_wins_on_any_number_of_processes(num_processes: int) -> None:
    limits = [(1, 20), (5, 6), (5, 4), (None, 7), (2, None)]
    expected = [(1, 3, 6, 24), (2, 6, 12, 48), (2, 4, 8, 32), (3, 7, 14, 56), (2, 6, 12, 48)]
    assert run_processes(_train_with_limits, num_processes, limits) == [expected] * num_processes


def test_callbacks_can_be_copied_and_asked() -> None:
    callback = TrainerCallback()
    assert not hasattr(copy.deepcopy(callback), "on_train_run_start")
    trainer = make_trainer(callback)
    assert [type(other) for other in copy.deepcopy(trainer.callback_handler)] == [TrainerCallback]


def test_a_script_written_for_the_published_library_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Imports, signatures, spellings and names as that library's own examples use them."""
    from pytorch_accelerated import Trainer, TrainerPlaceholderValues, notebook_launcher
    from pytorch_accelerated.callbacks import (
        EarlyStoppingCallback,
        LogMetricsCallback,
        MoveModulesToDeviceCallback,
        PrintProgressCallback,
        ProgressBarCallback,
        StopTrainingError,
        SummaryCallback,
        TerminateOnNaNCallback,
        TrainerCallback,
    )
    from pytorch_accelerated.run_config import TrainerRunConfig
    from pytorch_accelerated.schedulers import CosineLrScheduler
    from pytorch_accelerated.tracking import InMemoryRunHistory, RunHistory
    from pytorch_accelerated.trainer import DEFAULT_CALLBACKS
    from pytorch_accelerated.trainer import TrainerPlaceholderValues as OldPlace

    assert OldPlace is TrainerPlaceholderValues and callable(notebook_launcher)
    assert set(DEFAULT_CALLBACKS) == {
        MoveModulesToDeviceCallback,
        TerminateOnNaNCallback,
        PrintProgressCallback,
        ProgressBarCallback,
        LogMetricsCallback,
        SummaryCallback,  # is of this library
    }
    assert issubclass(StopTrainingError, Exception)

    class AccuracyCallback(TrainerCallback):
        def on_training_run_start(self, trainer: Any, **kwargs: Any) -> None:
            self.right = self.seen = 0

        def on_eval_step_end(self, trainer: Any, batch: Any, batch_output: Any, **kwargs: Any) -> None:
            predicted = batch_output["model_outputs"].argmax(dim=-1)
            self.right += int((trainer.gather(predicted) == trainer.gather(batch[1])).sum())
            self.seen += batch_output["batch_size"]

        def on_eval_epoch_end(self, trainer: Any, **kwargs: Any) -> None:
            trainer.run_history.update_metric("accuracy", self.right / self.seen)
            self.right = self.seen = 0

    class OldTrainer(Trainer):
        def create_train_dataloader(self, batch_size: int, train_dl_kwargs: Any = None) -> Any:
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=batch_size, shuffle=True)

        def calculate_train_batch_loss(self, batch: Any) -> Any:
            xb, yb = batch[0], batch[1]
            predictions = self.model(xb)
            loss = self.loss_func(predictions, yb)
            return {"loss": loss, "model_outputs": predictions, "batch_size": yb.size(0)}

    model = make_mlp()
    optimizer = torch.optim.AdamW(params=model.parameters(), lr=0.01)
    trainer = OldTrainer(
        model=model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        callbacks=(
            AccuracyCallback,
            EarlyStoppingCallback(early_stopping_patience=3),
            *DEFAULT_CALLBACKS,
        ),
        run_history=InMemoryRunHistory(),
    )
    trainer.train(
        train_dataset=make_data(32),
        eval_dataset=make_data(16),
        num_epochs=2,
        per_device_batch_size=8,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1),
        gradient_clip_value=1.0,
        train_dataloader_kwargs={"num_workers": 0},
    )
    trainer.evaluate(dataset=make_data(16), per_device_batch_size=8)
    history: RunHistory = trainer.run_history
    assert isinstance(trainer.run_config, TrainerRunConfig)
    assert len(history.get_metric_values("accuracy")) == 3
    names = {"train_loss_epoch", "eval_loss_epoch", "evaluation_loss", "accuracy"}
    assert history.get_metric_names() == names
    assert history.current_epoch == 2
    out = capsys.readouterr().out
    assert all(name in out for name in names)


def test_events_of_ones_own_are_called_as_before() -> None:
    """`callback_handler.call_event(name, trainer)` is how scripts of 0.1.x raise them."""
    heard: list[str] = []

    class Own(Trainer):
        EVENTS = (*Trainer.EVENTS, "on_special")

        def train_epoch_end(self) -> None:
            self.callback_handler.call_event("on_special", self)

    callback = LambdaCallback(on_special=lambda trainer, **kwargs: heard.append("special"))
    Own(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), [callback]).train(make_data(4), 2)
    assert heard == ["special"] * 2

"""The facts of a run, the placeholders for them, and the arguments that are refused."""

from __future__ import annotations

import ast
import dataclasses
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, LinearLR

import pytorch_accelerated
from pytorch_accelerated import Trainer, TrainerPlaceholderValues, TrainerRunConfig
from pytorch_accelerated.run_config import Placeholder, check_train_arguments, resolve_placeholders
from pytorch_accelerated.schedulers import LinearLrScheduler
from tests.support import Stream, make_data, make_mlp, weights_of

P = TrainerPlaceholderValues

# --------------------------------------------------------------------------------------------------------------------
# Facts
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "per_epoch", "num_updates"),
    [
        ({"train_dataloader_len": 10, "num_epochs": 3}, 10, 30),
        ({"train_dataloader_len": 10, "num_epochs": 3, "gradient_accumulation_steps": 5}, 2, 6),
        ({"train_dataloader_len": 10, "num_epochs": 3, "gradient_accumulation_steps": 4}, 3, 9),
        ({"train_dataloader_len": 10, "num_epochs": 3, "gradient_accumulation_steps": 99}, 1, 3),
        ({"train_dataloader_len": 1, "num_epochs": 1}, 1, 1),
        ({"train_dataloader_len": 10, "num_epochs": 3, "max_num_train_steps": 29}, 10, 29),
        ({"train_dataloader_len": 10, "num_epochs": 3, "max_num_train_steps": 31}, 10, 30),
        ({"train_dataloader_len": 10, "max_num_train_steps": 31}, 10, 31),
        ({"train_dataloader_len": 10}, 10, None),
        ({"num_epochs": 3, "max_num_train_steps": 7}, None, 7),
        ({"num_epochs": 3}, None, None),
        ({}, None, None),
    ],
)
def test_counts_updates(facts: dict[str, int], per_epoch: int | None, num_updates: int | None) -> None:
    config = TrainerRunConfig(**facts)
    assert config.num_update_steps_per_epoch == config.num_local_update_steps_per_epoch == per_epoch
    assert config.num_updates == num_updates


def test_total_batch_sizes() -> None:
    config = TrainerRunConfig(
        train_per_device_batch_size=3, eval_per_device_batch_size=5, num_processes=2, gradient_accumulation_steps=4
    )
    assert (config.train_total_batch_size, config.eval_total_batch_size, config.is_distributed) == (24, 10, True)
    config = TrainerRunConfig()
    assert (config.train_total_batch_size, config.eval_total_batch_size, config.is_distributed) == (None, None, False)


def test_is_frozen() -> None:
    config = TrainerRunConfig(num_epochs=3)
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, 1)
    with pytest.raises(AttributeError):
        config.num_updates = 1  # type: ignore[misc]


def make_trainer() -> Trainer:
    model = make_mlp()
    return Trainer(model, nn.CrossEntropyLoss(), SGD(model.parameters(), lr=0.1), callbacks=None, seed=3)


def test_a_run_without_evaluation_knows_its_facts() -> None:
    trainer = make_trainer()
    kwargs = {"shuffle": False, "worker_init_fn": print, "generator": torch.Generator()}
    before = dict(kwargs)
    trainer.train(
        make_data(22),
        2,
        per_device_batch_size=4,
        max_num_train_steps=3,
        gradient_accumulation_steps=4,
        gradient_clip_norm=0.5,
        train_dataloader_kwargs=kwargs,
    )
    facts = json.loads(json.dumps(trainer.run_config.to_dict(), allow_nan=False))
    generator = repr(kwargs["generator"])
    assert facts == {
        "num_epochs": 2,
        "max_num_train_steps": 3,
        "train_dataloader_len": 6,
        "eval_dataloader_len": None,
        "train_per_device_batch_size": 4,
        "eval_per_device_batch_size": None,
        "train_dl_kwargs": {"shuffle": False, "worker_init_fn": repr(print), "generator": generator},
        "eval_dl_kwargs": {},
        "gradient_accumulation_steps": 4,
        "gradient_clip_value": None,
        "gradient_clip_norm": 0.5,
        "seed": 3,
        "num_processes": 1,
        "mixed_precision": "no",
        "is_main_process": True,
        "is_local_main_process": True,
        "is_distributed": False,
        "num_update_steps_per_epoch": 2,
        "num_updates": 3,
        "train_total_batch_size": 16,
        "eval_total_batch_size": None,
        "num_local_update_steps_per_epoch": 2,
    }
    assert kwargs == before
    assert trainer.run_config.train_dl_kwargs == before


def test_the_dict_is_apart_from_the_facts() -> None:
    config = TrainerRunConfig(train_dl_kwargs={"nested": {"sizes": [1, (2, 3)]}, "sampler": make_data})
    facts = config.to_dict()
    assert facts["train_dl_kwargs"] == {"nested": {"sizes": [1, [2, 3]]}, "sampler": repr(make_data)}
    facts["train_dl_kwargs"]["nested"]["sizes"].append(4)
    assert config.train_dl_kwargs == {"nested": {"sizes": [1, (2, 3)]}, "sampler": make_data}


def test_lengths_of_evaluation_sets_are_added() -> None:
    trainer, data = make_trainer(), make_data(10)
    trainer.train(data, 1, {"a": data, "b": make_data(3)}, per_device_batch_size=4)
    assert trainer.run_config.eval_dataloader_len == 4
    trainer.train(data, 1, {"a": data, "b": Stream(data)}, per_device_batch_size=4)
    assert trainer.run_config.eval_dataloader_len is None


def test_an_evaluation_leaves_the_facts_of_the_training() -> None:
    trainer, data = make_trainer(), make_data(10)
    trainer.train(data, 1, per_device_batch_size=4)
    facts = trainer.run_config
    trainer.evaluate(data, per_device_batch_size=2)
    assert trainer.run_config is facts


# --------------------------------------------------------------------------------------------------------------------
# Placeholders
# --------------------------------------------------------------------------------------------------------------------

CONFIG = TrainerRunConfig(num_epochs=3, train_dataloader_len=10, gradient_accumulation_steps=3, eval_dataloader_len=7)


@pytest.mark.parametrize(
    ("placeholder", "value"),
    [
        (P.NUM_EPOCHS, 3),
        (P.NUM_UPDATES, 12),
        (P.NUM_UPDATE_STEPS_PER_EPOCH, 4),
        (P.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH, 4),
        (P.TRAIN_DATALOADER_LEN, 10),
        (P.EVAL_DATALOADER_LEN, 7),
        (P.NUM_UPDATES + 1, 13),
        (1 + P.NUM_UPDATES, 13),
        (P.NUM_UPDATES - 1, 11),
        (1 - P.NUM_UPDATES, -11),
        (P.NUM_UPDATES * 2, 24),
        (2 * P.NUM_UPDATES, 24),
        (P.NUM_UPDATES * 2 + 1, 25),
        (P.NUM_UPDATES / 5, 2.4),
        (5 / P.NUM_UPDATES, 5 / 12),
        (P.NUM_UPDATES // 5, 2),
        (77 // P.NUM_UPDATES, 6),
        ((P.NUM_UPDATES / 5).rounded(), 2),
        ((P.NUM_UPDATES / 7).rounded() + 1, 3),  # 1.71
        ((P.NUM_UPDATES / 8).rounded(), 1),  # 1.5: of two equally near, the lower
        (P.NUM_UPDATES - P.NUM_EPOCHS, 9),
        (P.NUM_UPDATES / P.NUM_EPOCHS, 4.0),
        ((P.NUM_UPDATES + 1) * (2 - P.NUM_EPOCHS) // 2, -7),
        (0.1 * P.NUM_UPDATES, pytest.approx(1.2)),
    ],
    ids=repr,
)
def test_arithmetic_on_both_sides(placeholder: Placeholder, value: float) -> None:
    found = resolve_placeholders(placeholder, CONFIG)
    assert found == value
    if not isinstance(value, type(pytest.approx(0))):
        assert type(found) is type(value)


def test_arithmetic_leaves_its_operands_alone() -> None:
    half = P.NUM_UPDATES / 2
    assert half + 1 is not half
    assert (resolve_placeholders(half, CONFIG), resolve_placeholders(P.NUM_UPDATES, CONFIG)) == (6, 12)


def test_says_what_it_stands_for() -> None:
    assert repr((2 * P.NUM_UPDATES - 1).rounded()) == ("round(((2 * TrainerPlaceholderValues(num_updates)) - 1))")


def take(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return args, kwargs


def test_found_wherever_they_are() -> None:
    nested = partial(take, P.NUM_EPOCHS, step=P.NUM_UPDATES)
    factory = partial(
        take,
        P.NUM_UPDATES,
        [P.NUM_EPOCHS, (P.NUM_EPOCHS + 1, {"a": P.NUM_EPOCHS * 2, P.NUM_EPOCHS: "key"})],
        nested,
        length=P.NUM_UPDATES,
        kept="text",
        function=nested,
    )
    args, kwargs = resolve_placeholders(factory, CONFIG)("optimizer")
    assert args[:2] == (12, [3, (4, {"a": 6, P.NUM_EPOCHS: "key"})])
    assert args[2]() == kwargs["function"]() == ((3,), {"step": 12})
    assert args[3] == "optimizer"
    assert {name: value for name, value in kwargs.items() if name != "function"} == {"length": 12, "kept": "text"}
    # The factory can be used again, for a run with other numbers.
    assert resolve_placeholders(factory, dataclasses.replace(CONFIG, num_epochs=1))()[0][0] == 4


def test_a_partial_of_a_partial() -> None:
    factory = partial(partial(take, P.NUM_UPDATES, a=P.NUM_EPOCHS), P.NUM_EPOCHS, b=1)
    assert resolve_placeholders(factory, CONFIG)() == ((12, 3), {"a": 3, "b": 1})


def test_anything_else_stays_as_it_is() -> None:
    for value in (3, "NUM_UPDATES", None, take, nn.Linear, torch.optim.SGD):
        assert resolve_placeholders(value, CONFIG) is value


def test_a_list_without_placeholders_stays_the_same_list() -> None:
    rates: list[float] = []
    args, _ = resolve_placeholders(partial(take, rates, length=P.NUM_UPDATES), CONFIG)()
    assert args[0] is rates


def test_reach_the_factory_in_a_run() -> None:
    taken: list[Any] = []

    def create(length: int, optimizer: Any, epochs: list[int]) -> Any:
        taken.append((length, epochs))
        return LambdaLR(optimizer, lambda update: 1.0)

    factory = partial(create, P.NUM_UPDATES // 2, epochs=[P.NUM_EPOCHS, P.EVAL_DATALOADER_LEN + 1])
    make_trainer().train(make_data(22), 2, make_data(9), per_device_batch_size=4, create_scheduler_fn=factory)
    assert taken == [(6, [2, 4])]


@pytest.mark.parametrize(
    ("placeholder", "field"),
    [
        (P.NUM_UPDATES, "num_updates"),
        (2 * P.NUM_UPDATE_STEPS_PER_EPOCH, "num_update_steps_per_epoch"),
        (P.NUM_EPOCHS, "num_epochs"),
        (P.EVAL_DATALOADER_LEN.rounded(), "eval_dataloader_len"),
    ],
)
def test_a_number_that_the_run_does_not_have(placeholder: Placeholder, field: str) -> None:
    for holder in (placeholder, partial(take, [placeholder])):
        with pytest.raises(ValueError) as caught:
            resolve_placeholders(holder, TrainerRunConfig())
        assert str(caught.value) == (
            f"TrainerPlaceholderValues needs run_config.{field}, which this run does not have: that takes data with a "
            "length, or a limit of the run (num_epochs, max_num_train_steps), or an evaluation set. Write the number "
            "into the scheduler factory instead."
        )


def test_no_text_is_run_as_code() -> None:
    """pytorch-accelerated 0.1.x evaluated the arithmetic of placeholders as source text."""
    for path in Path(pytorch_accelerated.__file__).parent.rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert not names & {"eval", "exec", "compile"}, path


# --------------------------------------------------------------------------------------------------------------------
# Arguments of train
# --------------------------------------------------------------------------------------------------------------------

COUNTS = ["num_epochs", "max_num_train_steps", "per_device_batch_size", "gradient_accumulation_steps"]
FINE = {
    "num_epochs": 2,
    "max_num_train_steps": 5,
    "per_device_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_clip_value": None,
    "gradient_clip_norm": None,
    "create_scheduler_fn": None,
}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_epochs": None},
        {"max_num_train_steps": None},
        {"num_epochs": 1, "max_num_train_steps": 1, "per_device_batch_size": 1},
        {"create_scheduler_fn": LinearLrScheduler.create_scheduler_fn()},
        {"create_scheduler_fn": lambda optimizer: None},
        {name: np.int64(3) for name in COUNTS},
        {"gradient_clip_value": 0.1, "gradient_clip_norm": 1},
        {"gradient_clip_norm": float("inf")},  # clips nothing, but the norm is found
    ],
)
def test_accepts_what_makes_sense(arguments: dict[str, Any]) -> None:
    check_train_arguments(**(FINE | arguments))


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("number", [0, -1, False, True, 2.0, 2.5, "2", float("nan"), np.float64(3)])
def test_refuses_what_is_no_number_of_at_least_one(name: str, number: Any) -> None:
    with pytest.raises(ValueError) as caught:
        check_train_arguments(**(FINE | {name: number}))
    assert str(caught.value) == f"{name} must be a whole number of at least 1, got {number!r}."


@pytest.mark.parametrize("name", ["per_device_batch_size", "gradient_accumulation_steps"])
def test_refuses_none_where_there_is_no_default(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_train_arguments(**(FINE | {name: None}))
    assert str(caught.value) == f"{name} must be a whole number of at least 1, got None."


@pytest.mark.parametrize("name", ["gradient_clip_value", "gradient_clip_norm"])
@pytest.mark.parametrize("limit", [0, 0.0, -1.0, float("nan")])
def test_refuses_limits_of_gradients_that_leave_nothing(name: str, limit: float) -> None:
    with pytest.raises(ValueError) as caught:
        check_train_arguments(**(FINE | {name: limit}))
    assert str(caught.value) == (f"{name} must be above 0, or None to leave the gradients as they are, got {limit!r}.")


def test_refuses_a_run_without_end() -> None:
    with pytest.raises(ValueError) as caught:
        check_train_arguments(**(FINE | {"num_epochs": None, "max_num_train_steps": None}))
    assert str(caught.value) == (
        "training would have no end: give num_epochs, max_num_train_steps (in updates), or both."
    )


def test_refuses_a_ready_scheduler() -> None:
    scheduler = LinearLrScheduler(SGD([nn.Parameter(torch.ones(()))], lr=0.1), num_updates=4)
    with pytest.raises(TypeError) as caught:
        check_train_arguments(**(FINE | {"create_scheduler_fn": scheduler}))
    assert str(caught.value) == (
        f"create_scheduler_fn must be a function that takes the optimizer and returns a scheduler, got {scheduler!r}. "
        "Pass for example partial(LinearLrScheduler, ...) instead."
    )


@pytest.mark.parametrize("something", ["cosine", 3])
def test_refuses_what_is_no_factory(something: Any) -> None:
    with pytest.raises(TypeError, match="create_scheduler_fn must be a function that takes the optimizer"):
        check_train_arguments(**(FINE | {"create_scheduler_fn": something}))


def test_a_class_is_a_factory() -> None:
    trainer = make_trainer()
    trainer.train(make_data(8), 1, create_scheduler_fn=LinearLR)
    assert isinstance(trainer.scheduler, LinearLR)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"num_epochs": 0}, ValueError),
        ({"num_epochs": None}, ValueError),
        ({"num_epochs": 1, "max_num_train_steps": 0}, ValueError),
        ({"num_epochs": 1, "per_device_batch_size": 0}, ValueError),
        ({"num_epochs": 1, "gradient_accumulation_steps": 0.5}, ValueError),
        ({"num_epochs": 1, "gradient_clip_norm": -1.0}, ValueError),
        ({"num_epochs": 1, "create_scheduler_fn": "linear"}, TypeError),
    ],
)
def test_train_refuses_before_anything_is_done(arguments: dict[str, Any], error: type[Exception]) -> None:
    trainer = make_trainer()
    trainer.train(make_data(8), 1)
    weights, config, model = weights_of(trainer), trainer.run_config, trainer.model
    read: list[Callable[[], Any]] = []
    with pytest.raises(error):
        trainer.train(read, **arguments)
    assert trainer.run_config is config
    assert trainer.model is model
    assert trainer.train_dataset is not read
    assert (trainer.num_updates, trainer.current_epoch) == (1, 1)
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(trainer).items())


def test_placeholders_can_be_sent_to_other_processes() -> None:
    sent = pickle.loads(pickle.dumps(partial(take, (2 * P.NUM_UPDATES - 1).rounded())))
    assert resolve_placeholders(sent, CONFIG)() == ((23,), {})

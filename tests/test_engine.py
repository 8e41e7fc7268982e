"""What Accelerate is asked for: models and optimizers wrapped once, and left as they were found."""

from __future__ import annotations

import copy
import os
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LambdaCallback, TerminateOnNaNCallback
from pytorch_accelerated.data import shard_dataloader
from pytorch_accelerated.errors import BatchError
from pytorch_accelerated.finetuning import ModelFreezer
from pytorch_accelerated.passes import DataPass, _is_same_device
from tests.support import assert_equal_weights, make_data, make_mlp, relative_error, run_processes, weights_of

SGD_01 = partial(SGD, lr=0.1)


def make_trainer(
    model: nn.Module | None = None, optimizer: Any = SGD_01, callbacks: Any = None, **kwargs: Any
) -> Trainer:
    model = make_mlp() if model is None else model
    return Trainer(model, kwargs.pop("loss_func", nn.CrossEntropyLoss()), optimizer, callbacks, **kwargs)


class WeightedLoss(nn.Module):
    """A loss with a parameter of its own, which is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs * self.scale, targets)


def train_with_loss_parameters(**kwargs: Any) -> dict[str, Tensor]:
    model, loss_func = make_mlp(), WeightedLoss()
    optimizer = SGD([*model.parameters(), *loss_func.parameters()], lr=0.5)
    trainer = make_trainer(model, optimizer, [TerminateOnNaNCallback], loss_func=loss_func, seed=1)
    trainer.train(make_data(10), 1, **kwargs)
    return weights_of(trainer) | {"scale": loss_func.scale.detach().clone()}


def test_parameters_of_the_loss_function_are_accumulated_and_clipped_like_the_models() -> None:
    """Ten samples: windows of 4 + 4 + 2, one update that has to be corrected for its true total."""
    whole = train_with_loss_parameters(per_device_batch_size=10, gradient_clip_norm=0.1)
    split = train_with_loss_parameters(per_device_batch_size=4, gradient_accumulation_steps=3, gradient_clip_norm=0.1)
    assert relative_error(split, whole) < 1e-6
    assert not torch.equal(whole["scale"], torch.ones(3))


def _train_with_loss_parameters_on_two() -> str:
    try:
        train_with_loss_parameters()
    except ValueError as error:
        return str(error)
    return "no error"


def test_parameters_that_processes_would_not_exchange_are_refused() -> None:
    for message in run_processes(_train_with_loss_parameters_on_two, 2):
        assert message.startswith("1 of the 5 parameters of the optimizer belong to another module than the model")
        assert message.endswith("Make that module a part of the model.")


@pytest.mark.filterwarnings("ignore:2 trainable parameters of the model are in no group")
def test_gradients_of_parameters_that_are_not_optimized_take_no_part_in_clipping() -> None:
    norms: list[float] = []
    note = LambdaCallback(on_train_update_end=lambda trainer, **_: norms.append(trainer.gradient_norm.item()))
    model = make_mlp()
    trainer = make_trainer(model, SGD(model[-1].parameters(), lr=1e-30), [note])
    arguments: dict[str, Any] = {"per_device_batch_size": 4, "gradient_clip_norm": 1e-3}
    trainer.train(make_data(16), 2, train_dataloader_kwargs={"shuffle": False}, **arguments)
    assert norms[:4] == norms[4:]  # nothing moved, so the second epoch is the first


def test_clipping_by_value_does_not_hide_an_infinite_gradient() -> None:
    model = make_mlp()
    model[0].weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    trainer = make_trainer(model, SGD_01, [TerminateOnNaNCallback])
    with pytest.raises(ArithmeticError, match="a gradient is not finite"):
        trainer.train(make_data(8), 1, gradient_clip_value=1.0)


class Lookahead:
    """An optimizer around another, as many are written; no torch Optimizer."""

    def __init__(self, optimizer: SGD) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.num_steps = 0

    def step(self) -> None:
        self.num_steps += 1
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


def test_an_optimizer_around_another_is_not_looked_through() -> None:
    model = make_mlp()
    lookahead = Lookahead(SGD(model.parameters(), lr=0.1))
    make_trainer(model, lookahead).train(make_data(16), 1, per_device_batch_size=4)
    assert lookahead.num_steps == 4


def test_a_new_model_with_the_old_optimizer_is_refused() -> None:
    trainer = make_trainer()
    trainer.train(make_data(8), 1)
    trainer.model = make_mlp(seed=1)
    with pytest.raises(ValueError, match="parameters of the optimizer do not belong to the model"):
        trainer.train(make_data(8), 1)
    trainer.optimizer = SGD(trainer.model.parameters(), lr=0.1)
    before = weights_of(trainer)
    trainer.train(make_data(8), 1)
    assert relative_error(weights_of(trainer), before) > 0


def test_an_optimizer_may_be_an_instance_or_a_function() -> None:
    model = make_mlp()
    first = make_trainer(model, SGD(model.parameters(), lr=0.1), seed=1)
    second = make_trainer(make_mlp(), SGD_01, seed=1)
    for trainer in (first, second):
        trainer.train(make_data(16), 1)
    assert_equal_weights(weights_of(first), weights_of(second))


# --------------------------------------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------------------------------------


def _thaw(where: str) -> dict[str, Tensor]:
    model = make_mlp()
    freezer = ModelFreezer(model)
    freezer.freeze()

    def thaw(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.current_epoch == 2:
            trainer.optimizer.add_param_group({"params": freezer.unfreeze(), "lr": 0.05})

    callbacks = [LambdaCallback(on_train_epoch_begin=thaw)] if where == "in a run" else []
    trainer = make_trainer(model, SGD(freezer.get_trainable_parameters(), lr=0.1), callbacks, seed=1)
    num_processes = trainer.accelerator.num_processes
    arguments: dict[str, Any] = {"per_device_batch_size": 8 // num_processes}
    if where == "in a run":
        trainer.train(make_data(24), 3, **arguments)
    else:
        trainer.train(make_data(24), 1, **arguments)
        trainer.optimizer.add_param_group({"params": freezer.unfreeze(), "lr": 0.05})
        trainer.train(make_data(24), 2, reset_run_history=False, **arguments)
    return weights_of(trainer)


@pytest.mark.parametrize("where", ["in a run", "between runs"])
def test_unfrozen_layers_are_trained_alike_on_all_processes(where: str) -> None:
    [alone] = run_processes(_thaw, 1, where)
    first, second = run_processes(_thaw, 2, where)
    assert_equal_weights(first, second)
    assert relative_error(first, alone) < 1e-6
    assert not torch.equal(first["0.weight"], make_mlp()[0].weight)


def _thaw_within_an_epoch() -> str:
    model = make_mlp()
    freezer = ModelFreezer(model)
    freezer.freeze()
    thaw = LambdaCallback(on_train_update_end=lambda trainer, **_: freezer.unfreeze())
    trainer = make_trainer(model, SGD(model.parameters(), lr=0.1), [thaw])
    try:
        trainer.train(make_data(24), 1, per_device_batch_size=4)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_unfreezing_within_an_epoch_does_not_go_unnoticed() -> None:
    for message in run_processes(_thaw_within_an_epoch, 2):
        assert message.startswith("parameters were frozen or unfrozen in the middle of an epoch")


def _use_a_frozen_model() -> tuple[float, Tensor, float]:
    trainer = make_trainer(make_mlp().requires_grad_(False))
    loss = trainer.evaluate(make_data(5))["evaluation_loss"]
    outputs = trainer.predict(make_data(5))
    trainer.get_model().requires_grad_(True)
    trainer.train(make_data(8), 1, per_device_batch_size=4)
    return loss, outputs, float(trainer.get_model()[0].weight.detach().sum())


def test_a_frozen_model_evaluates_and_predicts_and_may_be_trained_later() -> None:
    [alone] = run_processes(_use_a_frozen_model, 1)
    first, second = run_processes(_use_a_frozen_model, 2)
    assert first[0] == second[0] == pytest.approx(alone[0], rel=1e-6)
    assert torch.equal(first[1], second[1]) and torch.allclose(first[1], alone[1])
    assert first[2] == second[2]


# --------------------------------------------------------------------------------------------------------------------
# Mixed precision and what is left behind. In processes of their own: precision is a property of the process.
# --------------------------------------------------------------------------------------------------------------------


def _train_in_bf16() -> dict[str, Any]:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    model, dtypes = make_mlp(), []
    hook = model[0].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    own_keys = set(vars(model))
    trainers = [make_trainer(model, SGD_01, seed=1) for _ in range(2)]
    for trainer in trainers:
        trainer.train(make_data(8), 1, make_data(4))
    trainers[0].predict(make_data(4))
    hook.remove()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(trainers[0].get_model())))
    return {
        "precision": trainers[1].run_config.mixed_precision,
        "dtypes": set(dtypes),
        "left on the model": set(vars(model)) - own_keys,
        "output": model(torch.ones(1, 4)).dtype,
        "outputs": trainers[0].predict(make_data(4)).dtype,
        "copy": copied(torch.ones(1, 4)).dtype,
    }


@pytest.mark.parametrize("num_processes", [0, 1, 2])
def test_bf16_is_used_by_every_trainer_and_the_model_is_left_as_it_was(num_processes: int) -> None:
    for result in run_processes(_train_in_bf16, num_processes):
        assert result == {
            "precision": "bf16",
            "dtypes": {torch.bfloat16},
            "left on the model": set(),
            "output": torch.float32,
            "outputs": torch.float32,
            "copy": torch.float32,
        }


def _fail_in_bf16() -> set[str]:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    model = make_mlp()
    own_keys = set(vars(model))
    trainer = make_trainer(model)
    for create_scheduler_fn in (lambda optimizer: 1 / 0, None):
        callback = LambdaCallback(on_train_step_end=lambda trainer, **_: 1 / 0)
        trainer.callback_handler.add_callback(callback)
        with pytest.raises(ZeroDivisionError):
            trainer.train(make_data(8), 1, create_scheduler_fn=create_scheduler_fn)
    return set(vars(model)) - own_keys


def test_also_a_failed_run_leaves_the_model_as_it_was() -> None:
    assert run_processes(_fail_in_bf16, 1) == [set()]


def test_a_ready_accelerator_is_used_and_its_settings_are_honoured_and_put_back() -> None:
    accelerator = Accelerator(gradient_accumulation_steps=3)
    trainer = make_trainer(accelerator=accelerator)
    trainer.train(make_data(24), 1, per_device_batch_size=4)
    assert trainer.accelerator is accelerator
    assert trainer.run_config.gradient_accumulation_steps == 3
    assert (trainer.num_steps, trainer.num_updates) == (6, 2)
    assert accelerator.gradient_accumulation_steps == 3
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps is 2 in train\(\) and 3 in Accelerate's config"):
        trainer.train(make_data(24), 1, gradient_accumulation_steps=2)


def test_models_prepared_by_the_user_are_not_prepared_again() -> None:
    accelerator = Accelerator()
    model = make_mlp()
    prepared, optimizer = accelerator.prepare(model, SGD(model.parameters(), lr=0.1))
    trainer = make_trainer(prepared, optimizer, accelerator=accelerator)
    trainer.train(make_data(8), 2)
    trainer.evaluate(make_data(8))
    assert trainer.model is prepared and trainer.optimizer is optimizer
    assert len(accelerator._models) == len(accelerator._optimizers) == 1


def test_split_batches_is_refused() -> None:
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    with pytest.raises(
        ValueError, match="split_batches=True, but per_device_batch_size counts the samples of one proc"
    ):
        make_trainer(accelerator=accelerator).train(make_data(8), 1)


def _note_exchanges() -> list[bool]:
    exchanges: list[bool] = []

    class Noting(Trainer):
        def backward_step(self, loss: Tensor) -> None:
            exchanges.append(self.model.require_backward_grad_sync)
            super().backward_step(loss)

    trainer = Noting(make_mlp(), nn.CrossEntropyLoss(), SGD_01, None)
    trainer.train(make_data(40), 1, per_device_batch_size=4, gradient_accumulation_steps=3)
    return exchanges


def test_processes_exchange_gradients_once_per_update() -> None:
    assert run_processes(_note_exchanges, 2) == [[False, False, True, False, True]] * 2


# --------------------------------------------------------------------------------------------------------------------
# torch.compile
# --------------------------------------------------------------------------------------------------------------------


def _train_compiled_in_bf16(way: str) -> dict[str, Any]:
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    module = make_mlp()
    model: Any = module
    if way == "wrapped":
        model = torch.compile(module, backend="eager")
    elif way == "in place":
        module.compile(backend="eager")
    inputs = torch.ones(2, 4)
    before = model(inputs)
    trainer = make_trainer(model, SGD_01, accelerator=accelerator, seed=1)
    found: dict[str, Any] = {"before": before.dtype, "after": [], "weights": [], "losses": []}
    for _ in range(2):
        trainer.train(make_data(24), 2, make_data(8), per_device_batch_size=4)
        found["weights"].append(weights_of(trainer))
        with torch.no_grad():
            outputs, plain = model(inputs), copy.deepcopy(module[3])(module[1](module[0](inputs)))
        found["after"].append((outputs.dtype, torch.equal(outputs, plain)))
        found["losses"] += trainer.run_history.get_metric_values("train_loss_epoch")
    assert trainer.get_model() is module
    assert trainer.get_model(keep_torch_compile=True) is model
    found["predicted"] = trainer.predict(make_data(4)).dtype
    found["own output"] = model(inputs).dtype
    return found


def _train_compiled_in_three_ways() -> dict[str, Any]:
    from accelerate.state import AcceleratorState

    found = {}
    for way in ("not compiled", "in place", "wrapped"):
        AcceleratorState._reset_state(reset_partial_state=False)
        found[way] = _train_compiled_in_bf16(way)
    return found


@pytest.mark.parametrize("num_processes", [0, 2])
def test_a_compiled_model_trains_in_bf16_and_is_left_in_the_users_precision(num_processes: int) -> None:
    for found in run_processes(_train_compiled_in_three_ways, num_processes):
        for result in found.values():
            assert result["before"] == result["own output"] == result["predicted"] == torch.float32
            assert result["after"] == [(torch.float32, True)] * 2  # to the bit, so without autocast
        wrapped, in_place, plain = found["wrapped"], found["in place"], found["not compiled"]
        for number in range(2):
            assert_equal_weights(wrapped["weights"][number], in_place["weights"][number])
            assert relative_error(wrapped["weights"][number], plain["weights"][number]) < 1e-3
        assert relative_error(wrapped["weights"][1], wrapped["weights"][0]) > 1e-3
        assert wrapped["losses"] == in_place["losses"]


# --------------------------------------------------------------------------------------------------------------------
# A gradient scaler, which torch has for the CPU as well
# --------------------------------------------------------------------------------------------------------------------


class CountedSchedule:
    """Lets the learning rate be, and counts."""

    def __init__(self, optimizer: Any) -> None:
        self.num_steps = 0

    def step(self) -> None:
        self.num_steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_steps = state_dict["num_steps"]


OPTIMIZERS = {
    "SGD": SGD_01,
    "fused AdamW": partial(AdamW, lr=0.01, fused=True),
    "AdamW": partial(AdamW, lr=0.01, fused=False),
}


@pytest.mark.parametrize("bad", [[], [2], [0], [5], [1, 2]])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_that_the_scaler_leaves_out_is_counted_and_the_schedule_waits(name: str, bad: list[int]) -> None:
    num_batches, size = 6, 4
    inputs, targets = make_data(num_batches * size).tensors
    weights = torch.ones(num_batches * size)
    weights[[batch * size + 1 for batch in bad]] = float("inf")

    class Marking(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> Tensor:
            inputs, targets, weights = batch
            losses = nn.functional.cross_entropy(self.model(inputs), targets, reduction="none")
            return (losses * weights).mean()

    def train(indices: list[int], scale: float | None) -> tuple[Trainer, list[int]]:
        accelerator = Accelerator(cpu=True)
        if scale is not None:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        updates: list[int] = []
        note = LambdaCallback(on_train_update_end=lambda trainer, **_: updates.append(trainer.num_steps))
        trainer = Marking(make_mlp(), None, OPTIMIZERS[name], [note], accelerator=accelerator)
        rows = [batch * size + row for batch in indices for row in range(size)]
        trainer.train(
            TensorDataset(inputs[rows], targets[rows], weights[rows]),
            1,
            per_device_batch_size=size,
            train_dataloader_kwargs={"shuffle": False},
            create_scheduler_fn=CountedSchedule,
        )
        return trainer, updates

    trainer, updates = train(list(range(num_batches)), 2.0**10)
    good = [batch for batch in range(num_batches) if batch not in bad]
    assert trainer.num_skipped_updates == len(bad)
    assert trainer.num_updates == trainer.scheduler.num_steps == len(good)
    assert trainer.num_steps == num_batches
    assert updates == [batch + 1 for batch in good]
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (10 - len(bad))
    # What was left out has moved nothing: the scales are powers of 2, which change no digit.
    alone, _ = train(good, None)
    assert relative_error(weights_of(trainer), weights_of(alone)) < 1e-6
    assert all(value.isfinite().all() for value in weights_of(trainer).values())


# --------------------------------------------------------------------------------------------------------------------
# Devices
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("cuda", "cuda:0", True),
        ("cuda:1", "cuda:1", True),
        ("cuda:0", "cuda:1", False),
        ("cpu", "cpu:0", True),
        ("cpu:0", "cpu:1", True),
        ("cuda", "cpu", False),
        ("cuda:0", "cpu:0", False),
        ("mps", "mps:0", True),
        ("meta", "cpu", False),
    ],
)
def test_devices_are_the_same_whether_their_number_is_said_or_not(one: str, other: str, is_same: bool) -> None:
    assert _is_same_device(torch.device(one), torch.device(other)) is is_same
    assert _is_same_device(torch.device(other), torch.device(one)) is is_same


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "meta"])
def test_a_loss_must_be_on_the_device_of_the_run(device: str) -> None:
    accelerator = Accelerator(cpu=True)
    loader = shard_dataloader(torch.utils.data.DataLoader(make_data(4), batch_size=2), accelerator, 0)
    data_pass = DataPass("evaluating", loader, accelerator, None, None)
    for _ in data_pass.iterate(0):
        loss = torch.tensor(2.0, device=torch.device(device))
        if device == "meta":
            with pytest.raises(BatchError, match="returned a loss on meta, but the run is on cpu"):
                data_pass.account({"loss": loss})
        else:
            assert data_pass.account({"loss": loss}) == {"loss": loss, "batch_size": 2}
    assert data_pass.mean_loss_so_far() == (None if device == "meta" else 2.0)


class CountingSGD(SGD):
    num_calls = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.num_calls += 1
        super().zero_grad(set_to_none)


@pytest.mark.parametrize("is_patched", [False, True])
def test_an_optimizers_own_way_to_forget_gradients_is_taken(is_patched: bool) -> None:
    model = make_mlp()
    optimizer = CountingSGD(model.parameters(), lr=0.1)
    if is_patched:  # on the instance alone
        optimizer = SGD(model.parameters(), lr=0.1)
        optimizer.num_calls = 0
        original = optimizer.zero_grad

        def zero_grad() -> None:
            optimizer.num_calls += 1
            original()

        optimizer.zero_grad = zero_grad
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=[])
    trainer.train(make_data(8), 1, per_device_batch_size=2)
    assert optimizer.num_calls == 4 + 1  # and once when the run begins
    assert all(parameter.grad is None for parameter in model.parameters())

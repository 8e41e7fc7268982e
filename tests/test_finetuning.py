"""Freezing and unfreezing by groups of layers, alone and in training runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from pytorch_accelerated import Trainer
from pytorch_accelerated.finetuning import ModelFreezer
from tests.support import make_data, make_mlp, relative_error, run_processes, weights_of


def make_convnet() -> nn.Module:
    """Return a model of four groups, two with batch norms (one of them inside), one without parameters."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)
    )


class Classifier(nn.Module):
    """Owns a parameter itself, and has children that own some: the projection of the attention is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), 1, 4), x[:, None]], dim=1)
        out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0][:, 0])
        return out


def frozen_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def eval_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if not module.training]


def make_line(num_layers: int = 5) -> nn.Module:
    return nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(num_layers)))


# --------------------------------------------------------------------------------------------------------------------
# Groups
# --------------------------------------------------------------------------------------------------------------------


def test_groups_are_the_children_in_order() -> None:
    model = make_convnet()
    groups = ModelFreezer(model).get_layer_groups()
    assert [group.layer_group_idx for group in groups] == [0, 1, 2, 3]
    assert [group.name for group in groups] == ["0", "1", "2", "3"]
    assert all(group.module is module for group, module in zip(groups, model.children(), strict=True))
    assert not any(group.is_frozen for group in groups)


def test_parameters_of_the_model_itself_are_the_first_group() -> None:
    model = Classifier()
    groups = ModelFreezer(model).get_layer_groups()
    assert [group.name for group in groups] == ["", "attention", "head"]
    assert groups[0].module is model
    model.token.requires_grad_(False)
    assert [group.is_frozen for group in ModelFreezer(model).get_layer_groups()] == [True, False, False]


def test_a_lone_child_is_opened() -> None:
    model = make_convnet()
    freezer = ModelFreezer(nn.Sequential(nn.Sequential(model)))
    assert [group.module for group in freezer.get_layer_groups()] == list(model.children())
    freezer.freeze()
    assert frozen_names(model) == ["0.0.weight", "0.0.bias"]


def test_a_lone_child_is_not_opened_where_nothing_is_inside_or_the_wrapper_owns_something() -> None:
    layer = nn.Linear(2, 2)
    [group] = ModelFreezer(nn.Sequential(nn.Sequential(layer))).get_layer_groups()
    assert (group.name, group.module) == ("0", layer)
    wrapper = nn.Sequential(make_line())
    wrapper.scale = nn.Parameter(torch.ones(()))
    assert [group.name for group in ModelFreezer(wrapper).get_layer_groups()] == ["", "0"]


def test_a_wrapped_model_with_parameters_of_its_own() -> None:
    model = Classifier()
    freezer = ModelFreezer(nn.Sequential(model))
    assert [group.name for group in freezer.get_layer_groups()] == ["", "attention", "head"]
    freezer.freeze(0, 0, set_modules_as_eval=True)
    assert frozen_names(model) == ["token"]
    assert eval_names(model) == []


# --------------------------------------------------------------------------------------------------------------------
# Freezing
# --------------------------------------------------------------------------------------------------------------------


def test_freezes_all_but_the_last_group() -> None:
    model = make_line()
    freezer = ModelFreezer(model)
    freezer.freeze()
    assert frozen_names(model) == ["0.weight", "1.weight", "2.weight", "3.weight"]
    assert [group.is_frozen for group in freezer.get_layer_groups()] == [True, True, True, True, False]
    assert freezer.get_trainable_parameters() == [model[4].weight]  # type: ignore[index]
    assert eval_names(model) == []


@pytest.mark.parametrize(
    ("first", "last", "groups"),
    [
        (0, 0, [0]),
        (1, 3, [1, 2, 3]),
        (3, 1, [1, 2, 3]),
        (-1, -1, [4]),
        (-3, -1, [2, 3, 4]),
        (-1, -3, [2, 3, 4]),
        (-2, 0, [0, 1, 2, 3]),
        (0, -1, [0, 1, 2, 3, 4]),
        (-5, 4, [0, 1, 2, 3, 4]),
        (2, -2, [2, 3]),
    ],
)
def test_both_ends_of_a_range_belong_to_it(first: int, last: int, groups: list[int]) -> None:
    model = make_line()
    freezer = ModelFreezer(model)
    freezer.freeze(first, last)
    assert frozen_names(model) == [f"{group}.weight" for group in groups]
    others = [f"{group}.weight" for group in range(5) if group not in groups]
    freezer.freeze(0, -1)
    thawed = freezer.unfreeze(first, last)
    assert frozen_names(model) == others
    assert thawed == [model[group].weight for group in groups]  # type: ignore[index]


@pytest.mark.parametrize("call", ["freeze", "unfreeze"])
@pytest.mark.parametrize(("first", "last", "wrong"), [(0, 3, 3), (-4, 0, -4), (7, -9, 7)])
def test_there_is_no_such_group(call: str, first: int, last: int, wrong: int) -> None:
    model = Classifier()
    with pytest.raises(IndexError) as caught:
        getattr(ModelFreezer(model), call)(first, last)
    assert str(caught.value) == f"there is no layer group {wrong}; the model has 3: ['', 'attention', 'head']."
    assert frozen_names(model) == []


def test_parameters_that_inner_modules_own_are_frozen() -> None:
    model = Classifier()
    ModelFreezer(model).freeze()
    assert frozen_names(model) == [
        "token",
        "attention.in_proj_weight",
        "attention.in_proj_bias",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
    ]


def test_batch_norms_are_spared_unless_asked_for() -> None:
    model = make_convnet()
    ModelFreezer(model).freeze()
    assert frozen_names(model) == ["0.0.weight", "0.0.bias"]
    assert [group.is_frozen for group in ModelFreezer(model).get_layer_groups()] == [False] * 4
    freezer = ModelFreezer(model, freeze_batch_norms=True)
    freezer.freeze()
    assert frozen_names(model) == ["0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias", "1.weight", "1.bias"]
    # A group without parameters has none that is frozen.
    assert [group.is_frozen for group in freezer.get_layer_groups()] == [True, True, False, False]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_batch_norms_of_any_kind_are_spared(norm: Any) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), norm(2)), nn.LayerNorm(2), nn.Linear(2, 2))
    ModelFreezer(model).freeze()
    assert frozen_names(model) == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize("freeze_batch_norms", [False, True])
def test_eval_mode_is_set_as_well_as_frozen(freeze_batch_norms: bool) -> None:
    """The published library froze nothing where it set the modules to evaluation mode."""
    model = make_convnet()
    ModelFreezer(model, freeze_batch_norms).freeze(set_modules_as_eval=True)
    assert frozen_names(model)[:2] == ["0.0.weight", "0.0.bias"]
    assert len(frozen_names(model)) == (6 if freeze_batch_norms else 2)
    assert eval_names(model) == ["0", "0.0", "0.1", "0.2", "1", "2"]


def test_eval_mode_leaves_the_rest_of_a_resting_model_in_training_mode() -> None:
    model = make_convnet().eval()
    ModelFreezer(model).freeze(to_index=0)
    assert len(eval_names(model)) == 8  # as found
    ModelFreezer(model).freeze(to_index=0, set_modules_as_eval=True)
    assert eval_names(model) == ["0", "0.0", "0.1", "0.2"]


@pytest.mark.parametrize("set_modules_as_training", [True, False])
def test_unfreezes_whatever_the_mode(set_modules_as_training: bool) -> None:
    model = make_convnet()
    freezer = ModelFreezer(model, freeze_batch_norms=True)
    freezer.freeze(0, -1, set_modules_as_eval=True)
    thawed = freezer.unfreeze(set_modules_as_training=set_modules_as_training)
    assert frozen_names(model) == []
    assert [id(parameter) for parameter in thawed] == [id(parameter) for parameter in model.parameters()]
    assert eval_names(model) == ([] if set_modules_as_training else ["0", "0.0", "0.1", "0.2", "1", "2", "3"])


def test_unfreezing_returns_only_what_was_frozen() -> None:
    model = make_convnet()
    freezer = ModelFreezer(model)
    freezer.freeze()
    assert [id(p) for p in freezer.unfreeze()] == [id(p) for p in model[0][0].parameters()]  # type: ignore[index]
    assert freezer.unfreeze() == []


def test_a_shared_parameter_is_returned_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    model[0].weight = model[1].weight
    freezer = ModelFreezer(model)
    freezer.freeze()
    assert freezer.unfreeze() == [model[0].weight]


# --------------------------------------------------------------------------------------------------------------------
# In training runs
# --------------------------------------------------------------------------------------------------------------------


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_thawed_parameters_join_the_optimizer_and_move(weight_decay: float) -> None:
    model, data = Classifier(), make_data(12)
    freezer = ModelFreezer(model)
    freezer.freeze()
    optimizer = SGD(freezer.get_trainable_parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=None)
    weights = [weights_of(trainer)]
    for thawed in ((), (1, 1), (0, 0)):
        if thawed:
            optimizer.add_param_group({"params": freezer.unfreeze(*thawed)})
        trainer.train(data, 1, data, per_device_batch_size=4)
        weights.append(weights_of(trainer))
    head = ["head.weight", "head.bias"]
    attention = [name for name in weights[0] if name.startswith("attention")]
    assert moved(weights[0], weights[1]) == head
    assert moved(weights[1], weights[2]) == attention + head
    assert moved(weights[2], weights[3]) == ["token", *attention, *head]
    assert len(optimizer.param_groups) == 3


def test_an_optimizer_of_all_parameters_leaves_those_that_are_frozen() -> None:
    model, data = make_mlp(), make_data(12)
    freezer = ModelFreezer(model)
    freezer.freeze()
    trainer = Trainer(model, nn.CrossEntropyLoss(), SGD(model.parameters(), lr=0.1, weight_decay=0.1), callbacks=None)
    weights = [weights_of(trainer)]
    trainer.train(data, 1)
    weights.append(weights_of(trainer))
    freezer.unfreeze()
    trainer.train(data, 1)
    weights.append(weights_of(trainer))
    freezer.freeze()
    trainer.train(data, 1)
    weights.append(weights_of(trainer))
    assert moved(weights[0], weights[1]) == ["3.weight", "3.bias"]
    assert moved(weights[1], weights[2]) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert moved(weights[2], weights[3]) == ["3.weight", "3.bias"]


@pytest.mark.parametrize("begins_in_training_mode", [True, False])
@pytest.mark.parametrize("set_modules_as_eval", [True, False])
def test_statistics_stay_where_the_modules_are_in_eval_mode(
    begins_in_training_mode: bool, set_modules_as_eval: bool
) -> None:
    model, data = make_convnet().train(begins_in_training_mode), make_data(12)
    freezer = ModelFreezer(model, freeze_batch_norms=True)
    freezer.freeze(set_modules_as_eval=set_modules_as_eval)
    trainer = Trainer(model, nn.CrossEntropyLoss(), SGD(model.parameters(), lr=0.1), callbacks=None)
    before = weights_of(trainer)
    trainer.train(data, 2, data, per_device_batch_size=4)  # evaluates in between
    statistics = [name for name in before if name.rpartition(".")[2] in ("running_mean", "running_var")]
    changed = moved(before, weights_of(trainer))
    assert {"3.weight", "3.bias"} <= set(changed)
    assert not set(changed) & set(frozen_names(model))
    assert bool(set(statistics) & set(changed)) is not set_modules_as_eval
    assert model.training


def train_in_stages(freezes_later: bool, batch_size: int) -> dict[str, Tensor]:
    """Freeze or unfreeze between two runs, and return the weights."""
    model, data = make_mlp(), make_data(16)
    freezer = ModelFreezer(model)
    if not freezes_later:
        freezer.freeze()
    optimizer = SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=None)
    kwargs = {"shuffle": False}
    trainer.train(data, 1, per_device_batch_size=batch_size, train_dataloader_kwargs=kwargs)
    (freezer.freeze if freezes_later else freezer.unfreeze)()
    trainer.train(data, 2, per_device_batch_size=batch_size, train_dataloader_kwargs=kwargs)
    return weights_of(trainer)


@pytest.mark.parametrize("freezes_later", [False, True])
def test_two_processes_do_what_one_does(freezes_later: bool) -> None:
    alone = train_in_stages(freezes_later, 4)
    first, second = run_processes(train_in_stages, 2, freezes_later, 2, timeout=60)
    assert moved(first, second) == []
    assert relative_error(first, alone) < 1e-6

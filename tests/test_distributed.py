"""Gathering, agreeing, taking turns, in two real processes."""

from __future__ import annotations

import time
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from pytorch_accelerated import Trainer, notebook_launcher
from pytorch_accelerated.distributed import (
    any_process,
    broadcast_from_main,
    concatenate,
    gather,
    local_main_process_only,
    main_process_first,
    main_process_only,
    reduce_sum,
)
from tests.support import make_data, make_mlp, run_processes

Point = namedtuple("Point", "x y")


def _gather_ragged() -> dict[str, Any]:
    accelerator = Accelerator()
    rank = accelerator.process_index
    ints = torch.arange(3 - 2 * rank) - 1  # [-1, 0, 1] and [-1]
    empty = torch.ones(2 * rank, 2)
    return {
        "ints": gather(accelerator, ints),
        "values like the padding": gather(accelerator, torch.zeros(1 + rank, 2)),
        "empty on one": gather(accelerator, empty),
        "empty on all": gather(accelerator, torch.ones(0, 2)),
        "bool": gather(accelerator, torch.tensor([True, False])[: 1 + rank]),
        "bf16": gather(accelerator, torch.full((1 + rank,), rank + 0.5, dtype=torch.bfloat16)),
        "scalar": gather(accelerator, torch.tensor(float(rank))),
        "padded": gather(accelerator, torch.ones(1, 2 + rank), padding_value=-100),
        "nested": gather(accelerator, {"a": [torch.ones(1 + rank), Point(torch.zeros(1), torch.ones(1 + rank))]}),
        "objects": gather(accelerator, ["ab", "cde"][: 1 + rank]),
        "only from one": gather(accelerator, torch.full((2,), rank), contributes=rank == 1),
    }


def test_ragged_tensors_are_gathered_whole_and_in_order() -> None:
    for got in run_processes(_gather_ragged, 2):
        assert got["ints"].tolist() == [-1, 0, 1, -1]
        assert torch.equal(got["values like the padding"], torch.zeros(3, 2))
        assert torch.equal(got["empty on one"], torch.ones(2, 2))
        assert got["empty on all"].shape == (0, 2)
        assert got["bool"].tolist() == [True, True, False]
        assert got["bf16"].tolist() == [0.5, 1.5, 1.5] and got["bf16"].dtype == torch.bfloat16
        assert got["scalar"].tolist() == [0.0, 1.0]
        assert got["padded"].tolist() == [[1, 1, -100], [1, 1, 1]]
        ones, point = got["nested"]["a"]
        assert type(point) is Point and point.x.tolist() == [0, 0]
        assert ones.tolist() == point.y.tolist() == [1, 1, 1]
        assert got["objects"] == ["ab", "ab", "cde"]
        assert got["only from one"].tolist() == [1, 1]


def _gather_what_does_not_fit(kind: str) -> str:
    accelerator = Accelerator()
    tensor = (
        torch.ones(1, 2 + accelerator.process_index)
        if kind == "sizes"
        else torch.ones([1] * (1 + accelerator.process_index))
    )
    try:
        gather(accelerator, tensor, padding_value=None if kind == "sizes" else 0)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(("kind", "shapes"), [("sizes", "[(1, 2), (1, 3)]"), ("dimensions", "[(1,), (1, 1)]")])
def test_tensors_that_do_not_fit_are_an_error_on_all_processes(kind: str, shapes: str) -> None:
    first, second = run_processes(_gather_what_does_not_fit, 2, kind)
    assert first == second
    assert f"gather got tensors that do not fit together, by process: {shapes}" in first


def _agree() -> list[Any]:
    accelerator = Accelerator()
    rank = accelerator.process_index
    return [
        any_process(accelerator, rank == 1),
        any_process(accelerator, False),
        broadcast_from_main(accelerator, {"rank": rank}),
        reduce_sum(accelerator, torch.tensor([1.0, rank])).tolist(),
    ]


def test_processes_agree() -> None:
    assert run_processes(_agree, 2) == [[True, False, {"rank": 0}, [2.0, 1.0]]] * 2


def _take_turns(folder: str) -> list[Any]:
    accelerator = Accelerator()
    order = []
    with main_process_first(accelerator):
        if accelerator.is_main_process:
            time.sleep(0.3)
            (Path(folder) / "made").touch()
        order.append((Path(folder) / "made").exists())
    calls = []

    @main_process_only
    def write(name: str) -> str:
        calls.append(name)
        return name

    @local_main_process_only
    def fail() -> None:
        raise KeyError("disk full")

    returned = write("x")
    error = None
    try:
        fail()
    except KeyError as caught:
        error = str(caught)
    try:
        with main_process_first(accelerator, local=True):
            if accelerator.is_main_process:
                raise KeyError("again")
    except KeyError as caught:
        error = f"{error} {caught}"
    # Nobody is left waiting for anybody, and the next collective is the same for all.
    return [order, calls, returned, error, any_process(accelerator, accelerator.process_index == 1)]


def test_taking_turns_survives_exceptions(tmp_path: Path) -> None:
    first, second = run_processes(_take_turns, 2, str(tmp_path))
    assert first == [[True], ["x"], "x", "'disk full' 'again'", True]
    assert second == [[True], [], None, None, True]


def test_outputs_that_cannot_be_joined_say_why() -> None:
    with pytest.raises(ValueError, match=r"their shapes after the first dimension are \[\(2,\), \(3,\)\]"):
        concatenate([torch.ones(1, 2), torch.ones(1, 3)])
    with pytest.raises(ValueError, match="there is nothing to join"):
        concatenate([])


def _use_conveniences() -> list[Any]:
    trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), None)
    trainer.train(make_data(8), 1)
    trainer.print(f"printed by {trainer.accelerator.process_index}")
    return [
        trainer.gather(torch.tensor([trainer.accelerator.process_index])).tolist(),
        type(trainer.model).__name__,
        type(trainer.get_model()).__name__,
        trainer.device.type,
        trainer.run_config.num_processes,
        trainer.run_config.is_distributed,
    ]


def test_conveniences_of_the_trainer() -> None:
    expected = [[0, 1], "DistributedDataParallel", "Sequential", "cpu", 2, True]
    assert run_processes(_use_conveniences, 2) == [expected] * 2


def test_one_process_pays_for_nothing() -> None:
    accelerator = Accelerator()
    tensor = torch.ones(2)
    assert reduce_sum(accelerator, tensor) is tensor
    assert gather(accelerator, tensor).data_ptr() == tensor.data_ptr()
    assert gather(accelerator, tensor, contributes=False).shape == (0,)


def test_the_notebook_launcher_is_accelerates() -> None:
    import accelerate

    assert notebook_launcher is accelerate.notebook_launcher

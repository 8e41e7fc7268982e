"""Weights in files that plain torch and safetensors read, and back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LambdaCallback, SaveTrainingStateCallback
from pytorch_accelerated.errors import CheckpointError, CheckpointMismatchError
from tests.resume_cases import Case, Kill
from tests.support import assert_equal_weights, make_data, make_mlp, run_processes, weights_of
from tests.test_checkpoint_resume import COMPARED, assert_same, finish


class Tied(nn.Module):
    """Shares one matrix between its two ends, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens))


def make_trainer(model: nn.Module | None = None, **kwargs: Any) -> Trainer:
    return Trainer(
        model or make_mlp(), nn.CrossEntropyLoss(), partial(AdamW, lr=0.1), kwargs.pop("callbacks", None), **kwargs
    )


@pytest.mark.parametrize("has_trained", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.bin"])
def test_plain_torch_and_safetensors_read_what_save_model_writes(name: str, has_trained: bool, tmp_path: Path) -> None:
    trainer = make_trainer()
    if has_trained:
        trainer.train(make_data(8), 1)
    path = tmp_path / "new" / name
    trainer.save_model(path)
    read = load_file(path) if name.endswith("safetensors") else torch.load(path, weights_only=True)
    assert_equal_weights(read, weights_of(trainer))
    make_mlp(seed=3).load_state_dict(read)
    again = make_trainer(make_mlp(seed=3))
    again.load_checkpoint(path)
    assert_equal_weights(weights_of(again), weights_of(trainer))
    assert [entry.name for entry in path.parent.iterdir()] == [name]


def wrapped_models() -> dict[str, Any]:
    regional = make_mlp()
    for number in (0, 3):
        regional[number] = torch.compile(regional[number], backend="eager")
    in_place = make_mlp()
    in_place.compile(backend="eager")
    return {
        "compiled": torch.compile(make_mlp(), backend="eager"),
        "regions compiled": regional,
        "compiled in place": in_place,
    }


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize("kind", list(wrapped_models()))
def test_names_are_those_of_the_module_however_it_is_compiled(kind: str, tmp_path: Path) -> None:
    trainer = make_trainer(wrapped_models()[kind])
    trainer.train(make_data(8), 1)
    trainer.save_model(tmp_path / "model.safetensors")
    read = load_file(tmp_path / "model.safetensors")
    plain = make_mlp(seed=3)
    plain.load_state_dict(read)
    again = make_trainer(wrapped_models()[kind])
    again.load_checkpoint(tmp_path / "model.safetensors")
    x = make_data(8)[:][0]
    with torch.no_grad():
        assert torch.equal(again.get_model()(x), plain(x))


def test_tied_weights_are_read_by_strict_loading(tmp_path: Path) -> None:
    trainer = Trainer(Tied(), None, callbacks=None)
    trainer.save_model(tmp_path / "tied.safetensors")
    read = load_file(tmp_path / "tied.safetensors")
    other = Tied()
    other.load_state_dict(read)
    assert torch.equal(other.head.weight, trainer.get_model().head.weight)  # type: ignore[union-attr]
    assert other.head.weight is other.embedding.weight


def save_in_processes(path: Path) -> Any:
    trainer = make_trainer(seed=0)
    trainer.train(make_data(16), 1, per_device_batch_size=4)
    assert isinstance(trainer.model, DistributedDataParallel)
    trainer.save_model(path)
    trainer.save_checkpoint(path.with_suffix(".pt"))
    other = make_trainer(make_mlp(seed=3))
    other.load_checkpoint(path.with_suffix(".pt"))
    return weights_of(trainer), weights_of(other)


def test_two_processes_write_one_file_that_one_process_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for own, other in run_processes(save_in_processes, 2, path):
        assert_equal_weights(own, load_file(path))
        assert_equal_weights(other, own)
    make_mlp().load_state_dict(load_file(path))


def save_sharded(path: Path) -> Any:
    # Accelerate shards on GPUs only; torch does it on the CPU as well (research/accelerate.md, 1.2).
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Linear"]
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    assert accelerator.distributed_type == DistributedType.FSDP
    trainer = make_trainer(accelerator=accelerator, callbacks=None)
    trainer.train(make_data(16), 1, per_device_batch_size=4)
    trainer.save_model(path)
    try:
        trainer.save_training_state(path.parent / "state")
    except CheckpointError as error:
        return str(error)
    return ""


def test_sharded_weights_are_put_together(tmp_path: Path) -> None:
    messages = run_processes(save_sharded, 2, tmp_path / "model.safetensors")
    assert all("under FSDP the state of the optimizer is spread over the processes" in text for text in messages)
    read = load_file(tmp_path / "model.safetensors")
    model = make_mlp()
    before = weights_of(make_trainer(make_mlp()))
    model.load_state_dict(read)
    assert not torch.equal(read["0.weight"], before["0.weight"])


def test_a_checkpoint_of_torch_has_the_optimizer_and_what_else_was_asked_for(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.train(make_data(8), 2, per_device_batch_size=4)
    path = tmp_path / "checkpoint.pt"
    trainer.save_checkpoint(path, {"note": "x"})
    read = torch.load(path, weights_only=True)
    assert set(read) == {"model_state_dict", "optimizer_state_dict", "note"}
    other = make_trainer(make_mlp(seed=3))
    other.load_checkpoint(path)
    assert_same(other.optimizer.optimizer.state_dict(), trainer.optimizer.optimizer.state_dict())
    without = make_trainer(make_mlp(seed=3))
    without.load_checkpoint(path, load_optimizer=False)
    without.train(make_data(8), 1)
    assert without.optimizer.optimizer.state_dict()["state"][0]["step"] == 1


def test_a_checkpoint_of_a_run_is_read_too(tmp_path: Path) -> None:
    trainer = make_trainer(callbacks=[SaveTrainingStateCallback(tmp_path)])
    trainer.train(make_data(8), 2, per_device_batch_size=4)
    [path] = tmp_path.iterdir()
    other = make_trainer(make_mlp(seed=3))
    other.load_checkpoint(path)
    assert_equal_weights(weights_of(other), weights_of(trainer))
    whole = make_trainer(make_mlp(seed=3))
    whole.load_training_state(tmp_path)
    assert_equal_weights(weights_of(whole), weights_of(trainer))
    assert whole.run_history.state_dict() == trainer.run_history.state_dict()
    assert_same(whole.optimizer.optimizer.state_dict(), trainer.optimizer.optimizer.state_dict())
    assert whole.evaluate(make_data(8)) == trainer.evaluate(make_data(8))


def test_saving_the_state_at_a_moment_of_ones_own(tmp_path: Path) -> None:
    def save(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == 3:
            assert trainer.save_training_state(tmp_path / "mine") == tmp_path / "mine"

    trainer = make_trainer(callbacks=[LambdaCallback(on_train_update_end=save)])
    trainer.train(make_data(20), 2, per_device_batch_size=4)
    resumed = make_trainer()
    resumed.train(make_data(20), 2, per_device_batch_size=4, resume_from=tmp_path / "mine")
    assert_equal_weights(weights_of(resumed), weights_of(trainer))
    with pytest.raises(CheckpointError, match="is there already, and a checkpoint never replaces another"):
        trainer.save_training_state(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="there is no training run whose state could be saved"):
        make_trainer().save_training_state(tmp_path / "other")


INSIDE = ["on_train_step_begin", "on_train_step_end", "on_optimizer_step_begin", "on_train_epoch_begin"]


@pytest.mark.parametrize("event", INSIDE)
def test_saving_the_state_inside_an_update_is_refused(event: str, tmp_path: Path) -> None:
    """At the beginning of an epoch, too, if it is the one that a run goes on in."""

    def save(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == 3 and not trainer.training_run.is_stopped:
            trainer.save_training_state(tmp_path / "mine")

    saver = SaveTrainingStateCallback(tmp_path / "state", save_every_n_updates=3)
    make_trainer(callbacks=[saver]).train(make_data(20), 1, per_device_batch_size=4)
    first = min((tmp_path / "state").iterdir())
    trainer = make_trainer(callbacks=[LambdaCallback(**{event: save})])
    with pytest.raises(CheckpointError, match="save_training_state was called inside an update, or before a resumed"):
        trainer.train(make_data(20), 1, per_device_batch_size=4, resume_from=first)
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    "event",
    ["on_train_update_end", "on_train_epoch_begin", "on_train_epoch_end", "on_eval_step_end", "on_train_run_end"],
)
def test_saving_the_state_between_updates_at_any_event_is_exact(event: str, tmp_path: Path) -> None:
    places: list[Path] = []

    def save(trainer: Trainer, **kwargs: Any) -> None:
        places.append(trainer.save_training_state(tmp_path / f"{len(places)}"))

    whole = make_trainer(callbacks=[LambdaCallback(**{event: save})])
    whole.train(make_data(20), 2, make_data(8), per_device_batch_size=4)
    assert places
    for place in places:
        resumed = make_trainer()
        resumed.train(make_data(20), 2, make_data(8), per_device_batch_size=4, resume_from=place)
        assert_equal_weights(weights_of(resumed), weights_of(whole))
        for name in ("train_loss_epoch", "eval_loss_epoch"):
            values = [trainer.run_history.get_metric_values(name) for trainer in (resumed, whole)]
            assert values[0] == values[1], (event, place, name)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_weights_of_another_model_are_refused_and_nothing_changes(name: str, tmp_path: Path) -> None:
    make_trainer().save_model(tmp_path / name)
    other = make_trainer(make_mlp(outputs=5))
    before = weights_of(other)
    with pytest.raises(CheckpointMismatchError, match=r"3.weight has shape \(3, 8\) there and \(5, 8\) in the model"):
        other.load_checkpoint(tmp_path / name)
    assert_equal_weights(weights_of(other), before)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer()
    with pytest.raises(CheckpointError, match="there is no file"):
        trainer.load_checkpoint(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no")
    (tmp_path / "text.safetensors").write_text("no")
    for name in ("text.pt", "text.safetensors"):
        with pytest.raises(CheckpointError, match=rf"{name} (is damaged|cannot be read)"):
            trainer.load_checkpoint(tmp_path / name)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds no state_dict, but list"):
        trainer.load_checkpoint(tmp_path / "list.pt")
    with pytest.raises(ValueError, match="files of safetensors hold weights alone"):
        trainer.save_checkpoint(tmp_path / "x.safetensors", save_optimizer=True)
    with pytest.raises(TypeError, match=r"note.* is of type PosixPath"):
        trainer.save_checkpoint(tmp_path / "x.pt", {"note": tmp_path})


def test_an_interrupted_replacement_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    make_trainer().save_model(path)
    before = path.read_bytes()

    class Unwritable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("odd", torch.empty(3, dtype=torch.complex128))

    with pytest.raises(CheckpointError, match=r"odd has the type torch\.complex128"):
        Trainer(Unwritable(), None, callbacks=None).save_model(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [Case(mixed_precision="bf16"), Case(is_compiled=True), Case(accumulation=3)],
    ids=["bf16", "compiled", "window"],
)
def test_killed_and_run_again_it_ends_the_same(case: Case, tmp_path: Path) -> None:
    """In bf16, with a compiled model, and inside of an accumulation window."""
    expected = finish(case, 1, None, tmp_path / "expected")
    for kill in (Kill("loss", 8), Kill("eval_loss", 5)):
        assert finish(case, 1, tmp_path, tmp_path / "result", kill) is None
    resumed = finish(case, 1, tmp_path, tmp_path / "result")
    for name in COMPARED:
        assert_same(resumed[0][name], expected[0][name], name)

"""Weights, and the optimizer, in one file that other programs read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from pytorch_accelerated import distributed
from pytorch_accelerated.checkpoint import files, weights
from pytorch_accelerated.engine import raw_optimizer
from pytorch_accelerated.errors import CheckpointError, CheckpointMismatchError

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

MODEL_KEY, OPTIMIZER_KEY = "model_state_dict", "optimizer_state_dict"
"""What the published library calls them, too."""

METADATA_KEY = "metadata"


def whole_weights(trainer: Trainer) -> dict[str, Any]:
    """Return the weights under the names of the user's module, put together where processes hold parts. Collective."""
    if not distributed.is_sharded(trainer.accelerator):
        return weights.weights_of(trainer.get_model())
    # The other processes get nothing, or a part.
    state: Mapping[str, Any] = trainer.accelerator.get_state_dict(trainer.model)
    return {weights.clean_name(name): value for name, value in state.items()}


def save_portable(
    trainer: Trainer,
    path: Path,
    others: Mapping[str, Any] | None,
    save_optimizer: bool | None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save weights and, in a file of torch, the optimizer; see ``Trainer.save_checkpoint``. Collective.

    Args:
        trainer: whose weights they are.
        path: the file.
        others: what else a file of torch is to hold.
        save_optimizer: None to save it where the file can hold it.
        metadata: what to note about the weights, in either kind of file.
    """
    is_torch = path.suffix != weights.SAFETENSORS
    if not is_torch and (others or save_optimizer):
        raise ValueError(
            f"{path.name}: files of safetensors hold weights alone. Leave save_optimizer and checkpoint_kwargs out, or "
            "choose another ending, such as .pt."
        )
    optimizer = raw_optimizer(trainer.optimizer)
    has_optimizer = hasattr(optimizer, "state_dict") and not distributed.is_sharded(trainer.accelerator)
    if save_optimizer and not has_optimizer:
        raise ValueError("save_optimizer=True, but the trainer has no optimizer yet, or one that is spread out.")
    values = whole_weights(trainer)

    def save() -> None:
        if save_optimizer is False and not others and (metadata is None or not is_torch):
            weights.save_weights(path, values, metadata or {})
            return
        content = {MODEL_KEY: values, **(others or {})}
        if metadata is not None:
            content[METADATA_KEY] = dict(metadata)
        if save_optimizer is not False and has_optimizer:
            content[OPTIMIZER_KEY] = optimizer.state_dict()
        weights.save_with_torch(path, content)

    if not is_torch:
        save_optimizer = False
    distributed.on_main_process(trainer.accelerator, save, CheckpointError)


def read_metadata(path: Path) -> dict[str, str]:
    """Return what ``save_portable`` was told to note about the weights; empty if nothing.

    Raises:
        CheckpointError: if the file is not there or cannot be read.
    """
    weights.check_is_file(path)
    if path.suffix != weights.SAFETENSORS:
        with files.damage_reported(path):
            return dict(weights.read_with_torch(path).get(METADATA_KEY, {}))
    with files.damage_reported(path), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def load_portable(trainer: Trainer, path: Path, load_optimizer: bool) -> None:
    """Load weights and, where the file has one, the optimizer; see ``Trainer.load_checkpoint``."""
    with files.damage_reported(path):
        values, optimizer_state = _read(path, load_optimizer)
    optimizer = None
    if optimizer_state is not None and trainer.optimizer is not None:
        trainer.prepare_model_and_optimizer()  # the optimizer may be a function that makes one
        optimizer = raw_optimizer(trainer.optimizer)
        check_groups(optimizer, optimizer_state, path)
    weights.put_weights(trainer.get_model(), values, path)
    if optimizer is not None:
        optimizer.load_state_dict(optimizer_state)


def _read(path: Path, with_optimizer: bool) -> tuple[dict[str, Any], Any]:
    """Return weights under clean names and, where it is there and wanted, the state of the optimizer."""
    optimizer_state = None
    if path.is_dir():
        try:
            files.verify(path)
        except CheckpointError as error:
            raise CheckpointError(f"{path} is no whole checkpoint: {error}.") from error
        values = weights.read_weights(path / files.MODEL)
        values |= weights.read_with_torch(path / files.STATE)["model_extra"]
        if with_optimizer:
            optimizer_state = weights.read_with_torch(path / files.OPTIMIZER)["state"]
    else:
        values = weights.read_weights(path)
        if MODEL_KEY in values:
            optimizer_state = values.get(OPTIMIZER_KEY) if with_optimizer else None
            values = values[MODEL_KEY]
    if optimizer_state is not None and not isinstance(optimizer_state["param_groups"][0]["params"], list):
        raise CheckpointError(f"{path} holds no state of an optimizer.")
    return {weights.clean_name(name): value for name, value in values.items()}, optimizer_state


def check_groups(optimizer: Any, state: dict[str, Any], path: Path) -> None:
    """Raise CheckpointMismatchError if a saved state is of an optimizer with other groups, or of another kind."""
    theirs = [len(group["params"]) for group in state["param_groups"]]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    if theirs != ours:
        raise CheckpointMismatchError(
            f"the optimizer has groups of {theirs} parameters in {path} and of {ours} here. load_optimizer=False "
            "leaves it out."
        )
    strange = set(state["param_groups"][0]) - set(optimizer.param_groups[0]) - {"initial_lr"}
    if strange:
        raise CheckpointMismatchError(
            f"{path} is of another optimizer than {type(optimizer).__name__}, with {', '.join(sorted(strange))}. "
            "load_optimizer=False leaves it out."
        )

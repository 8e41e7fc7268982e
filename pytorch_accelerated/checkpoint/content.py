"""What a checkpoint of a training run holds: taken from a trainer, and given back to another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import accelerate
import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.optim import Optimizer

from pytorch_accelerated import distributed, randomness
from pytorch_accelerated._version import __version__
from pytorch_accelerated.checkpoint import files, weights
from pytorch_accelerated.engine import raw_optimizer
from pytorch_accelerated.errors import CheckpointError, CheckpointMismatchError, NonFiniteError
from pytorch_accelerated.schedulers import UpdateLrScheduler
from pytorch_accelerated.tracking import RunCounters

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

T = TypeVar("T")


@dataclasses.dataclass
class Snapshot:
    """The state of a training run at one moment, on the main process."""

    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    facts: bytes  # JSON
    run_id: str
    counters: dict[str, int]

    def to_host(self, earlier: Snapshot | None = None) -> Snapshot:
        """Return a copy that nothing else refers to, on the CPU.

        Args:
            earlier: a copy that is not needed any more; its memory is used again.
        """
        return Snapshot(
            weights.copied(self.tensors, earlier and earlier.tensors),
            weights.copied(self.optimizer, earlier and earlier.optimizer),
            weights.copied(self.state, earlier and earlier.state),
            self.facts,
            self.run_id,
            self.counters,
        )

    def write(self, target: Path, sequence: int = 0, keeper: str = "") -> None:
        """Write the checkpoint ``target``.

        Raises:
            CheckpointError: if that fails; there is nothing at ``target`` then.
        """
        writers: dict[str, files.Writer] = {
            files.MODEL: lambda file: weights.write_safetensors(file, self.tensors, {"format": "pt"}),
            files.OPTIMIZER: lambda file: weights.save_without_checksums(self.optimizer, file),
            files.STATE: lambda file: weights.save_without_checksums(self.state, file),
            files.FACTS: lambda file: _write_bytes(file, self.facts),
        }
        files.write_checkpoint(target, writers, {"run_id": self.run_id, "sequence": sequence, "keeper": keeper})


def _write_bytes(file: files.DurableFile, data: bytes) -> None:
    file.write(data)


# --------------------------------------------------------------------------------------------------------------------
# Taking
# --------------------------------------------------------------------------------------------------------------------


def capture(trainer: Trainer, rows: list[dict[str, Any]] | None = None) -> Snapshot | None:
    """Return the state of the training run on the main process, None on the others. Collective.

    The tensors are those in use: write them, or copy them, before training goes on.

    Args:
        trainer: in a training run, or after one.
        rows: what ``capture_process`` returned for each process; None to ask them, which is the collective part.

    Raises:
        CheckpointError: if there is no training run, or its state is spread over processes.
        NonFiniteError: if a weight is infinite or NaN.
        TypeError: if a callback or scheduler has a state that could not be loaded again.
    """
    check_can_save(trainer)
    if rows is None:
        own = recursively_apply(lambda tensor: tensor.cpu(), capture_process(trainer))  # waits: a save is a log point
        rows = distributed.gather_rows(trainer.accelerator, own)
    if not trainer.accelerator.is_main_process:
        return None
    model = trainer.get_model()
    _check_finite(model)
    run = trainer.training_run
    all_weights = weights.weights_of(model)
    tensors = weights.only_storable(all_weights)
    optimizer = raw_optimizer(trainer.optimizer)
    scaler = trainer.accelerator.scaler
    modes = run.suspended.modes if run.suspended is not None else modes_of(trainer)
    state = {
        "model_extra": {name: value for name, value in all_weights.items() if name not in tensors},
        "in_eval_mode": [weights.clean_name(name) for name, is_training in modes.items() if not is_training],
        "frozen": [weights.clean_name(name) for name, p in model.named_parameters() if not p.requires_grad],
        "modules": {name: module.state_dict() for name, module in _other_modules(trainer).items()},
        "scheduler": None if trainer.scheduler is None else trainer.scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "callbacks": trainer.callback_handler.state_dict(),
        "processes": rows,
        "train_loader": run.loader.state_dict(run.num_steps_in_epoch if run.is_in_epoch else None),
        "eval_loaders": {name or "": loader.state_dict(None) for name, loader in run.eval_loaders.items()},
        "extra": trainer.get_extra_state(),
    }
    state, groups = weights.as_plain(state), _group_names(trainer)
    optimizer_state = weights.as_plain({"groups": groups, "state": optimizer.state_dict()})
    weights.check_loadable(state, "state")
    weights.check_loadable(optimizer_state, "optimizer")
    facts = _facts_of(trainer, type(optimizer).__name__, groups)
    try:
        text = json.dumps(facts, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"the run history cannot be saved ({error}): update_metric takes numbers, strings and nested lists of them."
        ) from error
    return Snapshot(tensors, optimizer_state, state, text, run.run_id, facts["history"]["counters"])


def capture_process(trainer: Trainer) -> dict[str, Any]:
    """Return what each process has for itself: random streams, and sums of the epoch in progress."""
    run = trainer.training_run
    streams = run.suspended.streams if run.suspended is not None else randomness.get_streams(trainer.device)
    is_within = run.is_in_epoch and run.data_pass is not None
    return {
        "streams": randomness.pack_streams(streams),
        "pass": run.data_pass.state_dict() if is_within and run.data_pass is not None else None,
    }


def check_can_save(trainer: Trainer) -> None:
    """Refuse what cannot be saved. Raises CheckpointError."""
    if not trainer.has_training_run:
        raise CheckpointError(
            "there is no training run whose state could be saved: call save_training_state from a callback or hook "
            "of a run, or after one. save_model saves the weights at any time."
        )
    if distributed.is_sharded(trainer.accelerator):
        raise CheckpointError(
            f"under {trainer.accelerator.distributed_type.name} the state of the optimizer is spread over the "
            "processes, which this version cannot save. save_model saves the weights; accelerator.save_state saves "
            "the rest, without the position in the data."
        )


def _check_finite(model: nn.Module) -> None:
    candidates = [p.detach() for p in model.parameters() if p.is_floating_point() and p.numel()]
    parameters = [parameter for parameter in candidates if parameter.layout is torch.strided]
    # A sum is finite only if all it sums up is; sums before one look, because each look waits for the device.
    sums = [parameter.sum(dtype=torch.float32) for parameter in parameters]
    is_fine = not sums or bool(torch.isfinite(torch.stack([value.to(sums[0].device) for value in sums])).all())
    if not is_fine and not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        bad = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
        raise NonFiniteError(
            f"the weights are not finite ({', '.join(bad[:3])}), and the newest checkpoint always is: not saved. "
            "TerminateOnNaNCallback, one of the default callbacks, keeps such numbers away from the weights."
        )
    # Masks may well be infinite, but nothing is meant to be NaN.
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point() and b.layout is torch.strided}
    flags = [torch.isnan(buffer).any() for buffer in buffers.values()]
    if flags and bool(torch.stack([flag.to(flags[0].device) for flag in flags]).any()):  # one wait for all
        spoilt = [name for name, flag in zip(buffers, flags, strict=True) if bool(flag)]
        raise NonFiniteError(
            f"buffers of the model are NaN ({', '.join(spoilt[:3])}), and the newest checkpoint never is: not saved."
        )


def modes_of(trainer: Trainer) -> dict[str, bool]:
    """Return for each module of the user's model, by name, whether it is in training mode."""
    return {name: module.training for name, module in trainer.get_model().named_modules()}


def _other_modules(trainer: Trainer) -> dict[str, nn.Module]:
    """Return the modules besides the model that the trainer holds and that have a state, such as loss functions."""
    return {
        name: value
        for name, value in vars(trainer).items()
        if isinstance(value, nn.Module) and name != "model" and value.state_dict()
    }


def _names_of_parameters(trainer: Trainer) -> dict[int, str]:
    names = {id(p): weights.clean_name(name) for name, p in trainer.get_model().named_parameters()}
    for attribute, module in _other_modules(trainer).items():
        for name, parameter in module.named_parameters():
            names.setdefault(id(parameter), f"{attribute}.{name}")
    return names


def _group_names(trainer: Trainer) -> list[list[str]]:
    names = _names_of_parameters(trainer)
    groups = raw_optimizer(trainer.optimizer).param_groups
    return [[names.get(id(parameter), "?") for parameter in group["params"]] for group in groups]


def _facts_of(trainer: Trainer, optimizer: str, groups: list[list[str]]) -> dict[str, Any]:
    run, config = trainer.training_run, trainer.run_config
    facts = {
        "run_id": run.run_id,
        "seed": run.seed,
        "position": {
            "is_in_epoch": run.is_in_epoch,
            "is_epoch_exhausted": run.is_in_epoch and run.is_epoch_exhausted,
            "num_steps_in_epoch": run.num_steps_in_epoch,
            "pending_evaluation": run.pending_evaluation,
            "num_evaluated": run.num_evaluated,
            "is_stopped": run.is_stopped,
        },
        "first_epoch": run.first_epoch,
        "first_update": run.first_update,
        "num_epochs": config.num_epochs,
        "max_num_train_steps": config.max_num_train_steps,
        "data": data_facts(trainer),
        "optimizer": {
            "type": optimizer,
            "groups": groups,
            "hyperparameters": run.hyperparameters,
        },
        "scheduler": _type_name(trainer.scheduler),
        "num_updates": config.num_updates,
        "history": trainer.run_history.state_dict(),
        "config": config.to_dict(),
        "versions": {
            "pytorch_accelerated": __version__,
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            "python": platform.python_version(),
        },
    }
    identity = json.dumps([facts[name] for name in ("seed", "data", "optimizer", "scheduler")], sort_keys=True)
    facts["fingerprint"] = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return facts


def _type_name(scheduler: Any) -> str | None:
    return None if scheduler is None else type(scheduler).__name__


def hyperparameters_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return what the user has chosen for each group of an optimizer; call it before a scheduler changes that."""
    return [
        {
            name: value if isinstance(value, bool | int | float | str | None) else str(value)
            for name, value in group.items()
            if name not in ("params", "initial_lr")
        }
        for group in optimizer.param_groups
    ]


def data_facts(trainer: Trainer) -> dict[str, Any]:
    """Return what must be the same where a run goes on, and how it is divided, which may differ."""
    config, run = trainer.run_config, trainer.training_run
    size, num_batches = config.train_total_batch_size, config.num_processes * config.gradient_accumulation_steps
    limit = run.loader.limit
    return {
        "num_samples": run.loader.num_dataset_samples,
        "total_batch_size": size,
        "batches_in_update": num_batches if size is None else None,  # where batches are of any size
        "limit_train_batches": None if limit is None else limit * config.num_processes,  # over all processes
        "per_device_batch_size": config.train_per_device_batch_size,
        "num_processes": config.num_processes,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "mixed_precision": config.mixed_precision,
    }


# --------------------------------------------------------------------------------------------------------------------
# Giving back
# --------------------------------------------------------------------------------------------------------------------


_MAYBE_INT, _MAYBE_STR, _MAYBE_DICT = (int, type(None)), (str, type(None)), (dict, type(None))
_FACTS = {
    "run_id": str,
    "seed": int,
    "position": dict,
    "first_epoch": int,
    "first_update": int,
    "num_epochs": _MAYBE_INT,
    "max_num_train_steps": _MAYBE_INT,
    "num_updates": _MAYBE_INT,
    "data": dict,
    "optimizer": dict,
    "scheduler": _MAYBE_STR,
    "history": dict,
    "config": dict,
    "versions": dict,
    "fingerprint": str,
}
_POSITION = {
    "is_in_epoch": bool,
    "is_epoch_exhausted": bool,
    "num_steps_in_epoch": int,
    "pending_evaluation": _MAYBE_STR,
    "num_evaluated": int,
    "is_stopped": bool,
}
_DATA = {
    "num_samples": _MAYBE_INT,
    "total_batch_size": _MAYBE_INT,
    "batches_in_update": _MAYBE_INT,
    "limit_train_batches": _MAYBE_INT,
    "per_device_batch_size": _MAYBE_INT,
    "num_processes": int,
    "gradient_accumulation_steps": int,
    "mixed_precision": str,
}
_STATE = {
    "model_extra": dict,
    "in_eval_mode": list,
    "frozen": list,
    "modules": dict,
    "scheduler": _MAYBE_DICT,
    "scaler": _MAYBE_DICT,
    "callbacks": dict,
    "processes": list,
    "train_loader": dict,
    "eval_loaders": dict,
    "extra": object,
}
_OPTIMIZER = {"groups": list, "state": dict}


class Checkpoint:
    """A checkpoint that a run can go on from."""

    def __init__(self, path: Path) -> None:
        """Read what says where the run was; weights and the rest are read when they are wanted.

        Raises:
            CheckpointError: if that cannot be read.
        """
        self.path = path
        with files.damage_reported(path):
            self.facts: dict[str, Any] = json.loads((path / files.FACTS).read_text(encoding="utf-8"))
        self._check_fields(self.facts, _FACTS, files.FACTS)
        self.position: dict[str, Any] = self.facts["position"]
        self.counters: dict[str, int] = self.facts["history"].get("counters")
        self.seed: int = self.facts["seed"]
        self.run_id: str = self.facts["run_id"]
        counters = {field.name: int for field in dataclasses.fields(RunCounters)}
        for value, fields in (
            (self.position, _POSITION),
            (self.counters, counters),
            (self.facts["data"], _DATA),
            (self.facts["optimizer"], {"type": str, "groups": list, "hyperparameters": list}),
            (self.facts["history"], {"metrics": dict}),
        ):
            self._check_fields(value, fields, files.FACTS)
        for group in self.facts["optimizer"]["hyperparameters"]:
            self._check_fields({"hyperparameters": group}, {"hyperparameters": dict}, files.FACTS)

    def _check_fields(self, value: Any, fields: dict[str, Any], name: str) -> None:
        """Raise CheckpointError if ``value`` is not a dict with these fields of these types."""
        for field, kind in fields.items():
            if not isinstance(value, dict) or field not in value or not isinstance(value[field], kind):
                raise CheckpointError(f"the checkpoint {self.path} is no checkpoint: {name} has no {field!r} to use.")

    def _read(self, name: str, fields: dict[str, Any]) -> dict[str, Any]:
        content: dict[str, Any] = weights.read_with_torch(self.path / name)
        self._check_fields(content, fields, name)
        return content

    def describe(self) -> str:
        """Return in words where the run was."""
        epoch, updates = self.counters["current_epoch"], self.counters["num_updates"]
        samples = self.counters["num_samples"]
        if self.position["is_in_epoch"]:
            where = f"in epoch {epoch}, {self.position['num_steps_in_epoch']} steps into it"
        elif self.position["pending_evaluation"]:
            where = f"after the training of epoch {epoch}, {self.position['num_evaluated']} evaluation(s) of it done"
        else:
            where = f"after epoch {epoch}"
        return (
            f"{where}, {updates} updates, {samples} samples{', stopped early' if self.position['is_stopped'] else ''}"
        )

    def check(self, trainer: Trainer) -> None:
        """Compare the checkpoint with the run that is to go on from it.

        Raises:
            CheckpointMismatchError: if they differ in what a run cannot change; the message names both values.
        """
        own, there = data_facts(trainer), self.facts["data"]
        names = {
            "num_samples": "samples in the training data",
            "total_batch_size": "samples in an update (per_device_batch_size x processes x accumulation steps)",
            "batches_in_update": "batches in an update (processes x accumulation steps)",
            "limit_train_batches": "limit of batches in an epoch",
        }
        for name, words in names.items():
            if own[name] != there[name]:
                raise CheckpointMismatchError(f"{words}: {there[name]} in {self.path}, {own[name]} in this run.")
        kinds = {
            "optimizer": (self.facts["optimizer"]["type"], type(raw_optimizer(trainer.optimizer)).__name__),
            "scheduler": (self.facts["scheduler"], _type_name(trainer.scheduler)),
        }
        for what, (theirs, ours) in kinds.items():
            if theirs != ours:
                raise CheckpointMismatchError(f"{what}: {theirs} in {self.path}, {ours} in this run.")

    def check_seed(self, seed: int | None) -> None:
        """Raise CheckpointMismatchError if the trainer was given another seed than the checkpoint's."""
        if seed is not None and seed != self.seed:
            raise CheckpointMismatchError(
                f"seed: {self.seed} in {self.path}, {seed} in this run. The order of the samples would be another."
            )

    def notes(self, trainer: Trainer) -> list[str]:
        """Return in words what is not as it was, and what becomes of it."""
        own, there = data_facts(trainer), self.facts["data"]
        found = []
        if own["num_processes"] != there["num_processes"]:
            found.append(
                f"{own['num_processes']} process(es) instead of {there['num_processes']}: samples and updates go on as "
                "they would have, but for rounding; dropout is drawn anew."
            )
        if own["mixed_precision"] != there["mixed_precision"]:
            found.append(f"mixed precision is {own['mixed_precision']} instead of {there['mixed_precision']}.")
        groups = list(
            zip(self.facts["optimizer"]["hyperparameters"], trainer.training_run.hyperparameters, strict=False)
        )
        for number, (theirs, ours) in enumerate(groups):
            where = f"group {number} of " if len(groups) > 1 else ""
            for name in sorted(name for name in theirs.keys() & ours.keys() if theirs[name] != ours[name]):
                value = theirs[name]
                found.append(
                    f"{name} of {where}the optimizer was {value} and is {ours[name]} here; it goes on with {value}."
                )
        before, now = self.facts["num_updates"], trainer.run_config.num_updates
        if before != now and trainer.scheduler is not None and not isinstance(trainer.scheduler, UpdateLrScheduler):
            found.append(
                f"the run is {now} updates long instead of {before}, but {type(trainer.scheduler).__name__} goes on "
                "with the schedule it had."
            )
        return found

    def num_steps_in_epoch(self, trainer: Trainer) -> int:
        """Return how many steps of the epoch are done, in batches of this run."""
        there, own = self.facts["data"], data_facts(trainer)
        batches: int = self.position["num_steps_in_epoch"] * there["num_processes"]
        if there["per_device_batch_size"] is None:
            return -(-batches // int(own["num_processes"]))
        samples = batches * there["per_device_batch_size"]
        return int(-(-samples // (own["per_device_batch_size"] * own["num_processes"])))

    def restore(self, trainer: Trainer, is_final: bool, has_position: bool = True) -> None:
        """Give the trainer the state back.

        It is called twice: when everything is prepared, so that the hooks and callbacks at the beginning see where
        the run is, and just before the first step, so that what these changed again does not count.

        Args:
            trainer: whose model and optimizer are prepared.
            is_final: whether this is the second time.
            has_position: whether the trainer has a training run to go on with.

        Raises:
            CheckpointError: if something is missing.
            CheckpointMismatchError: if the checkpoint is of another model or optimizer.
        """
        model = trainer.get_model()
        state, saved = self._read(files.STATE, _STATE), self._read(files.OPTIMIZER, _OPTIMIZER)
        values = weights.read_weights(self.path / files.MODEL) | state["model_extra"]
        self._check_groups(trainer, saved, is_final)
        weights.put_weights(model, values, self.path / files.MODEL)
        in_eval_mode, frozen = set(state["in_eval_mode"]), set(state["frozen"])
        for name, module in model.named_modules():
            module.training = weights.clean_name(name) not in in_eval_mode
        for name, parameter in model.named_parameters():
            if parameter.requires_grad == (weights.clean_name(name) in frozen):
                parameter.requires_grad_(weights.clean_name(name) not in frozen)
        modules = _other_modules(trainer)
        for name, module_state in state["modules"].items():
            if name in modules:
                modules[name].load_state_dict(module_state)
        if trainer.optimizer is not None and _group_names(trainer) == saved["groups"]:
            raw_optimizer(trainer.optimizer).load_state_dict(saved["state"])
        if state["scheduler"] is not None and trainer.scheduler is not None and has_position:
            trainer.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] and trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(state["scaler"])
        trainer.run_history.load_state_dict(self.facts["history"])
        trainer.callback_handler.load_state_dict(state["callbacks"])
        if state["extra"] is not None:
            trainer.set_extra_state(state["extra"])
        if has_position:
            self._restore_run(trainer, state, is_final)

    def _check_groups(self, trainer: Trainer, saved: dict[str, Any], is_final: bool) -> None:
        """Raise CheckpointMismatchError if the optimizer holds other parameters; add the groups that are missing.

        A hook of an earlier epoch may have added groups, as when layers were unfrozen. One that is about to be called
        again may add them itself, so they are added at the end only.
        """
        if trainer.optimizer is None or not is_final:
            return
        optimizer, own, there = raw_optimizer(trainer.optimizer), _group_names(trainer), saved["groups"]
        if own != there[: len(own)] or self.facts["optimizer"]["type"] != type(optimizer).__name__:
            raise CheckpointMismatchError(
                f"the optimizer, {self.facts['optimizer']['type']}, has groups of {[len(group) for group in there]} "
                f"parameters in {self.path}, and {type(optimizer).__name__} of {[len(group) for group in own]} in this "
                f"run; first difference: {_first_difference(there, own)}."
            )
        if len(own) < len(there):
            parameters = {f"{a}.{n}": p for a, m in _other_modules(trainer).items() for n, p in m.named_parameters()}
            parameters |= {weights.clean_name(name): p for name, p in trainer.get_model().named_parameters()}
            for names in there[len(own) :]:
                optimizer.add_param_group({"params": [parameters[name] for name in names]})

    def _restore_run(self, trainer: Trainer, state: dict[str, Any], is_final: bool) -> None:
        run, position = trainer.training_run, self.position
        rows, accelerator = state["processes"], trainer.accelerator
        process, num_processes = accelerator.process_index, accelerator.num_processes
        run.is_in_epoch = position["is_in_epoch"]
        run.pending_evaluation = position["pending_evaluation"]
        run.num_evaluated = position["num_evaluated"]
        run.is_stopped = position["is_stopped"]
        run.hyperparameters = self.facts["optimizer"]["hyperparameters"]
        num_steps = self.num_steps_in_epoch(trainer) if run.is_in_epoch else None
        run.num_steps_in_epoch = num_steps or 0
        run.is_epoch_exhausted = position["is_epoch_exhausted"]
        run.pass_states = [row["pass"] for row in rows[process::num_processes] if row["pass"] is not None]
        num_left_out = None if run.is_epoch_exhausted else num_steps  # an exhausted epoch is not gone through again
        run.loader.go_on(self.counters["current_epoch"], num_left_out, state["train_loader"])
        for name, loader in run.eval_loaders.items():
            if (name or "") in state["eval_loaders"]:
                loader.go_on(0, None, state["eval_loaders"][name or ""])
        if not is_final:
            return
        if len(rows) == num_processes:
            randomness.set_streams(randomness.unpack_streams(rows[process]["streams"]), trainer.device)
        else:  # other batches go to each process than before, so no stream is the right one
            randomness.seed_all_streams(randomness.mix(run.seed, "process", process, self.counters["num_updates"]))


def save_state(trainer: Trainer, target: Path) -> Path:
    """Save the state of the training run as the checkpoint ``target``. Collective.

    Raises:
        CheckpointError: if there is something there, if it cannot be written, or if an update is in progress.
    """
    check_can_save(trainer)
    if not trainer.training_run.is_between_updates:
        raise CheckpointError(
            "save_training_state was called inside an update, or before a resumed run has taken its state up, from "
            "where no run could go on to the same numbers. Call it in on_train_update_end or at the end of an epoch, "
            "or leave it to SaveTrainingStateCallback."
        )
    write_together(trainer, capture(trainer), lambda snapshot: snapshot.write(target))
    return target


def write_together(trainer: Trainer, snapshot: Snapshot | None, write: Callable[[Snapshot], T]) -> T:
    """Let the main process, which alone has a snapshot, write it; return what it returns on each process. Collective.

    Raises:
        CheckpointError: if it cannot be written.
    """

    def call() -> T:
        assert snapshot is not None, "the main process has captured it"
        return write(snapshot)

    return distributed.on_main_process(trainer.accelerator, call, CheckpointError)


def load_state(trainer: Trainer, source: Path) -> None:
    """Load all of a checkpoint but its position in the data. Collective.

    Raises:
        CheckpointError: if it is damaged or of another model.
        RuntimeError: if a training run is going on.
    """
    if trainer.is_training_run:
        raise RuntimeError("load_training_state was called inside a training run; use train(resume_from=...).")
    found = find(trainer.accelerator, source, [], trainer.print, is_required=True)
    assert found is not None, "it is required"
    trainer.prepare_model_and_optimizer()
    found.restore(trainer, is_final=True, has_position=False)


def _first_difference(there: list[list[str]], own: list[list[str]]) -> str:
    theirs = [name for group in there for name in group]
    ours = [name for group in own for name in group]
    for first, second in zip(theirs, ours, strict=False):
        if first != second:
            return f"{first} there, {second} here"
    return "the sizes of the groups"


def find(
    accelerator: accelerate.Accelerator,
    resume_from: str | Path | None,
    directories: list[Path],
    say: Callable[[str], None],
    is_required: bool = False,
) -> Checkpoint | None:
    """Return the checkpoint that a run is to go on from, the same on every process; None to begin anew. Collective.

    Args:
        accelerator: the processes.
        resume_from: ``"latest"``, a checkpoint, or a directory that holds checkpoints; None to begin anew.
        directories: where ``"latest"`` looks.
        say: called with each line that the user should read.
        is_required: whether it is an error that a directory holds no checkpoint.

    Raises:
        CheckpointError: if there is nothing at the path that was given, or nothing whole.
        TypeError: if ``resume_from`` is something else.
    """
    if resume_from is None:
        return None
    if not isinstance(resume_from, str | os.PathLike):
        raise TypeError(
            f"resume_from must be 'latest', a path, or None, got {resume_from!r}. 'latest' goes on from the newest "
            "checkpoint, if there is one."
        )
    path = distributed.on_main_process(
        accelerator, lambda: _find_on_main(resume_from, directories, say, is_required), CheckpointError
    )
    if path is None:
        return None
    if not path.is_dir():
        raise CheckpointError(
            f"process {accelerator.process_index} does not see {path}, which process 0 has found: checkpoints must be "
            "on storage that all machines share."
        )
    return Checkpoint(path)


def _find_on_main(
    resume_from: str | Path, directories: list[Path], say: Callable[[str], None], is_required: bool
) -> Path | None:
    if resume_from != "latest":
        path = Path(resume_from)
        try:
            is_there = bool(str(resume_from)) and path.is_dir()
        except OSError:  # such as a name that is too long
            is_there = False
        if not is_there:
            raise CheckpointError(
                f"resume_from={str(resume_from)!r}: there is no such directory. Give a checkpoint, a directory that "
                "holds checkpoints, or 'latest', which begins anew where there is none."
            )
        if files.is_checkpoint(path):
            try:
                files.verify(path)
            except CheckpointError as error:
                raise CheckpointError(f"resume_from={str(resume_from)!r} is damaged: {error}.") from error
            return path
        directories = [path]
    if not directories:
        raise CheckpointError(
            "resume_from='latest' looks where SaveTrainingStateCallback saves, but there is none among the callbacks. "
            "Add one, or give the directory."
        )
    found, problems = [], []
    for directory in directories:
        try:
            newest = files.find_newest(directory, say)
            found += [newest] if newest is not None else []
        except CheckpointError as error:
            problems.append(error)
    if not found and problems:
        raise problems[0]
    if not found:
        where = f"No checkpoint in {', '.join(map(str, directories))}"
        if is_required:
            raise CheckpointError(f"{where}.")
        say(f"{where}: beginning anew.")
        return None
    return max(found, key=lambda path: (Checkpoint(path).counters["num_updates"], path.name))

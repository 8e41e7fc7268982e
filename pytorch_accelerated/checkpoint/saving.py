"""A directory of checkpoints that a run adds to, and the moment after an update that a failed step is taken back to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_accelerated import randomness
from pytorch_accelerated.checkpoint import files
from pytorch_accelerated.checkpoint.content import Snapshot, capture, capture_process
from pytorch_accelerated.checkpoint.weights import copied
from pytorch_accelerated.errors import CheckpointError

if TYPE_CHECKING:
    from pytorch_accelerated.tracking import RunHistory
    from pytorch_accelerated.trainer import Trainer


def prepare_directory(file: Path) -> None:
    """Clear away what killed saves have left beside a file; raise CheckpointError if it could not be written."""
    files.remove_leftovers(file.parent)
    files.check_writable(file.parent)


class CheckpointStore:
    """Add checkpoints of a run to a directory, and delete the oldest ones; on the main process."""

    def __init__(self, directory: Path, max_checkpoints: int | None, keeper: str = "") -> None:
        """Take the directory, and who keeps how many checkpoints of a run in it; None for all."""
        self.directory = directory
        self._max_checkpoints = max_checkpoints
        self._keeper = keeper
        self._known: dict[Path, bool] = {}  # whether it is whole, of this run and of this keeper

    def prepare(self) -> None:
        """Clear away what killed saves have left in the directory, and check that it can be written to.

        Raises:
            CheckpointError: if it cannot.
        """
        self._known = {}
        files.remove_leftovers(self.directory)
        files.check_writable(self.directory)

    def write(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint, then delete those that are too many, and return its path. Raises CheckpointError."""
        counters, sequence = snapshot.counters, files.next_sequence(self.directory)
        name = files.checkpoint_name(sequence, counters["current_epoch"], counters["num_updates"])
        target = self.directory / name
        snapshot.write(target, sequence, self._keeper)
        self._known[target] = True
        if self._max_checkpoints is not None:
            candidates = [
                path for path in files.list_checkpoints(self.directory) if self._counts(path, snapshot.run_id)
            ]
            files.remove_old(candidates, self._max_checkpoints)
        return target

    def _counts(self, path: Path, run_id: str) -> bool:
        """Return whether a checkpoint is one of those of which some stay; damaged ones are looked at once."""
        if path not in self._known:
            try:
                manifest = files.read_manifest(path)
                is_own = (manifest.get("run_id"), manifest.get("keeper")) == (run_id, self._keeper)
                self._known[path] = is_own and bool(files.verify(path))
            except CheckpointError:
                self._known[path] = False
        return self._known[path]


class Boundary:
    """What a step that fails has changed already, as it was after the last update."""

    def __init__(self, trainer: Trainer) -> None:
        """Note it, as cheaply as possible: called after each update."""
        run, history = trainer.training_run, trainer.run_history
        self.num_updates = trainer.num_updates
        self._streams = randomness.get_streams(trainer.device)
        self._pass_state = copied(run.data_pass.state_dict()) if run.is_in_epoch and run.data_pass else None
        self._loader_state = run.loader.state_dict(run.num_steps_in_epoch if run.is_in_epoch else None)
        self._counters = copy.copy(history.counters)
        self._buffers = [buffer.detach().clone() for buffer in trainer.get_model().buffers()]

    def capture(self, trainer: Trainer) -> Snapshot | None:
        """Return the state of the run after the last update, without asking other processes."""
        rows = [{"streams": randomness.pack_streams(self._streams), "pass": self._pass_state}]
        with self._taken_up(trainer):
            snapshot = capture(trainer, rows)
            if snapshot is not None:
                snapshot.state["train_loader"] = self._loader_state
                snapshot = snapshot.to_host()
        return snapshot

    @contextmanager
    def _taken_up(self, trainer: Trainer) -> Iterator[None]:
        history: RunHistory = trainer.run_history
        counters, history.counters = history.counters, self._counters
        buffers = list(trainer.get_model().buffers())
        current = [buffer.detach().clone() for buffer in buffers]
        _copy_into(buffers, self._buffers)
        try:
            yield
        finally:
            history.counters = counters
            _copy_into(buffers, current)


def capture_alone(trainer: Trainer) -> Snapshot | None:
    """Return the present state of the run without asking other processes, which may be gone."""
    snapshot = capture(trainer, [copied(capture_process(trainer))])
    return None if snapshot is None else snapshot.to_host()


def _copy_into(targets: list[Any], sources: list[Any]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.data.copy_(source)

"""From what the user names to trackers that are connected."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType

from pytorch_accelerated.errors import TrackerError, did_you_mean
from pytorch_accelerated.trackers.base import AccelerateTracker, Opening, Tracker, find_started, is_installed
from pytorch_accelerated.trackers.mlflow import MLflowTracker
from pytorch_accelerated.trackers.tensorboard import TensorBoardTracker
from pytorch_accelerated.trackers.wandb import WandbTracker

_CLASSES: Mapping[str, type[AccelerateTracker]] = {
    "mlflow": MLflowTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}

# The packages of Accelerate's own trackers, and how they are installed.
_PACKAGES = {
    "aim": "aim",
    "clearml": "clearml",
    "comet_ml": "comet_ml",
    "dvclive": "dvclive",
    "mlflow": '"pytorch-accelerated[mlflow]"',
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": '"pytorch-accelerated[wandb]"',
}

Wanted = Iterable[Any] | Mapping[Any, Mapping[str, Any] | None] | str


def check_trackers(trackers: Wanted, directory: Path | None, accelerator: Accelerator) -> None:
    """Refuse what cannot be opened, without connecting anywhere.

    Args:
        trackers: names, a mapping of names to arguments, or trackers.
        directory: the run directory, or where it will be; None for none.
        accelerator: whose own directory, and trackers that have been started already, are taken as well.

    Raises:
        TrackerError: if a name is unknown or given twice, a package is not installed, or a directory is needed.
        TypeError: if something is no tracker.
    """
    for tracker in _prepare(trackers):
        if isinstance(tracker, AccelerateTracker) and tracker.general is None:
            _check(tracker, directory, accelerator)


def open_trackers(
    accelerator: Accelerator,
    trackers: Wanted,
    directory: Path | None,
    project_name: str,
    run_name: str,
    config: Mapping[str, Any],
    states: Mapping[str, Mapping[str, Any]],
    first_update: int,
) -> list[Tracker]:
    """Return trackers that are connected; the accelerator knows them until they are finished. Main process only.

    If one cannot be opened, those before it are finished.

    Args:
        accelerator: whose ``trackers`` they become.
        trackers: names, a mapping of names to arguments, or trackers.
        directory: the run directory; None for none.
        project_name: under which runs are collected.
        run_name: of this run.
        config: the configuration of the run, nested as it is.
        states: what ``state_dict`` of a tracker returned, by name, to go on in the same run.
        first_update: number of updates that the run has done already.

    Raises:
        TrackerError: if one cannot be opened, with the cause.
    """
    opened: list[Tracker] = []
    is_done = False
    try:
        for tracker in _prepare(trackers):
            if isinstance(tracker, AccelerateTracker) and tracker.general is None:
                _check(tracker, directory, accelerator)
            state = states.get(tracker.name) or None
            opened.append(tracker)
            try:
                tracker.open(Opening(accelerator, directory, project_name, run_name, config, state, first_update))
            except Exception as error:
                raise TrackerError(
                    f"The tracker {tracker.name!r} could not be opened: {type(error).__name__}: {error}"
                ) from error
        is_done = True
    finally:
        if not is_done:
            _abandon(opened)
    return opened


def _abandon(opened: Sequence[Tracker]) -> None:
    """Finish trackers because of an exception that is on its way; what fails now is noted in it."""
    reason = sys.exception()
    for tracker in reversed(opened):
        try:
            tracker.finish("failed")
        except Exception as error:
            assert reason is not None, "an exception is on its way"
            reason.add_note(f"The tracker {tracker.name!r} could not be closed: {type(error).__name__}: {error}")


def _prepare(trackers: Wanted) -> list[Tracker]:
    """Return one tracker, not opened, for each that is wanted."""
    if isinstance(trackers, (str, LoggerType, Tracker, GeneralTracker)):
        trackers = [trackers]
    options = trackers if isinstance(trackers, Mapping) else {}
    prepared = [_prepare_one(item, options.get(item) or {} if options else {}) for item in trackers]
    names = [tracker.name for tracker in prepared]
    for name in names:
        if names.count(name) > 1:
            raise TrackerError(f"There are {names.count(name)} trackers named {name!r}; each needs a name of its own.")
    return prepared


def _prepare_one(item: Any, options: Mapping[str, Any]) -> Tracker:
    if isinstance(item, Tracker):
        return item
    if isinstance(item, GeneralTracker):
        known = LOGGER_TYPE_TO_CLASS.get(item.name)
        tracker_class = _CLASSES.get(item.name, AccelerateTracker)
        is_theirs = known is not None and isinstance(item, known)
        return (tracker_class if is_theirs else AccelerateTracker)(item.name, {}, item)
    if not isinstance(item, (str, LoggerType)):
        raise TypeError(
            "trackers takes names such as 'tensorboard', a mapping of names to arguments, and instances of Tracker "
            f"or of accelerate.tracking.GeneralTracker, got {item!r}."
        )
    name = str(item.value) if isinstance(item, LoggerType) else item
    if name not in LOGGER_TYPE_TO_CLASS:
        known_names = sorted(LOGGER_TYPE_TO_CLASS)
        raise TrackerError(f"There is no tracker {name!r}.{did_you_mean(name, known_names)} There are {known_names}.")
    if not isinstance(options, Mapping):
        raise TypeError(f"The arguments of the tracker {name!r} must be a mapping, got {options!r}.")
    return _CLASSES.get(name, AccelerateTracker)(name, options)


def _check(tracker: AccelerateTracker, directory: Path | None, accelerator: Accelerator) -> None:
    name = tracker.name
    if find_started(accelerator, name) is not None:
        return
    directory = directory or accelerator.logging_dir
    if name in _PACKAGES and not is_installed(name):
        raise TrackerError(f"The tracker {name!r} needs a package that is not installed: pip install {_PACKAGES[name]}")
    needs_directory = LOGGER_TYPE_TO_CLASS[name].requires_logging_directory
    if needs_directory and directory is None and tracker.options.get("logging_dir") is None:
        raise TrackerError(
            f"The tracker {name!r} needs a directory: give the trainer a run_dir, or the tracker one, by "
            f'trackers={{"{name}": {{"logging_dir": "runs"}}}}.'
        )

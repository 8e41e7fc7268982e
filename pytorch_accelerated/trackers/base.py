"""What a tracker is to a run: all that the rest of the library knows of TensorBoard, Weights & Biases and others."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from torch import nn

from pytorch_accelerated.errors import TrackerError
from pytorch_accelerated.trackers.media import Array, add_caption, as_plain, as_text, flatten

Counters = Mapping[str, float]
"""Where the run is: num_samples, num_steps, num_updates, current_epoch, num_skipped_updates, seconds."""

OUTCOMES = ("finished", "failed", "interrupted")


@dataclasses.dataclass(frozen=True)
class Opening:
    """Be what a tracker is told when it is opened."""

    accelerator: Accelerator
    directory: Path | None
    project_name: str
    run_name: str
    config: Mapping[str, Any]
    state: Mapping[str, Any] | None
    """What ``state_dict`` returned in an earlier session of the run; None for a new run."""
    first_update: int
    """Number of updates that the run has done already."""


class Tracker:
    """Send what a run logs to one place; subclass it for a place of your own, or give an Accelerate tracker.

    All methods are called on the main process only. The x axis of everything is ``counters["num_updates"]``.
    """

    name: str = "tracker"
    """By which states, messages and ``Accelerator.get_tracker`` know it."""
    can_take_back: bool = False
    """Whether opening it at an update removes what came after that update before."""

    @property
    def supported(self) -> frozenset[str]:
        """Which of images, figure, table, audio, text, histogram, file and model it takes; scalars all do."""
        return frozenset()

    def open(self, opening: Opening) -> None:
        """Connect, and tell it the configuration of the run.

        Args:
            opening: the run.
        """

    def log_scalars(self, values: Mapping[str, Any], counters: Counters) -> None:
        """Send one row of values.

        Args:
            values: numbers, texts, and what ``as_plain`` makes of anything else.
            counters: where the run is.
        """
        raise NotImplementedError(f"{type(self).__name__} must define log_scalars.")

    def log_images(
        self, name: str, images: Sequence[Array], captions: Sequence[str] | None, counters: Counters
    ) -> None:
        """Send pictures.

        Args:
            name: what they are called.
            images: uint8 of shape (H, W, 3).
            captions: a text for each, or None.
            counters: where the run is.
        """
        raise self._refusal("images")

    def log_figure(self, name: str, figure: Any, counters: Counters) -> None:
        """Send a matplotlib figure, as a picture.

        Args:
            name: what it is called.
            figure: a ``matplotlib.figure.Figure``.
            counters: where the run is.
        """
        raise self._refusal("figure")

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], counters: Counters) -> None:
        """Send a table.

        Args:
            name: what it is called.
            columns: names of the columns.
            rows: cells of plain values.
            counters: where the run is.
        """
        raise self._refusal("table")

    def log_audio(self, name: str, audio: Array, sample_rate: int, counters: Counters) -> None:
        """Send sound.

        Args:
            name: what it is called.
            audio: float32 between -1 and 1, of shape (T,) or (T, channels).
            sample_rate: samples per second.
            counters: where the run is.
        """
        raise self._refusal("audio")

    def log_text(self, name: str, text: str, counters: Counters) -> None:
        """Send a text.

        Args:
            name: what it is called.
            text: the text.
            counters: where the run is.
        """
        raise self._refusal("text")

    def log_histogram(self, name: str, values: Array, counters: Counters) -> None:
        """Send the distribution of numbers; how many are not finite is sent as well.

        Args:
            name: what it is called.
            values: the numbers.
            counters: where the run is.
        """
        raise self._refusal("histogram")

    def log_file(self, path: Path, counters: Counters) -> None:
        """Send a file or a directory.

        Args:
            path: of the file.
            counters: where the run is.
        """
        raise self._refusal("file")

    def log_model(self, model: nn.Module, example: Any, counters: Counters, name: str = "model") -> None:
        """Send a model with the signature of its inputs and outputs.

        Args:
            model: the bare model.
            example: a batch of inputs, as the model takes it.
            counters: where the run is.
            name: what it is called.
        """
        raise self._refusal("model")

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on in the same run of the tracker, as JSON takes it."""
        return {}

    def finish(self, outcome: str) -> None:
        """Send what is left, and close; called again, it does nothing.

        Args:
            outcome: ``"finished"``, ``"failed"`` or ``"interrupted"``.
        """

    def _refusal(self, kind: str) -> TrackerError:
        takes = ", ".join(sorted(self.supported)) or "numbers only"
        return TrackerError(f"The tracker {self.name!r} takes no {kind}; it takes {takes}.")


class AccelerateTracker(Tracker):
    """Be any tracker of Accelerate, or one that the user wrote for Accelerate.

    Accelerate's class connects. Numbers, and texts where the class takes them, go through its ``log``, images and
    tables through ``log_images`` and ``log_table`` where it has them.
    """

    _ONE_IMAGE_A_CALL: ClassVar = ("aim", "clearml")
    _NUMBERS_ONLY: ClassVar = ("aim", "clearml", "dvclive", "swanlab")

    def __init__(self, name: str, options: Mapping[str, Any], general: GeneralTracker | None = None) -> None:
        """Take what to open.

        Args:
            name: Accelerate's name of it.
            options: arguments of Accelerate's class.
            general: a tracker made already, which is used instead.
        """
        self.name = name
        self.options = dict(options)
        self.general: Any = general  # made when it is opened
        self._accelerator: Accelerator | None = None  # while it is open
        self._is_mine = True

    @property
    def supported(self) -> frozenset[str]:
        """Images and tables where Accelerate's class has a method for them."""
        kinds = {"images": "log_images", "table": "log_table"}
        return frozenset(kind for kind, method in kinds.items() if callable(getattr(self.general, method, None)))

    def open(self, opening: Opening) -> None:
        """Make Accelerate's tracker, start it, and let the accelerator know it.

        One that is among ``accelerator.trackers`` has been started by someone else, who will also finish it.

        Raises:
            ValueError: if there is one of this name there, and arguments were given for another.
        """
        accelerator = opening.accelerator
        if self.general is None:
            self.general = find_started(accelerator, self.name)
            if self.general is not None and self.options:
                raise ValueError(
                    f"Accelerator.init_trackers has started one of this name already, so that {self.options} come too "
                    "late. Leave out init_trackers, or the arguments."
                )
        if self.general is None:
            self.general = self._create(opening)
        self._is_mine = not any(tracker is self.general for tracker in accelerator.trackers)
        if self._is_mine:
            self.general.start()
            accelerator.trackers.append(self.general)
        self._accelerator = accelerator
        self._begin(opening)

    def log_scalars(self, values: Mapping[str, Any], counters: Counters) -> None:
        """Send one row of values and all counters."""
        numbers, texts = split_row(values)
        if self.name in self._NUMBERS_ONLY:
            texts = {}
        self.general.log({**counters, **numbers, **texts}, step=int(counters["num_updates"]))

    def log_images(
        self, name: str, images: Sequence[Array], captions: Sequence[str] | None, counters: Counters
    ) -> None:
        """Send pictures, captions drawn below them."""
        if "images" not in self.supported:
            raise self._refusal("images")
        images, step = with_captions(images, captions), int(counters["num_updates"])
        if self.name not in self._ONE_IMAGE_A_CALL:
            self.general.log_images({name: images}, step=step)
            return
        for number, image in enumerate(images):
            self.general.log_images({numbered(name, number, len(images)): image}, step=step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], counters: Counters) -> None:
        """Send a table."""
        if "table" not in self.supported:
            raise self._refusal("table")
        data = [list(row) for row in rows]
        self.general.log_table(name, columns=list(columns), data=data, step=int(counters["num_updates"]))

    def finish(self, outcome: str) -> None:
        """Close Accelerate's tracker, and take it out of the accelerator."""
        if outcome not in OUTCOMES:
            raise ValueError(f"outcome must be one of {OUTCOMES}, got {outcome!r}.")
        accelerator, self._accelerator = self._accelerator, None
        if accelerator is None or not self._is_mine:
            return
        try:
            self._close(outcome)
        finally:
            accelerator.trackers[:] = [tracker for tracker in accelerator.trackers if tracker is not self.general]

    def _create(self, opening: Opening) -> GeneralTracker:
        """Return Accelerate's tracker, not started."""
        tracker_class = LOGGER_TYPE_TO_CLASS[self.name]
        options = dict(self.options)
        if not tracker_class.requires_logging_directory:
            return tracker_class(opening.project_name, **options)
        directory = options.pop("logging_dir", None) or opening.directory or opening.accelerator.logging_dir
        return tracker_class(opening.project_name, directory, **options)

    def _begin(self, opening: Opening) -> None:
        """Send what belongs at the beginning, once it is started."""
        self.general.store_init_configuration(flatten(opening.config))

    def _close(self, outcome: str) -> None:
        """Close it."""
        self.general.finish()


def find_started(accelerator: Accelerator, name: str) -> GeneralTracker | None:
    """Return the tracker of a name that ``Accelerator.init_trackers`` has started; None where there is none.

    Args:
        accelerator: the accelerator.
        name: of the tracker.
    """
    return next((tracker for tracker in accelerator.trackers if tracker.name == name), None)


def split_row(values: Mapping[str, Any]) -> tuple[dict[str, bool | int | float], dict[str, str]]:
    """Return the numbers of a row, and all the rest as texts.

    Args:
        values: of the row.
    """
    plain = {name: as_plain(value) for name, value in values.items()}
    numbers = {name: value for name, value in plain.items() if isinstance(value, (bool, int, float))}
    return numbers, {name: as_text(value) for name, value in plain.items() if name not in numbers}


_GROUPS = (
    (r"(train|evaluation|eval|prediction|test|system)_(.+)", r"\1/\2"),
    (r"((?:lr|gradient_norm|momentum|weight_decay)(?:_\d+)?)", r"optimizer/\1"),
    (r"(.+_per_second)", r"speed/\1"),
    (r"([^/]+)", r"other/\1"),
)


def group(name: str) -> str:
    """Return the name of a value in TensorBoard, Weights & Biases and MLflow; what is before "/" is a group of charts.

    ``train_loss`` is ``train/loss``, and so are the names that begin with ``eval_``, ``evaluation_``, ``prediction_``,
    ``test_`` and ``system_``. ``lr``, ``lr_0``, ``gradient_norm``, ``momentum`` and ``weight_decay`` are in
    ``optimizer/``, ``samples_per_second`` in ``speed/``, what is left in ``other/``. A name with "/" stays as it is.

    Args:
        name: in the log of the run.
    """
    for pattern, replacement in _GROUPS:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name) if "/" not in name else name
    return name


def numbered(name: str, number: int, count: int) -> str:
    """Return the name of one of several pictures.

    Args:
        name: of all of them.
        number: of this one.
        count: of all of them.
    """
    return name if count == 1 else f"{name}/{number}"


def with_captions(images: Sequence[Array], captions: Sequence[str] | None) -> list[Array]:
    """Return pictures with their captions drawn below them.

    Args:
        images: uint8 of shape (H, W, 3).
        captions: a text for each, or None.
    """
    if captions is None:
        return list(images)
    return [add_caption(image, text) for image, text in zip(images, captions, strict=True)]


def is_installed(package: str) -> bool:
    """Return whether a package can be imported; a directory of its name, such as ``./wandb`` of old runs, is none.

    Args:
        package: its name.
    """
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None

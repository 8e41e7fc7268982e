"""What a trainer offers to look at a run: its counters, and the methods that log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from torch import Tensor

from pytorch_accelerated.run_directory import RunDirectory
from pytorch_accelerated.tracking import RunHistory

if TYPE_CHECKING:
    from pytorch_accelerated.callbacks.recording import RecordingCallback


class RunRecord:
    """Give access to the record of a run: counters, log, trackers and run directory.

    What is logged reaches the run directory and every tracker; a trainer that has neither does nothing with it.
    """

    run_history: RunHistory
    recorder: RecordingCallback | None
    """Keeps the log; None where there is neither a run directory nor a tracker."""

    @property
    def num_samples(self) -> int:
        """Return the training samples seen, over all processes."""
        return self.run_history.counters.num_samples

    @property
    def num_steps(self) -> int:
        """Return the training batches of one process that went through the hooks."""
        return self.run_history.counters.num_steps

    @property
    def num_updates(self) -> int:
        """Return the optimizer steps that changed the weights."""
        return self.run_history.counters.num_updates

    @property
    def num_skipped_updates(self) -> int:
        """Return the updates that were left out because of numbers that are not finite."""
        return self.run_history.counters.num_skipped_updates

    @property
    def current_epoch(self) -> int:
        """Return the number of the epoch in progress, from 1; 0 before the first."""
        return self.run_history.counters.current_epoch

    @property
    def run_dir(self) -> Path | None:
        """Return the directory of the run in progress, or of the last one; None before the first, and without."""
        return None if self.recorder is None else self.recorder.run_dir

    def log(self, values: Mapping[str, Any]) -> None:
        """Put values into the next row of the log; call it anywhere, on every process alike.

        Within an epoch the next row is that of the next log point, and the newest value of a name counts: nothing is
        read from the device before. At the end of an epoch or an evaluation it is that of the end. The main process's
        values are written. The mean over the samples of all processes is found by itself for each scalar that
        ``calculate_*_batch_loss`` returns.

        Args:
            values: by name: numbers, scalar tensors, strings, nested lists of numbers; or functions without arguments
                that return such, which within an epoch are called only in the steps of an update that a row is written
                for.

        Raises:
            ValueError: if a name is a counter's.
        """
        if self.recorder is not None:
            self.recorder.log(self, values)  # type: ignore[arg-type]  # a Trainer

    def log_images(self, name: str, images: Any, captions: Sequence[str] | None = None) -> None:
        """Log images, at once. Waits for the device.

        Args:
            name: what they are called.
            images: tensor, array or list of several: shape (N, C, H, W) or (N, H, W, C), floats of 0 to 1 or bytes; or
                a function that returns such, called in an epoch only where a row is due, as by ``log``.
            captions: a text for each image.

        Raises:
            ValueError: if it cannot be told what they show.
        """
        self._log_media("images", name, images, captions=captions)

    def log_image(self, name: str, image: Any, caption: str | None = None) -> None:
        """Log one image, of shape (H, W), (C, H, W) or (H, W, C); see ``log_images``."""
        self._log_media("images", name, image, captions=None if caption is None else [caption])

    def log_figure(self, name: str, figure: Any) -> None:
        """Log a figure of matplotlib, or a function that returns one, at once; closing it is the caller's."""
        self._log_media("figure", name, figure)

    def log_table(self, name: str, table: Any, columns: Sequence[str] | None = None) -> None:
        """Log a table, at once.

        Args:
            name: what it is called.
            table: a dict of columns, a list of dicts, a DataFrame, or rows; or a function that returns such.
            columns: names of the columns of rows.
        """
        self._log_media("table", name, table, columns=columns)

    def log_audio(self, name: str, audio: Any, sample_rate: int) -> None:
        """Log a sound, at once. Waits for the device.

        Args:
            name: what it is called.
            audio: of shape (T,), (T, C) or (C, T), floats of -1 to 1; or a function that returns such.
            sample_rate: samples in a second.
        """
        self._log_media("audio", name, audio, sample_rate=sample_rate)

    def log_text(self, name: str, text: str | Callable[[], str]) -> None:
        """Log a text, or what a function returns, at once."""
        self._log_media("text", name, text)

    def log_histogram(self, name: str, values: Tensor | Any) -> None:
        """Log how numbers, a tensor of any shape or a function that returns one, are distributed, at once."""
        self._log_media("histogram", name, values)

    def log_file(self, path: str | Path) -> None:
        """Send a file to the trackers that keep such, at once; table, report and facts of the run follow at its end."""
        if self.recorder is not None:
            self.recorder.send_file(self, Path(path))  # type: ignore[arg-type]  # a Trainer

    def log_model(self, example: Any, name: str = "model") -> None:
        """Send the model with the signature of its inputs and outputs to the trackers that keep such (MLflow), at once.

        Args:
            example: a batch of inputs, as the model takes it.
            name: what the model is called.
        """
        if self.recorder is not None:
            self.recorder.send_model(self, example, name)  # type: ignore[arg-type]  # a Trainer

    def _log_media(self, kind: str, name: str, content: Any, **details: Any) -> None:
        if self.recorder is not None:
            self.recorder.log_media(self, kind, name, content, **details)  # type: ignore[arg-type]  # a Trainer


def create_recorder(
    accelerator: Accelerator,
    run_dir: str | Path | RunDirectory | None,
    trackers: Iterable[Any] | Mapping[Any, Mapping[str, Any]] | str | None,
    log_every: int | timedelta,
    config: Any,
) -> RecordingCallback | None:
    """Return what keeps the record of a trainer's runs; None where nothing is to be kept.

    Raises:
        TrackerError: if a tracker is unknown or not installed, or needs a run directory.
        TypeError: if an argument is of a wrong type.
        ValueError: if ``log_every`` is not above zero.
    """
    if run_dir is not None and not isinstance(run_dir, str | Path | RunDirectory):
        raise TypeError(f"run_dir must be a path, a RunDirectory or None, got {run_dir!r}.")
    options = RunDirectory(run_dir) if isinstance(run_dir, str | Path) else run_dir
    if trackers is None:  # as Accelerate was set up; else what needs nothing but a directory
        trackers = _find_trackers(accelerator) or ([] if options is None else ["tensorboard"])
    elif not isinstance(trackers, Mapping):
        trackers = list(trackers) if isinstance(trackers, Iterable) and not isinstance(trackers, str) else [trackers]
    if options is None and not trackers:
        return None
    # Not at the top: what no trainer uses is not imported.
    from pytorch_accelerated.callbacks.recording import RecordingCallback

    return RecordingCallback(accelerator, options, trackers, log_every, config)


def _find_trackers(accelerator: Accelerator) -> list[Any] | dict[Any, Mapping[str, Any]]:
    """Return what Accelerate was set up to log with: trackers that the user has started, or names of such."""
    if accelerator.trackers:
        return list(accelerator.trackers)
    place = {} if accelerator.logging_dir is None else {"logging_dir": accelerator.logging_dir}
    with_place = [
        tracker for tracker in LOGGER_TYPE_TO_CLASS if LOGGER_TYPE_TO_CLASS[tracker].requires_logging_directory
    ]
    return {tracker: place if str(tracker) in with_place else {} for tracker in accelerator.log_with}

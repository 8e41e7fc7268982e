"""TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker
from accelerate.tracking import TensorBoardTracker as AccelerateTensorBoard

from pytorch_accelerated.trackers.base import (
    AccelerateTracker,
    Counters,
    Opening,
    group,
    numbered,
    split_row,
    with_captions,
)
from pytorch_accelerated.trackers.media import (
    Array,
    as_plain,
    as_text,
    decode_png,
    encode_figure,
    encode_png,
    encode_wav,
    flatten,
)

_MAX_ROWS = 1000  # of a table, which is text here
_SUBDIRECTORY = "tensorboard"


class TensorBoardTracker(AccelerateTracker):
    """Write event files, by default into ``tensorboard/`` of the run directory.

    Every row is on the disk when ``log_scalars`` returns. Opened again, it tells readers to forget what came after the
    update that the run goes on from.
    """

    can_take_back = True

    @property
    def supported(self) -> frozenset[str]:
        """Everything but files and models."""
        return frozenset({"images", "figure", "table", "audio", "text", "histogram"})

    def log_scalars(self, values: Mapping[str, Any], counters: Counters) -> None:
        """Write numbers as scalars, anything else as text, and the counters as scalars of the group ``counters``."""
        step = int(counters["num_updates"])
        numbers, texts = split_row(values)
        for name, number in numbers.items():
            self._writer.add_scalar(group(name), number, step)
        for name, text in texts.items():
            self._writer.add_text(group(name), text, step)
        for name, count in counters.items():
            if name != "num_updates":  # which is the x axis
                self._writer.add_scalar(f"counters/{name}", count, step)
        self._writer.flush()  # so that a process killed now has lost nothing

    def log_images(
        self, name: str, images: Sequence[Array], captions: Sequence[str] | None, counters: Counters
    ) -> None:
        """Write pictures, captions drawn below them, since TensorBoard has none."""
        for number, image in enumerate(with_captions(images, captions)):
            self._add_image(numbered(name, number, len(images)), encode_png(image), image.shape, counters)
        self._writer.flush()

    def log_figure(self, name: str, figure: Any, counters: Counters) -> None:
        """Write a figure as a picture."""
        data = encode_figure(figure)
        self._add_image(name, data, decode_png(data).shape, counters)
        self._writer.flush()

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], counters: Counters) -> None:
        """Write a table as text, which TensorBoard shows as a table."""
        text = as_markdown(columns, rows[:_MAX_ROWS])
        if len(rows) > _MAX_ROWS:
            text += f"\n\nThe first {_MAX_ROWS} of {len(rows)} rows."
        self.log_text(name, text, counters)

    def log_audio(self, name: str, audio: Array, sample_rate: int, counters: Counters) -> None:
        """Write sound, of one or several channels."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        sound = Summary.Audio(
            sample_rate=sample_rate,
            num_channels=audio.shape[1] if audio.ndim == 2 else 1,
            length_frames=len(audio),
            encoded_audio_string=encode_wav(audio, sample_rate),
            content_type="audio/wav",
        )
        self._add(Summary(value=[Summary.Value(tag=name, audio=sound)]), counters)
        self._writer.flush()

    def log_text(self, name: str, text: str, counters: Counters) -> None:
        """Write a text, which TensorBoard shows as Markdown."""
        self._writer.add_text(name, text, int(counters["num_updates"]))
        self._writer.flush()

    def log_histogram(self, name: str, values: Array, counters: Counters) -> None:
        """Write the distribution of the finite numbers, and how many others there are as a scalar."""
        step = int(counters["num_updates"])
        finite = values[np.isfinite(values)]
        if finite.size:
            self._writer.add_histogram(name, finite, step)
        if finite.size < values.size:
            self._writer.add_scalar(f"{name}/num_non_finite", values.size - finite.size, step)
        self._writer.flush()

    def state_dict(self) -> dict[str, Any]:
        """Return the name of the directory of event files."""
        return {"run_name": self.general.run_name}

    @property
    def _writer(self) -> Any:
        return self.general.writer

    def _create(self, opening: Opening) -> GeneralTracker:
        options = dict(self.options)
        chosen = options.pop("logging_dir", None) or (None if opening.directory else opening.accelerator.logging_dir)
        parent = Path(chosen or opening.directory or ".")
        if opening.state is not None:
            run_name = str(opening.state["run_name"])
        else:
            run_name = _SUBDIRECTORY if chosen is None else _find_unused(parent, opening.run_name)
        if opening.state is not None or opening.first_update:
            _wait_for_a_later_name(parent / run_name)
        # In the first session too: the page takes the first such mark for a beginning, only later ones for a return.
        options = {"purge_step": opening.first_update + 1} | options
        return AccelerateTensorBoard(run_name, parent, **options)

    def _begin(self, opening: Opening) -> None:
        """Write the configuration once: as hyper-parameters, with their types, and as a text to read.

        Accelerate's own way makes a second run of it, and fails for whatever is nested.
        """
        from tensorboard.plugins.hparams import summary_v2

        step = opening.first_update
        if opening.state is None and (parameters := flatten(opening.config)):
            self._writer.file_writer.add_summary(summary_v2.hparams_pb(parameters), step)
        text = json.dumps(as_plain(opening.config), indent=2)
        self._writer.add_text("config", "    " + text.replace("\n", "\n    "), step)
        self._writer.flush()

    def _add_image(self, name: str, data: bytes, shape: Sequence[int], counters: Counters) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        picture = Summary.Image(height=shape[0], width=shape[1], colorspace=3, encoded_image_string=data)
        self._add(Summary(value=[Summary.Value(tag=name, image=picture)]), counters)

    def _add(self, summary: Any, counters: Counters) -> None:
        self._writer.file_writer.add_summary(summary, int(counters["num_updates"]))


def as_markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown.

    Args:
        columns: names of the columns.
        rows: cells of plain values.
    """

    def line(cells: Sequence[Any]) -> str:
        texts = ("" if cell is None else as_text(cell) for cell in cells)
        return "| " + " | ".join(" ".join(text.replace("|", "\\|").split()) for text in texts) + " |"

    return "\n".join([line(columns), "|" + " --- |" * len(columns), *map(line, rows)])


def _find_unused(parent: Path, name: str) -> str:
    """Return the name, with a number if need be, of a directory that has no event files yet."""
    number, unused = 1, name
    while any((parent / unused).glob("events.out.tfevents.*")):
        number += 1
        unused = f"{name}_{number}"
    return unused


def _wait_for_a_later_name(directory: Path) -> None:
    """Wait until the second that names a new event file is later than those of the files there.

    Readers go through the files in the order of their names, which begin with the second of their making. Made within
    the same second as the one before, a file could come before it, and would then take back nothing.
    """
    names = [path.name.split(".")[3] for path in directory.glob("events.out.tfevents.*")]
    latest = max((int(second) for second in names if second.isdigit()), default=0)
    deadline = time.time() + 2  # a clock that was set back further is not waited for
    while int(time.time()) <= latest and time.time() < deadline:
        time.sleep(0.05)

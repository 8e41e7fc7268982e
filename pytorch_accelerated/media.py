"""Images, figures, tables, sounds and texts of a run, in a form that files and trackers take."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pytorch_accelerated.trackers import Tracker
from pytorch_accelerated.trackers.media import (
    as_audio,
    as_histogram_values,
    as_images,
    as_table,
    check_captions,
    describe_histogram,
    save_figure,
    save_image,
    save_table,
    save_wav,
)


@dataclasses.dataclass(frozen=True)
class Media:
    """Something to look at or to listen to, as a tracker's method for its kind takes it."""

    kind: str
    name: str
    content: tuple[Any, ...]
    captions: list[str] | None = None

    def send(self, tracker: Tracker, counters: Mapping[str, Any]) -> None:
        """Give it to a tracker."""
        getattr(tracker, f"log_{self.kind}")(self.name, *self.content, counters)

    def write(self, directory: Path, stem: str) -> list[Path]:
        """Write it into files in ``directory``, and return them.

        Args:
            directory: has a directory for each name.
            stem: what the names of the files begin with.
        """
        place = directory / (re.sub(r"[^\w.-]+", "_", self.name).strip("._") or "unnamed")
        place.mkdir(parents=True, exist_ok=True)
        if self.kind == "images":
            images = self.content[0]
            files = [place / f"{stem}-{number}.png" for number in range(1, len(images) + 1)]
            for file, image in zip(files, images, strict=True):
                save_image(file, image)
            return files
        suffix, save = _WRITERS[self.kind]
        file = place / f"{stem}{suffix}"
        save(file, *self.content)
        return [file]


def _save_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _save_histogram(path: Path, values: np.ndarray[Any, Any]) -> None:
    path.write_text(json.dumps(describe_histogram(values)), encoding="utf-8")


_WRITERS: dict[str, tuple[str, Callable[..., None]]] = {
    "figure": (".png", save_figure),
    "table": (".csv", save_table),
    "audio": (".wav", save_wav),
    "text": (".txt", _save_text),
    "histogram": (".json", _save_histogram),
}


def prepare_media(
    kind: str,
    name: str,
    content: Any,
    *,
    captions: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    sample_rate: int = 0,
) -> Media:
    """Return content of any form as media. Tensors on a device are waited for.

    Args:
        kind: images, figure, table, audio, text or histogram.
        name: what it is called in trackers and in the run directory.
        content: what the method of ``Trainer`` for the kind takes.
        captions: a text for each image.
        columns: names of the columns of a table of rows.
        sample_rate: samples of a sound in a second.

    Raises:
        TypeError: if it is nothing of its kind.
        ValueError: if it cannot be told what it means.
    """
    if kind == "images":
        images = as_images(content)
        texts = check_captions(captions, len(images))
        return Media(kind, name, (images, texts), texts)
    if kind == "table":
        return Media(kind, name, as_table(content, columns))
    if kind == "audio":
        return Media(kind, name, (as_audio(content), sample_rate))
    if kind == "histogram":
        return Media(kind, name, (as_histogram_values(content),))
    if kind == "text" and not isinstance(content, str):
        raise TypeError(f"the text {name!r} must be a string, got {type(content).__name__}.")
    return Media(kind, name, (content,))

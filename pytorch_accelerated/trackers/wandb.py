"""Weights & Biases."""

from __future__ import annotations

import html
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, WandBTracker

from pytorch_accelerated.trackers.base import AccelerateTracker, Counters, Opening, group, split_row
from pytorch_accelerated.trackers.media import (
    Array,
    as_plain,
    as_text,
    count_in_bins,
    decode_png,
    encode_figure,
    encode_wav,
)

_MAX_BINS = 64


class WandbTracker(AccelerateTracker):
    """Log to a run of Weights & Biases, online or offline.

    W&B's own step counts calls and is never given, because W&B drops rows whose step goes back. The x axis of all
    charts is ``num_updates``, and any other counter can be chosen, since each row has all of them.
    """

    @property
    def supported(self) -> frozenset[str]:
        """Everything but models, which are files or directories here."""
        return frozenset({"images", "figure", "table", "audio", "text", "histogram", "file"})

    def log_scalars(self, values: Mapping[str, Any], counters: Counters) -> None:
        """Send one row: numbers and texts, and all counters."""
        numbers, texts = split_row(values)
        self._log({group(name): value for name, value in {**numbers, **texts}.items()}, counters)

    def log_images(
        self, name: str, images: Sequence[Array], captions: Sequence[str] | None, counters: Counters
    ) -> None:
        """Send pictures with their captions."""
        import wandb

        texts: Sequence[str | None] = captions or [None] * len(images)
        pictures = [wandb.Image(image, caption=text) for image, text in zip(images, texts, strict=True)]
        self._log({name: pictures}, counters)

    def log_figure(self, name: str, figure: Any, counters: Counters) -> None:
        """Send a figure as a picture."""
        import wandb

        self._log({name: wandb.Image(decode_png(encode_figure(figure)))}, counters)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], counters: Counters) -> None:
        """Send a table; a column whose cells are of different kinds becomes text, because W&B takes one kind only."""
        import wandb

        mixed = {index for index in range(len(columns)) if not _has_one_kind([row[index] for row in rows])}
        data: list[Any] = [
            [as_text(cell) if index in mixed and cell is not None else cell for index, cell in enumerate(row)]
            for row in rows
        ]
        self._log({name: wandb.Table(columns=list(columns), data=data)}, counters)

    def log_audio(self, name: str, audio: Array, sample_rate: int, counters: Counters) -> None:
        """Send sound."""
        import wandb

        with tempfile.TemporaryDirectory() as directory:  # an array would need one more package, soundfile
            path = Path(directory, "audio.wav")
            path.write_bytes(encode_wav(audio, sample_rate))
            self._log({name: wandb.Audio(path, sample_rate=sample_rate)}, counters)

    def log_text(self, name: str, text: str, counters: Counters) -> None:
        """Send a text as a page, which keeps its lines."""
        import wandb

        self._log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)}, counters)

    def log_histogram(self, name: str, values: Array, counters: Counters) -> None:
        """Send the distribution of the finite numbers, and how many others there are."""
        import wandb

        counts, edges, num_others = count_in_bins(values, _MAX_BINS)
        row: dict[str, Any] = {f"{name}/num_non_finite": num_others} if num_others else {}
        if num_others < values.size:
            row[name] = wandb.Histogram(np_histogram=(counts, edges))
        self._log(row, counters)

    def log_file(self, path: Path, counters: Counters) -> None:
        """Send a file or a directory as an artifact named after it and the run, with the counters as its metadata."""
        import wandb

        name = re.sub(r"[^\w.-]+", "_", f"{path.name}-{self._run.id}")
        artifact = wandb.Artifact(name, "directory" if path.is_dir() else "file", metadata=dict(counters))
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def state_dict(self) -> dict[str, Any]:
        """Return the id of the run."""
        return {"run_id": self._run.id}

    @property
    def _run(self) -> Any:
        return self.general.tracker

    def _log(self, row: Mapping[str, Any], counters: Counters) -> None:
        self._run.log({**counters, **row})

    def _create(self, opening: Opening) -> GeneralTracker:
        options = {"name": opening.run_name, **self.options}
        project = options.pop("project", opening.project_name)
        if opening.directory is not None:
            options = {"dir": str(opening.directory)} | options
        if opening.state is not None and "id" not in options:
            options = {"resume": "allow"} | options | {"id": opening.state["run_id"]}
        return WandBTracker(project, **options)

    def _begin(self, opening: Opening) -> None:
        """Send the configuration as it is nested, and choose the x axis of all charts."""
        self._run.config.update(as_plain(opening.config), allow_val_change=True)
        self._run.define_metric("*", step_metric="num_updates")

    def _close(self, outcome: str) -> None:
        """Close the run: finished, failed, or preempted, as W&B calls a run that was asked to stop and can go on."""
        if outcome == "interrupted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


def _has_one_kind(cells: Sequence[Any]) -> bool:
    kinds = {float if type(cell) is int else type(cell) for cell in cells if cell is not None}
    return len(kinds) <= 1 and not kinds & {list, dict}

"""MLflow."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.tracking import GeneralTracker
from accelerate.tracking import MLflowTracker as AccelerateMLflow
from torch import Tensor, nn

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
    as_array,
    as_plain,
    as_text,
    describe_histogram,
    encode_figure,
    encode_wav,
    flatten,
)

_STATUSES = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_PARENT = "mlflow.parentRunId"  # the tag by which MLflow knows the parent of a run


class MLflowTracker(AccelerateTracker):
    """Log to a run of MLflow.

    Besides the arguments of Accelerate's class it takes ``tracking_uri``, which MLflow keeps for the process until the
    tracker is closed, and ``parent_run_id``, below which the run is shown. Everything is sent by the id of the run, so
    that runs which the user starts in between do not matter.
    """

    def __init__(self, name: str, options: Mapping[str, Any], general: GeneralTracker | None = None) -> None:
        """Take what to open; see the base class."""
        super().__init__(name, options, general)
        self._client: Any = None
        self._run_id = ""
        self._former_uri: str | None = None
        self._has_set_uri = False
        self._texts: dict[str, str] = {}  # of rows, sent last

    @property
    def supported(self) -> frozenset[str]:
        """Everything; what MLflow has no chart for is an artifact."""
        return frozenset({"images", "figure", "table", "audio", "text", "histogram", "file", "model"})

    def open(self, opening: Opening) -> None:
        """Choose the store, and start the run or go on with it."""
        import mlflow

        uri = self.options.get("tracking_uri")
        if uri is not None:
            self._former_uri = os.environ.get("MLFLOW_TRACKING_URI")
            self._has_set_uri = True
            mlflow.set_tracking_uri(uri)
        try:
            super().open(opening)
        except Exception:
            if self._accelerator is None:  # else finish will do it
                self._restore_uri()
            raise

    def log_scalars(self, values: Mapping[str, Any], counters: Counters) -> None:
        """Send numbers as metrics, the counters as metrics of the group ``counters``, and texts that are new."""
        numbers, texts = split_row(values)
        rows = {group(name): number for name, number in numbers.items()}
        rows |= {f"counters/{name}": count for name, count in counters.items() if name != "num_updates"}
        self._log_metrics(rows, counters)
        for name, text in texts.items():
            if self._texts.get(name) != text:
                self._texts[name] = text
                self.log_text(group(name), text, counters)

    def log_images(
        self, name: str, images: Sequence[Array], captions: Sequence[str] | None, counters: Counters
    ) -> None:
        """Send pictures, captions drawn below them, so that MLflow shows them with a slider over updates."""
        for number, image in enumerate(with_captions(images, captions)):
            key = _clean(numbered(name, number, len(images))).replace(":", "_")
            self._client.log_image(self._run_id, image, key=key, step=int(counters["num_updates"]), synchronous=True)

    def log_figure(self, name: str, figure: Any, counters: Counters) -> None:
        """Send a figure as an artifact below ``figures/``."""
        self._log_bytes("figures", name, "png", encode_figure(figure), counters)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], counters: Counters) -> None:
        """Send a table as an artifact below ``tables/``, which MLflow shows, and ``mlflow.load_table`` reads."""
        data = {column: [row[index] for row in rows] for index, column in enumerate(columns)}
        self._client.log_table(self._run_id, data, _path_of("tables", name, "json", counters))

    def log_audio(self, name: str, audio: Array, sample_rate: int, counters: Counters) -> None:
        """Send sound as an artifact below ``audio/``."""
        self._log_bytes("audio", name, "wav", encode_wav(audio, sample_rate), counters)

    def log_text(self, name: str, text: str, counters: Counters) -> None:
        """Send a text as an artifact below ``text/``."""
        self._log_bytes("text", name, "txt", text.encode(), counters)

    def log_histogram(self, name: str, values: Array, counters: Counters) -> None:
        """Send counts and edges of a histogram as an artifact below ``histograms/``."""
        self._client.log_dict(self._run_id, describe_histogram(values), _path_of("histograms", name, "json", counters))

    def log_file(self, path: Path, counters: Counters) -> None:
        """Send a file or a directory as an artifact of the same name, in the place of one sent before."""
        if path.is_dir():
            self._client.log_artifacts(self._run_id, str(path), path.name)
        else:
            self._client.log_artifact(self._run_id, str(path))

    def log_model(self, model: nn.Module, example: Any, counters: Counters, name: str = "model") -> None:
        """Send a model that ``mlflow.pytorch.load_model`` loads again, for batches of any size.

        It is pickled: the format that MLflow would choose traces the model, and for an example of one sample it traces
        a model that takes one sample at a time.

        Raises:
            ValueError: if another run of MLflow is active, whose model it would become.
        """
        import mlflow

        active = mlflow.active_run()
        if active is None or active.info.run_id != self._run_id:
            raise ValueError(
                f"The active run of MLflow is not that of the trainer, {self._run_id}, to which the model belongs. "
                "End the other run first."
            )
        mlflow.pytorch.log_model(
            model,
            name=name,
            signature=_find_signature(model, example),
            pip_requirements=mlflow.pytorch.get_default_pip_requirements(),  # else a process is started to guess them
            serialization_format="pickle",
            step=int(counters["num_updates"]),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the id of the run."""
        return {"run_id": self._run_id}

    def _create(self, opening: Opening) -> GeneralTracker:
        import mlflow

        options = {name: value for name, value in self.options.items() if name != "tracking_uri"}
        parent, active = options.pop("parent_run_id", None), mlflow.active_run()
        if parent is not None:
            experiment = mlflow.MlflowClient().get_run(parent).info.experiment_id
            options = {"experiment_name": mlflow.MlflowClient().get_experiment(experiment).name} | options
            options["tags"] = {**(options.get("tags") or {}), _PARENT: parent}
            if active is not None and active.info.run_id != parent:
                raise ValueError(
                    f"parent_run_id={parent!r} is not the active run of MLflow, {active.info.run_id!r}, "
                    "of which a new run would become a child. End that one first."
                )
            options["nested_run"] = active is not None
        elif options.get("nested_run") and active is None:
            raise ValueError(
                "nested_run=True makes a child of the active run of MLflow, and there is none. Start the trainer "
                "within `with mlflow.start_run():`, or give parent_run_id."
            )
        elif active is not None and not options.get("nested_run"):
            raise ValueError(
                f"The run {active.info.run_id!r} of MLflow is active. End it, or make this one a child of it by "
                'trackers={"mlflow": {"nested_run": True}}.'
            )
        if opening.state is not None:
            options = {"run_id": opening.state["run_id"]} | options
        return AccelerateMLflow(**({"experiment_name": opening.project_name, "run_name": opening.run_name} | options))

    def _begin(self, opening: Opening) -> None:
        """Send the configuration as parameters, and as it is nested as an artifact.

        Parameters never change in MLflow: of a run that goes on, those are sent which are new, and the artifact says
        what the configuration is now.
        """
        import mlflow
        from mlflow.entities import Param
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

        self._client, self._run_id = mlflow.MlflowClient(), self.general.tracker.info.run_id
        known = self._client.get_run(self._run_id).data.params
        found = {_clean(name): as_text(value) for name, value in flatten(opening.config).items()}
        parameters = [
            Param(name, value if len(value) <= MAX_PARAM_VAL_LENGTH else value[: MAX_PARAM_VAL_LENGTH - 3] + "...")
            for name, value in found.items()
            if name not in known
        ]
        for first in range(0, len(parameters), MAX_PARAMS_TAGS_PER_BATCH):
            some = parameters[first : first + MAX_PARAMS_TAGS_PER_BATCH]
            self._client.log_batch(self._run_id, params=some, synchronous=True)
        suffix = f"_update_{opening.first_update:08d}" if opening.state is not None else ""
        self._client.log_dict(self._run_id, as_plain(opening.config), f"config{suffix}.json")

    def _close(self, outcome: str) -> None:
        """End the run, and what was started within it and left open: FINISHED, FAILED or KILLED."""
        import mlflow

        run_id, status = self.general.tracker.info.run_id, _STATUSES[outcome]
        try:
            num_within = 0
            run: Any = mlflow.active_run()
            while run is not None and run.info.run_id != run_id:  # started within it, perhaps, and left open
                parent = run.data.tags.get(_PARENT)
                num_within, run = num_within + 1, None if parent is None else mlflow.get_run(parent)
            if run is None:  # ended by someone else
                mlflow.MlflowClient().set_terminated(run_id, status)
            else:
                for _ in range(num_within + 1):
                    mlflow.end_run(status)
        finally:
            self._restore_uri()

    def _restore_uri(self) -> None:
        if self._has_set_uri:
            import mlflow

            former: Any = self._former_uri  # None, of which MLflow's types do not know, takes back the choice
            mlflow.set_tracking_uri(former)
            self._has_set_uri = False

    def _log_metrics(self, numbers: Mapping[str, bool | int | float], counters: Counters) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.validation import MAX_METRICS_PER_BATCH

        now, step = int(time.time() * 1000), int(counters["num_updates"])
        metrics = [Metric(_clean(name), float(number), now, step) for name, number in numbers.items()]
        for first in range(0, len(metrics), MAX_METRICS_PER_BATCH):
            some = metrics[first : first + MAX_METRICS_PER_BATCH]
            self._client.log_batch(self._run_id, metrics=some, synchronous=True)

    def _log_bytes(self, kind: str, name: str, suffix: str, data: bytes, counters: Counters) -> None:
        target = Path(_path_of(kind, name, suffix, counters))
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, target.name)
            path.write_bytes(data)
            self._client.log_artifact(self._run_id, str(path), target.parent.as_posix())


def _clean(name: str) -> str:
    """Return a name that MLflow takes: letters, digits and "_-. :/", no path that leads elsewhere, at most 250."""
    name = re.sub(r"[^\w\-. :/]|[^\x00-\x7f]", "_", name)
    parts = [part if part.strip(".") else part.replace(".", "_") for part in name.split("/") if part]
    return "/".join(parts)[:250] or "unnamed"


def _path_of(kind: str, name: str, suffix: str, counters: Counters) -> str:
    cleaned = _clean(name).replace(":", "_")
    return f"{kind}/{cleaned}/update_{int(counters['num_updates']):08d}.{suffix}"


def _find_signature(model: nn.Module, example: Any) -> Any:
    """Return the signature of a model, from one forward pass in evaluation mode; modes are given back."""
    from mlflow.models import infer_signature

    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            output = model(_on(device, example))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return infer_signature(_as_arrays(example), _as_arrays(output))


def _on(device: torch.device, example: Any) -> Any:
    if isinstance(example, Mapping):
        return {name: _on(device, value) for name, value in example.items()}
    return torch.as_tensor(example).to(device) if isinstance(example, (Tensor, np.ndarray)) else example


def _as_arrays(values: Any) -> Any:
    """Return what MLflow tells a signature from: arrays, or a mapping of arrays; None for what it cannot tell."""
    if isinstance(values, Tensor | np.ndarray):
        return as_array(values, "an example")  # waits for the device: the signature is told from it
    if isinstance(values, Mapping) and all(isinstance(value, (Tensor, np.ndarray)) for value in values.values()):
        return {str(name): _as_arrays(value) for name, value in values.items()}
    return None

"""Weights & Biases offline and MLflow on SQLite: what arrives is read back from their own files and by their client."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import sys
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from pytorch_accelerated.errors import TrackerError
from pytorch_accelerated.trackers import media
from pytorch_accelerated.trackers.base import is_installed
from tests.test_trackers import CONFIG, ROW, at, open_them

needs_wandb = pytest.mark.skipif(not is_installed("wandb"), reason="wandb is not installed")
needs_mlflow = pytest.mark.skipif(not is_installed("mlflow"), reason="mlflow is not installed")
# Of MLflow's own code and of what it imports.
quiet = [
    pytest.mark.filterwarnings("ignore:.*noload.*loader strategy"),
    pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
SOUND = np.sin(np.arange(400) / 9).astype(np.float32)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    accelerator = Accelerator()
    yield accelerator
    assert accelerator.trackers == []


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, outside of which nothing is written."""
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "private"))
    (tmp_path / "private").mkdir()
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")
    for name in [name for name in os.environ if name.startswith("MLFLOW_") and name != "MLFLOW_DISABLE_TELEMETRY"]:
        monkeypatch.delenv(name)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


def log_media(tracker: Any, place: Path) -> None:
    from matplotlib.figure import Figure

    tracker.log_images("eval/shown", [PIXELS, 255 - PIXELS], ["a cat", "a dog"], at(4))
    figure = Figure(figsize=(3, 2), dpi=50)
    figure.subplots().plot([1, 2])
    tracker.log_figure("curve", figure, at(4))
    tracker.log_table("mixed", ["n", "any", "list"], [[1, "x", [1, 2]], [2.5, 3, None]], at(4))
    tracker.log_audio("sound", SOUND, 8000, at(4))
    tracker.log_text("note", "<b>one</b>\ntwo", at(4))
    tracker.log_histogram("weights", np.asarray([1.0, 2.0, 2.0, math.nan]), at(4))
    (place / "report.html").write_text("<p>report")
    tracker.log_file(place / "report.html", at(4))
    (place / "best").mkdir()
    (place / "best" / "weights.bin").write_bytes(b"w")
    tracker.log_file(place / "best", at(4))


# ---------------------------------------------------------------------------------------------------------------------
# Weights & Biases
# ---------------------------------------------------------------------------------------------------------------------


def records_of(path: Path) -> list[Any]:
    """Return the records of an offline run: protocol buffers in blocks of 32 KiB, as LevelDB keeps its log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    records: list[Any] = []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no header fits into what is left of a block
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def wandb_runs(directory: Path) -> list[list[Any]]:
    """Return the records of all runs, once the process that W&B writes by has written the last of each."""
    deadline = time.monotonic() + 30
    while True:
        runs = [records_of(path) for path in sorted((directory / "wandb").glob("offline-run-*/*.wandb"))]
        if all(find(records, "exit") for records in runs):
            return runs
        assert time.monotonic() < deadline, runs
        time.sleep(0.05)


def rows_of(records: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for history in find(records, "history"):
        row: dict[str, Any] = {}
        for item in history.item:
            *outer, name = item.nested_key or [item.key]
            inner = row
            for key in outer:
                inner = inner.setdefault(key, {})
            inner[name] = json.loads(item.value_json)
        rows.append(row)
    return rows


def find(records: list[Any], kind: str) -> list[Any]:
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


@pytest.mark.slow
@needs_wandb
def test_wandb_offline_has_every_value_and_every_counter(accelerator: Accelerator, place: Path) -> None:
    wanted = {"wandb": {"mode": "offline", "tags": ["a"]}}
    (tracker,) = open_them(accelerator, wanted, place)
    tracker.log_scalars(ROW, at(4))
    tracker.log_scalars({"eval_loss": 1.0}, at(4))  # the same update again
    tracker.log_scalars({"eval_loss": 2.0}, at(2))  # an earlier one: W&B would drop it, were its own step used
    state = tracker.state_dict()
    tracker.finish("finished")

    (records,) = wandb_runs(place)
    first, second, third = rows_of(records)
    assert {name: first[name] for name in at(4)} == at(4)
    for name, value in {
        "train/loss": 0.5,
        "eval/accuracy": 0.25,
        "eval/large_loss_epoch": 2.0,
        "optimizer/lr_0": 0.1,
        "other/count": 7,
        "other/array": 3,
        "other/bf16": 1.5,
        "other/flag": True,
        "other/numpy_flag": False,
        "other/word": "warm-up",
        "other/nothing": "None",
        "other/matrix": "[[1.0, 0.0], [0.0, 1.0]]",
        "other/mixed": '{"a": [1, null]}',
        "other/color": "RED",
    }.items():
        assert first[name] == value, name
    assert math.isnan(float(first["other/nan"])) and math.isinf(float(first["train/inf"]))
    assert (second["eval/loss"], second["num_updates"]) == (1.0, 4)
    assert (third["eval/loss"], third["num_updates"]) == (2.0, 2)
    assert [row["_step"] for row in (first, second, third)] == [0, 1, 2]
    (run, *_) = find(records, "run")
    assert (run.run_id, run.project, run.display_name, list(run.tags)) == (state["run_id"], "digits", "digits/1", ["a"])
    sent = {item.key: json.loads(item.value_json) for found in find(records, "config") for item in found.update}
    assert sent["optimizer"]["groups"] == [{"lr": 0.1, "betas": [0.9, 0.99]}, {"lr": 0.01}]
    assert any(metric.glob_name == "*" and metric.step_metric == "num_updates" for metric in find(records, "metric"))
    assert find(records, "exit")[0].exit_code == 0
    assert not list((place / "cwd").iterdir())


@pytest.mark.slow
@needs_wandb
def test_wandb_offline_has_every_kind_of_media(accelerator: Accelerator, place: Path) -> None:
    (tracker,) = open_them(accelerator, {"wandb": {"mode": "offline"}}, place)
    assert tracker.supported == {"images", "figure", "table", "audio", "text", "histogram", "file"}
    log_media(tracker, place)
    tracker.log_histogram("all_nan", np.full(2, math.nan), at(5))
    tracker.finish("failed")

    (records,) = wandb_runs(place)
    rows = rows_of(records)
    assert all(row["num_updates"] == 4 for row in rows[:-1])
    found = {name: value for row in rows for name, value in row.items()}
    (files,) = (place / "wandb").glob("offline-run-*/files")
    shown = found["eval/shown"]
    assert shown["captions"] == ["a cat", "a dog"]
    for name, original in zip(shown["filenames"], (PIXELS, 255 - PIXELS), strict=True):
        assert np.array_equal(media.decode_png((files / name).read_bytes()), original)
    assert (found["curve"]["width"], found["curve"]["height"]) == (150, 100)
    table = json.loads((files / found["mixed"]["path"]).read_text())
    assert table == {"columns": ["n", "any", "list"], "data": [[1, "x", "[1, 2]"], [2.5, "3", None]]}
    with wave.open(str(files / found["sound"]["path"])) as file:
        assert (file.getframerate(), file.getnframes()) == (8000, 400)
    assert "&lt;b&gt;one&lt;/b&gt;\ntwo" in (files / found["note"]["path"]).read_text()
    assert sum(found["weights"]["values"]) == 3 and found["weights/num_non_finite"] == 1
    assert found["all_nan/num_non_finite"] == 2 and "all_nan" not in found
    artifacts = {artifact.name: artifact for artifact in find(records, "artifact")}
    run_id = tracker.state_dict()["run_id"]
    assert [entry.path for entry in artifacts[f"report.html-{run_id}"].manifest.contents] == ["report.html"]
    assert [entry.path for entry in artifacts[f"best-{run_id}"].manifest.contents] == ["weights.bin"]
    assert json.loads(artifacts[f"best-{run_id}"].metadata)["num_updates"] == 4
    assert find(records, "exit")[0].exit_code == 1


@pytest.mark.slow
@needs_wandb
def test_wandb_goes_on_in_the_same_run(accelerator: Accelerator, place: Path) -> None:
    wanted: dict[str, Any] = {"wandb": {"mode": "offline"}}
    states: dict[str, Any] = {}
    for update, outcome in ((1, "interrupted"), (2, "finished")):
        (tracker,) = open_them(accelerator, wanted, place, states=states, first_update=update - 1)
        assert not tracker.can_take_back
        tracker.log_scalars({"train_loss": update}, at(update))
        tracker.finish(outcome)
        states = {"wandb": tracker.state_dict()}
    first, second = wandb_runs(place)
    assert find(first, "run")[0].run_id == find(second, "run")[0].run_id == states["wandb"]["run_id"]
    assert [row["num_updates"] for row in rows_of(first) + rows_of(second)] == [1, 2]
    assert find(first, "preempting") and find(first, "exit")[0].exit_code == 1
    (tracker,) = open_them(accelerator, {"wandb": {"mode": "offline", "id": None}}, place, states=states)
    assert tracker.state_dict()["run_id"] != states["wandb"]["run_id"]  # a new run, because it was asked for
    tracker.finish("finished")


@pytest.mark.slow
@needs_wandb
def test_wandb_without_a_key_is_one_clear_error(
    accelerator: Accelerator, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(place / "netrc"))
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(TrackerError, match=r"The tracker 'wandb' could not be opened: .*(API key|api_key|login)"):
        open_them(accelerator, ["tensorboard", "wandb"], place)


# ---------------------------------------------------------------------------------------------------------------------
# MLflow
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose tables have been made, which takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(empty_store: Path, place: Path) -> Iterator[dict[str, Any]]:
    """The arguments of a tracker with a store of its own."""
    import mlflow

    (place / "mlflow.db").write_bytes(empty_store.read_bytes())
    yield {"tracking_uri": f"sqlite:///{place}/mlflow.db", "logging_dir": str(place / "artifacts")}
    left = mlflow.active_run()
    while mlflow.active_run() is not None:  # else MLflow would end it when the process ends, in a store of its own
        mlflow.end_run()
    assert left is None


def client_of(store: dict[str, Any]) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(store["tracking_uri"])


class TestMLflow:
    pytestmark = [needs_mlflow, pytest.mark.slow, *quiet]

    def test_it_has_every_value_and_every_counter(
        self, accelerator: Accelerator, store: dict[str, Any], place: Path
    ) -> None:
        import mlflow

        before = mlflow.get_tracking_uri()
        config = {**CONFIG, "long": "x" * 7000, "many": {str(number): number for number in range(150)}, "odd name!": 1}
        (tracker,) = open_them(accelerator, {"mlflow": {**store, "tags": {"team": "a"}}}, place, config=config)
        tracker.log_scalars(ROW, at(4))
        tracker.log_scalars({"train_loss": 0.25, "word": "warm-up", "strange (name)": 1}, at(5))
        tracker.log_scalars({"word": "decay"}, at(6))
        run_id = tracker.state_dict()["run_id"]
        tracker.finish("finished")
        assert mlflow.get_tracking_uri() == before and mlflow.active_run() is None
        assert "MLFLOW_TRACKING_URI" not in os.environ

        client = client_of(store)
        run = client.get_run(run_id)
        assert (run.info.status, run.info.run_name, run.data.tags["team"]) == ("FINISHED", "digits/1", "a")
        assert client.get_experiment(run.info.experiment_id).name == "digits"
        losses = client.get_metric_history(run_id, "train/loss")
        assert [(metric.step, metric.value) for metric in losses] == [(4, 0.5), (5, 0.25)]
        metrics = run.data.metrics
        assert metrics["eval/accuracy"] == 0.25 and metrics["other/count"] == 7 and metrics["other/flag"] == 1
        assert math.isnan(metrics["other/nan"]) and metrics["train/inf"] > 1e300
        assert metrics["other/strange _name_"] == 1
        assert {name: metrics[f"counters/{name}"] for name in at(6) if name != "num_updates"} == {
            name: value for name, value in at(6).items() if name != "num_updates"
        }
        texts = {path: self.text(client, run_id, path) for path in self.artifacts(client, run_id, "text/other")}
        assert texts["text/other/word/update_00000004.txt"] == "warm-up"
        assert texts["text/other/word/update_00000006.txt"] == "decay"  # between them it was the same
        assert texts["text/other/nothing/update_00000004.txt"] == "None"
        assert len(texts) == 6
        parameters = run.data.params
        assert parameters["optimizer.groups.0.lr"] == "0.1" and parameters["run.is_resumed"] == "False"
        assert parameters["odd name_"] == "1" and parameters["many.149"] == "149"
        assert len(parameters["long"]) == 6000 and parameters["long"].endswith("...")
        assert json.loads(self.text(client, run_id, "config.json"))["long"] == "x" * 7000
        assert not list((place / "cwd").iterdir())

    def test_it_has_every_kind_of_media(self, accelerator: Accelerator, store: dict[str, Any], place: Path) -> None:
        import mlflow
        from PIL import Image

        (tracker,) = open_them(accelerator, {"mlflow": store}, place)
        log_media(tracker, place)
        run_id = tracker.state_dict()["run_id"]
        tracker.finish("failed")
        client = client_of(store)
        assert client.get_run(run_id).info.status == "FAILED"
        paths = self.artifacts(client, run_id)
        pictures = sorted(path for path in paths if path.startswith("images/") and path.endswith(".png"))
        assert ["eval~shown~0" in pictures[0], "eval~shown~1" in pictures[1]] == [True, True]
        assert all("step+4+" in path or "step%4%" in path for path in pictures)
        with Image.open(client.download_artifacts(run_id, pictures[0], str(place / "private"))) as image:
            assert image.width == 120 and image.height > 80  # four times as large, with a caption below
        curve = client.download_artifacts(run_id, "figures/curve/update_00000004.png", str(place / "private"))
        assert media.decode_png(Path(curve).read_bytes()).shape == (100, 150, 3)
        sound = client.download_artifacts(run_id, "audio/sound/update_00000004.wav", str(place / "private"))
        with wave.open(sound) as file:
            assert (file.getframerate(), file.getnframes()) == (8000, 400)
        assert self.text(client, run_id, "text/note/update_00000004.txt") == "<b>one</b>\ntwo"
        counted = json.loads(self.text(client, run_id, "histograms/weights/update_00000004.json"))
        assert (sum(counted["counts"]), counted["num_non_finite"]) == (3, 1)
        assert self.text(client, run_id, "report.html") == "<p>report" and "best/weights.bin" in paths
        experiment = client.get_run(run_id).info.experiment_id
        mlflow.set_tracking_uri(store["tracking_uri"])
        try:
            table = client.load_table(experiment, "tables/mixed/update_00000004.json", run_ids=[run_id])
        finally:
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
        assert list(table.columns) == ["n", "any", "list"] and table["any"].tolist() == ["x", 3]

    def test_a_model_is_loaded_again_for_batches_of_any_size(
        self, accelerator: Accelerator, store: dict[str, Any], place: Path
    ) -> None:
        import mlflow

        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        model[1].eval()
        (tracker,) = open_them(accelerator, {"mlflow": store}, place)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        tracker.log_model(model, torch.zeros(1, 4), at(7))
        assert [module.training for module in model.modules()] == [True, True, False, True]
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        run_id = tracker.state_dict()["run_id"]
        experiment = client_of(store).get_run(run_id).info.experiment_id
        (logged,) = mlflow.search_logged_models([experiment], output_format="list")
        assert logged.source_run_id == run_id
        loaded = mlflow.pytorch.load_model(logged.model_uri)
        served = mlflow.pyfunc.load_model(logged.model_uri)
        signature = served.metadata.signature
        for batch_size in (1, 5):
            batch = torch.randn(batch_size, 4)
            expected = model.eval()(batch)
            assert torch.equal(loaded.eval()(batch), expected)
            assert np.allclose(served.predict(batch.numpy()), expected.detach().numpy(), atol=1e-6)
        assert signature.inputs.inputs[0].shape == (-1, 4) and signature.outputs.inputs[0].shape == (-1, 3)
        with mlflow.start_run(nested=True), pytest.raises(ValueError, match="active run of MLflow is not that of"):
            tracker.log_model(model, torch.zeros(1, 4), at(8))
        tracker.finish("finished")

    def test_it_goes_on_in_the_same_run(self, accelerator: Accelerator, store: dict[str, Any], place: Path) -> None:
        client, states = client_of(store), {}
        for number, outcome, status in ((1, "interrupted", "KILLED"), (2, "finished", "FINISHED")):
            config = {"num_epochs": number, **({"new": 1} if number == 2 else {})}
            (tracker,) = open_them(
                accelerator, {"mlflow": store}, place, states=states, first_update=number - 1, config=config
            )
            assert not tracker.can_take_back
            states = {"mlflow": tracker.state_dict()}
            run_id = states["mlflow"]["run_id"]
            assert client.get_run(run_id).info.status == "RUNNING"
            tracker.log_scalars({"train_loss": number}, at(number))
            tracker.finish(outcome)
            assert client.get_run(run_id).info.status == status
        assert [metric.step for metric in client.get_metric_history(run_id, "train/loss")] == [1, 2]
        # Parameters never change in MLflow: what the configuration is now is beside them.
        assert client.get_run(run_id).data.params == {"num_epochs": "1", "new": "1"}
        assert json.loads(self.text(client, run_id, "config_update_00000001.json"))["num_epochs"] == 2
        wanted = {"mlflow": {**store, "run_id": None}}
        (tracker,) = open_them(accelerator, wanted, place, states=states)
        assert tracker.state_dict()["run_id"] != run_id
        tracker.finish("finished")
        states["mlflow"]["run_id"] = "0" * 32
        with pytest.raises(TrackerError, match=f"'mlflow' could not be opened: .*{'0' * 32}"):
            open_them(accelerator, {"mlflow": store}, place, states=states)

    def test_children_have_their_parent(self, accelerator: Accelerator, store: dict[str, Any], place: Path) -> None:
        import mlflow

        client = client_of(store)
        mlflow.set_tracking_uri(store["tracking_uri"])
        try:
            mlflow.set_experiment("search")
            with mlflow.start_run(run_name="all trials") as parent:
                with pytest.raises(TrackerError, match=r"is active. End it, or make this one a child .*nested_run"):
                    open_them(accelerator, ["mlflow"], place)
                options: dict[str, Any] = {"nested_run": True, "experiment_name": "search"}
                for _ in range(2):
                    (tracker,) = open_them(accelerator, {"mlflow": options}, place)
                    tracker.log_scalars({"train_loss": 1.0}, at(1))
                    tracker.finish("finished")
                    assert mlflow.active_run().info.run_id == parent.info.run_id
                with pytest.raises(TrackerError, match=r"parent_run_id='other'|other"):
                    open_them(accelerator, {"mlflow": {"parent_run_id": "other"}}, place)
            with pytest.raises(TrackerError, match="nested_run=True makes a child of the active run"):
                open_them(accelerator, {"mlflow": options}, place)
        finally:
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
            mlflow.tracking.fluent._active_experiment_id = None
            os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
        # From another process, in which the parent is not active: below its id, in its experiment.
        (tracker,) = open_them(accelerator, {"mlflow": {**store, "parent_run_id": parent.info.run_id}}, place)
        third = tracker.state_dict()["run_id"]
        tracker.finish("interrupted")
        found = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
        assert len(found) == 3 and third in [run.info.run_id for run in found]
        assert sorted(run.info.status for run in found) == ["FINISHED", "FINISHED", "KILLED"]

    def test_a_server_that_does_not_answer_is_one_clear_error(
        self, accelerator: Accelerator, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import mlflow

        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            uri = f"http://127.0.0.1:{probe.getsockname()[1]}"  # nobody listens there
        before = mlflow.get_tracking_uri()
        with pytest.raises(TrackerError, match=r"The tracker 'mlflow' could not be opened: .*127\.0\.0\.1"):
            open_them(accelerator, {"tensorboard": {}, "mlflow": {"tracking_uri": uri}}, place)
        assert mlflow.get_tracking_uri() == before and mlflow.active_run() is None

    def test_runs_that_the_user_started_in_between_change_nothing(
        self, accelerator: Accelerator, store: dict[str, Any], place: Path
    ) -> None:
        import mlflow

        client = client_of(store)
        (tracker,) = open_them(accelerator, {"mlflow": store}, place)
        run_id = tracker.state_dict()["run_id"]
        child, grandchild = mlflow.start_run(nested=True), mlflow.start_run(nested=True)
        tracker.log_scalars({"train_loss": 1.0}, at(1))
        tracker.finish("failed")  # and what was left open within it
        assert mlflow.active_run() is None
        for run in (child, grandchild):
            assert client.get_run(run.info.run_id).info.status == "FAILED"
            assert client.get_run(run.info.run_id).data.metrics == {}
        run = client.get_run(run_id)
        assert (run.info.status, run.data.metrics["train/loss"]) == ("FAILED", 1.0)

        (tracker,) = open_them(accelerator, {"mlflow": store}, place)
        mlflow.end_run()  # by the user, too early
        theirs = mlflow.start_run(experiment_id=run.info.experiment_id)
        tracker.log_scalars({"train_loss": 2.0}, at(2))
        run_id = tracker.state_dict()["run_id"]
        assert theirs.info.run_id == mlflow.active_run().info.run_id
        mlflow.end_run()
        tracker.finish("interrupted")
        run = client.get_run(run_id)
        assert (run.info.status, run.data.metrics["train/loss"]) == ("KILLED", 2.0)

    @staticmethod
    def artifacts(client: Any, run_id: str, path: str | None = None) -> list[str]:
        found = []
        for item in client.list_artifacts(run_id, path):
            found += TestMLflow.artifacts(client, run_id, item.path) if item.is_dir else [item.path]
        return found

    @staticmethod
    def text(client: Any, run_id: str, path: str) -> str:
        return Path(client.download_artifacts(run_id, path)).read_text()


def test_names_of_our_modules_hide_no_package() -> None:
    import pytorch_accelerated.trackers.mlflow
    import pytorch_accelerated.trackers.wandb

    for name in ("mlflow", "wandb", "tensorboard"):
        module = sys.modules.get(name)
        assert module is None or "pytorch_accelerated" not in str(module.__file__)
    assert not hasattr(pytorch_accelerated.trackers.wandb, "wandb")
    assert not hasattr(pytorch_accelerated.trackers.mlflow, "mlflow")

"""Trackers: TensorBoard by its own reader, trackers of the user's own, what is refused, and the forms of media."""

from __future__ import annotations

import datetime
import enum
import io
import json
import math
import signal
import subprocess
import sys
import textwrap
import time
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.tracking import TensorBoardTracker as AccelerateTensorBoard
from accelerate.utils import LoggerType
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PageAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn

from pytorch_accelerated.errors import TrackerError
from pytorch_accelerated.trackers import (
    AccelerateTracker,
    Opening,
    Tracker,
    as_plain,
    check_trackers,
    group,
    media,
    open_trackers,
)
from pytorch_accelerated.trackers.base import is_installed
from pytorch_accelerated.trackers.tensorboard import as_markdown

ROOT = Path(__file__).parent.parent
CONFIG = {
    "run": {"num_epochs": 3, "mixed_precision": None, "is_resumed": False},
    "optimizer": {"type": "SGD", "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}, {"lr": 0.01}]},
    "user": {"sizes": [8, 16], "path": Path("data"), "dtype": torch.bfloat16, "empty": {}, "scale": np.float32(0.5)},
}


def at(num_updates: int) -> dict[str, float]:
    return {
        "num_samples": num_updates * 8,
        "num_steps": num_updates * 2,
        "num_updates": num_updates,
        "current_epoch": 0,
        "num_skipped_updates": 0,
        "seconds": num_updates / 10,
    }


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    accelerator = Accelerator()
    yield accelerator
    assert accelerator.trackers == []


def open_them(accelerator: Accelerator, trackers: Any, directory: Path | None, **changes: Any) -> list[Tracker]:
    arguments: dict[str, Any] = {"project_name": "digits", "run_name": "digits/1", "config": CONFIG, "states": {}}
    return open_trackers(accelerator, trackers, directory, **{**arguments, "first_update": 0, **changes})


def read(directory: Path) -> EventAccumulator:
    return EventAccumulator(
        str(directory), {"scalars": 0, "tensors": 0, "images": 0, "audio": 0, "histograms": 0}
    ).Reload()


def text_of(events: EventAccumulator, tag: str) -> list[tuple[int, str]]:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(f"{tag}/text_summary")]


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard
# ---------------------------------------------------------------------------------------------------------------------


class Color(enum.Enum):
    RED = 1


ROW = {
    "train_loss": 0.5,
    "eval_accuracy": np.float32(0.25),
    "eval_large_loss_epoch": torch.tensor(2.0),
    "lr_0": np.float64(0.1),
    "samples_per_second": 12,
    "count": np.int64(7),
    "array": np.asarray(3),
    "bf16": torch.tensor(1.5, dtype=torch.bfloat16),
    "flag": True,
    "numpy_flag": np.bool_(False),
    "nan": math.nan,
    "train_inf": math.inf,
    "word": "warm-up",
    "nothing": None,
    "matrix": torch.eye(2),
    "mixed": {"a": [1, None]},
    "color": Color.RED,
}


def test_no_type_of_value_is_dropped(accelerator: Accelerator, tmp_path: Path) -> None:
    (tracker,) = open_them(accelerator, ["tensorboard"], tmp_path)
    tracker.log_scalars(ROW, at(4))
    # On the disk already: a process killed here has lost nothing.
    events = read(tmp_path / "tensorboard")
    found = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert all(events.Scalars(tag)[0].step == 4 for tag in found)
    assert math.isnan(found.pop("other/nan"))
    assert found == {
        "train/loss": 0.5,
        "eval/accuracy": 0.25,
        "eval/large_loss_epoch": 2.0,
        "optimizer/lr_0": pytest.approx(0.1),
        "speed/samples_per_second": 12,
        "other/count": 7,
        "other/array": 3,
        "other/bf16": 1.5,
        "other/flag": 1,
        "other/numpy_flag": 0,
        "train/inf": math.inf,
        "counters/num_samples": 32,
        "counters/num_steps": 8,
        "counters/current_epoch": 0,
        "counters/num_skipped_updates": 0,
        "counters/seconds": pytest.approx(0.4),
    }
    texts = {"word": "warm-up", "nothing": "None", "matrix": "[[1.0, 0.0], [0.0, 1.0]]", "mixed": '{"a": [1, null]}'}
    for name, text in (texts | {"color": "RED"}).items():
        assert text_of(events, f"other/{name}") == [(4, text)]
    assert len(found) + 1 + 5 == len(ROW) + 5
    tracker.finish("finished")


def test_each_kind_of_media_is_read_back(accelerator: Accelerator, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    (tracker,) = open_them(accelerator, "tensorboard", tmp_path)
    assert tracker.supported == {"images", "figure", "table", "audio", "text", "histogram"}
    pixels = np.random.default_rng(0).integers(0, 256, (100, 120, 3), np.uint8)
    tracker.log_images("eval/shown", [pixels, pixels[:40]], None, at(1))
    tracker.log_images("one", [pixels], ["A cat & a dog"], at(2))
    figure = Figure(figsize=(3, 2), dpi=50)
    canvas = figure.canvas
    figure.subplots().plot([1, 2])
    tracker.log_figure("curve", figure, at(3))
    assert figure.canvas is canvas
    tracker.log_table("confused", ["as|is", "n"], [["cat|dog", 1], [None, [1, 2]]], at(4))
    sound = np.stack([np.sin(np.arange(400) / 9), np.zeros(400)], axis=1).astype(np.float32)
    tracker.log_audio("stereo", sound, 8000, at(5))
    tracker.log_audio("mono", sound[:, 0], 16000, at(5))
    tracker.log_text("note", "# Title\ntwo lines", at(6))
    tracker.log_histogram("weights", np.asarray([1.0, 2.0, 2.0, math.nan, math.inf]), at(7))
    tracker.log_histogram("all_nan", np.full(3, math.nan), at(7))
    tracker.finish("finished")

    events = read(tmp_path / "tensorboard")
    for tag, original in (("eval/shown/0", pixels), ("eval/shown/1", pixels[:40])):
        (event,) = events.Images(tag)
        assert (event.step, event.height, event.width) == (1, *original.shape[:2])
        assert np.array_equal(media.decode_png(event.encoded_image_string), original)
    (event,) = events.Images("one")
    with_text = media.decode_png(event.encoded_image_string)
    assert with_text.shape[:2] == (event.height, event.width) and event.height > 100
    assert np.array_equal(with_text[:100], pixels)
    assert (with_text[100:] < 128).any() and (with_text[100:] == 255).any()
    (event,) = events.Images("curve")
    assert (event.step, event.width, event.height) == (3, 150, 100)
    assert text_of(events, "confused") == [(4, "| as\\|is | n |\n| --- | --- |\n| cat\\|dog | 1 |\n|  | [1, 2] |")]
    for tag, channels, rate in (("stereo", 2, 8000), ("mono", 1, 16000)):
        (event,) = events.Audio(tag)
        assert (event.step, event.sample_rate, event.length_frames) == (5, rate, 400)
        with wave.open(io.BytesIO(event.encoded_audio_string)) as file:
            assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (channels, rate, 400)
    assert text_of(events, "note") == [(6, "# Title\ntwo lines")]
    (event,) = events.Histograms("weights")
    assert (event.step, event.histogram_value.num, event.histogram_value.max) == (7, 3, 2)
    assert [event.value for event in events.Scalars("weights/num_non_finite")] == [2]
    assert [event.value for event in events.Scalars("all_nan/num_non_finite")] == [3]
    assert "all_nan" not in events.Tags()["histograms"]


def test_the_configuration_is_kept_with_its_types(accelerator: Accelerator, tmp_path: Path) -> None:
    (tracker,) = open_them(accelerator, "tensorboard", tmp_path)
    tracker.finish("finished")
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]
    assert not [path for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()]  # no second run beside it
    events = read(tmp_path / "tensorboard")
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()} == {
        "run.num_epochs": 3,
        "run.mixed_precision": "None",
        "run.is_resumed": False,
        "optimizer.type": "SGD",
        "optimizer.groups.0.lr": 0.1,
        "optimizer.groups.0.betas": "[0.9, 0.99]",
        "optimizer.groups.1.lr": 0.01,
        "user.sizes": "[8, 16]",
        "user.path": "data",
        "user.dtype": "torch.bfloat16",
        "user.empty": "{}",
        "user.scale": 0.5,
    }
    assert found["run.is_resumed"].WhichOneof("kind") == "bool_value"
    ((step, text),) = text_of(events, "config")
    assert step == 0 and json.loads(textwrap.dedent(text)) == as_plain(CONFIG)


KILLED = """
import os, pathlib, signal, sys
from accelerate import Accelerator
from tests.test_trackers import at, open_them
(tracker,) = open_them(Accelerator(), "tensorboard", pathlib.Path(sys.argv[1]))
for update in range(1, 11):
    tracker.log_scalars({"train_loss": 1.0, "phase": "first"}, at(update))
    tracker.log_histogram("weights", __import__("numpy").arange(3.0), at(update))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_goes_on_without_a_gap_and_without_duplicates(accelerator: Accelerator, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGKILL
    state = {"tensorboard": {"run_name": "tensorboard"}}
    for first, last in ((6, 8), (7, 12)):  # resumed twice, each time within the second in which it ended
        (tracker,) = open_them(accelerator, ["tensorboard"], tmp_path, states=state, first_update=first)
        assert tracker.can_take_back and tracker.state_dict() == state["tensorboard"]
        for update in range(first + 1, last + 1):
            tracker.log_scalars({"train_loss": float(first), "phase": f"from {first}"}, at(update))
            tracker.log_histogram("weights", np.arange(3.0), at(update))
        tracker.finish("finished")
    events = read(tmp_path / "tensorboard")
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(step, 1 if step <= 6 else 6 if step == 7 else 7) for step in range(1, 13)]
    samples = [(event.step, event.value) for event in events.Scalars("counters/num_samples")]
    assert samples == [(step, 8 * step) for step in range(1, 13)]
    assert [event.step for event in events.Histograms("weights")] == list(range(1, 13))
    # The page has a reader of its own, which holds the first mark of a session for no return.
    page = PageAccumulator(str(tmp_path / "tensorboard"), {"tensors": 0}).Reload()
    for tag in ("train/loss", "counters/num_samples", "weights", "other/phase/text_summary"):
        assert [event.step for event in page.Tensors(tag)] == list(range(1, 13)), tag
    assert "_hparams_/session_start_info" in events.Tags()["tensors"]


def test_a_run_that_goes_on_within_the_second_has_its_file_after_the_others(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    for first in (0, 2):
        states = {"tensorboard": {"run_name": "tensorboard"}} if first else {}
        (tracker,) = open_them(accelerator, "tensorboard", tmp_path, states=states, first_update=first)
        for update in range(first + 1, first + 4):
            tracker.log_scalars({"train_loss": first}, at(update))
        tracker.finish("interrupted")
        if first == 0:  # by its name the last of the files that are made within this second and the next
            (path,) = (tmp_path / "tensorboard").iterdir()
            path.rename(path.with_name(f"events.out.tfevents.{int(time.time()) + 1}.~.1.0"))
    losses = [(event.step, event.value) for event in read(tmp_path / "tensorboard").Scalars("train/loss")]
    assert losses == [(1, 0), (2, 0), (3, 2), (4, 2), (5, 2)]


def test_tensorboard_without_a_run_directory_has_one_for_each_run(accelerator: Accelerator, tmp_path: Path) -> None:
    wanted = {"tensorboard": {"logging_dir": tmp_path / "logs", "flush_secs": 5}}
    for _ in range(2):
        (tracker,) = open_them(accelerator, wanted, None)
        tracker.log_scalars({"train_loss": 1.0}, at(1))
        tracker.finish("finished")
    assert tracker.state_dict() == {"run_name": "digits/1_2"}
    (tracker,) = open_them(accelerator, wanted, None, states={"tensorboard": tracker.state_dict()}, first_update=1)
    tracker.log_scalars({"train_loss": 2.0}, at(2))
    tracker.finish("finished")
    for name, num_rows in (("1", 1), ("1_2", 2)):
        assert len(read(tmp_path / "logs" / "digits" / name).Scalars("train/loss")) == num_rows


def test_the_accelerator_knows_them_until_they_are_finished(accelerator: Accelerator, tmp_path: Path) -> None:
    (tracker,) = open_them(accelerator, [LoggerType.TENSORBOARD], tmp_path)
    assert accelerator.get_tracker("tensorboard", unwrap=True).log_dir == str(tmp_path / "tensorboard")
    try:
        raise ValueError("of the run")
    except ValueError:
        tracker.finish("failed")
    assert accelerator.trackers == []
    tracker.finish("failed")
    with pytest.raises(ValueError, match="outcome must be one of"):
        tracker.finish("done")


def test_a_large_table_says_how_much_of_it_is_shown(accelerator: Accelerator, tmp_path: Path) -> None:
    (tracker,) = open_them(accelerator, "tensorboard", tmp_path)
    tracker.log_table("long", ["n"], [[number] for number in range(1001)], at(1))
    tracker.finish("interrupted")
    ((_, text),) = text_of(read(tmp_path / "tensorboard"), "long")
    assert text.endswith("| 999 |\n\nThe first 1000 of 1001 rows.")
    assert as_markdown(["a\nb"], [["x\n\ny"]]) == "| a b |\n| --- |\n| x y |"


@pytest.mark.parametrize(
    ("name", "grouped"),
    [
        ("train_loss", "train/loss"),
        ("train_loss_epoch", "train/loss_epoch"),
        ("eval_hard_accuracy", "eval/hard_accuracy"),
        ("evaluation_loss", "evaluation/loss"),
        ("system_gpu_0_memory", "system/gpu_0_memory"),
        ("lr", "optimizer/lr"),
        ("lr_12", "optimizer/lr_12"),
        ("gradient_norm", "optimizer/gradient_norm"),
        ("tokens_per_second", "speed/tokens_per_second"),
        ("train_samples_per_second", "train/samples_per_second"),
        ("lrate", "other/lrate"),
        ("mine/eval_loss", "mine/eval_loss"),
        ("train_a/b", "train_a/b"),
        ("eval_", "other/eval_"),
    ],
)
def test_names_are_grouped(name: str, grouped: str) -> None:
    assert group(name) == grouped


# ---------------------------------------------------------------------------------------------------------------------
# Trackers of the user's own
# ---------------------------------------------------------------------------------------------------------------------


class ListTracker(GeneralTracker):
    """As Accelerate's documentation has users write one."""

    name = "list"
    requires_logging_directory = False

    def __init__(self, name: str = "list", fails_at: str = "") -> None:
        super().__init__()
        self.name, self.fails_at = name, fails_at
        self.calls: list[Any] = []

    @property
    def tracker(self) -> list[Any]:
        return self.calls

    def _note(self, what: str, *details: Any) -> None:
        if what == self.fails_at:
            raise ConnectionError(f"no {what}")
        self.calls.append((what, *details))

    def start(self) -> None:
        self._note("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._note("config", values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._note("log", values, step)

    def finish(self) -> None:
        self._note("finish")


class MediaTracker(ListTracker):
    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        self._note("images", {name: [image.shape for image in images] for name, images in values.items()}, step)

    def log_table(self, name: str, columns: Any = None, data: Any = None, step: int | None = None) -> None:
        self._note("table", name, columns, data, step)


def test_a_tracker_written_for_accelerate_works(accelerator: Accelerator) -> None:
    theirs = MediaTracker()
    (tracker,) = open_them(accelerator, theirs, None)
    assert accelerator.get_tracker("list") is theirs
    assert tracker.supported == {"images", "table"} and not tracker.can_take_back and tracker.state_dict() == {}
    tracker.log_scalars({"train_loss": np.float32(0.5), "word": "a", "matrix": [[1]]}, at(3))
    tracker.log_images("shown", [np.zeros((100, 100, 3), np.uint8)], ["a"], at(3))
    tracker.log_table("table", ["a"], [(1,)], at(3))
    with pytest.raises(TrackerError, match="'list' takes no audio; it takes images, table"):
        tracker.log_audio("sound", np.zeros(3, np.float32), 8000, at(3))
    tracker.finish("finished")
    start, config, log, images, table, finish = theirs.calls
    assert (start, finish) == (("start",), ("finish",))
    assert config[1]["optimizer.groups.0.lr"] == 0.1
    assert log == ("log", {**at(3), "train_loss": 0.5, "word": "a", "matrix": "[[1]]"}, 3)
    assert images[1]["shown"][0][0] > 100 and images[2] == 3
    assert table == ("table", "table", ["a"], [[1]], 3)


def test_a_tracker_without_methods_for_media_says_so(accelerator: Accelerator) -> None:
    (tracker,) = open_them(accelerator, [ListTracker()], None)
    assert tracker.supported == frozenset()
    with pytest.raises(TrackerError, match="takes no images; it takes numbers only"):
        tracker.log_images("shown", [np.zeros((2, 2, 3), np.uint8)], None, at(1))
    with pytest.raises(TrackerError, match="takes no model"):
        tracker.log_model(nn.Linear(1, 1), torch.zeros(1, 1), at(1))
    tracker.finish("finished")


def test_one_that_was_started_by_its_owner_is_left_to_him() -> None:
    theirs, accelerator = ListTracker(), Accelerator()
    accelerator.trackers.append(theirs)
    (tracker,) = open_them(accelerator, [theirs], None)
    tracker.log_scalars({"train_loss": 1}, at(1))
    tracker.finish("finished")
    assert [call[0] for call in theirs.calls] == ["config", "log"]
    assert accelerator.trackers == [theirs]


def test_trackers_that_the_accelerator_was_given_are_used(tmp_path: Path) -> None:
    accelerator = Accelerator(log_with="tensorboard", project_dir=str(tmp_path))
    check_trackers(accelerator.log_with, None, accelerator)
    (tracker,) = open_them(accelerator, accelerator.log_with, None)  # in the directory that it was given
    tracker.log_scalars({"train_loss": 1.0}, at(1))
    tracker.finish("finished")
    assert accelerator.trackers == []
    accelerator.init_trackers("theirs")
    (tracker,) = open_them(accelerator, ["tensorboard"], None)
    tracker.log_scalars({"train_loss": 2.0}, at(1))
    tracker.log_audio("sound", np.zeros(9, np.float32), 8000, at(1))
    tracker.finish("finished")
    assert len(accelerator.trackers) == 1
    with pytest.raises(TrackerError, match=r"ValueError: Accelerator.init_trackers has started one .* come too late"):
        open_them(accelerator, {"tensorboard": {"flush_secs": 5}}, None)
    accelerator.end_training()
    for name, value in (("digits/1", 1), ("theirs", 2)):
        assert read(tmp_path / name).Scalars("train/loss")[0].value == value
    assert read(tmp_path / "theirs").Tags()["audio"] == ["sound"]


def test_an_instance_of_accelerates_own_class_takes_all_that_its_name_does(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    (tracker,) = open_them(accelerator, [AccelerateTensorBoard("mine", tmp_path)], None)
    tracker.log_text("note", "text", at(1))
    tracker.log_scalars({"train_loss": 1.0}, at(1))
    tracker.finish("finished")
    events = read(tmp_path / "mine")
    assert text_of(events, "note") == [(1, "text")] and events.Scalars("train/loss")


def test_a_tracker_of_ones_own_without_accelerate(accelerator: Accelerator, tmp_path: Path) -> None:
    class JsonTracker(Tracker):
        name = "json"

        def open(self, opening: Opening) -> None:
            assert opening.directory is not None
            self.path, self.outcome = opening.directory / "rows.json", ""

        def log_scalars(self, values: Any, counters: Any) -> None:
            self.path.write_text(json.dumps({**counters, **values}))

        def finish(self, outcome: str) -> None:
            self.outcome = outcome

    (tracker,) = open_them(accelerator, [JsonTracker()], tmp_path)
    tracker.log_scalars({"a": 1}, at(1))
    tracker.finish("interrupted")
    assert json.loads(tracker.path.read_text())["a"] == 1  # type: ignore[attr-defined]
    assert tracker.outcome == "interrupted" and tracker.supported == frozenset()  # type: ignore[attr-defined]
    with pytest.raises(NotImplementedError, match="Tracker must define log_scalars"):
        Tracker().log_scalars({}, at(1))


@pytest.mark.parametrize("failing", ["start", "config"])
def test_when_one_cannot_be_opened_those_before_it_are_finished(
    accelerator: Accelerator, tmp_path: Path, failing: str
) -> None:
    first, second, third = ListTracker("first"), ListTracker("second", failing), ListTracker("third")
    with pytest.raises(TrackerError) as caught:
        open_them(accelerator, ["tensorboard", first, second, third], tmp_path)
    assert str(caught.value) == f"The tracker 'second' could not be opened: ConnectionError: no {failing}"
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert [call[0] for call in first.calls] == ["start", "config", "finish"]
    assert [call[0] for call in second.calls] == {"start": [], "config": ["start", "finish"]}[failing]
    assert third.calls == [] and accelerator.trackers == []


def test_what_fails_while_closing_is_noted_in_the_error(accelerator: Accelerator) -> None:
    with pytest.raises(TrackerError) as caught:
        open_them(accelerator, [ListTracker("first", "finish"), ListTracker("second", "start")], None)
    assert "'second' could not be opened" in str(caught.value)
    note = "The tracker 'first' could not be closed: ConnectionError: no finish"
    assert caught.value.__notes__ == [note]


def test_one_that_cannot_be_closed_is_taken_out_all_the_same(accelerator: Accelerator) -> None:
    (tracker,) = open_them(accelerator, [ListTracker(fails_at="finish")], None)
    with pytest.raises(ConnectionError, match="no finish"):
        tracker.finish("finished")
    tracker.finish("finished")


def test_a_directory_that_cannot_be_made_is_an_error_with_its_cause(accelerator: Accelerator, tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(TrackerError, match=r"'tensorboard' could not be opened: .*Error") as caught:
        open_them(accelerator, ["tensorboard"], tmp_path)
    assert isinstance(caught.value.__cause__, Exception)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused before anything is opened
# ---------------------------------------------------------------------------------------------------------------------


def test_unknown_names_are_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    with pytest.raises(TrackerError, match=r"There is no tracker 'tensorbord'\. Did you mean 'tensorboard'\?"):
        check_trackers(["tensorbord"], tmp_path, accelerator)
    with pytest.raises(TrackerError, match=r"There is no tracker 'neptune'.*There are .*'wandb'"):
        check_trackers({"neptune": {}}, tmp_path, accelerator)
    with pytest.raises(TypeError, match=r"trackers takes names .* got <class"):
        check_trackers([ListTracker], tmp_path, accelerator)
    with pytest.raises(TypeError, match="arguments of the tracker 'wandb' must be a mapping, got 'offline'"):
        check_trackers({"wandb": "offline"}, tmp_path, accelerator)  # type: ignore[dict-item]
    with pytest.raises(TrackerError, match="There are 2 trackers named 'list'"):
        check_trackers([ListTracker(), ListTracker()], tmp_path, accelerator)
    check_trackers([], None, accelerator)
    check_trackers([ListTracker("a"), ListTracker("b")], None, accelerator)


def test_a_package_that_is_not_installed_is_named(accelerator: Accelerator, tmp_path: Path) -> None:
    missing = next(name for name in ("clearml", "aim", "comet_ml") if not is_installed(name))
    message = f"The tracker '{missing}' needs a package that is not installed: pip install {missing}"
    with pytest.raises(TrackerError, match=message):
        check_trackers([missing], tmp_path, accelerator)
    with pytest.raises(TrackerError, match=message):
        open_them(accelerator, [missing], tmp_path)


def test_a_directory_of_the_name_of_a_package_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "comet_logs_of_old").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("comet_logs_of_old")
    assert is_installed("tensorboard")


def test_tensorboard_needs_a_directory(accelerator: Accelerator) -> None:
    with pytest.raises(
        TrackerError, match=r"'tensorboard' needs a directory: give the trainer a run_dir, .*logging_dir"
    ):
        check_trackers("tensorboard", None, accelerator)
    check_trackers({"tensorboard": {"logging_dir": "logs"}}, None, accelerator)


# ---------------------------------------------------------------------------------------------------------------------
# Media
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    lr: float
    shape: tuple[int, ...]


def test_everything_becomes_plain() -> None:
    values = {
        1: Settings(0.1, (1, 2)),
        "path": Path("a"),
        "none": None,
        "set": {3},
        "complex": torch.tensor(1j),
        "date": datetime.date(2026, 1, 2),
        "type": nn.Linear,
        "function": as_plain,
        "strings": np.asarray(["a"]),
        "objects": np.asarray([None, 1], dtype=object),
        "bfloat16": torch.ones(2, dtype=torch.bfloat16),
        "grad": torch.ones((), requires_grad=True),
    }
    plain = as_plain(values)
    json.dumps(plain)
    assert plain == {
        "1": {"lr": 0.1, "shape": [1, 2]},
        "path": "a",
        "none": None,
        "set": [3],
        "complex": "1j",
        "date": "2026-01-02",
        "type": "torch.nn.modules.linear.Linear",
        "function": "pytorch_accelerated.trackers.media.as_plain",
        "strings": ["a"],
        "objects": [None, 1],
        "bfloat16": [1.0, 1.0],
        "grad": 1.0,
    }


def test_two_settings_of_one_flat_name_are_both_kept() -> None:
    assert media.flatten({"a.b": 1, "a": {"b": 2}}) == {"a.b": 1, "a.b'": 2}


GRAY = np.arange(48, dtype=np.uint8).reshape(6, 8)
RGB = np.arange(144, dtype=np.uint8).reshape(6, 8, 3)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (GRAY, [np.stack([GRAY] * 3, -1)]),
        (torch.tensor(GRAY), [np.stack([GRAY] * 3, -1)]),
        (RGB, [RGB]),
        (torch.tensor(RGB).permute(2, 0, 1), [RGB]),
        (torch.tensor(RGB).permute(2, 0, 1) / 255, [RGB]),
        (torch.tensor(GRAY)[None].repeat(5, 1, 1)[:, None], [np.stack([GRAY] * 3, -1)] * 5),
        (np.stack([RGB, RGB]), [RGB, RGB]),
        (np.stack([RGB] * 3).transpose(0, 3, 1, 2), [RGB] * 3),
        ([RGB, torch.tensor(GRAY), Image.fromarray(RGB)], [RGB, np.stack([GRAY] * 3, -1), RGB]),
        (Image.fromarray(GRAY), [np.stack([GRAY] * 3, -1)]),
        (GRAY > 20, [np.stack([(GRAY > 20) * np.uint8(255)] * 3, -1)]),
        (np.dstack([RGB, np.full((6, 8), 255, np.uint8)]), [RGB]),
        (np.dstack([RGB, np.zeros((6, 8), np.uint8)]), [np.full_like(RGB, 255)]),
        (Image.fromarray(np.dstack([RGB, np.zeros((6, 8), np.uint8)])), [np.full_like(RGB, 255)]),
        (torch.full((6, 8), 1.00001), [np.full((6, 8, 3), 255, np.uint8)]),
        (torch.full((6, 8), 0.5, dtype=torch.bfloat16), [np.full((6, 8, 3), 128, np.uint8)]),
    ],
)
def test_images_become_rgb(images: Any, expected: list[Any]) -> None:
    found = media.as_images(images)
    assert len(found) == len(expected)
    for image, right in zip(found, expected, strict=True):
        assert image.dtype == np.uint8 and np.array_equal(image, right)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.randn(3, 8, 8) * 3, ValueError, r"between 0 and 1, got -.* Undo the normalisation"),
        (torch.full((8, 8), math.nan), ValueError, "got nan to nan"),
        (torch.arange(64).reshape(8, 8), ValueError, "or of booleans, got int64"),
        (
            np.zeros((3, 8, 3), np.float32),
            ValueError,
            r"shape \(3, 8, 3\): both the first and the last dimension may be",
        ),
        (torch.zeros(10, 8, 8), ValueError, r"shape \(10, 8, 8\): neither the first .* images\[:, None\]"),
        (torch.zeros(8), ValueError, r"have the shapes .* got \(8,\)"),
        (torch.zeros(3, 0, 8), ValueError, "has no pixels"),
        ([], ValueError, "no images"),
        ([torch.zeros(2, 3, 8, 8)], ValueError, "Item 0 of the list of images must be one image, got Tensor of shape"),
        ([[[0.5]]], ValueError, "Item 0 of the list"),
        ("cat.png", TypeError, "must be a tensor, an array or a list of them, got str 'cat.png'"),
        (Image.new("F", (4, 4)), ValueError, "mode 'F' has no fixed range"),
    ],
)
def test_images_that_are_unclear_are_refused(images: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        media.as_images(images)


def test_captions_are_as_many_as_images() -> None:
    assert media.check_captions(["a", 1], 2) == ["a", "1"] and media.check_captions(None, 2) is None
    with pytest.raises(ValueError, match="2 images and 1 captions"):
        media.check_captions(["a"], 2)
    with pytest.raises(TypeError, match="must be a list with one text for each image, got the text 'ab'"):
        media.check_captions("ab", 2)


def test_captions_are_drawn_whole_below_small_and_large_pictures() -> None:
    for size in (1, 8, 200):
        short = media.add_caption(np.zeros((size, size, 3), np.uint8), "cat")
        long = media.add_caption(np.zeros((size, size, 3), np.uint8), "a word " * 20 + "x" * 100 + "\nnext line")
        factor = max(1, math.ceil(96 / size))
        assert short.shape[1] == long.shape[1] == size * factor
        assert (short[: size * factor] == 0).all()
        below = short[size * factor :]
        assert (below < 128).any() and (below[:, -1] == 255).all() and (below[-1] == 255).all()
        assert long.shape[0] > short.shape[0]
    assert media.add_caption(np.zeros((8, 8, 3), np.uint8), "").shape[1] == 96


def test_audio_becomes_float32() -> None:
    wave_ = np.sin(np.arange(200) / 5)
    for audio in (wave_, torch.tensor(wave_), torch.tensor(wave_)[None], wave_[:, None]):
        found = media.as_audio(audio)
        assert found.shape == (200,) and found.dtype == np.float32 and np.allclose(found, wave_)
    assert media.as_audio(np.stack([wave_, wave_])).shape == (200, 2)
    assert media.as_audio(np.stack([wave_, wave_], 1)).shape == (200, 2)
    assert media.as_audio(np.asarray([-32768, 16384], np.int16)).tolist() == [-1.0, 0.5]
    for audio, message in (
        (wave_ * 2, "between -1 and 1, got a peak of 1.99"),
        (np.full(9, math.nan), "peak of nan"),
        (np.zeros((4, 4)), r"which dimension of audio of shape \(4, 4\) is time"),
        (np.zeros((90, 90)), r"which dimension"),
        (np.zeros(0), r"got \(0,\)"),
        (np.zeros(9, np.int32), "got int32"),
    ):
        with pytest.raises(ValueError, match=message):
            media.as_audio(audio)
    with pytest.raises(ValueError, match="sample_rate must be at least 1, got 0"):
        media.encode_wav(np.zeros(9, np.float32), 0)


@pytest.mark.parametrize(
    "table",
    [
        {"a": [1, 2], "b": ["x", None]},
        {"a": torch.tensor([1, 2]), "b": ("x", None)},
        [{"a": 1, "b": "x"}, {"a": 2}],
        pd.DataFrame({"a": [1, 2], "b": pd.Series(["x", None], dtype=object)}),
    ],
)
def test_tables_become_columns_and_rows(table: Any) -> None:
    assert media.as_table(table) == (["a", "b"], [[1, "x"], [2, None]])


def test_tables_of_rows() -> None:
    assert media.as_table([[1, "x"], (2, None)], ["a", "b"]) == (["a", "b"], [[1, "x"], [2, None]])
    assert media.as_table(torch.tensor([[1, 2]])) == (["0", "1"], [[1, 2]])
    assert media.as_table([], ["a"]) == (["a"], [])
    for table, columns, error, message in (
        ({"a": [1], "b": [1, 2]}, None, ValueError, r"same length, got {'a': 1, 'b': 2}"),
        ({"a": 1}, None, TypeError, "Column 'a' of the table must be a list of cells, got int 1"),
        ({"a": "text"}, None, TypeError, "Column 'a'"),
        ([[1], [1, 2]], None, ValueError, r"Row 1 of the table has 2 cells, there are 1 columns: \['0'\]"),
        ([[1, 2]], ["a"], ValueError, r"Row 0 of the table has 2 cells"),
        ({"a": [1]}, ["b"], ValueError, r"columns=\['b'\] are not those of the table"),
        ([1, 2], None, TypeError, "Row 0 of the table must be a list of cells, got int 1"),
        (torch.tensor(1), None, TypeError, "got a single number"),
        ("a,b", None, TypeError, "A table is a mapping"),
    ):
        with pytest.raises(error, match=message):
            media.as_table(table, columns)


def test_histograms_count_what_is_finite() -> None:
    values = media.as_histogram_values(torch.tensor([[1, 2], [2, 9]]))
    assert values.tolist() == [1, 2, 2, 9]
    assert media.as_histogram_values([True, np.float32(2)]).tolist() == [1, 2]
    counts, edges, num_others = media.count_in_bins(np.asarray([0.0, 1.0, 1.0, math.nan, -math.inf]), 2)
    assert counts.tolist() == [1, 2] and edges.tolist() == [0, 0.5, 1] and num_others == 2
    assert media.count_in_bins(np.full(4, 1e20))[0].sum() == 4
    assert media.count_in_bins(np.asarray([1e20, np.nextafter(1e20, 2e20)]))[0].sum() == 2
    assert media.describe_histogram(np.asarray([math.nan]), 4)["num_non_finite"] == 1
    with pytest.raises(ValueError, match="needs real numbers"):
        media.as_histogram_values(torch.zeros(0))
    with pytest.raises(ValueError, match="needs real numbers"):
        media.as_histogram_values(torch.tensor([1j]))
    with pytest.raises(TypeError, match="needs numbers, got list"):
        media.as_histogram_values(["a"])


def test_files_are_written(tmp_path: Path) -> None:
    media.save_image(tmp_path / "a.png", RGB)
    assert np.array_equal(media.decode_png((tmp_path / "a.png").read_bytes()), RGB)
    media.save_wav(tmp_path / "a.wav", np.asarray([-1.0, 0.0, 1.0], np.float32), 8000)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert np.frombuffer(file.readframes(3), "<i2").tolist() == [-32768, 0, 32767]
    media.save_table(tmp_path / "a.csv", ["ä"], [["ö\nü"]])
    assert (tmp_path / "a.csv").read_bytes().decode() == 'ä\n"ö\nü"\n'
    with pytest.raises(TypeError, match=r"A figure is a matplotlib.figure.Figure, got list \[1\]"):
        media.save_figure(tmp_path / "f.png", [1])  # type: ignore[arg-type]


def test_the_base_class_of_accelerate_trackers_is_for_all_of_them() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    for name in ("aim", "clearml", "comet_ml", "dvclive", "swanlab", "trackio"):
        assert name in LOGGER_TYPE_TO_CLASS
        tracker = AccelerateTracker(name, {}, LOGGER_TYPE_TO_CLASS[name]("project"))
        assert tracker.supported <= {"images", "table"}

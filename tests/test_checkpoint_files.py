"""Checkpoints on storage that fails, fills up or lies, and in the hands of strangers: whole, or refused in words."""

from __future__ import annotations

import ast
import collections
import errno
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR

import pytorch_accelerated
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, WSDCheckpointCallback
from pytorch_accelerated.checkpoint import (
    CheckpointStore,
    find_newest,
    list_checkpoints,
    read_manifest,
    read_metadata,
    read_weights,
    save_weights,
    verify,
)
from pytorch_accelerated.checkpoint import files as protocol
from pytorch_accelerated.checkpoint.__main__ import main
from pytorch_accelerated.checkpoint.weights import check_loadable, read_with_torch, save_with_torch
from pytorch_accelerated.errors import CheckpointError
from tests import checkpoint_cases as cases
from tests.checkpoint_cases import (
    DELETING,
    EVIL_FORMS,
    FILES,
    SAVING,
    AtUpdate,
    Run,
    calls_of,
    evil_bytes,
    failing,
    make_trainer,
    reseal,
    resume,
    run_through,
    train,
    updates_in,
    watched,
)
from tests.checkpoints import make as old
from tests.support import assert_equal_weights, make_data, make_mlp, run_processes, weights_of

ROOT = Path(__file__).parent.parent
FULL = os.strerror(errno.ENOSPC)


@pytest.fixture(scope="module")
def run() -> Run:
    """The run that nothing interrupts."""
    return run_through()


@pytest.fixture(scope="module")
def three(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoints of updates 1, 2 and 3; to be copied."""
    directory = tmp_path_factory.mktemp("three")
    for update in (1, 2, 3):
        CheckpointStore(directory, None, "SaveTrainingStateCallback").write(run.snapshots[update])
    return directory


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, where there is such a thing: hundreds of flushes can take minutes on a busy disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def saved(three: Path, quick: Path) -> Path:
    """A directory of one's own with the checkpoints of updates 1, 2 and 3."""
    return Path(shutil.copytree(three, quick / "saved"))


def failure_of(function: Callable[[], Any]) -> Exception | None:
    try:
        function()
    except Exception as error:
        return error
    return None


def lines_about(text: str, word: str) -> list[str]:
    return [line for line in text.splitlines() if word in line]


def contents_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------------------------
# A fault at every call
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("onwards", [False, True], ids=["once", "until space returns"])
def test_a_save_that_fails_at_any_call_says_so_and_leaves_nothing(onwards: bool, run: Run, quick: Path) -> None:
    directory, problems, resumed = quick / "saved", [], set()
    store = CheckpointStore(directory, None, "SaveTrainingStateCallback")
    first = store.write(run.snapshots[1])
    before = contents_of(directory)
    calls = calls_of(lambda: store.write(run.snapshots[2]))
    second = list_checkpoints(directory)[0]
    shutil.rmtree(second)
    assert {call.name for call in calls} == set(SAVING) and len(calls) > 20
    for number, call in enumerate(calls):
        with watched(failing(number, onwards=onwards)):
            error = failure_of(lambda: store.write(run.snapshots[2]))
        where = f"{call.name} of {call.path}: "
        if error is None and call.path == str(directory) and call.name == "mkdir":
            shutil.rmtree(second)  # it exists already, and whether it can be made does not matter
            continue
        if not isinstance(error, CheckpointError) or str(second) not in str(error) or FULL not in str(error):
            problems.append(f"{where}raised {error!r}")
        if contents_of(directory) != before or os.listdir(directory) != [first.name]:
            problems.append(f"{where}left {sorted(os.listdir(directory))}")
        elif find_newest(directory, problems.append) != first:
            problems.append(f"{where}the earlier one is gone")
        elif call.place not in resumed:  # what lies there is the same after each call, so it need not be trained
            resumed.add(call.place)
            assert_equal_weights(resume(directory, save_at_end=False), run.weights)
            verify(store.write(run.snapshots[2]))
        shutil.rmtree(second, ignore_errors=True)
    assert problems == []


@pytest.mark.parametrize("code", [errno.EIO, errno.EDQUOT, errno.EROFS])
def test_the_cause_is_named(code: int, run: Run, tmp_path: Path) -> None:
    with watched(failing(5, code)), pytest.raises(CheckpointError, match=os.strerror(code)):
        CheckpointStore(tmp_path, None, "SaveTrainingStateCallback").write(run.snapshots[1])
    assert os.listdir(tmp_path) == []


def test_a_write_that_takes_a_part_is_gone_on_with(run: Run, quick: Path) -> None:
    whole = run.snapshots[1]
    calls = calls_of(lambda: whole.write(quick / "whole"))
    expected = read_manifest(quick / "whole")
    numbers = [number for number, call in enumerate(calls) if call.name == "write"]
    assert len(numbers) > 15

    def taking(chosen: Callable[[int], bool], most: Callable[[int], int]) -> cases.Act:
        def act(current: int, call: cases.Call, go: Callable[[], Any], args: tuple[Any, ...]) -> Any:
            if call.name != "write" or not chosen(current):
                return go()
            descriptor, data = args
            return go.func(descriptor, data[: most(len(data))])  # type: ignore[attr-defined]  # a partial

        return act

    def half_at(number: int) -> cases.Act:
        return taking(lambda current: current == number, lambda size: max(size // 2, 1))

    ways = {str(number): half_at(number) for number in numbers}
    ways["all, half"] = taking(lambda n: True, lambda size: -(-size // 2))
    ways["all, 99 bytes"] = taking(lambda n: True, lambda size: 99)
    for name, act in ways.items():
        target = quick / f"short {name}"
        with watched(act):
            whole.write(target)
        assert verify(target) == expected, name


def test_a_file_of_several_chunks_is_written_in_parts_and_hashed_right(tmp_path: Path) -> None:
    weights = {"large": torch.arange(3_000_001, dtype=torch.float32), "small": torch.ones(3)}

    def act(current: int, call: cases.Call, go: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        return go.func(args[0], args[1][:1_000_003]) if call.name == "write" else go()  # type: ignore[attr-defined]

    with watched(act) as calls:
        digest = save_weights(tmp_path / "a.safetensors", weights, {})
    assert sum(call.name == "write" for call in calls) > 12
    assert digest == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert_equal_weights(safetensors.torch.load_file(tmp_path / "a.safetensors"), weights)


def test_a_buffer_may_be_used_again_once_it_is_written(tmp_path: Path) -> None:
    """Whoever writes, torch in C++ for one, may do with its memory what it likes when ``write`` returns."""
    free = threading.Event()
    with ThreadPoolExecutor(1) as hasher:
        hasher.submit(free.wait)  # the hasher is busy for a while
        threading.Timer(0.3, free.set).start()
        buffer = bytearray(b"x" * 1_000_000)
        file = protocol.DurableFile(tmp_path / "file", hasher)
        file.write(buffer)
        buffer[:] = bytes(len(buffer))
        digest = file.close()
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()


@pytest.mark.parametrize("max_checkpoints", [None, 1], ids=["all kept", "one kept"])
def test_a_kill_at_any_call_leaves_a_whole_checkpoint(max_checkpoints: int | None, quick: Path) -> None:
    [(number, problems)] = run_processes(cases.kill_at_every_call, 0, quick / "saved", max_checkpoints)
    assert problems == []
    assert number > 20


def test_a_run_killed_while_it_saves_and_rotates_goes_on_to_the_same_weights(quick: Path) -> None:
    [problems] = run_processes(cases.kill_a_run_at_each_place, 0, quick / "saved")
    assert problems == []


def test_failing_to_delete_old_checkpoints_is_an_error_and_costs_none(run: Run, quick: Path) -> None:
    directory, problems = quick / "saved", []
    store = CheckpointStore(directory, 1, "SaveTrainingStateCallback")

    def begin() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        store.write(run.snapshots[1])

    begin()
    calls = calls_of(lambda: store.write(run.snapshots[2]), SAVING + DELETING)
    [renamed] = [n for n, call in enumerate(calls) if call.name == "replace" and "update-1" in call.path]
    assert {call.name for call in calls[renamed:]} >= {"replace", *DELETING}
    for number in range(renamed, len(calls)):
        begin()
        with watched(failing(number, errno.EIO), SAVING + DELETING):
            error = failure_of(lambda: store.write(run.snapshots[2]))
        where = f"{calls[number]}: "
        if not isinstance(error, CheckpointError) or "update-1" not in str(error) or "Input/output" not in str(error):
            problems.append(f"{where}raised {error!r}")
        newest = find_newest(directory, problems.append)
        if newest is None or not newest.name.endswith("update-2"):
            problems.append(f"{where}found {newest}")
        store.prepare()
        store.write(run.snapshots[3])
        if updates_in(directory) != [3] or len(os.listdir(directory)) != 1:
            problems.append(f"{where}left {sorted(os.listdir(directory))}")
    assert problems == []


def test_a_run_whose_save_fails_stops_with_the_reason_and_can_be_resumed(run: Run, quick: Path) -> None:
    calls = calls_of(lambda: run.snapshots[2].write(quick / "other"))
    places = {call.place: number for number, call in enumerate(calls) if call.name != "mkdir"}
    for place, number in places.items():
        directory = quick / "-".join(place)
        watching = ExitStack()

        def arm(trainer: Trainer, watching: ExitStack = watching, number: int = number) -> None:
            if trainer.num_updates == 2:
                watching.enter_context(watched(failing(number, onwards=True)))

        with watching, pytest.raises(CheckpointError, match=f"cannot save .*update-2: {FULL}"):
            train(make_trainer(directory, AtUpdate(arm, order=1)))
        assert_equal_weights(resume(directory), run.weights)
        leftovers = [name for name in os.listdir(directory) if not name.startswith("checkpoint-")]
        assert leftovers == [], place


@pytest.mark.parametrize("name", ["write", "fsync", "replace"])
def test_a_save_in_the_background_that_fails_stops_the_run_too(name: str, run: Run, quick: Path) -> None:
    watching = ExitStack()

    def act(current: int, call: cases.Call, go: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if call.name == name:
            raise OSError(errno.ENOSPC, FULL)
        return go()

    def arm(trainer: Trainer) -> None:
        if trainer.num_updates == 2:
            [saver] = [one for one in trainer.callback_handler if isinstance(one, SaveTrainingStateCallback)]
            saver._finish_background()  # the first one, which is not to fail
            watching.enter_context(watched(act))

    trainer = make_trainer(quick, AtUpdate(arm, order=1), asynchronous=True)
    with watching, pytest.raises(CheckpointError, match=f"cannot save .*update-2: {FULL}"):
        train(trainer)
    assert updates_in(quick) == [1] and len(os.listdir(quick)) == 1
    assert_equal_weights(resume(quick), run.weights)


@pytest.mark.parametrize("is_failing", [False, True])
def test_large_files_are_flushed_on_the_way_and_a_failure_then_is_not_forgotten(
    is_failing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of a lost page once; the flush at the end would find nothing wrong."""
    monkeypatch.setattr(protocol, "_FLUSH_EVERY", 1 << 20)
    threads, sync = [], os.fsync

    def watch(descriptor: int) -> None:
        threads.append(threading.current_thread())
        if is_failing and len(threads) == 1:
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    tensors = {"a": torch.randn(3 << 20)}
    path = tmp_path / "large.safetensors"
    if is_failing:
        with pytest.raises(CheckpointError, match=r"cannot save .*large\.safetensors: Input/output error"):
            save_weights(path, tensors, {})
        assert os.listdir(tmp_path) == []
    else:
        digest = save_weights(path, tensors, {})
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
        assert torch.equal(safetensors.torch.load_file(path)["a"], tensors["a"])
    assert threads[0] is not threading.main_thread()


def test_when_the_main_process_cannot_save_all_know_why(tmp_path: Path) -> None:
    for error in run_processes(cases.fail_on_the_main_process, 2, tmp_path):
        assert f"cannot save {tmp_path}" in error and FULL in error
    assert os.listdir(tmp_path) == []


def flushes_and_the_like(function: Callable[[], Any]) -> list[tuple[str, str]]:
    return [(call.name, call.path) for call in calls_of(function)]


def test_names_reach_the_disk_after_what_they_name(run: Run, tmp_path: Path) -> None:
    """What a power cut may take is what was not flushed: nothing of a checkpoint, once it has its name."""
    events = flushes_and_the_like(
        lambda: CheckpointStore(tmp_path, 1, "SaveTrainingStateCallback").write(run.snapshots[1])
    )
    [renaming] = [number for number, (name, _) in enumerate(events) if name == "replace"]
    temporary = events[renaming][1]
    for name in FILES:
        about = [(number, kind) for number, (kind, path) in enumerate(events) if path == f"{temporary}/{name}"]
        assert [kind for _, kind in about].count("fsync") == 1 and about[-1][1] == "fsync", name
        assert about[-1][0] < renaming
    written = [path for kind, path in events if kind == "write"]
    assert written[-1].endswith(protocol.MANIFEST)
    last_write = max(number for number, (kind, _) in enumerate(events) if kind == "write")
    assert last_write < events.index(("fsync", temporary)) < renaming < events.index(("fsync", str(tmp_path)))


def test_a_file_reaches_the_disk_before_its_name(tmp_path: Path) -> None:
    events = flushes_and_the_like(lambda: save_weights(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {}))
    kinds = [kind for kind, _ in events if kind != "mkdir"]
    assert kinds == ["write", "write", "write", "fsync", "replace", "fsync"]
    assert events[-1] == ("fsync", str(tmp_path))


def test_directories_that_are_made_on_the_way_reach_the_disk(run: Run, tmp_path: Path) -> None:
    """A flushed directory that nothing names is lost with all that is in it."""
    ways: dict[str, Callable[[Path], Any]] = {
        "write": lambda directory: CheckpointStore(directory, None, "SaveTrainingStateCallback").write(
            run.snapshots[1]
        ),
        "prepare": lambda directory: CheckpointStore(directory, None, "SaveTrainingStateCallback").prepare(),
        "save_weights": lambda directory: save_weights(directory / "a.pt", {"a": torch.ones(2)}, {}),
    }
    problems = []
    for name, way in ways.items():
        events = flushes_and_the_like(partial(way, tmp_path / name / "newer"))
        for parent in (tmp_path, tmp_path / name):
            if ("fsync", str(parent)) not in events:
                problems.append(f"{name}: {parent} was not flushed, though a directory was made in it")
    assert problems == []


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_is_replaced_at_once_or_stays(suffix: str, quick: Path) -> None:
    path = quick / f"model{suffix}"
    trainer = make_trainer(None)
    trainer.save_model(path)
    before, original = path.read_bytes(), trainer.model[0].weight.detach().clone()
    with torch.no_grad():
        trainer.model[0].weight.zero_()
    calls = calls_of(lambda: trainer.save_model(path))
    after, problems = path.read_bytes(), []
    assert after != before
    for number, call in enumerate(calls):
        path.write_bytes(before)
        with watched(failing(number)):
            error = failure_of(lambda: trainer.save_model(path))
        if error is None and call.name == "mkdir":
            continue
        if not isinstance(error, CheckpointError) or str(path) not in str(error) or FULL not in str(error):
            problems.append(f"{call}: raised {error!r}")
        elif path.read_bytes() != before and "is as it was" in str(error):
            problems.append(f"{call}: the file is another, and the error says: {error}")
        if os.listdir(quick) != [path.name]:
            problems.append(f"{call}: left {os.listdir(quick)}")
    assert problems == []
    trainer.load_checkpoint(path)
    assert not torch.equal(trainer.model[0].weight, original)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_kill_leaves_the_old_file_or_the_new_one(suffix: str, quick: Path) -> None:
    [(number, problems)] = run_processes(cases.kill_a_file_at_every_call, 0, quick / f"model{suffix}")
    assert problems == []
    assert number > 4


# --------------------------------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------------------------------


def _flip(path: Path, position: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(position * (len(data) - 1))] ^= 0x20
    path.write_bytes(data)


def _replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _replace_by_link(path: Path) -> None:
    other = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(other)
    path.symlink_to(other)  # what it leads to is right, and may change at any time


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut to half": (lambda path: os.truncate(path, path.stat().st_size // 2), "bytes instead of"),
    "emptied": (lambda path: os.truncate(path, 0), "has 0 bytes instead of"),
    "deleted": (lambda path: path.unlink(), "is missing"),
    "first byte flipped": (lambda path: _flip(path, 0), "is damaged"),
    "byte flipped early": (lambda path: _flip(path, 0.1), "is damaged"),
    "byte flipped in the middle": (lambda path: _flip(path, 0.5), "is damaged"),
    "last byte flipped": (lambda path: _flip(path, 1), "is damaged"),
    "garbage appended": (lambda path: path.write_bytes(path.read_bytes() + b"\0garbage"), "bytes instead of"),
    "a directory in its place": (_replace_by_directory, "is not a plain file"),
    "a link in its place": (_replace_by_link, "is not a plain file"),
}


def damage(path: Path, kind: str) -> str:
    """Damage a file, and return what is to be said of it."""
    act, reason = DAMAGES[kind]
    act(path)
    if path.name == protocol.MANIFEST and "bytes" in reason:
        reason = "is damaged"  # nothing says how large it was
    return f"{path.name} {reason}" if "bytes instead" not in reason or "0 bytes" in reason else reason


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    kind: str, name: str, saved: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, previous = list_checkpoints(saved)[:2]
    reason = damage(newest / name, kind)
    found = contents_of(newest)
    assert_equal_weights(resume(saved), run.weights)
    said = capsys.readouterr().out
    [line] = lines_about(said, "Passed over")
    assert line.startswith(f"Passed over {newest}: ") and name in line and reason in line
    assert len(lines_about(said, newest.name)) == 1
    assert len(lines_about(said, f"Resuming from {previous}: ")) == 1
    assert contents_of(newest) == found  # nobody has repaired or deleted it


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["cut to half", "deleted", "byte flipped in the middle", "a link in its place"])
def test_a_damaged_checkpoint_that_is_asked_for_is_refused(kind: str, name: str, saved: Path) -> None:
    newest = list_checkpoints(saved)[0]
    reason = damage(newest / name, kind)
    trainer = make_trainer(saved)
    before = weights_of(trainer)
    ways: dict[str, Callable[[], Any]] = {
        "resume_from": lambda: train(trainer, newest),
        "load_training_state": lambda: trainer.load_training_state(newest),
        "load_checkpoint": lambda: trainer.load_checkpoint(newest),
    }
    problems = []
    for way, load in ways.items():
        error = failure_of(load)
        if not isinstance(error, CheckpointError) or any(
            word not in str(error) for word in (str(newest), name, reason)
        ):
            problems.append(f"{way}: {error!r}")
    assert problems == []
    assert_equal_weights(weights_of(trainer), before)


def test_where_all_are_damaged_nothing_begins_silently(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, name in zip(list_checkpoints(saved), FILES, strict=False):
        damage(path / name, "cut to half")
    trainer = make_trainer(saved)
    before, found = weights_of(trainer), contents_of(saved)
    for resume_from in ("latest", saved):
        with pytest.raises(CheckpointError, match=f"none of the 3 checkpoints in {saved} is whole"):
            train(trainer, resume_from)
        said = capsys.readouterr().out
        assert len(lines_about(said, "Passed over")) == 3 and lines_about(said, "beginning anew") == []
    assert_equal_weights(weights_of(trainer), before)
    assert contents_of(saved) == found


def test_a_directory_that_is_no_checkpoint_but_has_its_name_is_passed_over(saved: Path, run: Run) -> None:
    (saved / "checkpoint-000007-epoch-1-update-3").mkdir()
    (saved / "checkpoint-000008-epoch-1-update-3").write_text("")
    (saved / "checkpoint-000009-epoch-1-update-3").symlink_to(saved / "nowhere")
    said: list[str] = []
    newest = find_newest(saved, said.append)
    assert newest is not None and newest.name == "checkpoint-000003-epoch-1-update-3" and len(said) == 3
    assert_equal_weights(resume(saved), run.weights)
    assert max(path.name for path in saved.iterdir()).startswith("checkpoint-000010-")


def test_latest_begins_anew_where_there_is_nothing(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        assert_equal_weights(resume(tmp_path / name), run.weights)
        [line] = capsys.readouterr().out.splitlines()
        assert line == f"No checkpoint in {tmp_path / name}: beginning anew."
    with pytest.raises(CheckpointError, match="none among the callbacks"):
        train(make_trainer(None), "latest")


def test_a_path_where_there_is_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    trainer = make_trainer(tmp_path / "saved")
    for path in (tmp_path / "missing", tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300), ""):
        error = failure_of(partial(train, trainer, path))
        assert isinstance(error, CheckpointError) and repr(str(path)) in str(error), (path, error)
        error = failure_of(partial(trainer.load_checkpoint, path or tmp_path / "missing"))
        assert isinstance(error, CheckpointError) and str(path) in str(error), (path, error)
    capsys.readouterr()
    with pytest.raises(CheckpointError, match=f"^No checkpoint in {tmp_path / 'empty'}.$"):
        trainer.load_training_state(tmp_path / "empty")
    assert capsys.readouterr().out == ""
    for value in (True, 3, b"latest"):
        with pytest.raises(TypeError, match="resume_from must be 'latest', a path, or None"):
            train(trainer, value)
    assert not (tmp_path / "saved").exists()


def test_a_checkpoint_of_a_newer_version_is_refused_by_name(saved: Path, run: Run) -> None:
    newest = list_checkpoints(saved)[0]
    reseal(newest, format_version=protocol.FORMAT_VERSION + 1)
    with pytest.raises(CheckpointError, match=f"it has format {protocol.FORMAT_VERSION + 1}, and this"):
        resume(saved, newest)
    said: list[str] = []
    assert find_newest(saved, said.append) == list_checkpoints(saved)[1] and "format" in said[0]


def test_one_damaged_directory_does_not_hide_a_whole_checkpoint_in_another(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "checkpoint-000001-epoch-1-update-1").mkdir(parents=True)
    found = failure_of(lambda: train(make_trainer(saved, SaveTrainingStateCallback(other), every=100), "latest"))
    assert found is None


def test_weights_beside_checkpoints_do_not_make_their_directory_one(saved: Path, run: Run) -> None:
    make_trainer(None).save_model(saved / "model.safetensors")  # as good a name as any
    assert_equal_weights(resume(saved, saved), run.weights)


# --------------------------------------------------------------------------------------------------------------------
# Files of strangers
# --------------------------------------------------------------------------------------------------------------------


def loaders_of(path: Path, trainer: Trainer) -> dict[str, Callable[[], Any]]:
    """Return the ways in which a checkpoint is read."""
    return {
        "resume_from": lambda: train(trainer, path),
        "latest": lambda: train(trainer, "latest"),
        "load_training_state": lambda: trainer.load_training_state(path),
        "load_checkpoint": lambda: trainer.load_checkpoint(path),
        "load_checkpoint without optimizer": lambda: trainer.load_checkpoint(path, load_optimizer=False),
        "inspect": lambda: main(["inspect", str(path)]),
        "verify": lambda: main(["verify", str(path)]),
        "inspect all": lambda: main(["inspect", str(path.parent)]),
        "verify all": lambda: main(["verify", str(path.parent)]),
    }


# What does not read a file cannot complain about it.
DOES_NOT_READ = {
    (protocol.FACTS, "load_checkpoint"),
    (protocol.FACTS, "load_checkpoint without optimizer"),
    (protocol.OPTIMIZER, "load_checkpoint without optimizer"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", EVIL_FORMS)
def test_code_in_a_checkpoint_is_never_run(form: str, name: str, saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for path in list_checkpoints(saved)[1:]:
        shutil.rmtree(path)  # there is nothing better to fall back to
    newest = list_checkpoints(saved)[0]
    data = evil_bytes(form, marker, (newest / name).read_bytes())
    (newest / name).write_bytes(data)
    if name != protocol.MANIFEST:
        reseal(newest)
        verify(newest)
    trainer, problems = make_trainer(saved), []
    for way, load in loaders_of(newest, trainer).items():
        error = failure_of(load)
        if marker.exists():
            problems.append(f"{way} has run the code")
            marker.unlink()
        # The commands return an exit code.
        if not isinstance(error, CheckpointError) and "inspect" not in way and "verify" not in way:
            if error is not None or (name, way) not in DOES_NOT_READ:
                problems.append(f"{way}: {error!r}")
        elif error is not None and not isinstance(error, CheckpointError):
            problems.append(f"{way}: {error!r}")
    assert problems == []
    # The code works where it is let.
    if form == "bare pickle":
        import pickle

        pickle.loads(data)["state"].close()
    else:
        torch.load(io.BytesIO(data), weights_only=False)["state" if "itself" not in form else "more"].close()
    assert marker.exists()


def test_nobody_is_told_to_run_the_code_all_the_same(saved: Path, tmp_path: Path) -> None:
    newest = list_checkpoints(saved)[0]
    (newest / protocol.STATE).write_bytes(evil_bytes("file of torch", tmp_path / "marker", b""))
    reseal(newest)
    error = failure_of(lambda: make_trainer(None).load_training_state(newest))
    # Torch's own words go on to say how, in several paragraphs and with codes for the colours of a terminal.
    assert "set to `False`" not in str(error) and "safe_globals" not in str(error) and "\x1b" not in str(error)


@pytest.mark.parametrize("form", EVIL_FORMS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
def test_code_in_a_file_of_weights_is_never_run(form: str, suffix: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / f"model{suffix}"
    trainer = make_trainer(None)
    trainer.save_checkpoint(tmp_path / "model.pt")
    path.write_bytes(evil_bytes(form, marker, (tmp_path / "model.pt").read_bytes()))
    for load in (trainer.load_checkpoint, read_weights, read_metadata):
        with pytest.raises(CheckpointError, match=str(path)):
            load(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a/b", "", ".", "..", "nul\0", "\ud800", "x" * 300],
    ids=lambda name: repr(name)[:12],
)
def test_a_manifest_cannot_name_what_is_not_in_its_directory(name: str, saved: Path, tmp_path: Path) -> None:
    newest = list_checkpoints(saved)[0]
    name = str(tmp_path / "x") if name == "/x" else name
    (saved / "x").write_bytes(b"secret")
    (tmp_path / "x").write_bytes(b"secret")
    facts = {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    content = read_manifest(newest)
    reseal(newest, files=content["files"] | {name: facts})
    with pytest.raises(CheckpointError, match=r"manifest\.json|File name too long"):
        verify(newest)
    with pytest.raises(CheckpointError, match=str(newest)):
        resume(saved, newest)
    said: list[str] = []
    assert find_newest(saved, said.append) == list_checkpoints(saved)[1] and len(said) == 1


NONSENSE: dict[str, dict[str, Any]] = {
    "version of words": {"format_version": "new"},
    "no version": {"format_version": None},
    "list of files": {"files": [1, 2]},
    "endless size": {"files": {protocol.MODEL: {"size": float("inf"), "sha256": ""}}},
    "no number": {"files": {protocol.MODEL: {"size": float("nan"), "sha256": ""}}},
    "size of words": {"files": {protocol.MODEL: {"size": "large", "sha256": ""}}},
    "no facts": {"files": {protocol.MODEL: None}},
    "no files": {"files": {}},
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_a_manifest_of_nonsense_is_refused_like_a_damaged_one(kind: str, saved: Path) -> None:
    newest = list_checkpoints(saved)[0]
    reseal(newest, **NONSENSE[kind])
    with pytest.raises(CheckpointError):
        verify(newest)
    said: list[str] = []
    assert find_newest(saved, said.append) == list_checkpoints(saved)[1] and len(said) == 1


@pytest.mark.parametrize("name", FILES)
def test_a_manifest_without_one_of_the_files_is_not_of_a_whole_checkpoint(name: str, saved: Path) -> None:
    newest = list_checkpoints(saved)[0]
    if name == protocol.MANIFEST:  # one that is not sealed
        content = read_manifest(newest)
        (newest / name).write_text(json.dumps(content))
    else:
        content = read_manifest(newest)
        del content["files"][name]
        reseal(newest, files=content["files"])
        (newest / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        verify(newest)


MANGLED: dict[str, bytes] = {
    "a list": b"[]",
    "nothing": b"null",
    "no keys": b"{}",
    "nested too deep": b"[" * 100_000,
    "a number too long": b'{"seed": ' + b"1" * 5000 + b"}",
    "not text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("kind", MANGLED)
def test_facts_of_nonsense_are_refused(kind: str, saved: Path) -> None:
    newest = list_checkpoints(saved)[0]
    (newest / protocol.FACTS).write_bytes(MANGLED[kind])
    reseal(newest)
    with pytest.raises(CheckpointError, match=str(newest)):
        resume(saved, newest)
    assert main(["inspect", str(newest)]) == 1


def test_facts_that_lack_something_are_refused_in_words(saved: Path) -> None:
    newest = list_checkpoints(saved)[0]
    facts, problems = json.loads((newest / protocol.FACTS).read_text()), []
    for key in facts:
        for mangled in ({k: v for k, v in facts.items() if k != key}, facts | {key: ["?"]}):
            (newest / protocol.FACTS).write_text(json.dumps(mangled))
            reseal(newest)
            trainer = make_trainer(saved)
            for way in ("resume_from", "load_training_state", "inspect", "inspect all"):
                error = failure_of(loaders_of(newest, trainer)[way])
                if error is not None and not isinstance(error, CheckpointError):
                    problems.append(f"{way} without {key}: {error!r}")
    assert problems == []


@pytest.mark.parametrize("name", [protocol.STATE, protocol.OPTIMIZER])
def test_contents_that_lack_something_are_refused_in_words(name: str, saved: Path) -> None:
    newest = list_checkpoints(saved)[0]
    content, problems = torch.load(newest / name, weights_only=True), []
    for mangled in ([], None, {}, *({k: v for k, v in content.items() if k != key} for key in content)):
        torch.save(mangled, newest / name)
        reseal(newest)
        trainer = make_trainer(saved)
        for way in ("resume_from", "load_training_state", "load_checkpoint"):
            error = failure_of(loaders_of(newest, trainer)[way])
            if error is not None and not isinstance(error, CheckpointError):
                problems.append(f"{way} with {str(mangled)[:20]}: {error!r}")
    assert problems == []


HEADERS: dict[str, bytes] = {
    "longer than the file": (2**40).to_bytes(8, "little") + b"{}",
    "longest of all": b"\xff" * 16,
    "offsets beyond the end": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "offsets that do not fit the shape": b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}    ',
    "a type that nobody knows": b'{"a":{"dtype":"Q7","shape":[],"data_offsets":[0,4]}}    ',
}


@pytest.mark.parametrize("kind", HEADERS)
def test_weights_of_nonsense_are_refused(kind: str, saved: Path) -> None:
    newest, header = list_checkpoints(saved)[0], HEADERS[kind]
    data = header if "long" in kind else len(header).to_bytes(8, "little") + header
    (newest / protocol.MODEL).write_bytes(data)
    reseal(newest)
    trainer = make_trainer(saved)
    for way in ("resume_from", "load_training_state", "load_checkpoint"):
        with pytest.raises(CheckpointError, match=str(newest)):
            loaders_of(newest, trainer)[way]()
    assert main(["inspect", str(newest)]) == 1


def test_files_of_torch_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    names = list(make_mlp().state_dict())
    contents: dict[str, Any] = {
        "list": [1, 2],
        "number": 1,
        "list of weights": {"model_state_dict": [1]},
        "words": dict.fromkeys(names, "word"),
        "numbers": {"model_state_dict": dict.fromkeys(names, 1)},
        "keys that are no words": {1: torch.ones(1)},
    }
    trainer, problems = make_trainer(None), []
    before = weights_of(trainer)
    for kind, content in contents.items():
        path = tmp_path / f"{kind}.pt"
        torch.save(content, path)
        for read in (trainer.load_checkpoint, read_metadata):
            error = failure_of(partial(read, path))
            if isinstance(error, CheckpointError) and str(path) in str(error):
                continue
            if read == read_metadata and isinstance(content, dict) and error is None:
                continue
            problems.append(f"{kind}: {error!r}")
    assert problems == []
    assert_equal_weights(weights_of(trainer), before)


def test_nothing_in_the_package_unpickles() -> None:
    loaders = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    sources = sorted(Path(pytorch_accelerated.__file__).parent.rglob("*.py"))
    assert len(sources) > 20
    loads, problems = 0, []
    for path in sources:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                problems += [f"{where} imports {a.name}" for a in node.names if a.name.split(".")[0] in loaders]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in loaders:
                problems.append(f"{where} imports from {node.module}")
            elif isinstance(node, ast.Call):
                arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                name = ast.unparse(node.func)
                if name.endswith("torch.load") or name == "load":
                    loads += 1
                    if arguments.get("weights_only") != "True":
                        problems.append(f"{where} loads without weights_only=True")
                if arguments.get("allow_pickle", "False") != "False" or "unpickle" in name.lower():
                    problems.append(f"{where} unpickles")
                if name in ("eval", "exec", "compile", "__import__", "add_safe_globals"):
                    problems.append(f"{where} calls {name}")
        if "weights_only=False" in text or "add_safe_globals" in text or "NO_WEIGHTS_ONLY" in text:
            problems.append(f"{path.name} lets code be run")
    assert problems == []
    assert loads == 1  # one place to look at


# --------------------------------------------------------------------------------------------------------------------
# Storage
# --------------------------------------------------------------------------------------------------------------------


def _mount(directory: Path, options: str) -> bool:
    directory.mkdir(exist_ok=True)
    try:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(directory)]
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@contextmanager
def mounted(directory: Path, options: str) -> Iterator[bool]:
    """Mount a file system in memory; give False where that is not permitted."""
    is_mounted = _mount(directory, options)
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


@contextmanager
def changeable(directory: Path) -> Iterator[Callable[[bool], None]]:
    """Give a function that takes the right to write in a directory away, from root as well, and gives it back."""
    with mounted(directory, "size=4m") as is_mounted:
        if not is_mounted and os.geteuid() == 0:
            pytest.skip("as root without the right to mount, nothing here can be made read-only")

        def allow(is_writable: bool) -> None:
            if is_mounted:
                mode = "rw" if is_writable else "ro"
                subprocess.run(["mount", "-o", f"remount,{mode}", str(directory)], check=True)
            else:
                for path in (directory, *directory.rglob("*")):
                    if path.is_dir():
                        path.chmod(0o755 if is_writable else 0o555)

        try:
            yield allow
        finally:
            allow(True)


READ_ONLY = f"{os.strerror(errno.EROFS)}|{os.strerror(errno.EACCES)}"


def test_a_directory_that_becomes_read_only(run: Run, tmp_path: Path) -> None:
    directory = tmp_path / "disk"
    with changeable(directory) as allow:

        def forbid(trainer: Trainer) -> None:
            if trainer.num_updates == 2:
                allow(False)

        with pytest.raises(CheckpointError, match=f"cannot save {directory}.*update-2: ({READ_ONLY})"):
            train(make_trainer(directory, AtUpdate(forbid, order=1)))
        assert updates_in(directory) == [1] and len(os.listdir(directory)) == 1
        # It is known at the beginning of a run, before any training is lost.
        trainer = make_trainer(directory)
        with pytest.raises(CheckpointError, match=f"{directory}.*({READ_ONLY})"):
            train(trainer)
        assert trainer.num_updates == 0
        # Who does not save needs no right to write.
        trainer = make_trainer(None)
        assert_equal_weights(train(trainer, directory), run.weights)
        trainer.load_training_state(directory)
        for save in (trainer.save_training_state, trainer.save_model):
            with pytest.raises(CheckpointError, match=f"cannot save {directory / 'other'}: ({READ_ONLY})"):
                save(directory / "other")
        allow(True)
        assert_equal_weights(resume(directory), run.weights)
        assert all(name.startswith("checkpoint-") for name in os.listdir(directory))


@pytest.mark.parametrize("kind", ["below a file", "below a file that is to be a parent", "in /proc"])
def test_a_place_where_nothing_can_be_made(kind: str, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    place = {
        "below a file": file,
        "below a file that is to be a parent": file / "a" / "b",
        "in /proc": Path("/proc/nothing-here"),
    }[kind]
    cause = "Not a directory|File exists|No such file or directory|Permission denied"
    trainer = make_trainer(place)
    with pytest.raises(CheckpointError, match=f"{place}.*({cause})"):
        train(trainer)
    assert trainer.num_updates == 0
    with pytest.raises(CheckpointError, match=f"{place}"):
        resume(place)
    trainer = make_trainer(None)
    assert_equal_weights(train(trainer), run.weights)
    for name, save in {"state": trainer.save_training_state, "model.pt": trainer.save_model}.items():
        with pytest.raises(CheckpointError, match=f"cannot save {place / name}: ({cause})"):
            save(place / name)
    assert file.read_text() == "kept" and os.listdir(tmp_path) == ["file"]


def test_a_path_that_is_too_long_is_an_error_in_words(run: Run, tmp_path: Path) -> None:
    trainer = make_trainer(None)
    train(trainer)
    path = tmp_path / ("x" * 300)
    for save in (trainer.save_training_state, trainer.save_model):
        with pytest.raises(CheckpointError, match="File name too long"):
            save(path)
    with pytest.raises(CheckpointError, match="File name too long"):
        train(make_trainer(path))


def test_a_checkpoint_never_replaces_what_is_there(saved: Path, run: Run, tmp_path: Path) -> None:
    trainer = make_trainer(None)
    train(trainer)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = contents_of(tmp_path)
    for path in (list_checkpoints(saved)[0], tmp_path / "empty", tmp_path / "file", tmp_path / "link", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path} is there already"):
            trainer.save_training_state(path)
    assert contents_of(tmp_path) == before


def test_a_directory_that_is_removed_during_the_run(run: Run, tmp_path: Path) -> None:
    directory = tmp_path / "a" / "saved"

    def remove(trainer: Trainer) -> None:
        if trainer.num_updates == 3:
            shutil.rmtree(tmp_path / "a")

    assert_equal_weights(train(make_trainer(directory, AtUpdate(remove, order=1), max_checkpoints=2)), run.weights)
    assert updates_in(directory) == [4, 4]  # it is made again
    assert_equal_weights(resume(directory), run.weights)


def test_a_directory_that_is_replaced_by_a_file_during_the_run(run: Run, tmp_path: Path) -> None:
    directory = tmp_path / "a" / "saved"

    def replace(trainer: Trainer) -> None:
        if trainer.num_updates == 3:
            (tmp_path / "a").rename(tmp_path / "b")
            (tmp_path / "a").write_text("")

    with pytest.raises(CheckpointError, match=f"{directory}.*(Not a directory|File exists)"):
        train(make_trainer(directory, AtUpdate(replace, order=1)))
    (tmp_path / "a").unlink()
    (tmp_path / "b").rename(tmp_path / "a")
    assert_equal_weights(resume(directory), run.weights)


def test_a_directory_that_is_removed_during_a_save(run: Run, quick: Path) -> None:
    directory = quick / "saved"
    directory.mkdir()
    calls = calls_of(lambda: CheckpointStore(directory, None, "SaveTrainingStateCallback").write(run.snapshots[1]))
    renaming = next(number for number, call in enumerate(calls) if call.name == "replace")
    upto = enumerate(calls[: renaming + 1])
    # Where the directory itself is made, it is made again.
    last_calls = {call.place: number for number, call in upto if call.path != str(directory)}
    assert len(last_calls) > 10
    for number in last_calls.values():

        def act(
            current: int, call: cases.Call, go: Callable[[], Any], args: tuple[Any, ...], number: int = number
        ) -> Any:
            if current == number:
                shutil.rmtree(directory)
            return go()

        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        with watched(act), pytest.raises(CheckpointError, match=f"{directory}.*No such file or directory"):
            CheckpointStore(directory, None, "SaveTrainingStateCallback").write(run.snapshots[1])
        assert not directory.exists()


def test_a_file_system_that_is_full(run: Run, tmp_path: Path) -> None:
    directory = tmp_path / "disk"
    with mounted(directory, "size=256k") as is_mounted:
        if not is_mounted:
            pytest.skip("mounting is not permitted; test_a_limit_on_the_size_of_files has a real refusal all the same")
        filler = directory / "filler"

        def fill(trainer: Trainer) -> None:
            if trainer.num_updates == 2:
                left = shutil.disk_usage(directory).free
                filler.write_bytes(b"x" * (left - 16384))  # room for some of the files

        with pytest.raises(CheckpointError, match=f"cannot save {directory}.*update-2: {FULL}"):
            train(make_trainer(directory, AtUpdate(fill, order=1)))
        assert updates_in(directory) == [1] and sorted(os.listdir(directory))[1:] == ["filler"]
        verify(list_checkpoints(directory)[0])
        assert shutil.disk_usage(directory).free == 16384  # nothing of the failed one is left
        error = failure_of(lambda: make_trainer(None).save_checkpoint(directory / "x.pt", {"large": torch.ones(9999)}))
        assert isinstance(error, CheckpointError) and f"{directory / 'x.pt'}: {FULL}" in str(error)
        with pytest.raises(CheckpointError, match=FULL):
            resume(directory)
        filler.unlink()
        assert_equal_weights(resume(directory), run.weights)


def test_leftovers_that_fill_the_disk_do_not_keep_the_next_run_from_clearing_them(run: Run, tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    directory = tmp_path / "disk"
    with mounted(directory, "size=1m,nr_inodes=32") as is_mounted:
        if not is_mounted:
            pytest.skip("mounting is not permitted, and a disk without free inodes cannot be had otherwise")
        CheckpointStore(directory, None, "SaveTrainingStateCallback").write(run.snapshots[1])
        leftover = directory / _temporary_name(dead.pid)
        leftover.mkdir()
        with pytest.raises(OSError, match=FULL):
            for number in range(32):
                (leftover / str(number)).touch()
        assert_equal_weights(resume(directory), run.weights)


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    directory = tmp_path / "saved"
    [found] = run_processes(cases.save_with_a_limit, 0, directory)
    assert found["error"] is not None and os.strerror(errno.EFBIG) in found["error"]
    assert f"cannot save {directory}" in found["error"] and "update-2" in found["error"]
    assert found["updates"] == [1] and len(found["left"]) == 1 and found["whole"].endswith("update-1")


def test_the_temporary_directory_does_not_matter(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    shared = Path("/dev/shm")
    with ExitStack() as stack:
        if shared.is_dir() and os.access(shared, os.W_OK) and shared.stat().st_dev != tmp_path.stat().st_dev:
            base = shared / f"pytorch-accelerated-{os.getpid()}"
            base.mkdir()
            stack.callback(shutil.rmtree, base)
        elif stack.enter_context(mounted(tmp_path / "disk", "size=4m")):
            base = tmp_path / "disk"
        else:
            pytest.skip("there is no second file system here")
        for directory in (base / "saved", tmp_path / "saved"):
            trainer = make_trainer(directory, max_checkpoints=1, save_at_end=False)
            train(trainer, updates=2)
            trainer.save_model(directory / "model.pt")
            trainer.save_training_state(directory / "state")
            assert_equal_weights(resume(directory), run.weights)
    assert not (tmp_path / "missing").exists()


# --------------------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(saved: Path, tmp_path: Path) -> SimpleNamespace:
    """Directories in every state."""
    newest_damaged = Path(shutil.copytree(saved, tmp_path / "newest damaged"))
    damage(list_checkpoints(newest_damaged)[0] / protocol.OPTIMIZER, "cut to half")
    all_damaged = Path(shutil.copytree(saved, tmp_path / "all damaged"))
    for path in list_checkpoints(all_damaged):
        damage(path / protocol.FACTS, "emptied")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    return SimpleNamespace(
        whole=list_checkpoints(saved)[0],
        damaged=list_checkpoints(newest_damaged)[0],
        unreadable=list_checkpoints(all_damaged)[0],
        all_whole=saved,
        newest_damaged=newest_damaged,
        all_damaged=all_damaged,
        empty=tmp_path / "empty",
        missing=tmp_path / "missing",
        file=tmp_path / "file",
    )


def test_the_command_says_what_is_there_and_whether_it_is_whole(places: SimpleNamespace, tmp_path: Path) -> None:
    size = r"\d+(\.\d)? (B|KiB)"
    whole = f"{places.whole}: whole, {size}"
    anew = f"No checkpoint in {places.empty}: resume_from='latest' would begin anew."
    # For each: the exit code, which is 0 where all that was looked at is whole, and lines that have to be there.
    expected: dict[tuple[str, str], tuple[int, list[str]]] = {
        ("verify", "whole"): (0, [whole]),
        ("verify", "damaged"): (1, [f"{places.damaged}: NOT WHOLE: optimizer.pt has .* bytes instead of .*"]),
        ("verify", "all_whole"): (0, [whole, "resume_from='latest' would take checkpoint-000003-.*, the newest."]),
        ("verify", "newest_damaged"): (
            1,
            [
                f"{places.damaged}: NOT WHOLE: optimizer.pt has .* bytes instead of .*",
                f".*update-2: whole, {size}",
                f".*update-1: whole, {size}",
                "resume_from='latest' would take checkpoint-000002-.*, the newest that is whole.",
            ],
        ),
        ("verify", "all_damaged"): (1, ["resume_from='latest' would take none, and raise an error."]),
        ("verify", "empty"): (0, [anew]),
        ("verify", "missing"): (1, [f"{places.missing} is not a directory."]),
        ("verify", "file"): (1, [f"{places.file} is not a directory."]),
        ("inspect", "whole"): (0, [str(places.whole), " +stands +in epoch 1, 3 steps into it, 3 updates, 24 samples"]),
        ("inspect", "damaged"): (0, [str(places.damaged), " +stands +in epoch 1, 3 .*"]),
        ("inspect", "unreadable"): (1, [" +cannot be read: .*run.json.*|.*JSONDecodeError.*"]),
        ("inspect", "all_whole"): (0, [str(path) for path in list_checkpoints(places.all_whole)]),
        ("inspect", "newest_damaged"): (0, [str(path) for path in list_checkpoints(places.newest_damaged)]),
        ("inspect", "all_damaged"): (1, [str(path) for path in list_checkpoints(places.all_damaged)]),
        ("inspect", "empty"): (0, [anew]),
        ("inspect", "missing"): (1, [f"{places.missing} is not a directory."]),
    }
    import re

    commands = [[command, str(getattr(places, place))] for command, place in expected]
    [results] = run_processes(cases.run_commands, 0, commands, tmp_path)
    problems = []
    for (key, (code, lines)), (actual, out, err) in zip(expected.items(), results, strict=True):
        if actual != code:
            problems.append(f"{key}: exit code {actual} instead of {code}")
        if err:
            problems.append(f"{key}: {err}")
        problems += [
            f"{key}: no line {line!r} in\n{out}"
            for line in lines
            if not any(re.fullmatch(line, said) for said in out.splitlines())
        ]
    assert problems == []


def test_the_command_tells_the_facts(places: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(places.whole)]) == 0
    said = capsys.readouterr().out
    facts = json.loads((places.whole / protocol.FACTS).read_text())
    model = make_mlp()
    numbers = sum(p.numel() for p in model.parameters())
    for words in (
        f"{numbers} numbers in {len(model.state_dict())} tensors",
        "SGD, groups of [4]",
        "num_samples 32",
        "num_epochs 1, max_num_train_steps None",
        "seed      7",
        f"{facts['run_id']}, fingerprint {facts['fingerprint']}",
        f"torch {torch.__version__}",
        *(f"sha256 {file['sha256'][:16]}" for file in read_manifest(places.whole)["files"].values()),
    ):
        assert words in said, said


def test_the_command_does_not_fall_over_damage(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest, problems = list_checkpoints(saved)[0], []
    before = (newest / protocol.FACTS).read_bytes()
    for position in range(len(before)):
        if not chr(before[position]).isalpha():
            continue
        data = bytearray(before)
        data[position] ^= 0x01  # another letter: still JSON, with another name or word in it
        (newest / protocol.FACTS).write_bytes(data)
        error = failure_of(lambda: main(["inspect", str(newest)]))
        if error is not None:
            problems.append(f"{data[position - 10 : position + 10]!r}: {error!r}")
        capsys.readouterr()
    assert problems == []


def test_the_command_from_a_shell(places: SimpleNamespace) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    begun = [
        subprocess.Popen(
            [sys.executable, "-m", "pytorch_accelerated.checkpoint", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=places.empty,
            env=environment,
        )
        for arguments in (["verify", str(places.all_damaged)], ["inspect", str(places.whole)])
    ]
    (verified, verify_errors), (inspected, inspect_errors) = [process.communicate(timeout=100) for process in begun]
    assert [process.returncode for process in begun] == [1, 0]
    assert verify_errors == "" and inspect_errors == ""
    assert verified.count("NOT WHOLE: run.json has 0 bytes") == 3
    assert "in epoch 1, 3 steps into it" in inspected


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints of former versions
# --------------------------------------------------------------------------------------------------------------------

FORMATS = sorted(Path(old.__file__).parent.glob("format-*"))


def test_the_present_format_is_among_those_kept() -> None:
    assert Path(old.__file__).parent / f"format-{protocol.FORMAT_VERSION}" in FORMATS
    for directory in FORMATS:
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        assert size < 60_000


@pytest.mark.parametrize("kept", FORMATS, ids=lambda path: path.name)
def test_an_old_checkpoint_is_whole_and_resumes(kept: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(kept, tmp_path / "kept"))
    expected = json.loads((directory / "expected.json").read_text())
    [path] = list_checkpoints(directory)
    content = verify(path)
    assert content["format_version"] == int(kept.name.removeprefix("format-"))
    assert main(["verify", str(directory)]) == main(["inspect", str(directory)]) == 0
    for resume_from in (path, "latest"):
        trainer = old.make_trainer(directory, every=100)
        found = old.train(trainer, resume_from=resume_from)
        assert trainer.num_updates == 6 and trainer.run_history.get_metric_names() == {"train_loss_epoch"}
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert torch.allclose(torch.tensor(found[name]), torch.tensor(values), rtol=1e-5), name
    trainer = old.make_trainer(tmp_path / "other")
    trainer.load_training_state(path)
    assert trainer.num_updates == 2 and trainer.current_epoch == 1
    assert len(trainer.optimizer.state_dict()["state"]) == 2
    loaded = old.make_trainer(tmp_path / "other")
    loaded.load_checkpoint(path)
    assert_equal_weights(weights_of(loaded), weights_of(trainer))
    assert_equal_weights(safetensors.torch.load_file(path / protocol.MODEL), weights_of(trainer))


# --------------------------------------------------------------------------------------------------------------------
# Files of safetensors
# --------------------------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """Holds tensors under names; float ones are parameters."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex64,
]


def bits(tensor: Tensor) -> list[Any]:
    """Return the bytes of a tensor, for which every type has an equality."""
    resolved = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return [tensor.dtype, tuple(tensor.shape), resolved.reshape(-1).view(torch.uint8).tolist()]


def check_file(path: Path, tensors: dict[str, Tensor]) -> None:
    found = safetensors.torch.load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert bits(found[name]) == bits(tensor), name
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    # Each tensor begins where its elements may be read in place.
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    assert size % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0, name


def test_all_types_of_tensors_are_read_by_safetensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for dtype in DTYPES:
        raw = torch.randint(0, 2, (3, 5, 8), generator=generator, dtype=torch.uint8)
        name = "a_" + str(dtype).removeprefix("torch.")
        tensors[name] = raw.bool() if dtype is torch.bool else raw.view(dtype)
        tensors[f"{name}_scalar"] = tensors[name].reshape(-1)[1]
        tensors[f"{name}_empty"] = torch.empty(2, 0, 3, dtype=dtype)
        tensors[f"{name}_odd"] = tensors[name].reshape(-1)[:3]
    tensors["not_finite"] = torch.tensor([float("inf"), float("nan"), -0.0])
    digest = save_weights(tmp_path / "all.safetensors", tensors, {})
    assert digest == hashlib.sha256((tmp_path / "all.safetensors").read_bytes()).hexdigest()
    check_file(tmp_path / "all.safetensors", tensors)
    assert {name: bits(value) for name, value in read_weights(tmp_path / "all.safetensors").items()} == {
        name: bits(value) for name, value in tensors.items()
    }
    other = Holder({name: torch.empty_like(tensor) for name, tensor in tensors.items()})
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "all.safetensors"), strict=True)
    for name, tensor in tensors.items():
        assert bits(getattr(other, name)) == bits(tensor), name


def test_tensors_that_lie_oddly_in_memory_are_read_by_safetensors(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    number = torch.complex(base, -base)
    tensors = {
        "transposed": base.transpose(0, 2),
        "every_other": base[:, ::2, 1:],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "view_with_offset": base.reshape(-1)[5:11],
        "one_of_another": base[1, 2, 3],
        "single_with_a_stride": base.reshape(-1)[3:4:2].as_strided((1,), (2,)),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conjugate": number.conj(),
        "negative": number.conj().imag,
        "negative_and_contiguous": number[:1, :1, :1].conj().imag,
        "needs_gradient": nn.Parameter(base.clone()),
        "a name with blanks, dots. and ümläuts ☃": base.clone(),
    }
    assert tensors["conjugate"].is_conj() and tensors["negative"].is_neg() and not tensors["transposed"].is_contiguous()
    assert tensors["negative_and_contiguous"].is_neg() and tensors["negative_and_contiguous"].is_contiguous()
    before = {name: bits(tensor) for name, tensor in tensors.items()}
    save_weights(tmp_path / "odd.safetensors", tensors, {})
    check_file(tmp_path / "odd.safetensors", tensors)
    assert {name: bits(tensor) for name, tensor in tensors.items()} == before


class Tied(nn.Module):
    """Two layers with one weight, and buffers that are views of one another."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 3), nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("all", torch.arange(6.0))
        self.register_buffer("first", self.all[:2])
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def test_tied_weights_are_read_by_plain_safetensors_and_torch(tmp_path: Path) -> None:
    trainer = Trainer(Tied(), nn.CrossEntropyLoss(), partial(torch.optim.Adam, lr=0.1), [], seed=1)
    trainer.train(make_data(8, inputs=3), 1)
    path = tmp_path / "tied.safetensors"
    trainer.save_model(path)
    trainer.save_training_state(tmp_path / "state")
    for written in (path, tmp_path / "state" / protocol.MODEL):
        check_file(written, dict(trainer.get_model().state_dict()))
        other = Tied()
        other.load_state_dict(safetensors.torch.load_file(written), strict=True)
        assert other.encoder.weight is other.decoder.weight
        assert_equal_weights(other.state_dict(), weights_of(trainer))
    other_trainer = Trainer(Tied(), nn.CrossEntropyLoss(), partial(torch.optim.Adam, lr=0.1), [], seed=1)
    other_trainer.load_training_state(tmp_path / "state")
    assert_equal_weights(weights_of(other_trainer), weights_of(trainer))
    other_trainer.load_checkpoint(path)


class Quantities(nn.Module):
    """A model with buffers for which safetensors has no type."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("phases", torch.ones(2, dtype=torch.complex128))
        self.register_buffer("mask", torch.eye(3).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_tensors_that_safetensors_has_no_name_for(tmp_path: Path) -> None:
    trainer = Trainer(Quantities(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), [], seed=1)
    trainer.train(make_data(8), 1)
    for name in ("phases", "mask"):
        tensors = {name: getattr(trainer.model, name)}
        with pytest.raises(CheckpointError, match=name):
            save_weights(tmp_path / "weights.safetensors", tensors, {})
    # A run must be able to save whatever its model consists of: torch's own format takes everything.
    trainer.save_training_state(tmp_path / "state")
    other = Trainer(Quantities(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), [], seed=1)
    other.load_training_state(tmp_path / "state")
    assert torch.equal(other.model.layer.weight, trainer.model.layer.weight)


# --------------------------------------------------------------------------------------------------------------------
# What was saved can be loaded
# --------------------------------------------------------------------------------------------------------------------


def test_what_may_be_saved_can_be_loaded(tmp_path: Path) -> None:
    values = [
        None,
        True,
        -(10**40),
        float("inf"),
        1.5 - 2j,
        "word ☃",
        b"\x00\xff",
        torch.bfloat16,
        torch.device("cpu"),
        torch.Size([2, 3]),
        {1, 2},
        (1, [2, {"a": (3,)}]),
        collections.OrderedDict(b=1, a=2),
        collections.Counter("aab"),
        {(1, "a"): 2, None: 3},
        torch.eye(3).to_sparse(),
        nn.Parameter(torch.ones(2)),
        torch.ones(2, dtype=torch.complex128).conj(),
    ]
    for value in values:
        save_with_torch(tmp_path / "value.pt", value)
        found = read_with_torch(tmp_path / "value.pt")
        assert type(found) is type(value)
        if isinstance(value, Tensor):
            assert torch.equal(found.to_dense(), value.detach().to_dense()) if value.is_sparse else True
        else:
            assert found == value


class Marked(Tensor):
    """A kind of tensor that torch does not know."""


@pytest.mark.parametrize(
    "value",
    [np.float64(1), np.ones(2), Path("x"), object(), frozenset([1]), collections.defaultdict(list), len, Marked(2)],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_loaded_is_not_saved(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['a'\]\[0\]"):
        check_loadable({"a": [value]}, "state")


def test_numbers_of_numpy_in_the_optimizer_do_not_make_a_checkpoint_that_cannot_be_loaded(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        optimizer = partial(torch.optim.SGD, lr=np.float64(0.1), momentum=0.9)
        saver = SaveTrainingStateCallback(tmp_path / "saved", save_every_n_updates=1)
        return Trainer(make_mlp(dropout=0.2), nn.CrossEntropyLoss(), optimizer, [saver], seed=7)

    train(trainer(), updates=2)
    train(trainer(), "latest")


def test_a_schedule_in_numpy_can_be_saved(tmp_path: Path) -> None:
    schedule = partial(LambdaLR, lr_lambda=lambda step: 0.5 * (1 + np.cos(step / 4)))
    trainer = make_trainer(tmp_path / "saved")
    trainer.train(make_data(32), 1, create_scheduler_fn=schedule)
    make_trainer(tmp_path / "saved").train(make_data(32), 1, create_scheduler_fn=schedule, resume_from="latest")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_schedule_of_milestones_is_saved_as_it_is(asynchronous: bool, tmp_path: Path) -> None:
    schedule = partial(MultiStepLR, milestones=[2, 3, 3])
    trainer = make_trainer(tmp_path / "saved", asynchronous=asynchronous, save_at_end=False)
    trainer.train(make_data(32), 1, create_scheduler_fn=schedule, max_num_train_steps=1)
    trainer = make_trainer(tmp_path / "saved", every=100)
    trainer.train(make_data(32), 1, create_scheduler_fn=schedule, resume_from="latest")
    assert trainer.num_updates == 4
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**3)


def test_a_checkpoint_after_the_last_update_of_an_epoch_can_be_resumed(tmp_path: Path) -> None:
    def begin(every: int) -> Trainer:
        return make_trainer(tmp_path / "saved", every=every, save_at_end=False)

    trainer = begin(1)
    trainer.train(make_data(16), 2, per_device_batch_size=8)
    assert updates_in(tmp_path / "saved") == [4, 3, 2, 1]
    for path in list_checkpoints(tmp_path / "saved"):
        other = begin(100)
        other.train(make_data(16), 2, per_device_batch_size=8, resume_from=path)
        assert_equal_weights(weights_of(other), weights_of(trainer))


def test_what_is_of_another_optimizer_changes_nothing(saved: Path) -> None:
    path = list_checkpoints(saved)[0]

    def half(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(list(parameters)[:2], lr=0.1)

    problems = []
    for name, optimizer in {"Adam": torch.optim.Adam, "half of the parameters": half}.items():
        for way in ("load_training_state", "load_checkpoint"):
            trainer = Trainer(make_mlp(seed=1), nn.CrossEntropyLoss(), optimizer, [], seed=7)  # type: ignore[arg-type]
            before = weights_of(trainer)
            error = failure_of(lambda: getattr(trainer, way)(path))  # noqa: B023
            if not isinstance(error, CheckpointError):
                problems.append(f"{way} with {name}: {error!r}")
            if not all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items()):
                problems.append(f"{way} with {name}: the weights are others")
    assert problems == []


class Failing(Trainer):
    """Has a bug in a hook that takes the state up."""

    def get_extra_state(self) -> Any:
        return {"key": 1}

    def set_extra_state(self, state: Any) -> None:
        raise ZeroDivisionError("a bug of the user")


def test_an_error_of_the_users_own_code_is_not_taken_for_damage(tmp_path: Path) -> None:
    def begin() -> Trainer:
        saver = SaveTrainingStateCallback(tmp_path / "saved", save_every_n_updates=1)
        return Failing(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), [saver], seed=1)

    begin().train(make_data(16), 1)
    with pytest.raises(ZeroDivisionError, match="a bug of the user"):
        begin().train(make_data(16), 2, resume_from="latest")


def test_buffers_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    trainer = Trainer(model, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), [], seed=1)
    trainer.train(make_data(16), 1)
    assert model[1].running_var is not None
    model[1].running_var.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="running_var"):
        trainer.save_training_state(tmp_path / "state")


# --------------------------------------------------------------------------------------------------------------------
# Rotation, and what is cleared away
# --------------------------------------------------------------------------------------------------------------------


def _temporary_name(pid: int, host: str | None = None) -> str:
    name = protocol._temporary_prefix().replace(f"-{os.getpid()}-", f"-{pid}-")
    if host is not None:
        name = name.replace(protocol._host(), host)
    return f"{name}checkpoint-000009-epoch-1-update-9"


@pytest.mark.parametrize("max_checkpoints", [1, 2, 3, None])
def test_the_newest_of_a_run_are_kept(max_checkpoints: int | None, tmp_path: Path) -> None:
    at: list[list[int]] = []
    watch = AtUpdate(lambda trainer: at.append(updates_in(tmp_path)))
    train(make_trainer(tmp_path, watch, max_checkpoints=max_checkpoints, save_at_end=False))
    assert at == [list(range(1, n + 1))[::-1][:max_checkpoints] for n in (1, 2, 3, 4)]
    assert len(os.listdir(tmp_path)) == len(at[-1])
    for path in list_checkpoints(tmp_path):
        verify(path)


def test_checkpoints_of_another_run_stay_and_do_not_count(saved: Path) -> None:
    before = contents_of(saved)
    for _ in range(2):
        train(make_trainer(saved, max_checkpoints=2, save_at_end=False))
    # Three of the first run, two of each other.
    assert updates_in(saved) == [4, 3, 4, 3, 3, 2, 1]
    assert contents_of(saved).items() >= before.items()
    runs = [read_manifest(path)["run_id"] for path in list_checkpoints(saved)]
    assert [runs.count(name) for name in dict.fromkeys(runs)] == [2, 2, 3]


def test_a_resumed_run_goes_on_to_rotate_its_own(saved: Path, run: Run) -> None:
    assert_equal_weights(resume(saved, max_checkpoints=2), run.weights)
    assert updates_in(saved) == [4, 3]


@pytest.mark.parametrize("kind", ["cut to half", "deleted"])
@pytest.mark.parametrize("name", [protocol.STATE, protocol.MANIFEST])
def test_damaged_checkpoints_that_were_passed_over_do_not_count(kind: str, name: str, saved: Path) -> None:
    damage(list_checkpoints(saved)[0] / name, kind)
    trainer = make_trainer(saved, max_checkpoints=2, every=100)
    train(trainer, "latest", updates=3)
    # Two whole ones, the new one of update 3 and that of update 2, besides the damaged one.
    assert updates_in(saved) == [3, 3, 2]
    newest = find_newest(saved, lambda line: None)
    assert newest is not None and newest == list_checkpoints(saved)[0]


def test_a_damaged_checkpoint_does_not_count_in_later_runs_either(saved: Path, run: Run) -> None:
    damage(list_checkpoints(saved)[0] / protocol.STATE, "cut to half")
    train(make_trainer(saved, max_checkpoints=3, save_at_end=False), "latest", updates=3)
    assert updates_in(saved) == [3, 3, 2, 1]
    assert_equal_weights(resume(saved, max_checkpoints=3), run.weights)
    whole = [path for path in list_checkpoints(saved) if failure_of(partial(verify, path)) is None]
    assert [int(path.name.rpartition("-")[2]) for path in whole] == [4, 3, 2]


def test_a_directory_by_another_name_is_the_same_directory(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(saved)
    newest = tmp_path / "link" / list_checkpoints(saved)[0].name
    train(make_trainer(saved, max_checkpoints=2, every=100), newest)
    assert updates_in(saved) == [4, 3]  # as where it is called by its own name


def test_one_callback_does_not_delete_what_another_keeps(tmp_path: Path) -> None:
    """The state before the decay is there to be trained on from, long after the checkpoints that rotate."""
    from pytorch_accelerated.schedulers import WSDLrScheduler

    trainer = make_trainer(tmp_path, WSDCheckpointCallback(tmp_path), max_checkpoints=1)
    schedule = WSDLrScheduler.create_scheduler_fn(decay_phase_ratio=0.5)
    trainer.train(make_data(32), 1, per_device_batch_size=8, create_scheduler_fn=schedule)
    assert 2 in updates_in(tmp_path)


def test_leftovers_of_a_process_that_saves_stay_until_it_is_dead(tmp_path: Path) -> None:
    [found] = run_processes(cases.save_beside_one_that_saves, 0, tmp_path)
    checkpoint = "checkpoint-000001-epoch-1-update-1"
    [leftover] = [name for name in found["while it saves"] if name != checkpoint]
    assert leftover.startswith(".tmp-")
    assert found["after a run beside it"] == [leftover, checkpoint]
    assert found["after a run when it is dead"] == [checkpoint]


def test_leftovers_are_cleared_away_by_the_next_run(run: Run, tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    living = subprocess.Popen(["sleep", "100"])
    try:
        kept = [_temporary_name(living.pid), _temporary_name(dead.pid, "another_host"), ".tmp-mine", "notes.txt"]
        gone = [
            _temporary_name(dead.pid),
            _temporary_name(dead.pid).replace(".tmp-", ".discarded-"),
            _temporary_name(os.getpid()),  # an earlier process had the same number, as in containers
            _temporary_name(dead.pid, "old_host"),
        ]
        for name in (*kept, *gone):
            (tmp_path / name).mkdir()
            (tmp_path / name / protocol.STATE).write_bytes(b"x")
        (tmp_path / f"{_temporary_name(dead.pid)}-file").write_bytes(b"x")
        os.utime(tmp_path / gone[-1], (0, 0))
        train(make_trainer(tmp_path, every=100))
        left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("checkpoint-")}
        assert left == set(kept)
    finally:
        living.kill()
        living.wait()


def test_a_leftover_with_an_impossible_name_stops_no_run(tmp_path: Path) -> None:
    (tmp_path / f".tmp-{protocol._host()}-{10**30}-x").write_bytes(b"")
    train(make_trainer(tmp_path, every=100))


def test_leftovers_of_a_best_model_are_cleared_away_too(tmp_path: Path) -> None:
    [left] = run_processes(cases.kill_while_the_best_model_is_saved, 0, tmp_path)
    assert left == ["best.safetensors"]


def test_two_runs_may_begin_at_once_in_one_directory(tmp_path: Path) -> None:
    assert run_processes(cases.begin_within_another, 0, tmp_path) == [[]]


def test_a_file_of_the_user_is_not_taken_for_a_trial(tmp_path: Path) -> None:
    before = dict.fromkeys((".probe", "probe", ".tmp", "state.pt"), b"mine")
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    CheckpointStore(tmp_path, None, "SaveTrainingStateCallback").prepare()
    assert contents_of(tmp_path) == before


def test_files_have_the_rights_that_the_user_wants(run: Run, tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        run.snapshots[1].write(tmp_path / "state")
        make_trainer(None).save_model(tmp_path / "model.pt")
        torch.save({}, tmp_path / "plain.pt")
    finally:
        os.umask(before)
    wanted = stat.S_IMODE((tmp_path / "plain.pt").stat().st_mode)
    for path in (tmp_path / "model.pt", *(tmp_path / "state").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path.name


def test_a_file_system_that_cannot_flush_directories_is_good_enough(run: Run, tmp_path: Path) -> None:
    """Some network storage refuses it, and says that there is no such thing; the files themselves are flushed."""

    def act(current: int, call: cases.Call, go: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if call.name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return go()

    with watched(act):
        run.snapshots[1].write(tmp_path / "state")
    verify(tmp_path / "state")


def test_nothing_is_said_on_the_side(saved: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume(saved)
        make_trainer(None).load_checkpoint(list_checkpoints(saved)[0])
    assert [str(warning.message) for warning in caught] == []

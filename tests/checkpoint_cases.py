"""Small runs that save, faults at each call that a save makes of the system, hostile files; for tests and processes."""

from __future__ import annotations

import errno
import io
import os
import pickle
import resource
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, TrainerCallback
from pytorch_accelerated.checkpoint import (
    CheckpointStore,
    Snapshot,
    capture,
    files,
    find_newest,
    list_checkpoints,
    verify,
)
from pytorch_accelerated.errors import CheckpointError
from tests.support import assert_equal_weights, make_data, make_mlp, weights_of

NUM_UPDATES = 4
"""Updates in the run; there is one epoch of them."""

FILES = (files.MODEL, files.OPTIMIZER, files.STATE, files.FACTS, files.MANIFEST)

# --------------------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------------------


def make_trainer(save_dir: Path | None, *callbacks: TrainerCallback, every: int = 1, **settings: Any) -> Trainer:
    """Return a trainer whose result depends on random streams, sample order and the state of the optimizer."""
    savers = [] if save_dir is None else [SaveTrainingStateCallback(save_dir, save_every_n_updates=every, **settings)]
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    return Trainer(make_mlp(dropout=0.2), nn.CrossEntropyLoss(), optimizer, [*savers, *callbacks], seed=7)


def train(trainer: Trainer, resume_from: str | Path | None = None, updates: int | None = None) -> dict[str, Tensor]:
    """Train up to ``updates``, or to the end of the epoch, and return the weights."""
    data = make_data(8 * NUM_UPDATES)
    trainer.train(data, 1, per_device_batch_size=8, max_num_train_steps=updates, resume_from=resume_from)
    return weights_of(trainer)


def resume(save_dir: Path, resume_from: str | Path = "latest", **settings: Any) -> dict[str, Tensor]:
    """Let another trainer go on to the end, and return its weights; it saves at the end alone."""
    return train(make_trainer(save_dir, every=100, **settings), resume_from)


class AtUpdate(TrainerCallback):
    """Call a function after each update, later than the other callbacks, or before a saver that follows it."""

    def __init__(self, act: Callable[[Trainer], None], order: int = 3) -> None:
        self.act = act
        self.order = order

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.act(trainer)


class Run(NamedTuple):
    """A run that nothing has interrupted: its state after each update, and the weights at its end."""

    snapshots: dict[int, Snapshot]
    weights: dict[str, Tensor]


def run_through() -> Run:
    """Return what the run gives that nothing interrupts."""
    snapshots: dict[int, Snapshot] = {}

    def take(trainer: Trainer) -> None:
        snapshot = capture(trainer)
        assert snapshot is not None
        snapshots[trainer.num_updates] = snapshot.to_host()

    weights = train(make_trainer(None, AtUpdate(take)))
    assert list(snapshots) == [1, 2, 3, 4]
    return Run(snapshots, weights)


def updates_in(directory: Path) -> list[int]:
    """Return the numbers of the updates that the checkpoints in a directory are of, newest first."""
    return [int(path.name.rpartition("-")[2]) for path in list_checkpoints(directory)]


# --------------------------------------------------------------------------------------------------------------------
# Faults
# --------------------------------------------------------------------------------------------------------------------

SAVING = ("write", "fsync", "mkdir", "replace")
DELETING = ("unlink", "rmdir")


class Call(NamedTuple):
    """A call of the system that may change the disk, and the path it is about."""

    name: str
    path: str

    @property
    def place(self) -> tuple[str, str]:
        """The kind of call and the kind of path: what a save does in many calls of one place is the same to a fault."""
        return self.name, Path(self.path).name.rpartition("-")[2]


Act = Callable[[int, Call, Callable[[], Any], tuple[Any, ...]], Any]


@contextmanager
def watched(act: Act | None = None, names: tuple[str, ...] = SAVING) -> Iterator[list[Call]]:
    """Let ``act`` stand before each call of the system that changes the disk; yield the list of those made.

    ``act`` is given the number of the call, the call, what would make it, and its arguments; what it does by itself is
    not watched.
    """
    calls: list[Call] = []
    acting: list[bool] = []
    paths: dict[int, str] = {}
    originals = {name: getattr(os, name) for name in (*names, "open")}

    def opened(path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor: int = originals["open"](path, *args, **kwargs)
        paths[descriptor] = str(path)
        return descriptor

    def guarded(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            go = partial(originals[name], *args, **kwargs)
            if acting:
                return go()
            path = paths.get(args[0], "?") if isinstance(args[0], int) else str(args[0])
            calls.append(Call(name, path))
            acting.append(True)
            try:
                return go() if act is None else act(len(calls) - 1, calls[-1], go, args)
            finally:
                acting.clear()

        return call

    for name in names:
        setattr(os, name, guarded(name))
    os.open = opened
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def failing(number: int, code: int = errno.ENOSPC, onwards: bool = False) -> Act:
    """Fail at one call; ``onwards`` as a full disk does, which refuses no renaming."""

    def act(current: int, call: Call, go: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if current == number or (onwards and current > number and call.name != "replace"):
            raise OSError(code, os.strerror(code))
        return go()

    return act


def killing(number: int) -> Act:
    """Kill the process at one call, before it is made."""

    def act(current: int, call: Call, go: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if current == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return go()

    return act


def calls_of(function: Callable[[], Any], names: tuple[str, ...] = SAVING) -> list[Call]:
    """Return the calls that a function makes."""
    with watched(names=names) as calls:
        function()
    return calls


def in_fork(function: Callable[[], Any]) -> int:
    """Call a function in a fork of this process, and return its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# --------------------------------------------------------------------------------------------------------------------
# Hostile files
# --------------------------------------------------------------------------------------------------------------------


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return open, (self.marker, "w")


def evil_bytes(form: str, marker: Path, original: bytes) -> bytes:
    """Return a file that runs code where it is unpickled carelessly."""
    buffer = io.BytesIO()
    evil = Evil(marker)
    if form == "bare pickle":
        return pickle.dumps({"state": evil}, protocol=2)
    if form == "file of torch":
        torch.save({"state": evil}, buffer)
    elif form == "old file of torch":
        torch.save({"state": evil}, buffer, _use_new_zipfile_serialization=False)
    elif form == "the file itself, with one thing more":
        try:
            content = torch.load(io.BytesIO(original), weights_only=True)
        except Exception:  # no file of torch to begin with
            content = {}
        torch.save({**content, "more": evil}, buffer)
    else:
        raise AssertionError(form)
    return buffer.getvalue()


EVIL_FORMS = ("bare pickle", "file of torch", "old file of torch", "the file itself, with one thing more")


def reseal(path: Path, **changes: Any) -> None:
    """Make the manifest fit the files again, as a stranger would, with ``changes`` of its content."""
    content = files.read_manifest(path)
    for name in content["files"]:
        data = (path / name).read_bytes()
        content["files"][name] = {"size": len(data), "sha256": files.hashlib.sha256(data).hexdigest()}
    content |= changes
    (path / files.MANIFEST).write_bytes(files._sealed(content))


# --------------------------------------------------------------------------------------------------------------------
# What runs in processes of its own
# --------------------------------------------------------------------------------------------------------------------


def kill_at_every_call(directory: Path, max_checkpoints: int | None) -> tuple[int, list[str]]:
    """Kill a second save at each of its calls; return how many these are, and what was wrong afterwards.

    A fork takes long, so of the many writes to a file the process is killed at the first and the last. At the others
    what lies in the directory is copied: a kill would leave just that.
    """
    run, problems, resumed = run_through(), [], set()
    names = SAVING if max_checkpoints is None else SAVING + DELETING

    def save(act: Act | None = None) -> list[Call]:
        with watched(act, names) as calls:
            CheckpointStore(directory, max_checkpoints, "SaveTrainingStateCallback").write(run.snapshots[2])
        return calls

    def begin() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        CheckpointStore(directory, None, "SaveTrainingStateCallback").write(run.snapshots[1])

    def copy(current: int, call: Call, go: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        shutil.copytree(directory, f"{directory}-{current}")
        return go()

    begin()
    calls = save(copy)
    last = {call.place: number for number, call in enumerate(calls)}
    first = {call.place: number for number, call in reversed(list(enumerate(calls)))}
    for number, call in enumerate(calls):
        where, place = f"killed at call {number}, {call.name} of {call.path}: ", Path(f"{directory}-{number}")
        if call.name != "write" or number in (first[call.place], last[call.place]):
            begin()
            code = in_fork(lambda number=number: save(killing(number)))
            left = sorted(path.name.rpartition("-")[2] for path in directory.rglob("*"))
            if left != sorted(path.name.rpartition("-")[2] for path in place.rglob("*")):
                problems.append(where + f"{left} is not what was there at the call")
            if code != -signal.SIGKILL:
                problems.append(where + f"exit code {code}")
            place = directory
        # What lies on the disk is of as many kinds as there are places; to train after each kill would take minutes.
        weights = None if call.place in resumed else run.weights
        resumed.add(call.place)
        problems += [where + problem for problem in find_problems(place, weights)]
    begin()
    if in_fork(lambda: save(killing(len(calls)))) != 0:
        problems.append("killed where there is no call any more")
    return len(calls), problems


def find_problems(directory: Path, weights: dict[str, Tensor] | None) -> list[str]:
    """Return what is wrong in a directory after a kill; resume the run there if its final weights are given."""
    said: list[str] = []
    try:
        newest = find_newest(directory, said.append)
        for path in list_checkpoints(directory):
            verify(path)
        assert newest is not None and not said, f"found {newest}, {said}"
        assert updates_in(directory) in ([1], [2], [2, 1]), f"there is {sorted(os.listdir(directory))}"
        if weights is None:
            CheckpointStore(directory, None, "SaveTrainingStateCallback").prepare()
        else:
            assert_equal_weights(resume(directory), weights)
        left = [name for name in os.listdir(directory) if not name.startswith("checkpoint-")]
        assert not left, f"the next run has left {left}"
    except Exception as error:
        return [repr(error)]
    return []


def kill_a_run_at_each_place(directory: Path) -> list[str]:
    """Kill training at a call of each place of its second save, resume it, and return what was wrong."""
    run, problems = run_through(), []

    def begin(act: Act | None = None) -> list[Call]:
        watching = ExitStack()
        made: list[list[Call]] = []

        def arm(trainer: Trainer) -> None:
            if trainer.num_updates == 2:
                made.append(watching.enter_context(watched(act, SAVING + DELETING)))

        def disarm(trainer: Trainer) -> None:
            watching.close()

        train(make_trainer(directory, AtUpdate(arm, order=1), AtUpdate(disarm), max_checkpoints=1))
        return made[0]

    calls = begin()
    last_calls = {call.place: number for number, call in enumerate(calls)}
    for place, number in last_calls.items():
        if place[0] == "write" and place[1] not in (files.STATE, files.MANIFEST):
            continue  # a kill there leaves what one at the flush leaves
        shutil.rmtree(directory)
        code = in_fork(lambda number=number: begin(killing(number)))
        if code != -signal.SIGKILL:
            problems.append(f"killed at {place}: exit code {code}")
        try:
            assert_equal_weights(resume(directory, max_checkpoints=1), run.weights)
            assert [name for name in os.listdir(directory) if not name.startswith("checkpoint-")] == []
            assert len(os.listdir(directory)) == 1, os.listdir(directory)
        except Exception as error:
            problems.append(f"killed at {place}: {error!r}")
    return problems


def kill_a_file_at_every_call(path: Path) -> tuple[int, list[str]]:
    """Kill ``save_model`` at each of its calls where there is a file already; return how many, and what was wrong."""
    trainer, problems = make_trainer(None), []
    trainer.save_model(path)
    before = path.read_bytes()
    with torch.no_grad():
        trainer.model[0].weight.zero_()
    calls = calls_of(lambda: trainer.save_model(path))
    after = path.read_bytes()
    assert after != before

    def save(number: int) -> None:
        with watched(killing(number)):
            trainer.save_model(path)

    for number, call in enumerate(calls):
        if call.name == "write" and 2 < number < len(calls) - 5:
            continue  # all alike: bytes in a file that nobody looks at yet
        path.write_bytes(before)
        if (code := in_fork(partial(save, number))) != -signal.SIGKILL:
            problems.append(f"{call}: exit code {code}")
        if path.read_bytes() not in (before, after):
            problems.append(f"{call}: neither the old file nor the new one")
    return len(calls), problems


def begin_within_another(directory: Path) -> list[str]:
    """Let a process begin a run in a directory between the calls of another that does so, and return what went wrong.

    Each tries whether it can write there; neither may trip over the other's trial.
    """
    problems: list[str] = []
    for name in (*SAVING, *DELETING):

        def act(current: int, call: Call, go: Callable[[], Any], args: tuple[Any, ...], name: str = name) -> Any:
            if (code := in_fork(lambda: CheckpointStore(directory, None, "SaveTrainingStateCallback").prepare())) != 0:
                problems.append(f"within {name}: exit code {code}")
            return go()

        try:
            with watched(act, (name,)):
                CheckpointStore(directory, None, "SaveTrainingStateCallback").prepare()
        except Exception as error:
            problems.append(f"around {name}: {error!r}")
        if os.listdir(directory) != []:
            problems.append(f"{name}: left {os.listdir(directory)}")
    return problems


def fail_on_the_main_process(directory: Path) -> str:
    """Let the main process of a run of several fail to save; return what this process has raised."""
    watching = ExitStack()

    def arm(trainer: Trainer) -> None:
        if trainer.accelerator.is_main_process:
            watching.enter_context(watched(failing(9)))

    with watching:
        try:
            make_trainer(directory, AtUpdate(arm, order=1)).train(make_data(16), 1, per_device_batch_size=4)
        except CheckpointError as error:
            return str(error)
    return "nothing"


def save_beside_one_that_saves(directory: Path) -> dict[str, list[str]]:
    """Return what lies in a directory while another process is saving, after a run beside it, and after its death."""
    run = run_through()
    CheckpointStore(directory, None, "SaveTrainingStateCallback").write(run.snapshots[1])

    def stop_half_way(current: int, call: Call, go: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if call.name == "fsync" and call.path.endswith(files.OPTIMIZER):
            time.sleep(600)
        return go()

    child = os.fork()
    if child == 0:
        with watched(stop_half_way):
            CheckpointStore(directory, None, "SaveTrainingStateCallback").write(run.snapshots[2])
        os._exit(0)
    found: dict[str, list[str]] = {}
    try:
        deadline = time.monotonic() + 60
        while not list(directory.glob(f"*/{files.OPTIMIZER}")) or len(os.listdir(directory)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        found["while it saves"] = sorted(os.listdir(directory))
        assert_equal_weights(resume(directory, save_at_end=False), run.weights)
        found["after a run beside it"] = sorted(os.listdir(directory))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert_equal_weights(resume(directory, save_at_end=False), run.weights)
    found["after a run when it is dead"] = sorted(os.listdir(directory))
    return found


def kill_while_the_best_model_is_saved(directory: Path) -> list[str]:
    """Return what lies in a directory after a run whose predecessor was killed while it saved its best model."""
    from pytorch_accelerated.callbacks import SaveBestModelCallback

    def save(act: Act | None) -> None:
        with watched(act):
            best = SaveBestModelCallback(directory / "best.safetensors", "train_loss_epoch", greater_is_better=False)
            train(make_trainer(None, best))

    assert in_fork(lambda: save(killing(3))) == -signal.SIGKILL
    assert os.listdir(directory) != []  # of which nothing may be left
    save(None)
    return sorted(os.listdir(directory))


def save_with_a_limit(directory: Path) -> dict[str, Any]:
    """Let the system refuse files above a size, really, in the middle of a run; resume without the limit."""
    run = run_through()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(trainer: Trainer) -> None:
        if trainer.num_updates == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (9001, hard))  # the system takes a part, then nothing

    found: dict[str, Any] = {}
    try:
        train(make_trainer(directory, AtUpdate(limit, order=1)))
        found["error"] = None
    except CheckpointError as error:
        found["error"] = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found["left"] = sorted(os.listdir(directory))
    found["updates"] = updates_in(directory)
    found["whole"] = str(find_newest(directory, print))
    assert_equal_weights(resume(directory), run.weights)
    return found


def run_commands(commands: list[list[str]], scratch: Path) -> list[tuple[int, str, str]]:
    """Run ``python -m pytorch_accelerated.checkpoint`` in forks; return exit code, stdout and stderr of each.

    As in a new interpreter, but for the seconds that importing torch takes.
    """

    def run(arguments: list[str]) -> None:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(scratch / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115  # ends with us
        sys.argv = ["checkpoint", *arguments]
        code: Any = 0
        try:
            runpy.run_module("pytorch_accelerated.checkpoint", run_name="__main__", alter_sys=True)
        except SystemExit as leaving:
            code = leaving.code
        except BaseException as error:
            sys.stderr.write(f"Traceback: {error!r}\n")
            code = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)

    results = []
    for arguments in commands:
        code = in_fork(partial(run, arguments))
        results.append((code, (scratch / "out").read_text(), (scratch / "err").read_text()))
    return results

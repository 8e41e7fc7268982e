"""The script that test_signals.py interrupts: it says when a moment has come, and goes on when it is told to.

``python preempted_script.py CASE`` trains; CASE is JSON, see ``Case``. ``python preempted_script.py serve`` reads
requests and forks a process for each, which is spared the imports and otherwise as if it had been started alone: it
leaves through the end of the script.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import gc
import hashlib
import json
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer would import it in each process
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy

# Where it is installed, torch._dynamo imports it at exit to print times. Python 3.11 then forgets that a
# KeyboardInterrupt ended the script, and leaves with 1, with and without this library.
with suppress(ImportError):
    import tabulate  # noqa: F401

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import (
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    TrainerCallback,
    WSDCheckpointCallback,
)
from pytorch_accelerated.errors import TrainingInterrupted
from pytorch_accelerated.schedulers import WSDLrScheduler

NUM_SAMPLES, BATCH_SIZE, ACCUMULATION, NUM_EPOCHS = 64, 4, 3, 3
UPDATES_IN_EPOCH = 6  # 16 batches in windows of 3, of which the last has one
EVAL_EVERY = 4
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclasses.dataclass
class Case:
    """What a process does."""

    directory: str
    """Where checkpoints, the result, and the words to go on are."""
    action: str = "train"
    moments: tuple[str, ...] = ()
    """At which to wait for the word to go on, as ``"update 7"``; the first time alone."""
    rank: int = 0
    """The process that waits."""
    num_workers: int = 0
    persistent: bool = False
    context: str | None = None
    num_processes: int = 1
    num_epochs: int = NUM_EPOCHS
    num_samples: int = NUM_SAMPLES
    num_eval_samples: int = 40
    eval_every: int = EVAL_EVERY
    in_full: bool = True
    """Whether a forked process takes the interpreter down as well, which takes a second."""
    pause: float = 0.0
    """Seconds that each update takes,"""
    pause_from: int = 0
    """beginning with this one."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of SaveTrainingStateCallback."""

    def wait(self, moment: str) -> None:
        """Say that a moment has come, and wait until the test has done what it wants to do in it."""
        word = Path(self.directory) / f"go {moment}"
        if moment not in self.moments or int(os.environ.get("RANK", "0")) != self.rank or word.exists():
            return
        say(f"reached {moment}")
        (Path(self.directory) / f"reached {moment}").touch()
        deadline = time.monotonic() + 60
        while not word.exists():
            assert time.monotonic() < deadline, f"nobody said to go on at {moment}"
            time.sleep(0.005)


def say(text: str) -> None:
    """Print a line in one piece, whatever other processes print."""
    os.write(1, f"{text}\n".encode())


class Noisy(Dataset[Any]):
    """Samples with noise; the moments ``item EPOCH INDEX`` and ``stuck EPOCH COUNT``, which no word ends."""

    def __init__(self, case: Case, num_samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(num_samples, 4, generator=generator)
        self.y = torch.randint(3, (num_samples,), generator=generator)
        self.case = case
        self.epoch = self.count = 0

    def __len__(self) -> int:
        return len(self.x)

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.count = epoch, 0

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.case.wait(f"item {self.epoch} {index}")
        self.count += 1
        if f"stuck {self.epoch} {self.count}" in self.case.moments:
            say(f"reached stuck {self.epoch} {self.count}")
            deadlock()
        return self.x[index] + 0.1 * torch.randn(4), self.y[index]


def deadlock() -> None:
    """Wait for ever in a library, where no handler of Python runs."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    for _ in range(2):
        library.pthread_mutex_lock(mutex)


class PreemptedTrainer(Trainer):
    """The moments ``step NUMBER`` and ``evaluating UPDATE STEP``."""

    case: Case
    num_evaluated = 0

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        self.case.wait(f"step {self.num_steps}")
        return super().calculate_train_batch_loss(batch)

    def calculate_eval_batch_loss(self, batch: Any) -> Any:
        assert self.data_pass is not None
        self.case.wait(f"evaluating {self.num_updates} {self.data_pass.step}")
        self.num_evaluated += 1
        return super().calculate_eval_batch_loss(batch)


class Moments(TrainerCallback):
    """The moments ``update NUMBER``, ``saving UPDATE``, ``begin`` and ``end``, and what else there is to say."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def on_train_run_begin(self, trainer: PreemptedTrainer, **kwargs: Any) -> None:
        assert trainer.accelerator.num_processes == self.case.num_processes
        self.case.wait("begin")

    def on_train_update_end(self, trainer: PreemptedTrainer, **kwargs: Any) -> None:
        if trainer.num_updates >= self.case.pause_from:
            time.sleep(self.case.pause)
        self.case.wait(f"update {trainer.num_updates}")

    def on_exception(self, trainer: PreemptedTrainer, exception: BaseException, **kwargs: Any) -> None:
        say(f"on_exception {type(exception).__name__}")

    def on_train_run_end(
        self, trainer: PreemptedTrainer, exception: BaseException | None = None, **kwargs: Any
    ) -> None:
        self.case.wait("end")
        name = None if exception is None else type(exception).__name__
        say(f"on_train_run_end {name} updates {trainer.num_updates} evaluated {trainer.num_evaluated}")

    def state_dict(self) -> dict[str, Any]:
        trainer = self.trainer
        self.case.wait(f"saving {trainer.num_updates}")
        return {}

    def on_init_end(self, trainer: PreemptedTrainer, **kwargs: Any) -> None:
        self.trainer = trainer
        trainer.case = self.case


def make_trainer(case: Case, callbacks: Iterable[TrainerCallback] | None = None) -> PreemptedTrainer:
    """Return a trainer with everything in it that could make a resumed run differ."""
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    if callbacks is None:
        callbacks = [make_saver(case)]
    return PreemptedTrainer(
        model,
        nn.CrossEntropyLoss(),
        partial(torch.optim.AdamW, lr=0.01),
        [Moments(case), StepBasedEvaluationCallback(case.eval_every), *callbacks],
        seed=3,
        metrics={"accuracy": MulticlassAccuracy(3)},
    )


def make_saver(case: Case, **options: Any) -> SaveTrainingStateCallback:
    options = {"save_dir": Path(case.directory) / "checkpoints"} | case.options | options
    if options.pop("as_timedelta", False):
        options["time_budget"] = timedelta(seconds=options["time_budget"])
    return SaveTrainingStateCallback(**options)


def train(trainer: PreemptedTrainer, case: Case, **arguments: Any) -> None:
    """Train, or go on; each process writes what came out, if it comes to the end."""
    kwargs: dict[str, Any] = {"num_workers": case.num_workers}
    if case.num_workers:
        kwargs |= {"persistent_workers": case.persistent, "multiprocessing_context": case.context}
    defaults: dict[str, Any] = {
        "train_dataset": Noisy(case, case.num_samples, 1),
        "num_epochs": case.num_epochs,
        "eval_dataset": Noisy(case, case.num_eval_samples, 2),
        "per_device_batch_size": BATCH_SIZE // case.num_processes,
        "gradient_accumulation_steps": ACCUMULATION,
        "create_scheduler_fn": partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.95),
        "train_dataloader_kwargs": kwargs,
        "eval_dataloader_kwargs": kwargs,
        "resume_from": "latest",
    }
    trainer.train(**defaults | arguments)
    write_result(trainer, case)


def write_result(trainer: PreemptedTrainer, case: Case) -> None:
    optimizer = trainer.optimizer.state_dict()["state"]
    result = {
        "num_processes": trainer.accelerator.num_processes,
        "weights": digest(trainer.get_model().state_dict()),
        "optimizer": digest({f"{i}.{name}": value for i in optimizer for name, value in optimizer[i].items()}),
        "stream": digest({"torch": torch.get_rng_state()}),
        "history": trainer.run_history.state_dict(),
    }
    path = Path(case.directory) / f"result.{os.environ.get('RANK', '0')}"
    unfinished = path.with_name(f"unfinished {path.name}")
    unfinished.write_text(json.dumps(result))
    unfinished.replace(path)
    say("finished")


def digest(tensors: dict[str, Any]) -> str:
    """Return a hash of tensors, to the bit."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + torch.as_tensor(tensors[name]).contiguous().numpy().tobytes())
    return found.hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# What processes do besides training
# --------------------------------------------------------------------------------------------------------------------


def fail(case: Case) -> None:
    """Train; a bug ends the first run in the middle of update 8."""

    class Failing(TrainerCallback):
        def on_train_step_begin(self, trainer: Any, **kwargs: Any) -> None:
            mark = Path(case.directory) / "failed"
            if trainer.num_steps == 20 and not mark.exists():
                mark.touch()
                raise ZeroDivisionError("a bug of the user")

    train(make_trainer(case, [Failing(), make_saver(case)]), case)


def write_slowly(case: Case) -> None:
    """Train on a disk whose first flush is the moment ``writing``."""
    sync = os.fsync

    def slow_sync(descriptor: int) -> None:
        if trainer.num_updates > 0:
            case.wait("writing")
        sync(descriptor)

    trainer = make_trainer(case)
    os.fsync = slow_sync
    train(trainer, case)


@contextmanager
def handlers_set(handler: Any) -> Iterator[None]:
    """Set one handler for all signals, and say whether it is still set afterwards."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        found = {number: signal.getsignal(number) for number in SIGNALS}
        say(f"handlers are {'as before' if set(found.values()) == {handler} else found}")
        for number, previous in before.items():
            signal.signal(number, previous)


def train_with_handlers(case: Case, handler: Any) -> None:
    """Train to an end that ``case`` asks for, under handlers of the user's own."""

    class Failing(TrainerCallback):
        def on_train_update_end(self, trainer: Any, **kwargs: Any) -> None:
            watched = [callable(signal.getsignal(number)) for number in SIGNALS]
            if trainer.num_updates == 8:
                say(f"in the run: {['is' if is_changed(number) else 'not' for number in SIGNALS]} {watched}")
                if "fail" in case.action:
                    raise ZeroDivisionError("a bug of the user")

    def is_changed(number: int) -> bool:
        return signal.getsignal(number) != handler

    callbacks = [Failing()] if "unwatched" in case.action else [Failing(), make_saver(case)]
    with handlers_set(handler), suppress(ZeroDivisionError):
        train(make_trainer(case, callbacks), case, **({"resume_from": None} if "unwatched" in case.action else {}))


def note(number: int, frame: Any) -> None:
    say(f"the user's handler got {signal.Signals(number).name}")


def train_with_raising_handler(case: Case) -> None:
    """Train under the handler that most scripts have: it leaves."""

    def leave(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    train(make_trainer(case), case)


def train_with_slow_handler(case: Case) -> None:
    """Train under a handler that is the moment ``handling``, in which the next signal may come."""

    def handle(number: int, frame: Any) -> None:
        note(number, frame)
        case.wait("handling")

    signal.signal(signal.SIGUSR1, handle)
    train(make_trainer(case), case)


def train_in_child(case: Case) -> None:
    """Train; in update 7 a process is forked that trains as well, and gets SIGTERM."""
    second = dataclasses.replace(case, directory=f"{case.directory}/second")
    second.options = {"save_dir": f"{second.directory}/checkpoints"}

    class Signalling(TrainerCallback):
        def on_train_update_end(self, trainer: Any, **kwargs: Any) -> None:
            if trainer.num_updates == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    class Forking(TrainerCallback):
        def on_train_update_end(self, trainer: Any, **kwargs: Any) -> None:
            if trainer.num_updates != 7:
                return
            pid = os.fork()
            if pid == 0:
                leave_quickly(lambda: train(make_trainer(second, [Signalling(), make_saver(second)]), second))
            say(f"child ended {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")

    train(make_trainer(case, [Forking(), make_saver(case)]), case)


def train_in_thread(case: Case) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=lambda: train(make_trainer(case), case))
    thread.start()
    thread.join()
    say(f"untouched {before == [signal.getsignal(number) for number in SIGNALS]}")


def train_in_daemon_thread(case: Case) -> None:
    """Leave while a thread is still training, as an application with a window does."""
    thread = threading.Thread(target=lambda: train(make_trainer(case), case), daemon=True)
    thread.start()
    case.wait("leaving")


def train_with_two_savers(case: Case) -> None:
    """Train with checkpoints in two places, in two runs of one trainer."""
    savers = [make_saver(case), make_saver(case, save_dir=Path(case.directory) / "others")]
    trainer = make_trainer(case, savers)
    with handlers_set(note):
        train(trainer, case, num_epochs=2)
        say(f"between the runs {[signal.getsignal(number) == note for number in SIGNALS]}")
        train(trainer, case)


def train_with_chained_handler(case: Case) -> None:
    """Train twice; during the first run something sets a handler that calls the one before it, and stays."""

    class Chaining(TrainerCallback):
        def on_train_update_end(self, trainer: Any, **kwargs: Any) -> None:
            if trainer.num_updates == 2:
                before = signal.getsignal(signal.SIGTERM)
                signal.signal(signal.SIGTERM, lambda *args: (note(*args), before(*args)))

    trainer = make_trainer(case, [Chaining(), make_saver(case)])
    train(trainer, case, num_epochs=2)
    train(trainer, case)


def look_at_interruption(case: Case) -> None:
    """Catch what ends the run, and show it."""
    trainer = make_trainer(case)
    try:
        try:
            train(trainer, case)
        except Exception:
            say("caught as an Exception")
    except TrainingInterrupted as interruption:
        code, reason, checkpoint = interruption.code, interruption.reason, interruption.checkpoint
        say(f"caught {reason} {code} {checkpoint.is_dir()} {type(checkpoint).__name__} {isinstance(checkpoint, Path)}")
        say(f"running {trainer.is_training_run}")
        if case.action == "copy":
            copied = pickle.loads(pickle.dumps(interruption))
            say(f"copied {copied.reason} {copied.code} {copied.checkpoint == checkpoint}")
        raise


def train_at_prompt(case: Case) -> None:
    """Train as at a prompt, and once more in the same process after each Ctrl-C."""
    sys.ps1 = ">>> "
    trainer = make_trainer(case)
    while True:
        try:
            train(trainer, case)
            return
        except KeyboardInterrupt as interruption:
            say(f"KeyboardInterrupt: {interruption}")


def train_beside_child(case: Case) -> None:
    """Train; in update 7 a process is forked, which waits to be signalled, three times."""

    class Forking(TrainerCallback):
        def on_train_update_end(self, trainer: Any, **kwargs: Any) -> None:
            if trainer.num_updates == 7:
                for number in SIGNALS:
                    say(f"child ended {wait_in_child(number)}")

    train(make_trainer(case, [Forking(), make_saver(case)]), case)


def wait_in_child(number: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except KeyboardInterrupt:
            os._exit(77)
        os._exit(78)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train_twice(case: Case) -> None:
    """Train two models, one after the other."""
    train(make_trainer(case), case)
    second = dataclasses.replace(case, directory=f"{case.directory}/second", moments=())
    second.options = {"save_dir": f"{second.directory}/checkpoints"}
    train(make_trainer(second), second)


def signal_new_workers(case: Case) -> None:
    """Train; when the workers of the second epoch are there and have not begun, all processes get SIGTERM."""
    main = os.getpid()

    def signal_all() -> None:
        if (Path(case.directory) / "armed").exists():
            (Path(case.directory) / "armed").unlink()
            os.killpg(os.getpgid(main), signal.SIGTERM)
            time.sleep(0.2)

    class Arming(TrainerCallback):
        def on_train_update_end(self, trainer: Any, **kwargs: Any) -> None:
            if trainer.num_updates == UPDATES_IN_EPOCH + 1 and not (Path(case.directory) / "fired").exists():
                (Path(case.directory) / "fired").touch()
                (Path(case.directory) / "armed").touch()

    os.register_at_fork(after_in_child=signal_all)
    train(make_trainer(case, [Arming(), make_saver(case)]), case)


class Unpickled(Noisy):
    """A dataset whose arrival in a worker, before the worker has begun, is when all processes get SIGTERM, once."""

    main = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        mark = Path(self.case.directory) / "signalled"
        if not mark.exists():
            mark.touch()
            os.killpg(os.getpgid(self.main), signal.SIGTERM)
            time.sleep(0.2)


def signal_spawned_workers(case: Case) -> None:
    dataset = Unpickled(case, case.num_samples, 1)
    dataset.main = os.getpid()
    train(make_trainer(case), case, train_dataset=dataset)


def train_with_decay(case: Case) -> None:
    """Train with a checkpoint before the decay of the learning rate, which comes after the other that is due then."""
    saver = WSDCheckpointCallback(Path(case.directory) / "before decay")
    create = WSDLrScheduler.create_scheduler_fn(decay_phase_ratio=0.5)
    train(make_trainer(case, [make_saver(case), saver]), case, create_scheduler_fn=create)


def evaluate_first(case: Case) -> None:
    """Use a trainer that saves for something else than training."""
    trainer = make_trainer(case)
    say(f"evaluated {sorted(trainer.evaluate(Noisy(case, 8, 2)))}")


ACTIONS = {
    "train": lambda case: train(make_trainer(case), case),
    "plain": lambda case: train(make_trainer(case, []), case, resume_from=None),
    "fail": fail,
    "write slowly": write_slowly,
    "handlers": partial(train_with_handlers, handler=note),
    "handlers, fail": partial(train_with_handlers, handler=note),
    "handlers, unwatched": partial(train_with_handlers, handler=note),
    "ignored": partial(train_with_handlers, handler=signal.SIG_IGN),
    "raising handler": train_with_raising_handler,
    "slow handler": train_with_slow_handler,
    "train in child": train_in_child,
    "signal spawned workers": signal_spawned_workers,
    "thread": train_in_thread,
    "daemon thread": train_in_daemon_thread,
    "two savers": train_with_two_savers,
    "chained": train_with_chained_handler,
    "look": look_at_interruption,
    "copy": look_at_interruption,
    "prompt": train_at_prompt,
    "child": train_beside_child,
    "twice": train_twice,
    "signal new workers": signal_new_workers,
    "evaluate": evaluate_first,
    "decay": train_with_decay,
}


# --------------------------------------------------------------------------------------------------------------------
# Being many processes
# --------------------------------------------------------------------------------------------------------------------


def serve() -> dict[str, Any] | None:
    """Fork a process for each request, in which this returns what it is to do; None when there are no more."""
    gc.collect()
    gc.freeze()
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "case" in request:
            pid = os.fork()
            if pid == 0:
                enter(request)
                return dict(request["case"])
            say(str(pid))
            continue
        deadline = time.monotonic() + request["timeout"]
        while request["pid"] not in codes and time.monotonic() < deadline:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                codes[pid] = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.005)
        say(str(codes.get(request["pid"])))
    return None


def enter(request: dict[str, Any]) -> None:
    """Be a process of its own, with its own session, output and environment."""
    os.setsid()
    descriptors = os.open(os.devnull, os.O_RDONLY), os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptors[0], 0)
    os.dup2(descriptors[1], 1)
    os.dup2(descriptors[1], 2)
    os.environ.update(request["environment"])


def main() -> None:
    """Do what the argument says."""
    fields = serve() if sys.argv[1] == "serve" else json.loads(sys.argv[1])
    if fields is None:
        return
    case = Case(**{**fields, "moments": tuple(fields["moments"])})
    (Path(case.directory) / f"pid.{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    if case.in_full:
        ACTIONS[case.action](case)
    else:
        leave_quickly(lambda: ACTIONS[case.action](case))


def leave_quickly(function: Callable[[], None]) -> None:
    """Do what the interpreter does at the end of a script, but leave the memory to the system."""
    code: Any = 0
    try:
        function()
    except SystemExit as leaving:
        code = leaving.code
    except Exception:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()

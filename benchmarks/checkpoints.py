"""Measure what checkpoints cost, as ratios within one run.

python benchmarks/checkpoints.py
python benchmarks/checkpoints.py --check

Everything goes through real training runs. What is compared is measured in turns, because a machine's disk and cores
are not the same from one minute to the next; before each save what earlier ones left to be written is written. Other
work on the machine only adds, so the smallest of several times is the best known.
"""

import argparse
import gc
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import SaveTrainingStateCallback, TrainerCallback
from pytorch_accelerated.checkpoint import list_checkpoints
from pytorch_accelerated.errors import StopTrainingError

# The aims, as ratios; --check fails where one is missed by the factor FAR.
MOST_FOR_A_SAVE = 1.3
MOST_FOR_A_DURABLE_SAVE = 1.3
MOST_FOR_A_STALL = 0.2
MOST_BETWEEN_POSITIONS = 1.25
MOST_FOR_AN_UPDATE = 1.05
FAR = 2.0

WIDTH = 2048
MEGABYTES_OF_A_LAYER = WIDTH * (WIDTH + 1) * 4 * 3 / 1e6  # weights, and two numbers of AdamW for each


def timed(function: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Bare(TrainerCallback):
    """Save weights and optimizer in every update as one would by hand, once plainly and once down to the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plain: list[float] = []
        self.durable: list[float] = []

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.plain.append(self._measure(partial(self._save, trainer)))
        self.durable.append(self._measure(partial(self._save_durably, trainer)))

    def _measure(self, save: Callable[[], None]) -> float:
        os.sync()
        seconds = timed(save)
        self.path.unlink()
        return seconds

    def _save(self, trainer: Trainer) -> None:
        state = {"model": trainer.get_model().state_dict(), "optimizer": trainer.optimizer.state_dict()}
        torch.save(state, self.path)

    def _save_durably(self, trainer: Trainer) -> None:
        self._save(trainer)
        with self.path.open("rb") as file:
            os.fsync(file.fileno())


class Begin(TrainerCallback):
    """Note the time just before ``SaveTrainingStateCallback``, whose ``order`` is 2, hears of an update."""

    order = 1
    start: float

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        os.sync()
        self.start = time.perf_counter()


class End(TrainerCallback):
    """Note for how long it held the loop up, then wait until what it does in the background is done."""

    order = 3

    def __init__(self, begin: Begin, directory: Path) -> None:
        self.begin, self.directory = begin, directory
        self.held_up: list[float] = []
        self.until_saved: list[float] = []

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.held_up.append(time.perf_counter() - self.begin.start)
        ending = f"-update-{trainer.num_updates}"
        while not any(path.name.endswith(ending) for path in list_checkpoints(self.directory)):
            time.sleep(0.002)
        self.until_saved.append(time.perf_counter() - self.begin.start)
        for old in list_checkpoints(self.directory)[1:]:  # outside of the times, as with the bare file
            shutil.rmtree(old)


def measure_saving(directory: Path, megabytes: float, repeats: int, asynchronous: bool) -> dict[str, list[float]]:
    """Train for some updates, saving in each, and return the seconds by what was done."""
    num_layers = max(1, round(megabytes / MEGABYTES_OF_A_LAYER))
    data = TensorDataset(torch.randn(repeats + 1, WIDTH), torch.randn(repeats + 1, WIDTH))
    bare, begin = Bare(directory / "bare.pt"), Begin()
    checkpoints = directory / ("background" if asynchronous else "foreground")
    end = End(begin, checkpoints)
    saving = SaveTrainingStateCallback(
        checkpoints, save_every_n_updates=1, save_at_end=False, asynchronous=asynchronous
    )
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers)))
    optimizer = partial(torch.optim.AdamW, lr=1e-6)
    trainer = Trainer(model, nn.MSELoss(), optimizer, callbacks=[bare, begin, saving, end])
    trainer.train(data, num_epochs=1, per_device_batch_size=1)
    # The first has memory and files to make that later ones find.
    times = {"plain": bare.plain, "durable": bare.durable, "held up": end.held_up, "until saved": end.until_saved}
    return {name: seconds[1:] for name, seconds in times.items()}


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """A map-style dataset that is asked for one sample at a time."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((8,), index / self.size), torch.zeros(1)


class SaveAt(TrainerCallback):
    """Save the state after certain updates, and note when each came."""

    order = 2

    def __init__(self, directory: Path, updates: list[int]) -> None:
        self.paths = {update: directory / f"after-{update}" for update in updates}
        self.times: dict[int, float] = {}

    def on_train_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates in self.paths:
            self.times[trainer.num_updates] = time.perf_counter() - self.start
            trainer.save_training_state(self.paths[trainer.num_updates])


class StopAtFirstBatch(TrainerCallback):
    """End the run as soon as it has a batch."""

    def on_train_step_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        self.time = time.perf_counter()
        raise StopTrainingError("that was what there was to see")


def measure_resuming(
    directory: Path, num_samples: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds to the first batch after resuming by position, and those that training took to get there."""
    batch_size = 64
    num_updates = -(-num_samples // batch_size)
    positions = {"start": 1, "middle": num_updates // 2, "end": num_updates - 1}
    data = Samples(num_samples)

    def make_trainer(*callbacks: TrainerCallback) -> Trainer:
        torch.manual_seed(0)
        return Trainer(nn.Linear(8, 1), nn.MSELoss(), partial(torch.optim.SGD, lr=0.01), callbacks=callbacks)

    saving = SaveAt(directory, list(positions.values()))
    make_trainer(saving).train(data, num_epochs=1, per_device_batch_size=batch_size)
    times: dict[str, list[float]] = {name: [] for name in positions}
    for _ in range(repeats + 1):
        for name, update in positions.items():
            stop = StopAtFirstBatch()
            trainer = make_trainer(stop)
            trainer.print = lambda *arguments: None  # type: ignore[method-assign]
            start = time.perf_counter()
            path = saving.paths[update]
            trainer.train(data, num_epochs=1, per_device_batch_size=batch_size, resume_from=path)
            times[name].append(stop.time - start)
    reached = {name: saving.times[update] for name, update in positions.items()}
    return {name: seconds[1:] for name, seconds in times.items()}, reached


class Lap(TrainerCallback):
    """Note the time of each update, before or after ``SaveTrainingStateCallback`` hears of it."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.times: list[float] = []

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def measure_updates(directory: Path, num_updates: int, repeats: int) -> tuple[list[float], list[float]]:
    """Return the seconds of an update of a tiny model, and those ``SaveTrainingStateCallback`` adds without a save."""
    data = TensorDataset(torch.randn(num_updates * 8, 32), torch.randn(num_updates * 8, 1))
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))
    saving = SaveTrainingStateCallback(directory / "never", save_at_end=False)

    def time_in_between(*between: TrainerCallback) -> tuple[float, float]:
        before, after = Lap(order=1), Lap(order=3)
        optimizer = partial(torch.optim.AdamW, lr=1e-6)
        trainer = Trainer(model, nn.MSELoss(), optimizer, callbacks=[before, *between, after])
        trainer.train(data, num_epochs=1)
        gaps = [end - begin for begin, end in zip(before.times, after.times, strict=True)]
        updates = [end - begin for begin, end in itertools.pairwise(before.times)]
        return statistics.median(updates), statistics.median(gaps)

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other longer than they work
    updates, added = [], []
    for _ in range(repeats):
        update, nothing = time_in_between()
        _, watching = time_in_between(saving)
        updates.append(update)
        added.append(watching - nothing)
    torch.set_num_threads(num_threads)
    return updates, added


def main() -> int:
    """Measure, print, and return 1 where --check was given and an aim is missed by far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=250, help="weights and state of AdamW together")
    parser.add_argument("--num-samples", type=int, default=200_000, help="of the dataset that is resumed in")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--directory", type=Path, help="on the disk to be measured; default: one for temporary files")
    parser.add_argument("--check", action="store_true", help=f"fail where an aim is missed by a factor of {FAR:g}")
    arguments = parser.parse_args()

    misses: list[str] = []

    def report(what: str, seconds: list[float], base: list[float] | None = None, most: float | None = None) -> None:
        """Print the smallest and the median time, and both as ratios to those of ``base``."""
        figures = min(seconds), statistics.median(seconds)
        line = f"{what:<62}" + "".join(f"{1e3 * figure:10.3f}" for figure in figures)
        if base is not None:
            ratios = min(seconds) / min(base), statistics.median(seconds) / statistics.median(base)
            line += "".join(f"{ratio:8.2f}" for ratio in ratios) + ("" if most is None else f"  aim: {most:g}")
            if most is not None and min(ratios) > most * FAR:
                misses.append(what)
        print(line)

    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        print(f"{'milliseconds, and ratios: smallest and median':<62}{'smallest':>10}{'median':>10}{'ratios':>16}")
        for is_asynchronous in (False, True):
            times = measure_saving(directory, arguments.megabytes, arguments.repeats, is_asynchronous)
            gc.collect()
            report(f"torch.save, {arguments.megabytes:g} MB", times["plain"])
            report("torch.save and fsync", times["durable"], times["plain"])
            if is_asynchronous:
                report("asynchronous save: until the loop goes on", times["held up"], times["plain"], MOST_FOR_A_STALL)
                report("asynchronous save: until it is on the disk", times["until saved"], times["plain"])
            else:
                report("save: everything, hashes and fsync", times["held up"], times["plain"], MOST_FOR_A_SAVE)
                report(
                    "the same, against torch.save and fsync",
                    times["held up"],
                    times["durable"],
                    MOST_FOR_A_DURABLE_SAVE,
                )
        resuming, reached = measure_resuming(directory, arguments.num_samples, arguments.repeats)
        for position, seconds in resuming.items():
            what = f"resume to the first batch: {position} of an epoch (trained in {reached[position]:.1f} s)"
            if position == "start":
                report(what, seconds)
            else:
                report(what, seconds, resuming["start"], MOST_BETWEEN_POSITIONS)
        updates, added = measure_updates(directory, 300, arguments.repeats)
        longer = [update + more for update, more in zip(updates, added, strict=True)]
        report("update of a tiny model", updates)
        report("the same, watching for signals and times", longer, updates, MOST_FOR_AN_UPDATE)
        report("what that adds to each update", added)
    if misses:
        print(f"missed by a factor of {FAR:g} or more: {'; '.join(misses)}")
    return int(arguments.check and bool(misses))


if __name__ == "__main__":
    sys.exit(main())

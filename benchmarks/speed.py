"""Measure what training costs around the arithmetic, here and in other systems, as ratios to a loop written by hand.

make bench
python benchmarks/speed.py --quick
python benchmarks/speed.py --systems ours,lightning --workloads python_dataset,counts --rounds 5

Each system has a process of its own, started once for all repetitions, and only one of them works at a time: in rounds,
because a machine is not the same from one minute to the next, and a ratio is taken within its round. Progress bars draw
on a pseudo-terminal, as for a user. What is trained, and how a step is timed, is in systems/workloads.py.
"""

import argparse
import contextlib
import datetime
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import platform
import pty
import select
import shlex
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS_DIRECTORY = Path(__file__).resolve().parent / "systems"
PUBLISHED = Path(sys.prefix) / "published"
BASE = "by_hand"
SECONDS_TO_ANSWER = 900


@dataclass(frozen=True)
class System:
    """A system: its file, what a user of it imports, and the distributions it consists of."""

    title: str
    file: str
    imports: str
    distribution: str | None = None
    arguments: tuple[str, ...] = ()


SYSTEMS = {
    BASE: System("by hand", "by_hand.py", "import torch"),
    "accelerate": System("Accelerate", "accelerate_loop.py", "from accelerate import Accelerator", "accelerate"),
    "ours": System("this library", "ours.py", "from pytorch_accelerated import Trainer", "pytorch-accelerated"),
    "ours_bare": System(
        "this library, no callbacks",
        "ours.py",
        "from pytorch_accelerated import Trainer",
        "pytorch-accelerated",
        ("bare",),
    ),
    "published": System(
        "pytorch-accelerated 0.1.61",
        "published.py",
        f"import sys; sys.path.insert(0, {str(PUBLISHED)!r}); from pytorch_accelerated import Trainer",
    ),
    "lightning": System("Lightning", "lightning_trainer.py", "import lightning", "lightning"),
    "hf_trainer": System(
        "Trainer of transformers",
        "hf_trainer.py",
        "from transformers import Trainer, TrainingArguments",
        "transformers",
    ),
    "ignite": System(
        "Ignite",
        "ignite_engine.py",
        "from ignite.engine import create_supervised_trainer; from ignite.handlers import ProgressBar",
        "pytorch-ignite",
    ),
}

TIMED = {
    "python_dataset": "Python dataset",
    "in_memory": "in memory",
    "adamw": "AdamW",
    "accumulation": "accumulation",
    "evaluation": "evaluation",
    "two_processes": "two processes",
    "transformer": "transformer",
}
OTHERS = ("counts", "imports", "callbacks", "growth", "indices")


@dataclass(frozen=True)
class Effort:
    """How much is done of everything."""

    rounds: int
    steps: int
    warmup: int
    transformer_steps: int
    window: tuple[int, int]
    fresh: int  # processes that are started to see how they start
    callback_counts: tuple[int, ...]
    growth: tuple[int, int]
    sizes: tuple[int, ...]


SIZES = (10**3, 10**5, 10**6, 10**7, 10**8)
FULL = Effort(9, 800, 50, 22, (100, 200), 3, (0, 5, 10, 20, 50), (10_000, 100_000), SIZES)
QUICK = Effort(1, 240, 50, 6, (100, 200), 1, (0, 50), (400, 1_000), SIZES[:2])


class WorkerError(Exception):
    """A worker could not do what it was asked for; what it printed is in the message."""


class Worker:
    """A process that does jobs in one system, on a pseudo-terminal of its own."""

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        system = SYSTEMS[name]
        self.name = name
        self.printed = bytearray()
        self.scratch = tempfile.TemporaryDirectory(prefix=f"speed-{name}-")
        terminal, its_terminal = pty.openpty()
        # Without a size a bar has no room to be drawn in.
        fcntl.ioctl(its_terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        commands, self._commands = os.pipe()
        self._replies, replies = os.pipe()
        self.started_at = time.perf_counter()  # the clock is the same in all processes
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(SYSTEMS_DIRECTORY / system.file),
                str(commands),
                str(replies),
                *system.arguments,
            ],
            stdin=its_terminal,
            stdout=its_terminal,
            stderr=its_terminal,
            cwd=self.scratch.name,
            env=environment,
            pass_fds=(commands, replies),
        )
        for descriptor in (its_terminal, commands, replies):
            os.close(descriptor)
        self._terminal = terminal
        self._reader = os.fdopen(self._replies)
        self._drain = threading.Thread(target=self._read_terminal, daemon=True)
        self._drain.start()

    def _read_terminal(self) -> None:
        # A terminal whose other side is closed reads as an error.
        with contextlib.suppress(OSError):
            while chunk := os.read(self._terminal, 1 << 16):
                self.printed += chunk
                del self.printed[:-20_000]

    def send(self, command: dict[str, Any]) -> None:
        try:
            os.write(self._commands, (json.dumps(command) + "\n").encode())
        except BrokenPipeError:
            self._fail("the process is gone")

    def receive(self) -> dict[str, Any]:
        if not select.select([self._reader], [], [], SECONDS_TO_ANSWER)[0]:
            self._fail(f"no answer for {SECONDS_TO_ANSWER} seconds")
        line = self._reader.readline()
        reply: dict[str, Any] = json.loads(line) if line else {"failed": "the process is gone"}
        if "failed" in reply:
            self._fail(reply["failed"])
        return reply

    def _fail(self, why: str) -> None:
        self.stop()
        lines = self.printed.decode(errors="replace").replace("\r\n", "\n").split("\n")
        seen = "\n".join(line.rpartition("\r")[2] for line in lines)  # of a bar the last that was drawn
        raise WorkerError(f"{self.name}: {why}\n{seen}")

    def stop(self) -> None:
        if self.process.returncode is not None:
            return
        os.close(self._commands)  # the worker's loop over commands ends
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._drain.join(5)
        self._reader.close()
        os.close(self._terminal)
        files = [path.name for path in Path(self.scratch.name).rglob("*")]
        if files:
            print(f"{self.name} wrote files: {', '.join(files)}", file=sys.stderr)
        self.scratch.cleanup()


class Team:
    """The processes that do one job together: one, or as many as are to exchange gradients."""

    def __init__(self, name: str, num_processes: int = 1) -> None:
        common = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            # All are compared on the CPU: a system that finds an accelerator by itself would take it.
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TERM": "xterm",
        }
        self.workers: list[Worker] = []
        port = str(find_free_port())
        for rank in range(num_processes):
            environment = dict(common)
            if num_processes > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(num_processes),
                    "LOCAL_WORLD_SIZE": str(num_processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
            self.workers.append(Worker(name, environment))

    def ask(self, **command: Any) -> dict[str, Any]:
        """Let all do a job, and return what the first one measured."""
        for worker in self.workers:
            worker.send(command)
        replies = [worker.receive() for worker in self.workers]
        weights = {reply.get("weights") for reply in replies}
        if len(weights) > 1:
            raise WorkerError(f"{self.workers[0].name}: the processes ended with different weights, {weights}")
        return replies[0]

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()


def find_free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


@contextmanager
def fresh(name: str) -> Iterator[Team]:
    """Start a worker for a single job."""
    team = Team(name)
    try:
        yield team
    finally:
        team.stop()


@dataclass
class Results:
    """What was measured, by part and system; a system that failed in a part has nothing there."""

    times: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    callbacks: dict[str, list[float]] = field(default_factory=dict)
    growth: list[float] = field(default_factory=list)
    indices: dict[tuple[str, int], dict[str, float] | None] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def noting_failure(self, part: str, name: str) -> Iterator[None]:
        """Go on with the other systems where one fails, and tell in the end."""
        try:
            yield
        except WorkerError as error:
            self.failures.append(f"{part}, {name}")
            print(f"\nFAILED: {part}, {error}\n", file=sys.stderr)


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def measure_times(results: Results, parts: Sequence[str], names: Sequence[str], effort: Effort) -> None:
    """Time the steps of workloads, in processes that stay for all of them."""
    for num_processes in (1, 2):
        teams: dict[str, Team] = {}
        try:
            for part in parts:
                if num_processes == (2 if part == "two_processes" else 1):
                    results.times[part] = time_steps(results, part, names, teams, num_processes, effort)
        finally:
            for team in teams.values():
                team.stop()


def time_steps(
    results: Results, part: str, names: Sequence[str], teams: dict[str, Team], num_processes: int, effort: Effort
) -> dict[str, list[float]]:
    """Return the seconds of a step, by system and round; of a system that fails there are none."""
    steps, warmup = (effort.transformer_steps, 2) if part == "transformer" else (effort.steps, effort.warmup)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(effort.rounds + 1):
        # The first round is for looking at what is done, and for what happens once only.
        measure = "time" if number else "check"
        for name in list(times):
            is_done = False
            with results.noting_failure(part, name):
                if name not in teams:
                    teams[name] = Team(name, num_processes)
                reply = teams[name].ask(workload=part, measure=measure, steps=steps, warmup=warmup)
                is_done = True
            if not is_done:
                del times[name]
                teams.pop(name).stop()
            elif number:
                times[name].append(reply["seconds"])
        say(f"{part}: round {number} of {effort.rounds}")
    return times


def measure_counts(results: Results, names: Sequence[str], effort: Effort) -> None:
    """Count calls, operations, reads and frames, and see how a fresh process begins."""
    job = {"workload": "python_dataset", "steps": max(240, effort.window[1] + 1)}
    figures = {
        what: {name: [] for name in names} for what in ("calls", "ops", "reads", "frames", "first", "ready", "peak")
    }
    results.figures |= figures
    for name in names:
        with results.noting_failure("counts", name), fresh(name) as team:
            for measure, whats in (("calls", ["calls"]), ("ops", ["ops", "reads"]), ("frames", ["frames"])):
                reply = team.ask(measure=measure, window=effort.window, **job)
                for what in whats:
                    figures[what][name].append(reply[what])
    say("counts: counted")
    for number in range(effort.fresh):
        for name in names:
            with results.noting_failure("counts", name), fresh(name) as team:
                reply = team.ask(measure="time", warmup=effort.warmup, **job)
                reply["ready"] = reply["first_at"] - team.workers[0].started_at
                for what in ("first", "ready", "peak"):
                    figures[what][name].append(reply[what])
        say(f"counts: fresh processes, {number + 1} of {effort.fresh}")


def measure_imports(results: Results, names: Sequence[str], effort: Effort) -> None:
    """Time what a user of a system imports, as a ratio to importing torch."""

    def seconds_of(statement: str) -> float:
        code = f"import time; begin = time.perf_counter(); {statement}; print(time.perf_counter() - begin)"
        # Some print while they are imported.
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
        return float(done.stdout.splitlines()[-1])

    ratios: dict[str, list[float]] = {name: [] for name in names}
    results.figures["imports"] = ratios
    by_statement = {SYSTEMS[name].imports: name for name in reversed(names)}
    for number in range(-1, effort.fresh):  # the first time is for the disk
        base = seconds_of(SYSTEMS[BASE].imports)
        for statement, name in by_statement.items():
            if name != BASE and (number >= 0 or effort.fresh > 1):
                ratio = seconds_of(statement) / base
                if number >= 0:
                    ratios[name].append(ratio)
        if number >= 0:
            ratios[BASE].append(1.0)
        say(f"imports: round {number + 1} of {effort.fresh}")
    for name in names:
        ratios[name] = ratios[by_statement[SYSTEMS[name].imports]]


def measure_callbacks(results: Results, effort: Effort) -> None:
    """Time steps of this library with callbacks that do nothing."""
    kinds: dict[str, dict[str, Any]] = {
        str(count): {"callbacks": count, "listening": True} for count in effort.callback_counts
    }
    kinds[f"{effort.callback_counts[-1]}, none listening"] = {
        "callbacks": effort.callback_counts[-1],
        "listening": False,
    }
    results.callbacks = {kind: [] for kind in kinds}
    with results.noting_failure("callbacks", "ours"), fresh("ours") as team:
        for number in range(effort.rounds + 1):
            for kind, how in kinds.items():
                job = {"workload": "in_memory", "steps": effort.steps, "warmup": effort.warmup}
                reply = team.ask(measure="time", **job, **how)
                if number:
                    results.callbacks[kind].append(reply["seconds"])
        say("callbacks: done")


def measure_growth(results: Results, effort: Effort) -> None:
    """See what memory a long run of this library gathers; a step on the way and the last but one are looked at."""
    first, last = effort.growth
    steps_of_an_epoch = first // 10
    with results.noting_failure("growth", "ours"), fresh("ours") as team:
        reply = team.ask(
            workload="in_memory",
            measure="growth",
            steps=steps_of_an_epoch,
            epochs=last // steps_of_an_epoch,
            window=(first, last - 1),
        )
        results.growth = reply["growth"]
        say("growth: done")


def measure_indices(results: Results, names: Sequence[str], effort: Effort, largest: float) -> None:
    """See what time and memory it takes to begin with a large dataset."""
    for size in effort.sizes:
        for name in names:
            if size > largest:
                results.indices[name, size] = None
                continue
            with results.noting_failure("indices", name), fresh(name) as team:
                reply = team.ask(workload="indices", measure="start", steps=1, indices=size)
                results.indices[name, size] = {"first": reply["first"], "peak": reply["peak"]}
        say(f"indices: {size:.0e}")


# --------------------------------------------------------------------------------------------------------------------
# What is written
# --------------------------------------------------------------------------------------------------------------------


def with_spread(numbers: Sequence[float], form: str = ".2f") -> str:
    """Return the median and, of several numbers, the quartiles."""
    if not numbers:
        return "failed"
    middle = f"{statistics.median(numbers):{form}}"
    if len(numbers) < 3:
        return middle
    lower, _, upper = statistics.quantiles(numbers, n=4, method="inclusive")
    return f"{middle} ({lower:{form}} to {upper:{form}})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def describe(results: Results, names: Sequence[str], missing: Sequence[str], effort: Effort) -> str:
    """Return all results as Markdown."""
    parts = [describe_circumstances(names)]
    lacking = [[SYSTEMS[name].title, "not installed"] for name in missing]
    if results.times:
        head = ["speed, as a ratio to the loop by hand", *(TIMED[part] for part in results.times)]
        base = {part: times.get(BASE, []) for part, times in results.times.items()}
        microseconds = [with_spread([1e6 * t for t in times], ".0f") for times in base.values()]
        rows = [["by hand, microseconds of a step", *microseconds]]
        for name in names:
            if name == BASE:
                continue
            cells = []
            for part, times in results.times.items():
                pairs = zip(times.get(name, []), base[part], strict=False)
                cells.append(with_spread([by_hand / mine for mine, by_hand in pairs]))
            rows.append([SYSTEMS[name].title, *cells])
        rows += [row + [""] * (len(head) - 2) for row in lacking]
        rounds = f"Median and quartiles of {effort.rounds} rounds" if effort.rounds > 2 else "Too few rounds to tell"
        parts.append(f"{table(head, rows)}\n\n{rounds}; ratios within a round; more is faster.")
    titles = {
        "calls": ("Python calls in a step", ".0f"),
        "ops": ("kernels in a step", ".1f"),
        "reads": ("reads by the host in a step", ".1f"),
        "frames": ("frames above `backward`", ".0f"),
        "imports": ("import, ratio to torch's", ".2f"),
        "first": ("seconds to the first batch", ".3f"),
        "ready": ("the same, from the start of the process", ".2f"),
        "peak": ("peak memory, MiB", ".0f"),
    }
    shown = [what for what in titles if what in results.figures]
    if shown:
        rows = []
        for name in names:
            cells = []
            for what in shown:
                numbers, form = results.figures[what][name], titles[what][1]
                cells.append(f"{statistics.median(numbers):{form}}" if numbers else "failed")
            rows.append([SYSTEMS[name].title, *cells])
        rows += [row + [""] * (len(shown) - 1) for row in lacking]
        parts.append(table(["with the Python dataset", *(titles[what][0] for what in shown)], rows))
    if results.callbacks:
        base = results.callbacks["0"]
        rows = []
        for kind, seconds in results.callbacks.items():
            ratios = [with_some / without for with_some, without in zip(seconds, base, strict=False)]
            rows.append([kind, with_spread([1e6 * t for t in seconds], ".0f"), with_spread(ratios)])
        head = ["callbacks listening to each step", "microseconds of a step", "ratio to none"]
        parts.append(table(head, rows))
    if results.growth:
        first, last = results.growth
        head = ["steps", "memory, MiB"]
        rows = [[f"{n:,}", f"{size:.1f}"] for n, size in zip(effort.growth, results.growth, strict=True)]
        parts.append(table(head, [*rows, ["growth", f"{last - first:.1f}"]]))
    if results.indices:
        systems = list(dict.fromkeys(name for name, _ in results.indices))
        head = ["indices of the dataset"]
        for name in systems:
            head += [f"{SYSTEMS[name].title}: seconds to the first batch", "peak memory, MiB"]
        rows = []
        for size in dict.fromkeys(size for _, size in results.indices):
            row = [f"{size:,}"]
            for name in systems:
                figures = results.indices.get((name, size), {})
                if figures:
                    row += [f"{figures['first']:.3f}", f"{figures['peak']:.0f}"]
                else:
                    row += ["skipped" if figures is None else "failed"] * 2
            rows.append(row)
        parts.append(table(head, rows))
    return "\n\n".join(parts) + "\n"


def describe_circumstances(names: Sequence[str]) -> str:
    versions = [f"Python {platform.python_version()}", f"torch {importlib.metadata.version('torch')}"]
    for distribution in dict.fromkeys(["accelerate", *(SYSTEMS[name].distribution for name in names)]):
        if distribution is not None:
            versions.append(f"{distribution} {importlib.metadata.version(distribution)}")
    if "published" in names:
        found = importlib.metadata.distributions(path=[str(PUBLISHED)])
        versions += [f"published {one.name} {one.version}" for one in found if "accelerated" in one.name]
    command = shlex.join(["python", str(Path(__file__).relative_to(ROOT)), *sys.argv[1:]])
    machine = f"{cpu_name()}, {os.cpu_count()} cores, {available_gigabytes():.0f} GiB of memory free"
    return f"{datetime.date.today()}; {machine}; {', '.join(versions)}; commit {commit()}; `{command}`"


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_gigabytes() -> float:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) / 2**20
    return 0.0


def commit() -> str:
    """Return the commit of this repository, and whether there is more in it."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        name, changes = (
            subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "pytorch_accelerated"))
        )
        return f"{name} with changes" if changes else name
    return "unknown"


def is_installed(name: str) -> bool:
    """Return whether a system can be imported, without importing it."""
    if name == "published":
        return (PUBLISHED / "pytorch_accelerated").is_dir()
    module = SYSTEMS[name].imports.split()[1].partition(".")[0]
    return importlib.util.find_spec(module) is not None


def main() -> int:
    """Measure, write, and return 1 where a system failed."""

    def choice(of: Sequence[str], text: str) -> list[str]:
        unknown = sorted(set(text.split(",")) - set(of))
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(of)}")
        return [one for one in of if one in text.split(",")]

    all_parts = [*TIMED, *OTHERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only see that everything works")
    parser.add_argument("--rounds", type=int, help=f"of what is timed, default {FULL.rounds}")
    parser.add_argument("--systems", type=lambda text: choice([*SYSTEMS], text), default=[*SYSTEMS])
    parser.add_argument(
        "--workloads", type=lambda text: choice(all_parts, text), default=all_parts, help=", ".join(all_parts)
    )
    parser.add_argument(
        "--largest", type=float, help="dataset, in indices; default 1e8, or 1e7 where less than 12 GiB are free"
    )
    parser.add_argument("--write", type=Path, help="a Markdown file; default: to the terminal")
    arguments = parser.parse_args()

    effort = QUICK if arguments.quick else FULL
    if arguments.rounds is not None:
        effort = Effort(**vars(effort) | {"rounds": arguments.rounds})
    chosen = [name for name in SYSTEMS if name == BASE or name in arguments.systems]
    names = [name for name in chosen if is_installed(name)]
    missing = [name for name in chosen if name not in names]
    parts = arguments.workloads
    largest = arguments.largest or (1e8 if available_gigabytes() > 12 else 1e7)
    results = Results()
    measure_times(results, [part for part in TIMED if part in parts], names, effort)
    if "counts" in parts:
        measure_counts(results, names, effort)
    if "imports" in parts:
        measure_imports(results, names, effort)
    if "ours" in names:
        if "callbacks" in parts:
            measure_callbacks(results, effort)
        if "growth" in parts:
            measure_growth(results, effort)
    if "indices" in parts:
        measure_indices(results, [name for name in (BASE, "ours") if name in names], effort, largest)
    text = describe(results, names, missing, effort)
    if arguments.write is None:
        print(text)
    else:
        arguments.write.write_text(text)
    if results.failures:
        print(f"failed: {'; '.join(results.failures)}", file=sys.stderr)
    return int(bool(results.failures))


if __name__ == "__main__":
    sys.exit(main())

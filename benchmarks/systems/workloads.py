"""What every system trains, and the worker that trains it when the runner asks.

The model notes the time whenever a batch reaches it, and that alone says how long a step takes: it is the one place
that all systems pass in the same way. Counting goes through the same place, see ``Window``.
"""

import gc
import json
import os
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset, TensorDataset

NUM_INPUTS, NUM_CLASSES = 64, 10
VOCABULARY, CONTEXT, WIDTH, NUM_LAYERS = 4096, 32, 320, 6
NUM_PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


class Stamps(Protocol):
    """What the model tells of each batch: a list, for timing, or something that acts on it."""

    def append(self, now: float, /) -> None: ...


class TinyMLP(nn.Module):
    """So little arithmetic that a step shows what is around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stamps: Stamps = []
        self.hidden = nn.Linear(NUM_INPUTS, NUM_INPUTS)
        self.relu = nn.ReLU()
        self.head = nn.Linear(NUM_INPUTS, NUM_CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        self.stamps.append(time.perf_counter())
        return self.head(self.relu(self.hidden(inputs)))


class SmallGPT(nn.Module):
    """Ten million parameters of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stamps: Stamps = []
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, nhead=5, dim_feedforward=4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, NUM_LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, inputs: Tensor) -> Tensor:
        self.stamps.append(time.perf_counter())
        embedded = self.tokens(inputs) + self.positions.weight
        return self.head(self.layers(embedded, mask=self.mask, is_causal=True))


class TokenLoss(nn.Module):
    """The mean over all tokens."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """A dataset as users write them: one sample at a time."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


class Indices(Dataset[tuple[Tensor, Tensor]]):
    """Nothing but a length, to see what a system does for each index before it begins."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sample = torch.zeros(NUM_INPUTS), torch.tensor(0)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.sample


def make_rows(num_samples: int) -> tuple[Tensor, Tensor]:
    """Return points and the one of ten directions that each lies in most: easy to learn, so that learning shows."""
    inputs = torch.randn(num_samples, NUM_INPUTS)
    return inputs, (inputs @ torch.randn(NUM_INPUTS, NUM_CLASSES)).argmax(dim=1)


def make_text(num_samples: int) -> tuple[Tensor, Tensor]:
    """Return texts that count upwards in a small part of the vocabulary."""
    text = (torch.randint(50, (num_samples, 1)) + torch.arange(CONTEXT + 1)) % 50
    return text[:, :-1], text[:, 1:]


sgd = partial(torch.optim.SGD, lr=0.1)
adamw = partial(torch.optim.AdamW, lr=1e-3)


@dataclass(frozen=True)
class Workload:
    """What is trained, without how long."""

    make_model: Callable[[], nn.Module] = TinyMLP
    make_data: Callable[[int], Dataset[Any]] = lambda num_samples: Rows(*make_rows(num_samples))
    make_loss: Callable[[], nn.Module] = nn.CrossEntropyLoss
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = sgd
    batch_size: int = 32
    accumulation: int = 1
    clip_norm: float | None = None
    has_schedule: bool = False
    is_evaluation: bool = False


WORKLOADS = {
    "python_dataset": Workload(),
    "in_memory": Workload(make_data=lambda num_samples: TensorDataset(*make_rows(num_samples))),
    "adamw": Workload(make_optimizer=adamw),
    "transformer": Workload(
        SmallGPT, lambda num_samples: Rows(*make_text(num_samples)), TokenLoss, adamw, batch_size=2
    ),
    "accumulation": Workload(accumulation=4, clip_norm=1.0, has_schedule=True),
    "evaluation": Workload(is_evaluation=True),
    "two_processes": Workload(),
    "indices": Workload(make_data=Indices),
}


@dataclass
class Job:
    """One training run or evaluation, as a system is asked for it."""

    model: nn.Module
    dataset: Dataset[Any]
    loss: nn.Module
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    batch_size: int  # of one process
    accumulation: int
    clip_norm: float | None
    make_scheduler: Callable[[Optimizer], LambdaLR] | None  # to be stepped once per update
    num_epochs: int = 1  # more than one for ours only
    num_callbacks: int | None = None  # for ours only: as many that do nothing, instead of the default ones
    is_listening: bool = True  # whether these listen to an event


class EnoughSeenError(Exception):
    """End a run of which there is nothing more to see."""


class Window:
    """Call one function when a certain batch reaches the model, and another when a later one does."""

    def __init__(self, first: int, last: int, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self.first, self.last, self.begin, self.end = first, last, begin, end
        self.seen = 0

    def append(self, now: float, /) -> None:
        if self.seen == self.first:
            self.begin()
        elif self.seen == self.last:
            self.end()
        self.seen += 1


class Ops(TorchDispatchMode):
    """Count what reaches torch's kernels while ``is_counting``.

    A mode entered inside of forward would be left in another order than it was entered in, so this one is there for
    the whole run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.is_counting = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func.overloadpacket)] += self.is_counting
        return func(*args, **(kwargs or {}))


Function = Callable[[Job], int]
"""How a system does a job; it returns the number of processes that it knows of."""


class Worker:
    """Do jobs in one system."""

    def __init__(self, train: Function, evaluate: Function) -> None:
        self.train, self.evaluate = train, evaluate

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Return what a command asks to be measured, and how much memory the process has used."""
        workload = WORKLOADS[command["workload"]]
        torch.manual_seed(0)
        num_steps, num_epochs = command["steps"], command.get("epochs", 1)
        num_samples = num_steps * workload.batch_size * NUM_PROCESSES
        num_updates = num_steps // workload.accumulation
        job = Job(
            model=workload.make_model(),
            dataset=workload.make_data(command.get("indices", num_samples)),
            loss=workload.make_loss(),
            make_optimizer=workload.make_optimizer,
            batch_size=workload.batch_size,
            accumulation=workload.accumulation,
            clip_norm=workload.clip_norm,
            make_scheduler=partial(_make_linear_schedule, num_updates) if workload.has_schedule else None,
            num_epochs=num_epochs,
            num_callbacks=command.get("callbacks"),
            is_listening=command.get("listening", True),
        )
        function = self.evaluate if workload.is_evaluation else self.train
        gc.collect()
        measured = getattr(self, f"_measure_{command['measure']}")(command, job, partial(self._run, function, job))
        measured["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return measured

    def _run(self, function: Function, job: Job) -> None:
        found = function(job)
        assert found == NUM_PROCESSES, f"the system knows of {found} processes instead of {NUM_PROCESSES}"

    def _measure_time(self, command: dict[str, Any], job: Job, run: Callable[[], None]) -> dict[str, Any]:
        stamps: list[float] = []
        job.model.stamps = stamps
        begin = time.perf_counter()
        run()
        assert len(stamps) == command["steps"], f"{len(stamps)} batches instead of {command['steps']}"
        warmup = command["warmup"]
        seconds = (stamps[-1] - stamps[warmup]) / (len(stamps) - 1 - warmup)
        return {"seconds": seconds, "first": stamps[0] - begin, "first_at": stamps[0]}

    def _measure_check(self, command: dict[str, Any], job: Job, run: Callable[[], None]) -> dict[str, Any]:
        """Do what is timed with a look at whether it is what was asked for: the timed runs have nothing to look."""
        rates: list[float] = []
        norms: list[float] = []

        def look(optimizer: Optimizer, *arguments: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])
            gradients = [parameter.grad for parameter in job.model.parameters() if parameter.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))

        workload = WORKLOADS[command["workload"]]
        before = _loss_of(job)
        stamps: list[float] = []
        job.model.stamps = stamps
        hook = register_optimizer_step_post_hook(look)
        try:
            run()
        finally:
            hook.remove()
        num_steps = command["steps"]
        assert len(stamps) == num_steps, f"{len(stamps)} batches instead of {num_steps}"
        after = _loss_of(job)
        if workload.is_evaluation:
            assert not rates and after == before, "an evaluation changed the model"
        else:
            num_updates = num_steps // job.accumulation
            assert len(rates) == num_updates, f"{len(rates)} updates instead of {num_updates}"
            assert after < 0.95 * before, f"the loss was {before:.3f} before training and is {after:.3f} now"
            last = rates[0] / num_updates if workload.has_schedule else rates[0]
            assert abs(rates[-1] - last) < 1e-9, f"the last learning rate is {rates[-1]} instead of {last}"
            most = job.clip_norm
            assert most is None or max(norms) < most * 1.001, f"a gradient of norm {max(norms)} was not clipped"
        weights = sum(float(parameter.detach().double().sum()) for parameter in job.model.parameters())
        return {"before": before, "after": after, "weights": weights}

    def _measure_calls(self, command: dict[str, Any], job: Job, run: Callable[[], None]) -> dict[str, Any]:
        count = 0

        def profile(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += event == "call"

        first, last = command["window"]
        job.model.stamps = Window(first, last, partial(sys.setprofile, profile), partial(sys.setprofile, None))
        run()
        return {"calls": count / (last - first) - 1}  # one of them is the window's own

    def _measure_ops(self, command: dict[str, Any], job: Job, run: Callable[[], None]) -> dict[str, Any]:
        ops = Ops()

        def count(is_counting: bool) -> None:
            ops.is_counting = is_counting

        first, last = command["window"]
        job.model.stamps = Window(first, last, partial(count, True), partial(count, False))
        with ops:
            run()
        # What item(), float() and bool() of a tensor come down to; an accelerator would have to be waited for.
        num_reads = ops.counts["aten._local_scalar_dense"]
        return {"ops": ops.counts.total() / (last - first), "reads": num_reads / (last - first)}

    def _measure_frames(self, command: dict[str, Any], job: Job, run: Callable[[], None]) -> dict[str, Any]:
        """Count the frames of the system between the function of its file here and ``Tensor.backward``."""
        found: list[list[str]] = []
        original = torch.Tensor.backward
        ours, torchs = str(Path(__file__).parent), str(Path(torch.__file__).parent)

        def backward(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
            names: list[str] = []
            frame = sys._getframe(1)
            while frame is not None and frame.f_code is not self.train.__code__:
                if not frame.f_code.co_filename.startswith((ours, torchs)):
                    names.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")
                frame = frame.f_back
            assert frame is not None, "backward was called from elsewhere"
            found.append(names)
            original(tensor, *args, **kwargs)

        torch.Tensor.backward = backward
        try:
            run()
        finally:
            torch.Tensor.backward = original
        names = found[len(found) // 2]
        print(*names, sep="\n")
        return {"frames": len(names)}

    def _measure_start(self, command: dict[str, Any], job: Job, run: Callable[[], None]) -> dict[str, Any]:
        """Run until the first batches are there, however many there would be."""
        stamps: list[float] = []

        def stop() -> None:
            raise EnoughSeenError

        job.model.stamps = Window(0, 3, lambda: stamps.append(time.perf_counter()), stop)
        begin = time.perf_counter()
        try:
            run()
        except EnoughSeenError:
            return {"first": stamps[0] - begin}
        raise AssertionError("the run was over before it had three batches")

    def _measure_growth(self, command: dict[str, Any], job: Job, run: Callable[[], None]) -> dict[str, Any]:
        memory: list[float] = []

        def look() -> None:
            memory.append(_resident_memory())

        job.model.stamps = Window(*command["window"], look, look)
        run()
        return {"growth": memory}


def serve(train: Function, evaluate: Function) -> None:
    """Do the commands that come through one pipe and answer through another; both are given by number."""
    torch.set_num_threads(1)
    worker = Worker(train, evaluate)
    commands, replies = (int(argument) for argument in sys.argv[1:3])
    with open(commands) as reader, open(replies, "w") as writer:
        for line in reader:
            try:
                reply = worker.do(json.loads(line))
            except Exception as error:
                traceback.print_exc()  # the runner shows what the worker printed
                reply = {"failed": f"{type(error).__name__}: {error}"}
            sys.stdout.flush()
            writer.write(json.dumps(reply) + "\n")
            writer.flush()


def _make_linear_schedule(num_updates: int, optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda update: max(0.0, 1 - update / num_updates))


def _loss_of(job: Job) -> float:
    """Return the loss over some of the data, and leave no stamps."""
    stamps, job.model.stamps = job.model.stamps, []
    samples = [job.dataset[index] for index in range(4 * job.batch_size)]
    inputs, targets = (torch.stack(part) for part in zip(*samples, strict=True))
    with torch.no_grad():
        loss = float(job.loss(job.model(inputs), targets))
    job.model.stamps = stamps
    return loss


def _resident_memory() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20

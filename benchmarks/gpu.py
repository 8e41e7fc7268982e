"""Compare the trainer with a loop written by hand, on one GPU, as ratios within one process.

python benchmarks/gpu.py
python benchmarks/gpu.py --others --write docs/performance_gpu.md
python benchmarks/gpu.py --device cpu --quick       (tries the script out; its figures mean nothing)

Each part runs in a process of its own: Accelerate has one precision a process, memory is free afterwards, and a part
that fails takes nothing along. What is compared is measured in turns, each time with a fresh model; ratios are of one
turn, and of these the median is given. The loop by hand sums its losses on the device, as any loop does that reports
one. Exit code: 1 where something failed, 2 where only time ran out.
"""

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to measure this repository, installed or not

import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from pytorch_accelerated import DEFAULT_CALLBACKS, Trainer
from pytorch_accelerated.callbacks import (
    ProgressBarCallback,
    SaveTrainingStateCallback,
    TerminateOnNaNCallback,
    TrainerCallback,
)
from pytorch_accelerated.checkpoint import list_checkpoints
from pytorch_accelerated.errors import NonFiniteError, StopTrainingError

# Dense bf16 in TFLOP/s, from the data sheets; the first whose name is a part of the device's.
PEAKS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
}
BY_HAND = "by hand"
LAUNCHES = {"cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch"}
COPIES = {"cudaMemcpyAsync", "cudaMemsetAsync"}
SYNCS = {"cudaStreamSynchronize", "cudaEventSynchronize"}  # the profiler itself synchronises the device


# --------------------------------------------------------------------------------------------------------------------
# What a part works with
# --------------------------------------------------------------------------------------------------------------------


class Part:
    """What a part is given, and where it puts its results: a file that is whole after each of them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        self.has_gpu = self.device.type == "cuda"
        self.is_quick: bool = arguments.quick
        self.others: bool = arguments.others
        self.precision: str = arguments.precision
        self.directory: Path | None = arguments.directory
        self._path: Path = arguments.json
        self._end = time.monotonic() + arguments.seconds
        self.results: dict[str, Any] = {"tables": [], "notes": [], "failures": [], "skipped": [], "is_done": False}
        self.results["device"] = torch.cuda.get_device_name() if self.has_gpu else f"CPU ({platform.machine()})"

    def choose(self, full: Any, quick: Any) -> Any:
        return quick if self.is_quick else full

    def seconds_left(self) -> float:
        left: float = self._end - time.monotonic()
        return left

    def table(self, title: str, *columns: str) -> None:
        """Begin a table."""
        self.results["tables"].append({"title": title, "columns": columns, "rows": []})
        self.save()

    def row(self, *cells: str) -> None:
        """Add a row to the last table."""
        self.results["tables"][-1]["rows"].append(cells)
        print("   ", " | ".join(cells), flush=True)
        self.save()

    def note(self, text: str) -> None:
        self.results["notes"].append(text)
        self.save()

    def skip(self, what: str) -> None:
        self.results["skipped"].append(what)
        self.save()

    def fail(self, what: str, why: str) -> None:
        print(f"FAILED: {what}: {why}", flush=True)
        self.results["failures"].append(f"{what}: {why}")
        self.save()

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Report what is raised in here, and go on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fail(what, f"{type(error).__name__}: {first_line(error)}")
        self.free()

    def free(self) -> None:
        gc.collect()
        if self.has_gpu:
            with contextlib.suppress(RuntimeError):  # after a failure in a kernel nothing works any more
                torch.cuda.empty_cache()

    def sync(self) -> None:
        if self.has_gpu:
            torch.cuda.synchronize()

    def accelerator(self, **kwargs: Any) -> Accelerator:
        return Accelerator(mixed_precision=self.precision, cpu=not self.has_gpu, **kwargs)

    def autocast(self) -> torch.autocast:
        types = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return torch.autocast(self.device.type, types.get(self.precision), enabled=self.precision != "no")

    def save(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results))
        temporary.replace(self._path)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what is printed to oneself; it is printed all the same, so what it costs is measured."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


class Lap:
    """Called at the end of each update, measures a window of them; the device is waited for at its ends alone."""

    def __init__(self, part: Part, first: int, last: int) -> None:
        self._part, self.first, self.last = part, first, last
        self._marks = {1, first, last}
        self._count = 0
        self.begin = time.perf_counter()
        self.seconds = self.first_update = self.peak = math.nan

    def __call__(self) -> None:
        self._count += 1
        if self._count in self._marks:
            self._part.sync()
            self._mark(time.perf_counter())

    def _mark(self, now: float) -> None:
        if self._count == 1:
            self.first_update = now - self.begin
        if self._count == self.first:
            if self._part.has_gpu:
                torch.cuda.reset_peak_memory_stats()
            self.begin = time.perf_counter()
        if self._count == self.last:
            self.seconds = (now - self.begin) / (self.last - self.first)
            if self._part.has_gpu:
                self.peak = torch.cuda.max_memory_allocated() / 2**30


class Profile:
    """Called at the end of each update, counts what is launched in a window of them."""

    def __init__(self, part: Part, first: int, last: int) -> None:
        self._part, self.first, self.last = part, first, last
        self._count = 0
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if part.has_gpu else []
        self._profiler = torch.profiler.profile(activities=activities)

    def __call__(self) -> None:
        self._count += 1
        if self._count == self.first:
            self._part.sync()
            self._profiler.start()
        elif self._count == self.last:
            self._profiler.stop()

    def counts(self) -> tuple[float, float, float, float]:
        """Return kernel launches, copies, synchronisations and operators of an update."""
        by_name = {event.key: event.count for event in self._profiler.key_averages()}
        num = self.last - self.first
        kinds = [sum(by_name.get(name, 0) for name in names) / num for names in (LAUNCHES, COPIES, SYNCS)]
        operators = sum(count for name, count in by_name.items() if name.startswith("aten::")) / num
        return kinds[0], kinds[1], kinds[2], operators


class AtUpdate(TrainerCallback):
    """Call a function at the end of each update."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._function()


class Batches:
    """Batches that are ready, in an endless row of a certain length."""

    def __init__(self, batches: list[Any], length: int) -> None:
        self._batches, self._length = batches, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        for number in range(self._length):
            yield self._batches[number % len(self._batches)]


# --------------------------------------------------------------------------------------------------------------------
# What is trained, and by whom
# --------------------------------------------------------------------------------------------------------------------


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that a model makes itself."""
    loss: Tensor = model(*batch)["loss"]
    return loss


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


@dataclass
class Workload:
    make_model: Callable[[], nn.Module]
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    data: Any  # a dataset, or Batches
    batch_size: int
    loss: Callable[[nn.Module, Any], Tensor]  # by hand
    loss_func: Callable[..., Tensor] | None  # the same, as the trainer takes it
    loader: dict[str, Any] = field(default_factory=dict)
    is_blocking: bool = False  # copying to the device as beginners do

    def make_loader(self, part: Part) -> Any:
        """Return the loader that one writes by hand."""
        if isinstance(self.data, Batches):
            return self.data
        kwargs = {"shuffle": True, "pin_memory": part.has_gpu and not self.is_blocking, **self.loader}
        return DataLoader(self.data, batch_size=self.batch_size, **kwargs)


def train_by_hand(part: Part, work: Workload, at_update: Callable[[], None], num_updates: int) -> None:
    model = work.make_model().to(part.device)
    model.train()
    optimizer = work.make_optimizer(model.parameters())
    device, non_blocking, loss_of = part.device, not work.is_blocking, work.loss
    total = torch.zeros((), device=device)
    for update, batch in enumerate(work.make_loader(part), 1):
        batch = [tensor.to(device, non_blocking=non_blocking) for tensor in batch]
        with part.autocast():
            loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
        at_update()
        if update == num_updates:
            break


def train_with_ours(
    part: Part, work: Workload, at_update: Callable[[], None], num_updates: int, callbacks: Iterable[Any] = ()
) -> None:
    callbacks = [*callbacks, AtUpdate(at_update)]
    model, accelerator = work.make_model(), part.accelerator()
    trainer = Trainer(model, work.loss_func, work.make_optimizer, callbacks=callbacks, accelerator=accelerator)
    arguments: dict[str, Any] = {}
    if not isinstance(work.data, Batches):
        arguments = {"per_device_batch_size": work.batch_size, "train_dataloader_kwargs": work.loader}
    with quiet():
        trainer.train(work.data, num_epochs=1, max_num_train_steps=num_updates, **arguments)


def train_with_lightning(part: Part, work: Workload, at_update: Callable[[], None], num_updates: int) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = work.make_model()

        def training_step(self, batch: Any, batch_index: int) -> Tensor:
            return work.loss(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return work.make_optimizer(self.model.parameters())

        def on_train_batch_end(self, *args: Any) -> None:
            at_update()

    trainer = lightning.Trainer(
        max_steps=num_updates,
        accelerator="gpu" if part.has_gpu else "cpu",
        devices=1,
        precision={"bf16": "bf16-mixed", "no": "32-true"}[part.precision],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with quiet():
        trainer.fit(Module(), work.make_loader(part))


class TakesAll(nn.Module):
    """What the Trainer of transformers asks of a model: keyword arguments, and its own loss."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.model, self._loss = work.make_model(), work.loss

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return {"loss": self._loss(self.model, batch)}


def train_with_transformers(part: Part, work: Workload, at_update: Callable[[], None], num_updates: int) -> None:
    import transformers

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            at_update()

    model = TakesAll(work)
    with tempfile.TemporaryDirectory() as name, quiet():
        arguments = transformers.TrainingArguments(
            output_dir=name,
            max_steps=num_updates,
            per_device_train_batch_size=work.batch_size,
            bf16=part.precision == "bf16",
            use_cpu=not part.has_gpu,
            max_grad_norm=0.0,  # none of the others clips
            lr_scheduler_type="constant",
            dataloader_num_workers=work.loader.get("num_workers", 0),
            dataloader_pin_memory=part.has_gpu,
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=work.data,
            data_collator=lambda rows: {"batch": default_collate(rows)},
            optimizers=(work.make_optimizer(model.parameters()), None),
            callbacks=[Callback()],
        )
        trainer.train()


def systems_of(part: Part, has_others: bool = False) -> dict[str, Callable[..., None]]:
    """Return the ways to train, by name; by hand first."""
    systems: dict[str, Callable[..., None]] = {
        BY_HAND: train_by_hand,
        "ours, default callbacks": partial(train_with_ours, callbacks=DEFAULT_CALLBACKS),
        "ours, no callbacks": train_with_ours,
    }
    others = {"lightning": train_with_lightning, "transformers": train_with_transformers}
    for name, train in others.items() if part.others and has_others else ():
        if importlib.util.find_spec(name) is None:
            part.note(f"{name} is not installed here.")
        else:
            systems[f"{name} {importlib.metadata.version(name)}"] = train
    return systems


def measure_in_turns(
    part: Part,
    title: str,
    work: Workload,
    window: tuple[int, int],
    num_rounds: int,
    is_compiled: bool = False,
    has_others: bool = False,
) -> dict[str, list[Lap]]:
    """Train with all systems in turns, and return what was measured, by system; one that fails has its turn no more."""
    systems = systems_of(part, has_others)
    laps: dict[str, list[Lap]] = {name: [] for name in systems}
    longest = 0.0
    for number in range(num_rounds):
        for name in list(systems):
            if part.seconds_left() < 1.5 * longest + 1:
                part.skip(f"{title}: rounds {number + 1} to {num_rounds} from {name!r} on")
                return laps
            begin = time.monotonic()
            with part.guarded(f"{title}, {name}"):
                if is_compiled:
                    # Each fresh model is compiled anew, as in a run of its own. Without this, some models in one
                    # process exceed torch's limit for recompiling, and would be run as they are, silently.
                    torch._dynamo.reset()
                torch.manual_seed(number)
                lap = Lap(part, *window)
                systems[name](part, work, lap, window[1])
                if math.isnan(lap.seconds):
                    raise RuntimeError(f"ended before update {window[1]}")
                laps[name].append(lap)
            if len(laps[name]) <= number:
                del systems[name]
            if not (is_compiled and number == 0 and name == BY_HAND):  # else compiling, from nothing
                longest = max(longest, time.monotonic() - begin)
    return laps


def ratios(laps: dict[str, list[Lap]], name: str) -> str:
    """Return the ratio of a system's time to that by hand: the median of the rounds, and their range."""
    pairs = list(zip(laps[name], laps[BY_HAND], strict=False))
    if name == BY_HAND or not pairs:
        return "1" if name == BY_HAND else "-"
    values = [lap.seconds / base.seconds for lap, base in pairs]
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def report_laps(
    part: Part, title: str, laps: dict[str, list[Lap]], unit: float, more: Callable[[float], list[str]]
) -> None:
    """Add a row for each system; ``more`` makes cells of the seconds of a step."""
    for name, measured in laps.items():
        if not measured:
            part.row(title, name, "failed" if name != BY_HAND else "-", *("-" for _ in more(1.0)), "-", "-", "-")
            continue
        seconds = statistics.median(lap.seconds for lap in measured)
        peak = max(lap.peak for lap in measured)
        first = measured[0].first_update
        part.row(
            title,
            name,
            f"{seconds * unit:.4g}",
            *more(seconds),
            ratios(laps, name),
            "-" if math.isnan(peak) else f"{peak:.2f}",
            f"{first:.1f}",
        )


# --------------------------------------------------------------------------------------------------------------------
# 1: a transformer
# --------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        size, length, width = hidden.shape
        parts = self.mix(self.norm1(hidden)).view(size, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(seen.transpose(1, 2).reshape(size, length, width))
        return hidden + self.down(functional.gelu(self.up(self.norm2(hidden))))


class GPT(nn.Module):
    """A decoder that returns its own loss, so that nobody converts the logits to float32 on their way out."""

    def __init__(self, vocabulary: int, length: int, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        tokens = tokens.long()  # they travel as int32
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        hidden = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits = functional.linear(self.norm(hidden), self.tokens.weight)
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), targets.flatten())}


class Inside(nn.Module):
    """A plain module around a compiled one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        return self.model(*args)


def make_gpt(part: Part, num_layers: int) -> GPT:
    sizes = {"vocabulary": 50304, "length": 1024, "width": 1024, "num_heads": 16}
    if part.is_quick:
        sizes = {"vocabulary": 512, "length": 64, "width": 64, "num_heads": 4}
    with part.device:  # drawing hundreds of millions of numbers takes the CPU seconds, for each fresh model
        return GPT(num_layers=num_layers, **sizes)


def tokens_for(model: GPT, num_samples: int) -> TensorDataset:
    shape = num_samples, model.positions.num_embeddings + 1
    return TensorDataset(torch.randint(model.tokens.num_embeddings, shape, dtype=torch.int32))


def run_transformer(part: Part) -> None:
    num_layers, batch_size = part.choose(16, 2), part.choose(8, 2)
    model = make_gpt(part, num_layers)
    length, width = model.positions.num_embeddings, model.positions.embedding_dim
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    # Forward and backward take 6 operations for each weight that a token is multiplied with (the positions are not);
    # attention 12 for each pair of a token and one before it, a half of all, and each element of the width.
    flops = batch_size * length * (6 * (num_parameters - length * width) + 6 * num_layers * width * length)
    peak = next((peak for name, peak in PEAKS.items() if name in part.results["device"]), None)
    window = part.choose((15, 65), (3, 8))
    data = tokens_for(model, batch_size * (window[1] + 4))
    del model

    def more(seconds: float) -> list[str]:
        utilisation = f"{flops / seconds / peak / 1e10:.1f} %" if peak and part.has_gpu else "-"
        return [f"{1 / seconds:.3g}", f"{batch_size * length / seconds:,.0f}", utilisation]

    columns = ["variant", "system", "ms/step", "steps/s", "tokens/s", "FLOP utilisation", "time to by hand's"]
    part.table(
        f"{num_parameters / 1e6:.0f} M parameters, {batch_size} x {length} tokens a step, {part.precision}, "
        f"AdamW(fused=True), updates {window[0]} to {window[1]}"
        + (f"; utilisation of {peak} TFLOP/s" if peak and part.has_gpu else ""),
        *columns,
        "peak GiB",
        "first update, s",
    )
    part.note(
        "The first update of a compiled model contains its compilation: by hand, which comes first, from nothing; for "
        "those after it torch's cache on the disk has the kernels. It is in none of the times of a step."
    )
    optimizer = partial(torch.optim.AdamW, lr=1e-4, fused=True)
    plain = Workload(partial(make_gpt, part, num_layers), optimizer, data, batch_size, own_loss, None)
    backend = "inductor" if part.has_gpu else "aot_eager"  # the compiler for CPUs takes longer than all of a dry run

    def make_compiled() -> nn.Module:
        compiled: nn.Module = torch.compile(make_gpt(part, num_layers), backend=backend)  # type: ignore[assignment]
        return compiled

    with_workers = replace(plain, loader={"num_workers": part.choose(2, 1)})
    variants = {
        "eager, workers 0": (plain, 2),
        "eager, workers 2": (with_workers, 2),
        "torch.compile, workers 2": (replace(with_workers, make_model=make_compiled), 2),
        "compiled, inside a plain module": (replace(with_workers, make_model=lambda: Inside(make_compiled())), 2),
    }
    are_ours_compiled = False
    for title, (work, num_rounds) in variants.items():
        is_compiled = work.make_model is not plain.make_model
        if "inside" in title and are_ours_compiled:
            continue  # it is the way around what did not work
        if is_compiled and not part.is_quick and part.seconds_left() < 75:
            part.skip(title)
            continue
        has_others = title == "eager, workers 2"
        laps = measure_in_turns(part, title, work, window, part.choose(num_rounds, 1), is_compiled, has_others)
        are_ours_compiled = is_compiled and bool(laps["ours, default callbacks"])
        report_laps(part, title, laps, 1e3, more)


# --------------------------------------------------------------------------------------------------------------------
# 2: a small convolutional network
# --------------------------------------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for previous, width in zip((3, *widths), widths, strict=False):
            for first, stride in ((previous, 1 if previous == 3 else 2), (width, 1)):
                conv = nn.Conv2d(first, width, 3, stride, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(widths[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(dtype=torch.float32, memory_format=torch.channels_last) / 255  # they travel as bytes
        scores: Tensor = self.head(self.layers(images).mean((2, 3)))
        return scores


class Pictures(Dataset[tuple[Tensor, int]]):
    """A dataset as people write them: a sample at a time, with some augmentation."""

    def __init__(self, size: int) -> None:
        self._images = torch.randint(256, (1024, 3, 32, 32), dtype=torch.uint8)
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._images[index % len(self._images)]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image, index % 10


def run_convnet(part: Part) -> None:
    batch_size, window, num_rounds = part.choose((256, (40, 340), 3), (16, (3, 9), 2))
    widths = part.choose((64, 128, 256), (8, 16))
    num_samples = batch_size * (window[1] + 8)

    def make_model() -> nn.Module:
        return ConvNet(widths).to(part.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    in_memory = TensorDataset(
        torch.randint(256, (num_samples, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (num_samples,))
    )
    optimizer = partial(torch.optim.AdamW, lr=1e-4, fused=True)
    work = Workload(make_model, optimizer, in_memory, batch_size, cross_entropy, nn.CrossEntropyLoss())
    num_workers = part.choose(4, 1)
    part.table(
        f"convolutions of widths {widths}, batches of {batch_size} pictures of 32 x 32, {part.precision}, "
        f"channels_last, AdamW(fused=True), updates {window[0]} to {window[1]}",
        *("variant", "system", "ms/step", "samples/s", "time to by hand's", "peak GiB", "first update, s"),
    )
    variants = {
        f"python dataset, {num_workers} workers": replace(
            work, data=Pictures(num_samples), loader={"num_workers": num_workers}
        ),
        "TensorDataset, no workers": work,
    }
    for title, variant in variants.items():
        laps = measure_in_turns(part, title, variant, window, num_rounds, has_others=variant is not work)
        report_laps(part, title, laps, 1e3, lambda seconds: [f"{batch_size / seconds:,.0f}"])


# --------------------------------------------------------------------------------------------------------------------
# 3: overhead alone
# --------------------------------------------------------------------------------------------------------------------


def make_mlp(device: torch.device, *widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for first, second in itertools.pairwise(widths):
        layers += [nn.Linear(first, second), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(device)


def run_overhead(part: Part) -> None:
    window, num_rounds = part.choose(((200, 1200), 7), ((20, 60), 2))
    data = TensorDataset(torch.randn(32 * (window[1] + 8), 64), torch.randint(10, (32 * (window[1] + 8),)))
    on_device = [
        (torch.randn(32, 64, device=part.device), torch.randint(10, (32,), device=part.device)) for _ in range(8)
    ]
    ready = Batches(on_device, window[1] + 8)
    adamw = partial(torch.optim.AdamW, lr=1e-4, fused=True)
    make_model = partial(make_mlp, part.device, 64, 64, 10)
    work = Workload(make_model, adamw, ready, 32, cross_entropy, nn.CrossEntropyLoss())
    variants = {
        "AdamW(fused=True), batches ready on the device": work,
        "SGD with momentum, batches ready on the device": replace(
            work, make_optimizer=partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
        ),
        "AdamW(fused=True), TensorDataset in host memory": replace(work, data=data),
    }
    part.table(
        f"64-64-10, batches of 32, float32, updates {window[0]} to {window[1]}",
        *("variant", "system", "us/step", "more than by hand, us", "time to by hand's", "peak GiB", "first update, s"),
    )
    for title, variant in variants.items():
        laps = measure_in_turns(part, title, variant, window, num_rounds, has_others=variant.data is data)
        base = statistics.median(lap.seconds for lap in laps[BY_HAND]) if laps[BY_HAND] else math.nan
        report_laps(part, title, laps, 1e6, lambda seconds, base=base: [f"{1e6 * (seconds - base):.1f}"])  # type: ignore[misc]
    # Last, because the profiler leaves traces in the times of what comes after it.
    part.table(
        "what one update launches, over updates 20 to 40",
        *("variant", "system", "kernels", "copies and fills", "synchronisations", "operators, nested ones too"),
    )
    for title, variant in variants.items():
        for name, train in systems_of(part, has_others=variant.data is data).items():
            if part.seconds_left() < 3:
                part.skip(f"launches: {title}, {name}")
                continue
            with part.guarded(f"launches: {title}, {name}"):
                profile = Profile(part, 20, 40)
                train(part, variant, profile, 44)
                launches, copies, syncs, operators = profile.counts()
                cells = [f"{number:.4g}" for number in (launches, copies, syncs)]
                is_seen = part.has_gpu and launches > 0
                part.row(title, name, *(cells if is_seen else ["not seen"] * 3), f"{operators:.4g}")


# --------------------------------------------------------------------------------------------------------------------
# 4: nothing waits for the device
# --------------------------------------------------------------------------------------------------------------------

FIRST_WATCHED, LAST_WATCHED, NUM_UPDATES_WATCHED = 10, 45, 48


class ForbidSyncs(TrainerCallback):
    """Let torch raise where the host waits for the device, between two log points of the default callbacks.

    Before the others, so that at the end, and where something was raised, they can wait again.
    """

    order = -9

    def __init__(self, part: Part) -> None:
        self._part = part
        self.is_done = False

    def set_mode(self, mode: str) -> None:
        if self._part.has_gpu:
            torch.cuda.set_sync_debug_mode(mode)

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if trainer.num_updates == FIRST_WATCHED:
            self.set_mode("error")
        elif trainer.num_updates == LAST_WATCHED:
            self.set_mode("default")
            self.is_done = True

    def on_exception(self, trainer: Trainer, exception: BaseException, **kwargs: Any) -> None:
        self.set_mode("default")


class LeakyTrainer(Trainer):
    """Read the loss in each step, as one should not."""

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        output = super().calculate_train_batch_loss(batch)
        output["loss"].item()
        return output


class Tagger(nn.Module):
    """Scores for each position of a row, as for tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.layer(inputs).view(-1, 8, 8)
        return scores


def where_from(error: BaseException) -> str:
    """Return the last lines of the library that led to an error, the innermost first."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "pytorch_accelerated" in frame.filename]
    return ", ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames[-3:]))


def run_sync_proof(part: Part) -> None:
    adamw, sgd = partial(torch.optim.AdamW, lr=1e-4), partial(torch.optim.SGD, lr=1e-3)
    linear = partial(torch.optim.lr_scheduler.LinearLR, total_iters=100)
    make_model = partial(make_mlp, part.device, 64, 64, 10)
    make_small_gpt = partial(GPT, vocabulary=512, length=64, width=64, num_layers=2, num_heads=4)
    labels = nn.CrossEntropyLoss()

    def case(
        optimizer: Any,
        trainer_class: type[Trainer] = Trainer,
        policy: Any = "raise",
        make: Callable[[], nn.Module] = make_model,
        **arguments: Any,
    ) -> tuple[type[Trainer], Any, str, Callable[[], nn.Module], dict[str, Any]]:
        return trainer_class, optimizer, policy, make, arguments

    fused = partial(adamw, fused=True)
    cases = {
        "SGD": case(sgd),
        "SGD with momentum": case(partial(sgd, momentum=0.9)),
        "AdamW(fused=True)": case(fused),
        "AdamW(foreach=True)": case(partial(adamw, foreach=True)),
        "AdamW(foreach=False)": case(partial(adamw, foreach=False)),
        "clipping by norm": case(fused, gradient_clip_norm=1.0),
        "clipping by value": case(fused, gradient_clip_value=0.1),
        "accumulation 4": case(fused, gradient_accumulation_steps=4),
        "accumulation 4, clipping, SGD": case(sgd, gradient_accumulation_steps=4, gradient_clip_norm=1.0),
        "scheduler": case(fused, create_scheduler_fn=linear),
        "2 workers": case(fused, train_dataloader_kwargs={"num_workers": 2}),
        "TerminateOnNaNCallback('skip')": case(fused, policy="skip"),
        "losses weighed by tokens, accumulation 4": case(fused, make=Tagger, gradient_accumulation_steps=4),
        "GPT, its own loss, clipping": case(fused, make=make_small_gpt, gradient_clip_norm=1.0),
        "batches on the device, made by the user": case(fused),
        "everything at once": case(
            fused,
            gradient_accumulation_steps=4,
            gradient_clip_norm=1.0,
            create_scheduler_fn=linear,
            train_dataloader_kwargs={"num_workers": 2},
        ),
        "to prove the check: loss.item() in calculate_train_batch_loss": case(fused, LeakyTrainer),
    }
    part.table(
        f'under torch.cuda.set_sync_debug_mode("error") from update {FIRST_WATCHED} to {LAST_WATCHED}, default '
        f"callbacks, precision {part.precision}",
        *("case", "synchronisations", "where"),
    )
    if part.precision != "no":  # what has to do with it
        others = {"SGD with momentum", "AdamW(foreach=False)", "clipping by value", "2 workers"}
        cases = {name: case for name, case in cases.items() if name not in others}
    for name, (trainer_class, optimizer, policy, make, arguments) in cases.items():
        if part.seconds_left() < 2:
            part.skip(name)
            continue
        must_raise = trainer_class is LeakyTrainer
        batch_size = part.choose(32, 2)
        num_samples = batch_size * (NUM_UPDATES_WATCHED + 2) * arguments.get("gradient_accumulation_steps", 1)
        model = make()
        loss_func: Any = labels
        data: Any = TensorDataset(torch.randn(num_samples, 64), torch.randint(10, (num_samples,)))
        if "made by the user" in name:
            data = Batches([(torch.randn(8, 64).to(part.device), torch.randint(10, (8,)).to(part.device))], num_samples)
        elif isinstance(model, GPT):
            loss_func, data = None, tokens_for(model, num_samples)
        elif isinstance(model, Tagger):
            targets = torch.randint(8, (num_samples, 8))
            targets[:, 0] = -100
            data = TensorDataset(torch.randn(num_samples, 64), targets)
        forbid = ForbidSyncs(part)
        default = [c for c in DEFAULT_CALLBACKS if c not in (ProgressBarCallback, TerminateOnNaNCallback)]
        # The default callbacks, but for the interval of the bar, which reads the loss when the clock says so.
        bar = ProgressBarCallback(seconds_between_draws=1e6, seconds_between_lines=1e6)
        callbacks = [*default, TerminateOnNaNCallback(policy), bar, forbid]
        with part.guarded(name):
            trainer = trainer_class(model, loss_func, optimizer, callbacks=callbacks, accelerator=part.accelerator())
            try:
                with quiet():
                    limit = NUM_UPDATES_WATCHED
                    trainer.train(data, 1, max_num_train_steps=limit, per_device_batch_size=batch_size, **arguments)
                if not forbid.is_done:
                    raise RuntimeError("the run ended before the check did")
                what, where, is_wrong = "none", "", must_raise
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    part.row(name, "failed", "")
                    raise
                if not must_raise:
                    traceback.print_exc()
                what, where, is_wrong = "raised", where_from(error), not must_raise
            except Exception:
                part.row(name, "failed", "")
                raise
            finally:
                forbid.set_mode("default")
            if not part.has_gpu:
                part.row(name, "ran, but only a GPU can tell", "")
                continue
            part.row(name, what + (" (as it must)" if must_raise and not is_wrong else ""), where)
            if is_wrong:
                part.fail(name, "the check finds nothing, so it proves nothing" if must_raise else f"waits: {where}")


# --------------------------------------------------------------------------------------------------------------------
# 5: loading and copying
# --------------------------------------------------------------------------------------------------------------------


class LargePictures(Dataset[tuple[Tensor]]):
    def __init__(self, size: int, side: int) -> None:
        self._images = torch.rand(256, 3, side, side)
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (self._images[index % len(self._images)],)


class Repeats(nn.Module):
    """As much arithmetic as one likes on pictures."""

    def __init__(self, device: torch.device, width: int, num_repeats: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False, device=device)
        nn.init.orthogonal_(self.layer.weight)  # numbers stay as large as they are: products of zeros take less time
        self._width, self._num_repeats = width, num_repeats

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = images.reshape(-1, self._width)
        for _ in range(self._num_repeats):
            hidden = self.layer(hidden)
        return {"loss": hidden.float().square().mean()}


def run_loading(part: Part) -> None:
    batch_size, side, width = part.choose((128, 224, 768), (4, 32, 64))
    window = part.choose((6, 30), (2, 5))
    data = LargePictures(batch_size * (window[1] + 8), side)
    megabytes = batch_size * 3 * side * side * 4 / 1e6

    def workload(num_repeats: int, **changes: Any) -> Workload:
        make_model = partial(Repeats, part.device, width, num_repeats)
        return Workload(make_model, partial(torch.optim.SGD, lr=1e-6), data, batch_size, own_loss, None, **changes)

    def seconds_of(train: Callable[..., None], work: Workload) -> float:
        lap = Lap(part, *window)
        train(part, work, lap, window[1])
        part.free()
        return lap.seconds

    def compute(num_repeats: int) -> float:
        resident = [(torch.rand(batch_size, 3, side, side, device=part.device),)]
        return seconds_of(train_by_hand, replace(workload(num_repeats), data=Batches(resident, window[1])))

    def copy() -> float:
        images = torch.rand(batch_size, 3, side, side, pin_memory=part.has_gpu)
        lap = Lap(part, *window)
        for _ in range(window[1]):
            images.to(part.device, non_blocking=True)
            lap()
        return lap.seconds

    def load(work: Workload) -> float:
        lap = Lap(part, *window)
        for number, _ in enumerate(work.make_loader(part), 1):
            lap()
            if number == window[1]:
                break
        return lap.seconds

    part.table(
        f"batches of {megabytes:.0f} MB, {part.precision}; the model takes about as long as loading and copying; "
        f"updates {window[0]} to {window[1]}, smaller of two times",
        *("workers", "what", "ms/step", "to the longest alone", "to all three in a row"),
    )
    part.note(
        "One stream of kernels copies and computes in turn, so with pinned memory the least is the larger of loading "
        "and of copying and computing together."
    )
    compute(1)  # the first call of a process makes its handles
    small, large = part.choose((4, 24), (1, 2))
    fast, slow = compute(small), compute(large)
    per_repeat = max((slow - fast) / (large - small), 1e-6)
    copying = min(copy(), copy())
    for num_workers in part.choose((0, 4), (0, 1)):
        if part.seconds_left() < 10 and not part.is_quick:
            part.skip(f"{num_workers} workers")
            continue
        with part.guarded(f"{num_workers} workers"):
            loader: dict[str, Any] = {"num_workers": num_workers} if num_workers else {}
            loading = min(load(workload(1, loader=loader)) for _ in range(2))
            wanted = small + (loading + copying - fast) / per_repeat
            # What forward keeps for backward, 2 bytes for each number of a batch and repeat, has to fit.
            room = torch.cuda.mem_get_info()[0] / 2e6 if part.has_gpu else 1e3
            num_repeats = int(max(1, min(wanted, room / (megabytes / 2), 600)))
            computing = min(compute(num_repeats) for _ in range(2))
            work = workload(num_repeats, loader=loader)
            longest, total = max(computing, loading, copying), computing + loading + copying
            for what, seconds in (
                (f"computing alone, {num_repeats} products", computing),
                ("loading alone, to pinned memory", loading),
                (f"copying alone, {megabytes / copying / 1e3:.1f} GB/s", copying),
            ):
                part.row(str(num_workers), what, f"{1e3 * seconds:.2f}", "", "")
            systems: dict[str, Any] = {
                "by hand, plain memory, blocking copies": (train_by_hand, replace(work, is_blocking=True)),
                "by hand, pinned memory, non_blocking": (train_by_hand, work),
                "ours, default callbacks": (partial(train_with_ours, callbacks=DEFAULT_CALLBACKS), work),
            }
            times: dict[str, list[float]] = {name: [] for name in systems}
            for _ in range(2):
                for name, (train, variant) in systems.items():
                    if part.seconds_left() > 3:
                        times[name].append(seconds_of(train, variant))
            for name, seconds in times.items():
                if seconds:
                    best = min(seconds)
                    cells = f"{1e3 * best:.2f}", f"{best / longest:.2f}", f"{best / total:.2f}"
                    part.row(str(num_workers), name, *cells)
                else:
                    part.skip(f"{num_workers} workers, {name}")


# --------------------------------------------------------------------------------------------------------------------
# 6: checkpoints
# --------------------------------------------------------------------------------------------------------------------


class Bare(TrainerCallback):
    """Save weights and optimizer in every update as one would by hand, and note the seconds."""

    def __init__(self, part: Part, path: Path) -> None:
        self._part, self._path = part, path
        self.seconds: list[float] = []
        self.megabytes = 0.0

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        os.sync()
        self._part.sync()
        start = time.perf_counter()
        state = {"model": trainer.get_model().state_dict(), "optimizer": trainer.optimizer.state_dict()}
        torch.save(state, self._path)
        self.seconds.append(time.perf_counter() - start)
        self.megabytes = self._path.stat().st_size / 1e6
        self._path.unlink()


class Begin(TrainerCallback):
    """Note the time just before ``SaveTrainingStateCallback``, whose ``order`` is 2, hears of an update."""

    order = 1
    start: float

    def __init__(self, part: Part) -> None:
        self._part = part

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        os.sync()  # what others left to be written is none of its business
        self._part.sync()
        self.start = time.perf_counter()


class End(TrainerCallback):
    """Note for how long it held the loop up, then wait until what it does in the background is done."""

    order = 3

    def __init__(self, part: Part, begin: Begin, directory: Path, seconds: float) -> None:
        self._part, self._begin, self._directory = part, begin, directory
        self._start, self._seconds = time.perf_counter(), seconds
        self.held_up: list[float] = []
        self.until_saved: list[float] = []

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.held_up.append(time.perf_counter() - self._begin.start)
        ending = f"-update-{trainer.num_updates}"
        while not any(path.name.endswith(ending) for path in list_checkpoints(self._directory)):
            if time.perf_counter() - self._start > self._seconds:
                raise StopTrainingError("out of time")
            time.sleep(0.002)
        self.until_saved.append(time.perf_counter() - self._begin.start)
        for old in list_checkpoints(self._directory)[1:]:
            shutil.rmtree(old)
        spent = time.perf_counter() - self._start
        if spent * (1 + 1 / len(self.held_up)) > self._seconds:
            raise StopTrainingError("out of time")


def run_checkpoints(part: Part) -> None:
    num_saves = 3
    seconds_for_each = part.seconds_left() / 2
    with tempfile.TemporaryDirectory(dir=part.directory) as name:
        part.table(
            "",
            *("what", "seconds", "all", "to torch.save's"),
        )
        part.note(
            "Medians; the first save of each kind, which has memory and files to make, is left out where there are "
            f"more. Into {name if part.directory else 'the directory for temporary files'}; torch.save is not flushed "
            "to the disk, a checkpoint is, with hashes."
        )
        for is_asynchronous in (False, True):
            how = "asynchronous=True" if is_asynchronous else "asynchronous=False"
            if part.seconds_left() < 5:
                part.skip(how)
                continue
            with part.guarded(how):
                model = make_gpt(part, part.choose(8, 2))
                num_bytes = 12 * sum(parameter.numel() for parameter in model.parameters())
                free = shutil.disk_usage(name).free
                if free < 4 * num_bytes:
                    raise RuntimeError(f"{free / 1e9:.1f} GB are free, {4 * num_bytes / 1e9:.1f} are needed")
                checkpoints = Path(name) / how
                bare, begin = Bare(part, Path(name) / "bare.pt"), Begin(part)
                end = End(part, begin, checkpoints, seconds_for_each)
                saving = SaveTrainingStateCallback(
                    checkpoints, save_every_n_updates=1, save_at_end=False, asynchronous=is_asynchronous
                )
                trainer = Trainer(
                    model,
                    None,
                    partial(torch.optim.AdamW, lr=1e-6, fused=True),
                    callbacks=[bare, begin, saving, end],
                    accelerator=part.accelerator(),
                )
                with quiet():
                    trainer.train(tokens_for(model, num_saves), num_epochs=1, per_device_batch_size=1)
                part.results["tables"][-1]["title"] = f"weights and AdamW of a transformer, {bare.megabytes:,.0f} MB"
                times = {
                    "torch.save of the same": bare.seconds,
                    f"SaveTrainingStateCallback({how}): until the loop goes on": end.held_up,
                    f"SaveTrainingStateCallback({how}): until it is on the disk": end.until_saved,
                }
                if not end.until_saved:
                    part.skip(f"{how}: not one save was complete in time")
                base = statistics.median(bare.seconds[1:] or bare.seconds)
                for what, seconds in times.items():
                    if seconds:
                        median = statistics.median(seconds[1:] or seconds)
                        every = ", ".join(f"{value:.3g}" for value in seconds)
                        part.row(what, f"{median:.3g}", every, f"{median / base:.2f}")
                del trainer, model, bare, saving


# --------------------------------------------------------------------------------------------------------------------
# 7: the gradient scaler of fp16
# --------------------------------------------------------------------------------------------------------------------


def run_scaler(part: Part) -> None:
    if not part.has_gpu:
        part.precision = "no"  # so that the code is run, at least
    labels, batch_size, num_updates = nn.CrossEntropyLoss(), 32, 40
    torch.manual_seed(0)
    num_samples = batch_size * 100
    inputs, targets = torch.randn(num_samples, 64), torch.randint(10, (num_samples,))
    poisoned = inputs.clone()
    poisoned[batch_size * 5] = math.inf
    start = make_mlp(part.device, 64, 256, 10).state_dict()
    huge = 2.0**24

    def weights_of(model: nn.Module) -> Tensor:
        return torch.cat([parameter.detach().flatten().float().cpu() for parameter in model.parameters()])

    def make_model() -> nn.Module:
        model = make_mlp(part.device, 64, 256, 10)
        model.load_state_dict(start)
        return model

    def train(
        data: Tensor, scale: float, is_fused: bool, callbacks: Iterable[Any], **arguments: Any
    ) -> tuple[Trainer, float]:
        """Train, and return the trainer and the updates that the scaler left out, by its own scale."""
        handler = GradScalerKwargs(init_scale=scale, growth_interval=10**6)
        accelerator = part.accelerator(kwargs_handlers=[handler])
        optimizer = partial(torch.optim.AdamW, lr=1e-3, fused=is_fused)
        trainer = Trainer(make_model(), labels, optimizer, callbacks=callbacks, accelerator=accelerator)
        with quiet():
            trainer.train(
                TensorDataset(data, targets),
                num_epochs=1,
                max_num_train_steps=num_updates,
                per_device_batch_size=batch_size,
                train_dataloader_kwargs={"shuffle": False},
                **arguments,
            )
        scaler = accelerator.scaler
        return trainer, 0.0 if scaler is None else math.log2(scale / scaler.get_scale())

    def by_hand(scale: float, is_fused: bool, clip: float) -> Tensor:
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=is_fused)
        scaler = torch.amp.GradScaler(
            part.device.type, init_scale=scale, growth_interval=10**6, enabled=part.precision == "fp16"
        )
        skipped = step = 0
        while step - skipped < num_updates:
            rows = slice(step * batch_size, (step + 1) * batch_size)
            with part.autocast():
                outputs = model(inputs[rows].to(part.device))
            scaler.scale(labels(outputs.float(), targets[rows].to(part.device))).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            skipped += scaler.get_scale() < before
            step += 1
        return weights_of(model)

    def check_trained(trainer: Trainer, at_fault: int | None, left_out: float) -> list[str]:
        weights, first = weights_of(trainer.get_model()), weights_of(make_model())
        problems = [] if bool(weights.isfinite().all()) else ["weights are not finite"]
        if torch.equal(weights, first):
            problems.append("weights have not moved")
        if trainer.num_updates != num_updates:
            problems.append(f"{trainer.num_updates} updates instead of {num_updates}")
        expected = left_out if at_fault is None else at_fault
        if trainer.num_skipped_updates != expected:
            problems.append(f"{trainer.num_skipped_updates} counted as skipped instead of {expected:g}")
        if part.precision == "fp16" and at_fault is None and left_out < 1:
            problems.append("the scale was meant to be too large, and was not")
        return problems

    skip = [TerminateOnNaNCallback("skip")]

    def overflow(is_fused: bool, callbacks: Iterable[Any], **arguments: Any) -> tuple[list[str], str]:
        trainer, left_out = train(inputs, huge, is_fused, callbacks, **arguments)
        return check_trained(trainer, None, left_out), f"{trainer.num_skipped_updates} skipped, scaler: {left_out:g}"

    def bad_batch(is_fused: bool) -> tuple[list[str], str]:
        trainer, left_out = train(poisoned, 1024.0, is_fused, skip)
        return check_trained(trainer, 1, left_out), f"{trainer.num_skipped_updates} skipped, scaler: {left_out:g}"

    def refused(is_fused: bool) -> tuple[list[str], str]:
        try:
            train(poisoned, 1024.0, is_fused, DEFAULT_CALLBACKS)
        except NonFiniteError as error:
            return [], first_line(error).split(";")[0]
        return ["no NonFiniteError"], ""

    def equal(is_fused: bool) -> tuple[list[str], str]:
        trainer, _ = train(inputs, huge, is_fused, DEFAULT_CALLBACKS, gradient_clip_norm=0.1)
        difference = (weights_of(trainer.get_model()) - by_hand(huge, is_fused, 0.1)).abs().max().item()
        return [] if difference <= 1e-6 else ["other weights"], f"largest difference {difference:g}"

    part.table(
        f"precision {part.precision}, {num_updates} updates, AdamW", *("check", "fused=False", "fused=True", "found")
    )
    checks: dict[str, Callable[[bool], tuple[list[str], str]]] = {
        "scale too large, default callbacks: skipped, counted, goes on": partial(overflow, callbacks=DEFAULT_CALLBACKS),
        "scale too large, no callbacks": partial(overflow, callbacks=()),
        "scale too large, accumulation 2, clipping": partial(
            overflow, callbacks=DEFAULT_CALLBACKS, gradient_accumulation_steps=2, gradient_clip_norm=1.0
        ),
        "a batch with an infinite number, policy 'skip': skipped once": bad_batch,
        "a batch with an infinite number, default callbacks: refused": refused,
        "scale too large, clipping: weights as with torch.amp.GradScaler by hand": equal,
    }
    for name, check in checks.items():
        cells, found = [], []
        for is_fused in (False, True):
            what = f"{name}, fused={is_fused}"
            cells.append("failed")
            with part.guarded(what):
                problems, seen = check(is_fused)
                found.append(seen)
                if problems:
                    part.fail(what, "; ".join(problems))
                else:
                    cells[-1] = "pass" if part.has_gpu else "ran, without a scaler"
        part.row(name, *cells, "; ".join(dict.fromkeys(found)))


# --------------------------------------------------------------------------------------------------------------------
# All parts
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    number: int
    title: str
    function: Callable[[Part], None]
    seconds: int  # at most, on a GPU
    precision: str = "no"


# Proofs first: they are short, and worth more than figures should time run out.
TASKS = {
    "4": Task(4, "Nothing waits for the device", run_sync_proof, 50),
    "4-bf16": Task(4, "Nothing waits for the device, bf16", run_sync_proof, 50, "bf16"),
    "7": Task(7, "The gradient scaler of fp16", run_scaler, 45, "fp16"),
    "3": Task(3, "Overhead alone", run_overhead, 60),
    "1": Task(1, "A transformer", run_transformer, 180, "bf16"),
    "2": Task(2, "A small convolutional network", run_convnet, 75, "bf16"),
    "5": Task(5, "Loading and copying", run_loading, 70, "bf16"),
    "6": Task(6, "Checkpoints", run_checkpoints, 75),
}


def run_task(arguments: argparse.Namespace) -> int:
    """Run one part in this process, and leave its results in the file."""
    task = TASKS[arguments.task]
    arguments.precision = task.precision
    part = Part(arguments)
    part.save()
    with part.guarded("the part"):
        task.function(part)
    part.results["is_done"] = True
    part.save()
    return 0


def start_task(name: str, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run one part in a process of its own, and return its results, or those it had when its time was over."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "results.json"
        command = [sys.executable, __file__, "--task", name, "--json", str(path), "--device", arguments.device]
        command += ["--seconds", str(max(5.0, 0.92 * seconds - 5))]  # to end by itself before it is ended
        command += ["--quick"] * arguments.quick + ["--others"] * arguments.others
        command += ["--directory", str(arguments.directory)] if arguments.directory else []
        begin = time.monotonic()
        # Its own group, so that its workers end with it; its output apart from the report.
        process = subprocess.Popen(command, stdout=sys.stderr, process_group=0)
        problem = None
        try:
            if process.wait(timeout=seconds) != 0:
                problem = f"the process ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            problem = f"not done in {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        results: dict[str, Any] = {"tables": [], "notes": [], "failures": [], "skipped": [], "is_done": False}
        with contextlib.suppress(FileNotFoundError):
            results = json.loads(path.read_text())
        if problem is not None:
            results["failures"].append(problem)
        results["seconds"] = time.monotonic() - begin
        return results


def describe_machine(device: str, command: str) -> str:
    """Return the line that says when, where and with what."""
    names = {name: importlib.metadata.version(name) for name in ("torch", "accelerate")}
    facts = [datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), device]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        facts += [f"driver {found[0]}"] if found and not device.startswith("CPU") else []
    facts += [f"{os.cpu_count()} CPU cores", f"Python {platform.python_version()}"]
    facts += [f"{name} {version}" for name, version in names.items()]
    if torch.version.cuda and not device.startswith("CPU"):
        facts.append(f"CUDA {torch.version.cuda}")
    return f"Measured {', '.join(facts)}: `{command}`."


def write_report(results: dict[str, dict[str, Any] | None], command: str) -> str:
    """Return the Markdown of what has been done so far; None stands for a part there was no time for."""
    device = next((result["device"] for result in results.values() if result and "device" in result), "unknown device")
    lines = [describe_machine(device, command), ""]
    for name in sorted(results):
        task, result = TASKS[name], results[name]
        if result is None:
            lines += [f"### {task.title}", "", "skipped: out of time", ""]
            continue
        status = "" if result["is_done"] and not result["failures"] else " (failed)"
        lines += [f"### {task.title}{status}", ""]
        for table in result["tables"]:
            lines += [f"{table['title'][:1].upper()}{table['title'][1:]}.", ""] if table["title"] else []
            lines += [f"| {' | '.join(table['columns'])} |", f"|{'---|' * len(table['columns'])}"]
            lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table["rows"]] + [""]
        lines += [f"{note}\n" for note in dict.fromkeys(result["notes"])]
        lines += [f"- failed: {failure}" for failure in result["failures"]]
        lines += [f"- skipped: out of time: {what}" for what in result["skipped"]]
        lines += [""] if result["failures"] or result["skipped"] else []
    took = ", ".join(f"{TASKS[n].title.lower()} {r['seconds']:.0f}" for n, r in results.items() if r is not None)
    return "\n".join([*lines, f"Seconds for each part: {took}.", ""])


def main() -> int:
    """Run all parts, print the report, and return 1 where something failed, 2 where only time ran out."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="1,2,3,4,5,6,7", help="numbers of the parts to run")
    parser.add_argument("--others", action="store_true", help="also lightning and transformers, where installed")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few steps, to try the script out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=460.0, help="seconds for everything")
    parser.add_argument("--directory", type=Path, help="for checkpoints, on the disk to be measured")
    parser.add_argument("--write", type=Path, help="a Markdown file for the report, besides the standard output")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task is not None:
        return run_task(arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; to try the script out: --device cpu --quick")
    numbers = {int(number) for number in arguments.parts.split(",")}
    if unknown := numbers - {task.number for task in TASKS.values()}:
        parser.error(f"there are no parts {sorted(unknown)}")
    command = " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    results: dict[str, dict[str, Any] | None] = {name: None for name, t in TASKS.items() if t.number in numbers}
    for name in results:
        left = arguments.budget - (time.monotonic() - begin)
        if left < 15:
            print(f"== {TASKS[name].title}: skipped: out of time", file=sys.stderr, flush=True)
            continue
        print(f"== {TASKS[name].title}, {left:.0f} s left", file=sys.stderr, flush=True)
        results[name] = start_task(name, arguments, min(TASKS[name].seconds, left))
        if arguments.write:  # after each part, should the whole be ended from outside
            arguments.write.write_text(write_report(results, command))
    print(write_report(results, command))
    has_failed = any(result is not None and result["failures"] for result in results.values())
    is_short = any(result is None or result["skipped"] for result in results.values())
    return 1 if has_failed else 2 if is_short else 0


if __name__ == "__main__":
    sys.exit(main())

"""Style that matters: what is on the stack, what imports what, what is documented, what is large."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import pytorch_accelerated
from pytorch_accelerated import Trainer, callbacks, schedulers
from tests.support import PlainDataset, make_data, make_mlp, run_processes

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pytorch_accelerated"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each line may import from the lines above it.
LAYERS = [
    {"_version", "errors", "randomness", "signals", "syncs", "metrics_log", "snapshot"},
    {"dealing", "trackers"},
    {"run_config", "tracking", "data", "distributed", "engine", "finetuning", "media"},
    {"metrics", "predictions", "run_directory"},
    {"passes", "schedulers", "report"},
    {"checkpoint"},
    {"runs", "callbacks"},
    {"recording"},
    {"trainer"},
    {"integrations", "__init__"},
]


def module_of(path: Path) -> str:
    """Return the name of the module or, for one of a subpackage, of the subpackage."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[str, list[str]]]:
    """Return (module, names) of the imports at run time, those under TYPE_CHECKING left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped:
            found.append((node.module or "", [alias.name for alias in node.names]))
        elif isinstance(node, ast.Import) and id(node) not in skipped:
            found += [(alias.name, []) for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    me = module_of(path)
    level = next(number for number, layer in enumerate(LAYERS) if me in layer)
    for module, names in imports_of(path):
        if not module.startswith("pytorch_accelerated"):
            continue
        parts = module.split(".")[1:]
        for target in [parts[0]] if parts else names:
            if target == me or target not in set().union(*LAYERS):
                continue  # within a subpackage; or a name of the package itself
            theirs = next(number for number, layer in enumerate(LAYERS) if target in layer)
            assert theirs < level, f"{me} imports {target}"
        private = [name for name in names if name.startswith("_") and name != "__version__"]
        assert not private, f"{me} imports {private} of another module"


# What one process runs in the middle of `loss.backward()`, seen from inside it.
def stack_at_backward(**kwargs: Any) -> list[str]:
    stacks: list[list[str]] = []
    original = torch.Tensor.backward

    def backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        stacks.append([frame.filename for frame in traceback.extract_stack()])
        original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), partial(SGD, lr=0.1))
        trainer.train(PlainDataset(make_data(8)), 1, per_device_batch_size=2, **kwargs)
    assert len(stacks) >= 2
    return [name for name in stacks[1] if name.startswith(str(PACKAGE))]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_stack_at_backward_is_short(num_processes: int, accumulation: int) -> None:
    kwargs = {"gradient_accumulation_steps": accumulation}
    if num_processes == 1:
        stacks = [stack_at_backward(**kwargs)]
    else:
        stacks = run_processes(partial(stack_at_backward, **kwargs), num_processes)
    for frames in stacks:
        assert 1 <= len(frames) <= 4, frames
        assert len(set(frames)) <= 2, frames


def test_the_trainer_reads_from_top_to_bottom() -> None:
    """Sections in the order of DESIGN 4, hooks in the order in which they are called."""
    source = (PACKAGE / "trainer.py").read_text()
    sections = re.findall(r"# -{20,}\n    # (.+)\n", source)
    assert sections == [
        "Runs",
        "The loop",
        "Hooks that set up a run",
        "Hooks of a training run",
        "Hooks of evaluation and prediction runs",
        "State",
        "Conveniences",
        "Private: one batch",
        "Private: a run",
    ]
    positions = [source.index(f"    def {name}(") for name in Trainer.HOOKS if name != "update_metrics"]
    evaluation = Trainer.HOOKS.index("evaluation_run_start")
    for part in (positions[4:evaluation], positions[evaluation:]):
        assert part == sorted(part)
    assert source.index("def _run_train_epoch") < positions[0]


def test_no_function_is_longer_than_a_screen() -> None:
    for path in FILES:
        assert len(path.read_text().splitlines()) < 950, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                documented = ast.get_docstring(node, clean=False)
                lines = (node.end_lineno or 0) - node.lineno - len((documented or "").splitlines())
                assert lines <= 60, f"{path.name}: {node.name} has {lines} lines"


def test_no_mocks_and_no_disabled_checks() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        assert "unittest" + ".mock" not in path.read_text(), path
    for path in FILES:
        source = path.read_text()
        assert "except:" not in source and "except BaseException:" not in source, path
        assert not re.search(r"\beval\((?!\))", re.sub(r"\.eval\(", "", source)), path
        assert "warnings.filterwarnings" not in source and "set_seed(" not in source, path


def test_every_wait_for_the_device_says_why() -> None:
    for path in FILES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"\.(item|cpu|tolist)\(\)", line) and "numpy" not in line:
                near = path.read_text().splitlines()[max(0, number - 4) : number + 1]
                assert any("wait" in text.lower() or "numpy" in text for text in near), (
                    f"{path.name}:{number} {line.strip()}"
                )


def test_importing_is_light() -> None:
    script = (
        "import sys, logging, torch, random; torch.manual_seed(7); random.seed(7); before = "
        "torch.get_rng_state();state = random.getstate(); handlers = list(logging.root.handlers); import "
        "pytorch_accelerated;assert torch.equal(before, torch.get_rng_state()) and state == random.getstate();assert "
        "logging.root.handlers == handlers;print([m for m in ('torchmetrics', 'tensorboard', 'matplotlib', 'pandas', "
        "'timm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def public_objects() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in (pytorch_accelerated, callbacks, schedulers):
        for name in module.__all__:
            value = getattr(module, name)
            if getattr(value, "__module__", "").startswith("pytorch_accelerated"):
                found[name] = value
    return found


def test_public_names_are_documented_in_code_and_in_the_docs() -> None:
    # README's tables are a part of the docs, which include them.
    pages = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    for name, value in public_objects().items():
        assert inspect.getdoc(value), name
        assert re.search(rf"\b{name}\b", pages), f"{name} is on no page of the docs"
        if inspect.isclass(value):
            for member, function in inspect.getmembers(value, inspect.isfunction):
                if not member.startswith("_") and function.__module__.startswith("pytorch_accelerated"):
                    assert inspect.getdoc(function), f"{name}.{member}"
    for name in (*Trainer.HOOKS, *Trainer.EVENTS):
        assert f"`{name}" in pages, f"{name} is on no page of the docs"


def test_each_module_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()

"""Look at checkpoints from a shell: ``python -m pytorch_accelerated.checkpoint inspect|verify DIR``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pytorch_accelerated.checkpoint.content import Checkpoint
from pytorch_accelerated.checkpoint.files import MODEL, is_checkpoint, list_checkpoints, read_manifest, verify
from pytorch_accelerated.errors import CheckpointError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return 0 if what it looked at is whole and 1 if not."""
    parser = argparse.ArgumentParser(
        prog="python -m pytorch_accelerated.checkpoint",
        description="Look at checkpoints of training runs. No code in them is run.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {
        "inspect": "what is in a checkpoint, or in each checkpoint of a directory",
        "verify": "whether each file is whole, and which checkpoint resume_from='latest' would take",
    }.items():
        commands.add_parser(name, help=text, description=text).add_argument("directory", type=Path)
    options = parser.parse_args(arguments)
    if not options.directory.is_dir():
        _say(f"{options.directory} is not a directory.")
        return 1
    is_single = is_checkpoint(options.directory)
    paths = [options.directory] if is_single else list_checkpoints(options.directory)
    if not paths:
        _say(f"No checkpoint in {options.directory}: resume_from='latest' would begin anew.")
        return 0
    if options.command == "inspect":
        return max([_inspect(path) for path in paths])
    return _verify(paths, is_single)


def _verify(paths: list[Path], is_single: bool) -> int:
    taken: Path | None = None
    num_whole = 0
    for path in paths:
        try:
            num_bytes = sum(facts["size"] for facts in verify(path)["files"].values())
        except CheckpointError as error:
            _say(f"{path}: NOT WHOLE: {error}")
            continue
        _say(f"{path}: whole, {_size(num_bytes)}")
        taken, num_whole = taken or path, num_whole + 1
    if not is_single:
        if taken is None:
            _say("resume_from='latest' would take none, and raise an error.")
        else:
            why = "the newest" if taken == paths[0] else "the newest that is whole"
            _say(f"resume_from='latest' would take {taken.name}, {why}.")
    return 0 if num_whole == len(paths) else 1


def _inspect(path: Path) -> int:
    _say(path)
    try:
        manifest, found = read_manifest(path), Checkpoint(path)
        with safe_open(path / MODEL, framework="pt") as model:
            shapes = [model.get_slice(name).get_shape() for name in model.keys()]  # noqa: SIM118  # not a dict
    except (CheckpointError, OSError, ValueError) as error:
        _say(f"  cannot be read: {error}")
        return 1
    except Exception as error:  # safetensors has an exception type of its own, which it does not export everywhere
        _say(f"  cannot be read: {type(error).__name__}: {error}")
        return 1
    facts = found.facts
    num_weights = sum(math.prod(shape) for shape in shapes)
    lines = {
        "stands": found.describe(),
        "model": f"{num_weights:,} numbers in {len(shapes)} tensors",
        "optimizer": f"{facts['optimizer']['type']}, groups of {[len(g) for g in facts['optimizer']['groups']]}",
        "scheduler": facts["scheduler"],
        "data": ", ".join(f"{name} {value}" for name, value in facts["data"].items() if value is not None),
        "limits": f"num_epochs {facts['num_epochs']}, max_num_train_steps {facts['max_num_train_steps']}",
        "latest": ", ".join(f"{name} {rows[-1][0]}" for name, rows in facts["history"]["metrics"].items()),
        "seed": facts["seed"],
        "run": f"{found.run_id}, fingerprint {facts['fingerprint']}",
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "format": manifest["format_version"],
    }
    for name, line in lines.items():
        _say(f"  {name:9} {line}")
    for name, file in manifest["files"].items():
        _say(f"  {name:18} {_size(file['size']):>10}  sha256 {file['sha256'][:16]}")
    return 0


def _say(line: Any) -> None:
    sys.stdout.write(f"{line}\n")


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())

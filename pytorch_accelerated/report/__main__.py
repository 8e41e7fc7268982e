"""Look at runs from a shell: ``python -m pytorch_accelerated.report RUN [RUN ...]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_accelerated.errors import TrainerError
from pytorch_accelerated.report.comparison import compare_runs, diff_runs
from pytorch_accelerated.report.page import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, with ``--diff`` 1 where the runs differ, and 2 where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m pytorch_accelerated.report",
        description="Write a page about a run, or about several side by side. No code of the runs is run.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or directories that hold some")
    parser.add_argument("--output", type=Path, help="the page; default: report.html in the run directory")
    parser.add_argument(
        "--best", action="append", default=[], metavar="NAME:min|max", help="which values of a metric are better"
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--table", action="store_true", help="print a table of the runs instead")
    choice.add_argument("--diff", action="store_true", help="print where two runs part instead; the exit code is 1")
    parser.add_argument("--rtol", type=float, default=0.0, help="with --diff: how much numbers may differ, relatively")
    options = parser.parse_args(arguments)
    if options.diff and len(options.runs) != 2:
        parser.error(f"--diff compares two runs, got {len(options.runs)}")
    best = dict(_direction(parser, text) for text in options.best)
    try:
        if options.diff:
            difference = diff_runs(options.runs[0], options.runs[1], options.rtol)
            _say(difference)
            return 0 if difference.are_equal else 1
        if options.table:
            _say(compare_runs(options.runs, best))
        else:
            _say(write_report(options.runs, options.output, best))
    except (TrainerError, ValueError, ImportError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _direction(parser: argparse.ArgumentParser, text: str) -> tuple[str, str]:
    name, _, direction = text.rpartition(":")
    if not name or direction not in ("min", "max"):
        parser.error(f"--best takes NAME:min or NAME:max, got {text!r}")
    return name, direction


def _say(line: Any) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())

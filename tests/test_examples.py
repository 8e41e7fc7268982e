"""Each example runs as a user would run it, and reaches what it promises."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow  # a minute in all
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run_example(name: str, *launcher: str) -> str:
    # Threads of torch that compete with other processes for cores spin, and take many times as long.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PT_ACC_LIMIT_BATCHES", None)
    command = [sys.executable, *launcher, f"examples/{name}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def accuracy_in(out: str) -> float:
    """Return what the quickstart printed, in percent."""
    [accuracy] = re.findall(r"test accuracy: ([\d.]+)%", out)
    return float(accuracy)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = run_example(name)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The time of one core, which a busy machine does not lengthen: with two it is less than a minute by the clock.
    assert after.ru_utime - before.ru_utime < 60
    assert out.strip()
    if name == "quickstart.py":
        assert accuracy_in(out) >= 97


def test_the_list_of_examples_is_complete() -> None:
    for page in ("README.md", "docs/examples.md"):
        text = (ROOT / page).read_text()
        assert [name for name in EXAMPLES if name not in text] == []


def test_the_quickstart_runs_under_accelerate_launch() -> None:
    config = ["--config_file", "accelerate_config.yaml"]
    out = run_example("quickstart.py", "-m", "accelerate.commands.launch", *config)
    assert accuracy_in(out) >= 97

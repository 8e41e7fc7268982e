"""Each example runs as a user would run it, and reaches what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow  # they use both cores, and their time is a part of what is promised
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))

# What the last lines must say: a pattern whose number must be at least, or at most, a bound.
PROMISES: dict[str, tuple[str, str, float]] = {
    "quickstart.py": (r"test accuracy: ([\d.]+)%", ">=", 97.0),
}


def run_example(name: str, *launcher: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    environment.pop("PT_ACC_LIMIT_BATCHES", None)
    command = [sys.executable, *launcher, f"examples/{name}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str) -> None:
    begin = time.monotonic()
    out = run_example(name)
    assert time.monotonic() - begin < 60
    assert out.strip()
    if name in PROMISES:
        pattern, sign, bound = PROMISES[name]
        [number] = re.findall(pattern, out)
        assert float(number) >= bound if sign == ">=" else float(number) <= bound, out


def test_the_list_of_examples_is_complete() -> None:
    for page in ("README.md", "docs/examples.md"):
        text = (ROOT / page).read_text()
        assert [name for name in EXAMPLES if name not in text] == []


def test_the_quickstart_runs_under_accelerate_launch() -> None:
    config = ["--config_file", "accelerate_config.yaml"]
    out = run_example("quickstart.py", "-m", "accelerate.commands.launch", *config)
    [accuracy] = re.findall(r"test accuracy: ([\d.]+)%", out)
    assert float(accuracy) >= 97

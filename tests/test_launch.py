"""The same script under every launcher: the same numbers, and the error that matters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.launched_script import train
from tests.support import run_processes

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "tests" / "launched_script.py")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
TORCHRUN += ["--rdzv_endpoint", "localhost:0"]
TWO_PROCESSES = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
TWO_PROCESSES += ["--dynamo_backend", "no", "--main_process_port", "0"]
ON_CPU = {"ACCELERATE_USE_CPU": "true"}


def start(command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (environment or {})
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=150, cwd=ROOT)


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """What one process gives; run in a process of its own, for fresh state."""
    [result] = run_processes(train, 1)
    return result


LAUNCHERS: dict[str, tuple[list[str], dict[str, str], int]] = {
    "python": ([sys.executable, SCRIPT], {}, 1),
    "accelerate_config.yaml": ([*ACCELERATE, "--config_file", "accelerate_config.yaml", SCRIPT], {}, 1),
    "accelerate launch": ([*ACCELERATE, *TWO_PROCESSES, SCRIPT], ON_CPU, 2),
    "torchrun": ([*TORCHRUN, SCRIPT], ON_CPU, 2),
    "notebook_launcher": ([sys.executable, SCRIPT, "notebook"], ON_CPU, 2),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_the_same_numbers(launcher: str, plain: dict[str, Any], tmp_path: Path) -> None:
    command, environment, num_processes = LAUNCHERS[launcher]
    action = [] if launcher == "notebook_launcher" else ["train"]
    done = start([*command, *action, str(tmp_path / "result")], environment)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr.replace("FutureWarning", ""), done.stderr
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())]
    assert len(results) == num_processes
    for result in results:
        assert result["num_processes"] == num_processes
        assert result["train"] == pytest.approx(plain["train"], rel=1e-6)
        assert result["eval"] == pytest.approx(plain["eval"], rel=1e-6)
        steps = [210, 18, 18, 3]  # ceil(70 / 12) rounds in each epoch, however many processes
        assert result["counters"] == plain["counters"] == steps


def test_forked_processes_give_the_same_numbers(plain: dict[str, Any]) -> None:
    for num_processes in (2, 3):
        for result in run_processes(train, num_processes):
            assert result["num_processes"] == num_processes
            assert result["train"] == pytest.approx(plain["train"], rel=1e-6)
            assert result["eval"] == pytest.approx(plain["eval"], rel=1e-6)


@pytest.mark.parametrize("launcher", ["accelerate launch", "torchrun"])
def test_the_error_of_the_failing_process_is_seen_and_nothing_hangs(launcher: str) -> None:
    command, environment, _ = LAUNCHERS[launcher]
    begin = time.monotonic()
    done = start([*command, "fail"], environment)
    assert done.returncode != 0
    assert time.monotonic() - begin < 100
    assert "ZeroDivisionError: a bug of the user" in done.stderr
    assert "while training, process 1 of 2, epoch 1, 2 updates made, batch 3 of 8" in done.stderr
    # The other process either said whose error it was, or was ended by the launcher before it noticed.
    assert "Connection closed by peer" not in done.stderr


def test_processes_that_do_not_know_of_each_other_are_told_the_command_that_works(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("only on machines without a GPU does this launch go wrong")
    done = start([*ACCELERATE, *TWO_PROCESSES, SCRIPT, "train", str(tmp_path / "result")])
    assert done.returncode != 0
    assert "LaunchError: the launcher started WORLD_SIZE=2 processes, but Accelerate counts 1" in done.stderr
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2" in done.stderr
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
from functools import partial
import torch
from torch import nn
from pytorch_accelerated import Trainer
from pytorch_accelerated.callbacks import LambdaCallback
from tests.support import make_data, make_mlp

def say(text):
    return lambda trainer, **kwargs: print(text, flush=True)

def say_once(trainer, **kwargs):
    if trainer.num_updates == 50:
        print("on its way", flush=True)

once = LambdaCallback(on_train_update_end=say_once)
heard = LambdaCallback(on_exception=say("heard"), on_train_run_end=say("ended"))
trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), [once, heard])
try:
    trainer.train(make_data(64), None, max_num_train_steps=10**9, train_dataloader_kwargs={"num_workers": 1})
except KeyboardInterrupt:
    print("caught", flush=True)
trainer.callback_handler.clear_callbacks()
trainer.train(make_data(64), 1)
print("trained again", trainer.num_updates, flush=True)
"""


def test_ctrl_c_ends_a_run_and_leaves_a_trainer_that_can_be_used() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "on its way\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.splitlines() == ["heard", "ended", "caught", "trained again 8"]

"""The directory of a run: what is in it, that none is written over, and that a run that goes on goes on in its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from pytorch_accelerated import Trainer, run_directory
from pytorch_accelerated.callbacks import LambdaCallback, SaveBestModelCallback, SaveTrainingStateCallback
from pytorch_accelerated.errors import RunDirectoryError
from pytorch_accelerated.metrics_log import read_rows
from pytorch_accelerated.run_directory import OpenRunDirectory, RunDirectory, find_runs, read_run
from tests.support import Interruption, interrupt_at, make_data, make_mlp, run_processes

ROOT = Path(__file__).parent.parent

SCRIPT = """
    import sys
    from functools import partial
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset
    from pytorch_accelerated import Trainer
    from pytorch_accelerated.run_directory import RunDirectory

    data = TensorDataset(torch.randn(16, 2), torch.randn(16, 1))
    trainer = Trainer(
        nn.Linear(2, 1), nn.MSELoss(), partial(torch.optim.SGD, lr=0.1), None, seed=11,
        run_dir=RunDirectory("runs", strict="--strict" in sys.argv), config={"width": 1},
    )
    trainer.train(data, 1)
"""


def make_trainer(run_dir: Any, *callbacks: Any) -> Trainer:
    return Trainer(
        make_mlp(), nn.CrossEntropyLoss(), partial(SGD, lr=0.1), callbacks, seed=3, run_dir=run_dir, trackers=()
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a git repository with one commit, of a script that trains."""
    (tmp_path / "project").mkdir()
    project = tmp_path / "project"
    (project / "train.py").write_text(textwrap.dedent(SCRIPT))
    git(project, "init", "--quiet", "--initial-branch", "main")
    git(project, "add", ".")
    git(project, "-c", "user.name=n", "-c", "user.email=e@x", "commit", "--quiet", "-m", "first")
    return project


def git(directory: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(directory), *arguments], check=True, capture_output=True, text=True).stdout


def run_script(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train.py", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=project, capture_output=True, text=True, env=env, timeout=120)


def test_every_fact_of_a_run_is_in_its_directory(repository: Path) -> None:
    (repository / "train.py").write_text((repository / "train.py").read_text() + "\n# changed\n")
    (repository / "näw file.txt").write_text("x")
    secrets = {"MY_API_KEY": "s3cr3t", "DATABASE": "postgres://me:s3cr3t@host/db", "PLAIN": "visible"}
    done = run_script(repository, "--token", "s3cr3t", "--password=s3cr3t", "--width", "3", **secrets)
    assert done.returncode == 0, done.stderr
    run = repository / "runs" / "1"
    facts = read_run(run)
    [session] = facts["sessions"]
    assert facts["seed"] == 11 and len(facts["run_id"]) == 32 and facts["created"] <= session["started"]
    assert facts["config"]["user"] == {"width": 1} and facts["config"]["run"]["num_epochs"] == 1
    assert facts["config"]["model"] == {"type": "Linear", "num_parameters": 3, "num_trainable_parameters": 3}
    assert facts["config"]["optimizer"]["groups"][0]["lr"] == 0.1
    assert facts["config"]["data"]["num_train_samples"] == 16
    commit = git(repository, "rev-parse", "HEAD").strip()
    assert session["git"] == {
        "commit": commit,
        "branch": "main",
        "is_dirty": True,
        "changes": ["train.py", "näw file.txt"],
    }
    assert session["command"][1:] == ["train.py", "--token", "<hidden>", "--password=<hidden>", "--width", "3"]
    assert session["cwd"] == str(repository) and session["outcome"] == "finished" and session["num_processes"] == 1
    assert session["versions"]["torch"] == torch.__version__ and session["hardware"]["num_cores"] == os.cpu_count()
    files = run / "sessions" / "1"
    diff = (files / "git.diff").read_text()
    assert "+# changed" in diff
    git(repository, "checkout", "--quiet", "train.py")
    (repository / "näw file.txt").unlink()
    git(repository, "apply", str(files / "git.diff"))  # brings the code of the run back
    assert (repository / "train.py").read_text() == (files / "train.py").read_text()
    assert (repository / "näw file.txt").read_text() == "x"
    assert f"torch=={torch.__version__}\n" in (files / "packages.txt").read_text()
    environment = json.loads((files / "environment.json").read_text())
    assert environment["PLAIN"] == "visible"
    assert environment["MY_API_KEY"] == environment["DATABASE"] == "<hidden>"
    for path in run.rglob("*"):
        assert not path.is_file() or b"s3cr3t" not in path.read_bytes(), path
    assert {path.name for path in run.iterdir()} >= {"metrics.jsonl", "metrics.csv", "log.txt", "tensorboard"}


@pytest.mark.slow
def test_strict_refuses_code_that_is_in_no_commit(repository: Path) -> None:
    assert run_script(repository, "--strict").returncode == 0
    assert run_script(repository, "--strict").returncode == 0  # what the first run has written does not count
    assert sorted(path.name for path in (repository / "runs").iterdir()) == ["1", "2"]
    (repository / "helper.py").write_text("x = 1\n")
    done = run_script(repository, "--strict")
    assert done.returncode == 1 and "helper.py differ(s) from commit" in done.stderr, done.stderr
    git(repository, "add", "helper.py")
    assert run_script(repository, "--strict").returncode == 1
    git(repository, "-c", "user.name=n", "-c", "user.email=e@x", "commit", "--quiet", "-m", "second")
    assert run_script(repository, "--strict").returncode == 0
    (repository / ".git").rename(repository / "git")
    done = run_script(repository, "--strict")
    assert done.returncode == 1 and "is in no repository" in done.stderr
    assert sorted(path.name for path in (repository / "runs").iterdir()) == ["1", "2", "3"]


def test_no_run_is_written_over(tmp_path: Path) -> None:
    first = make_trainer(tmp_path)
    first.train(make_data(8), 1)
    before = {path: path.read_bytes() for path in (tmp_path / "1").rglob("*") if path.is_file()}
    second = make_trainer(tmp_path)
    second.train(make_data(8), 1)
    second.train(make_data(8), 1)
    assert second.run_dir == tmp_path / "3"
    assert [run.name for run in find_runs(tmp_path)] == ["1", "2", "3"]
    assert before == {path: path.read_bytes() for path in before}
    second.train(make_data(8), 1, reset_run_history=False)  # counts on: the same run
    assert second.run_dir == tmp_path / "3"
    assert [row["current_epoch"] for row in read_rows(tmp_path / "3" / "metrics.jsonl")] == [1, 1, 2, 2]
    assert [session["number"] for session in read_run(tmp_path / "3")["sessions"]] == [1, 2]


def create(base: Path) -> str:
    return OpenRunDirectory.create(base).path.name


def test_directories_made_at_the_same_moment_differ(tmp_path: Path) -> None:
    with ProcessPoolExecutor(8, mp_context=get_context("forkserver")) as pool:
        names = list(pool.map(create, [tmp_path] * 40))
    assert sorted(map(int, names)) == list(range(1, 41))


def hold(path: Path) -> bool:
    directory = OpenRunDirectory(path)
    return directory.path == path


def test_two_processes_cannot_have_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "_SECONDS_TO_WAIT_FOR_A_LOCK", 0.1)
    mine = OpenRunDirectory.create(tmp_path)
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:  # with the short time to wait
        with pytest.raises(RunDirectoryError, match="1 is in use by another process"):
            pool.submit(hold, mine.path).result()
        mine.let_go()
        assert pool.submit(hold, mine.path).result()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot make a run directory"):
        make_trainer(tmp_path / "file").train(make_data(4), 1)
    with pytest.raises(RunDirectoryError, match="there is no run in"):
        find_runs(tmp_path)
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(RunDirectoryError, match="made by a newer version"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="cannot be read"):
        read_run(tmp_path)


def test_checkpoints_and_the_best_model_go_into_the_run_directory(tmp_path: Path) -> None:
    saver, best = SaveTrainingStateCallback(save_every_n_epochs=1), SaveBestModelCallback()
    trainer = make_trainer(tmp_path, saver, best)
    trainer.train(make_data(8), 2, make_data(4))
    assert len(list((tmp_path / "1" / "checkpoints").glob("checkpoint-*"))) == 2
    assert best.save_path == tmp_path / "1" / "best_model.safetensors" and best.save_path.exists()
    trainer.train(make_data(8), 1, make_data(4))
    assert saver.save_dir == tmp_path / "2" / "checkpoints" and len(list(saver.save_dir.glob("checkpoint-*"))) == 1
    with pytest.raises(ValueError, match="SaveTrainingStateCallback was given no save_dir, and there is no run dir"):
        make_trainer(None, SaveTrainingStateCallback()).train(make_data(4), 1)


def interrupted(base: Path, update: int) -> None:
    saver = SaveTrainingStateCallback(save_every_n_updates=2)
    with pytest.raises(Interruption):
        make_trainer(base, saver, interrupt_at(update)).train(make_data(24), 2, per_device_batch_size=4)


def go_on(base: Path, resume_from: Any = "latest", num_epochs: int = 2, save_dir: Path | None = None) -> Trainer:
    trainer = make_trainer(base, SaveTrainingStateCallback(save_dir, save_every_n_updates=2))
    trainer.train(make_data(24), num_epochs, per_device_batch_size=4, resume_from=resume_from)
    return trainer


def test_latest_is_of_the_newest_run_that_has_saved(tmp_path: Path) -> None:
    interrupted(tmp_path, 5)
    make_trainer(tmp_path).evaluate(make_data(4))  # makes a directory without checkpoints
    assert go_on(tmp_path).run_dir == tmp_path / "1"
    assert go_on(tmp_path).run_dir == tmp_path / "1"  # nothing is left to do, and the log stays as it is
    rows = read_rows(tmp_path / "1" / "metrics.jsonl")
    assert [row["num_updates"] for row in rows] == [6, 6, 12, 12]


def test_an_older_checkpoint_begins_another_directory_with_the_log_up_to_it(tmp_path: Path) -> None:
    note = LambdaCallback(on_train_epoch_end=lambda trainer, **kw: trainer.log_text("note", "after an epoch"))
    saver = SaveTrainingStateCallback(save_every_n_updates=2)
    make_trainer(tmp_path, saver, note).train(make_data(24), 3, per_device_batch_size=4)
    whole = read_rows(tmp_path / "1" / "metrics.jsonl")
    assert [row["num_updates"] for row in whole] == [6, 6, 12, 12, 18, 18]
    older = next((tmp_path / "1" / "checkpoints").glob("*-update-8"))
    branch = go_on(tmp_path, older, num_epochs=3)
    assert branch.run_dir == tmp_path / "2"
    rows = read_rows(tmp_path / "2" / "metrics.jsonl")
    assert rows[:2] == whole[:2]
    losses = [[row["train_loss_epoch"] for row in log if "train_loss_epoch" in row] for log in (rows, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert read_rows(tmp_path / "1" / "metrics.jsonl") == whole
    media = read_rows(tmp_path / "2" / "media" / "index.jsonl")
    assert len(media) == 1 and (tmp_path / "2" / media[0]["files"][0]).read_text() == "after an epoch"
    assert read_run(tmp_path / "2")["sessions"][0]["resumed_from"] == str(older)
    newest = max((tmp_path / "2" / "checkpoints").glob("*-update-18"))
    assert go_on(tmp_path, newest, num_epochs=4).run_dir == tmp_path / "2"


def test_checkpoints_elsewhere_belong_to_the_run_by_its_id(tmp_path: Path) -> None:
    saver = SaveTrainingStateCallback(tmp_path / "saved", save_every_n_updates=2)
    with pytest.raises(Interruption):
        make_trainer(tmp_path / "runs", saver, interrupt_at(9)).train(make_data(24), 2, per_device_batch_size=4)
    make_trainer(tmp_path / "runs").train(make_data(4), 1)
    trainer = go_on(tmp_path / "runs", save_dir=tmp_path / "saved")
    assert trainer.run_dir == tmp_path / "runs" / "1"
    assert [row["num_updates"] for row in read_rows(tmp_path / "runs" / "1" / "metrics.jsonl")] == [6, 6, 12, 12]


def test_a_place_given_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    note = LambdaCallback(on_train_epoch_end=lambda trainer, **kw: trainer.log_text("note", "after an epoch"))
    saver = SaveTrainingStateCallback(save_every_n_updates=2)
    with pytest.raises(Interruption):
        make_trainer("runs", saver, note, interrupt_at(9)).train(make_data(24), 2, per_device_batch_size=4)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    trainer = make_trainer("link", SaveTrainingStateCallback(save_every_n_updates=2), note)
    trainer.train(make_data(24), 2, per_device_batch_size=4, resume_from="latest")
    assert trainer.run_dir == Path("link/1") and len(read_rows(tmp_path / "runs/1/media/index.jsonl")) == 2


def test_the_best_model_of_another_directory_is_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [SaveTrainingStateCallback(save_every_n_epochs=1), SaveBestModelCallback()]
    make_trainer(tmp_path, *callbacks).train(make_data(8), 3, make_data(4))
    older = min((tmp_path / "1" / "checkpoints").iterdir())
    best = SaveBestModelCallback()
    branch = make_trainer(tmp_path, SaveTrainingStateCallback(), best)
    branch.train(make_data(8), 3, make_data(4), resume_from=older)
    assert best.save_path == tmp_path / "2" / "best_model.safetensors" and best.save_path.exists()


def test_an_evaluation_does_not_write_into_a_directory_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_directory, "_SECONDS_TO_WAIT_FOR_A_LOCK", 0.1)
    trainer = make_trainer(tmp_path)
    trainer.train(make_data(8), 1)
    rows = read_rows(tmp_path / "1" / "metrics.jsonl")
    other = OpenRunDirectory(tmp_path / "1")
    with pytest.raises(RunDirectoryError, match="is in use"):
        trainer.evaluate(make_data(4))
    trainer.print("said", "twice", sep=None)
    assert read_rows(tmp_path / "1" / "metrics.jsonl") == rows
    other.let_go()
    trainer.evaluate(make_data(4))
    assert len(read_rows(tmp_path / "1" / "metrics.jsonl")) == len(rows) + 1


def test_a_log_that_is_gone_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(tmp_path, 9)
    (tmp_path / "1" / "metrics.jsonl").unlink()
    go_on(tmp_path)
    assert "Note on resuming: 2 of the 2 rows that the log had" in capsys.readouterr().out


def test_what_is_printed_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say = LambdaCallback(on_train_epoch_end=lambda trainer, **kw: trainer.print("héllo", 3, sep="-", end="!\n"))
    make_trainer(tmp_path, say).train(make_data(4), 1)
    assert (tmp_path / "1" / "log.txt").read_text(encoding="utf-8") == capsys.readouterr().out
    assert "héllo-3!\n" in (tmp_path / "1" / "log.txt").read_text(encoding="utf-8")


def fail_on_second(base: Path) -> int:
    def fail(trainer: Trainer, **kwargs: Any) -> None:
        if trainer.accelerator.process_index == 1 and trainer.num_updates == 2:
            raise RuntimeError("only here")

    trainer = make_trainer(base, LambdaCallback(on_train_step_begin=fail))
    with pytest.raises(Exception, match="only here"):
        trainer.train(make_data(24), 1, per_device_batch_size=2)
    return trainer.accelerator.num_processes


def test_a_failure_of_another_process_leaves_its_traceback(tmp_path: Path) -> None:
    assert run_processes(fail_on_second, 2, tmp_path) == [2, 2]
    assert "RuntimeError: only here" in (tmp_path / "1" / "log_process1.txt").read_text()
    [session] = read_run(tmp_path / "1")["sessions"]
    assert session["outcome"] == "failed" and "RuntimeError: only here" in session["error"], session["error"]


def test_an_evaluation_alone_has_a_directory(tmp_path: Path) -> None:
    trainer = make_trainer(RunDirectory(tmp_path, save_environment=False, save_script=False))
    trainer.evaluate(make_data(6))
    [row] = read_rows(tmp_path / "1" / "metrics.jsonl")
    assert "evaluation_loss" in row and row["num_updates"] == 0
    [session] = read_run(tmp_path / "1")["sessions"]
    assert session["outcome"] == "finished" and not (tmp_path / "1" / "sessions" / "1" / "environment.json").exists()
    trainer.train(make_data(6), 1)
    assert trainer.run_dir == tmp_path / "1"

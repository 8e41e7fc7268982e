"""Who waits for the device, and when: nobody in the library between log points."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.utils.data import Dataset

import pytorch_accelerated
from pytorch_accelerated import Trainer
from pytorch_accelerated.syncs import SyncAudit
from tests.support import PlainDataset, make_data, make_mlp

PACKAGE = Path(pytorch_accelerated.__file__).parent
SCRIPT = Path(__file__).parent / "sync_cases.py"


def run(*names: str, package_parent: Path = PACKAGE.parent) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(package_parent)}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=package_parent, env=environment)
    assert done.returncode == 0, done.stderr
    waits: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return waits


@cache
def run_all() -> dict[str, Any]:
    return run()


def refuse_waits(waits: list[Any], epochs: int = 1) -> None:
    """Raise AssertionError, with file and line, if the library waits but at its log points."""
    library = {place: number for owner, place, number in waits if owner == "library"}
    # Of 120 updates the flags are read after 50 and 100, and at the end of each epoch; so is the mean loss.
    expected = {"TerminateOnNaNCallback._read": 2 + epochs, "DataPass.sums_so_far": epochs}
    unexpected = {place: number for place, number in library.items() if place.split()[1] not in expected}
    assert not unexpected, f"the library waits for the device: {unexpected}"
    assert {place.split()[1]: number for place, number in library.items()} == expected


@pytest.mark.parametrize("name", ["default", "in memory", "AdamW, clipping and a schedule"])
def test_the_library_waits_for_the_device_at_log_points_alone(name: str) -> None:
    waits = run_all()[name]
    refuse_waits(waits)
    assert [wait for wait in waits if wait[0] == "user"] == []


def test_accumulation_waits_no_more() -> None:
    refuse_waits(run_all()["accumulation"], epochs=4)


def test_a_users_own_wait_is_told_with_its_line() -> None:
    waits = run_all()["a reading hook"]
    refuse_waits(waits)
    line = next(n for n, text in enumerate(SCRIPT.read_text().splitlines(), 1) if '["loss"].item()' in text)
    assert [wait for wait in waits if wait[0] == "user"] == [
        ["user", f"{SCRIPT}:{line} Reading.calculate_train_batch_loss", 120]
    ]


@pytest.mark.parametrize(
    "file, anchor",
    [
        ("callbacks/progress.py", "        if self._passes:\n            self._passes[-1].advance(trainer)\n"),
        ("callbacks/stopping.py", "        losses, self._losses = self._losses, None\n"),
        ("trainer.py", "        data_pass = self.data_pass\n        assert data_pass is not None"),
    ],
)
def test_a_wait_planted_in_the_library_is_found(file: str, anchor: str, tmp_path: Path) -> None:
    """The tests above can fail: with an item() in a default callback, or in the loop, they do and name the line."""
    copy = tmp_path / "pytorch_accelerated"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / file).read_text()
    assert source.count(anchor) == 1
    planted = (
        "        next(trainer.model.parameters() if 'trainer' in vars() else self.model.parameters()).sum().item()\n"
    )
    (copy / file).write_text(source.replace(anchor, planted + anchor))
    line = (copy / file).read_text().splitlines().index(planted.rstrip("\n")) + 1
    waits = run("default", package_parent=tmp_path)["default"]
    with pytest.raises(AssertionError, match=re.escape(f"{copy / file}:{line} ")):
        refuse_waits(waits)


class Reads(Dataset[Any]):
    """Reads its own tensors, which are on the CPU everywhere."""

    def __init__(self) -> None:
        self.x, self.y = torch.randn(24, 4), torch.randint(3, (24,))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] * self.x[index].sum().item(), int(self.y[index])


class Careless(Trainer):
    def calculate_train_batch_loss(self, batch: Any) -> Any:
        output = super().calculate_train_batch_loss(batch)
        assert isinstance(output, dict)
        if output["loss"] > 1e9:  # bool
            raise AssertionError
        output["model_outputs"].detach().cpu().numpy()
        output["model_outputs"].tolist()
        output["model_outputs"][batch[1] == 0].sum()
        torch.nonzero(batch[1])
        float(output["loss"].detach())
        return output


def test_audit_on_the_cpu_shows_what_would_wait_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Careless(nn.Linear(4, 3), nn.CrossEntropyLoss(), partial(AdamW, lr=0.1), callbacks=[])
    with trainer.audit_syncs() as audit:
        trainer.train(Reads(), 1, per_device_batch_size=4)
    assert trainer.num_updates == 6
    found = {(sync.function, sync.operation): audit.counts[sync] for sync in audit.find("user")}
    hook = "Careless.calculate_train_batch_loss"
    read = "a value is read, by item(), float(), int() or a condition"
    assert found == {
        (hook, "cpu()"): 6,
        (hook, "numpy()"): 6,
        (hook, "tolist()"): 6,
        (hook, "indexing with a mask"): 6,
        (hook, "nonzero(), or torch.where with one argument"): 6,
        (hook, read): 6,
    } or found == {**found, (hook, read): 6}
    assert len(audit.find("user")) == 7  # two lines read a value
    assert all(sync.path == __file__ for sync in audit.find("user"))
    assert audit.find("optimizer")  # AdamW reads its count of steps, which is on the CPU everywhere
    printed = capsys.readouterr().out
    assert "42 waits for the device in 7 places of your code" in printed
    assert printed.count(f"{__file__}:") == 7


def test_audit_finds_nothing_in_careful_code(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(make_mlp(), nn.CrossEntropyLoss(), partial(AdamW, lr=0.1))
    with trainer.audit_syncs() as audit:
        trainer.train(PlainDataset(make_data(8)), 1, per_device_batch_size=4)
    assert audit.find("user") == []
    assert "no wait for the device in your code" in capsys.readouterr().out


def test_audit_ends_with_its_block_also_where_it_fails() -> None:
    audit = SyncAudit(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="planted"), audit:
        torch.ones(()).item()
        raise RuntimeError("planted")
    torch.ones(()).item()
    assert sum(audit.counts.values()) == 1


def test_on_a_device_tensors_of_the_cpu_are_not_waited_for() -> None:
    with SyncAudit(torch.device("meta")) as audit:
        torch.ones(()).item()
        torch.ones(3).tolist()
        torch.ones(3)[torch.tensor([True, False, True])].cpu()
        torch.ones(3).to("meta", non_blocking=True)
    assert not audit.counts
    with SyncAudit(torch.device("meta")) as audit:
        torch.ones(3).to("meta")
    assert [sync.operation for sync in audit.counts] == ["copy from cpu to meta"]

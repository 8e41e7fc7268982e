"""Killed anywhere and started again, a run ends as if nothing had happened, to the bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.resume_cases import NUM_SAMPLES, PLACES, Case, Kill, run_case
from tests.support import run_until_killed

pytestmark = pytest.mark.slow  # a minute and a half, of many processes

KILLS_IN_A_ROW = 4
COMPARED = ("weights", "optimizer", "scheduler", "history", "seen", "rates", "mark", "stream")


def assert_same(first: Any, second: Any, where: str = "") -> None:
    """Check that two nested structures are the same to the bit."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}[{key!r}]")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            assert_same(one, other, f"{where}[{number}]")
    else:
        assert first == second, where


def finish(case: Case, num_processes: int, directory: Path | None, result: Path, kill: Kill | None = None) -> Any:
    """Run a case; return the outcome on each process, None if it was killed."""
    codes = run_until_killed(run_case, num_processes, case, directory and str(directory), str(result), kill)
    if any(codes):
        assert kill is not None, codes
        assert -9 in codes
        return None
    outcomes = [torch.load(f"{result}.{rank}") for rank in range(max(num_processes, 1))]
    assert {outcome["num_processes"] for outcome in outcomes} == {max(num_processes, 1)}
    return outcomes


def assert_each_sample_once(outcome: Any, case: Case) -> None:
    assert sorted(outcome["seen"]) == list(range(1, case.num_epochs + 1))
    for epoch, indices in outcome["seen"].items():
        assert sorted(indices) == list(range(NUM_SAMPLES)), epoch


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_anywhere_and_run_again_it_ends_the_same(
    num_processes: int, num_workers: int, seed: int, tmp_path: Path
) -> None:
    """Eight times seven moments: in a step, the loss, an evaluation, a callback, at a flush or rename of a save."""
    choices = random.Random(f"{num_processes} {num_workers} {seed}")
    case = Case(
        num_workers=num_workers,
        persistent_workers=num_workers > 0 and seed == 1,
        accumulation=1 + seed,
        asynchronous=seed == 1,
        save_every=choices.choice([1, 2, 3]),
    )
    expected = finish(case, num_processes, None, tmp_path / "expected")
    assert_each_sample_once(expected[0], case)
    num_kills, attempt, in_a_row = 0, 0, 0
    places = list(PLACES)
    choices.shuffle(places)
    directory = tmp_path / "0"
    while num_kills < len(places) or in_a_row:
        attempt += 1
        assert attempt < 40
        kill = None
        if in_a_row < KILLS_IN_A_ROW and num_kills < len(places):
            place = places[num_kills]
            last = {"sync": 12, "rename": 4, "callback": 3}.get(place, 9)
            process = choices.randrange(num_processes) if place not in ("sync", "rename") else 0
            kill = Kill(place, choices.randint(1, last), process)
        outcome = finish(case, num_processes, directory, tmp_path / f"result{attempt}", kill)
        if outcome is None:
            num_kills, in_a_row = num_kills + 1, in_a_row + 1
            continue
        for rank, own in enumerate(outcome):
            for name in COMPARED:
                assert_same(own[name], expected[rank][name], f"process {rank}, {name}, kills {num_kills}")
        directory, in_a_row = tmp_path / str(attempt), 0  # anew
    assert num_kills == len(places)

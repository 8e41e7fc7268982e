"""Counters, history, sums of losses, and the arithmetic of accumulation windows."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from pytorch_accelerated.tracking import AccumulationWindow, InMemoryRunHistory, LossSum, RunCounters, RunHistory

CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------------------------------------
# History
# --------------------------------------------------------------------------------------------------------------------


def make_history() -> RunHistory:
    """Return the history of two epochs, with one evaluation inside the second and three recordings at its end."""
    history = RunHistory()
    for epoch, losses in [(1, [1.5]), (2, [0.75])]:
        history.counters = RunCounters(num_samples=8 * epoch, num_steps=4 * epoch, num_updates=2 * epoch)
        history.counters.current_epoch = epoch
        if epoch == 2:
            history.counters.num_updates = 3
            history.update_metric("eval_loss_epoch", 1.25)
            history.counters.num_updates = 4
        history.update_metric("train_loss_epoch", losses[0])
        history.update_metric("eval_loss_epoch", losses[0] + 0.25)
    history.update_metric("eval_loss_epoch", math.nan)
    history.update_metric("eval_loss_epoch", math.inf)
    return history


def at(num_samples: int, num_steps: int, num_updates: int, current_epoch: int, num_skipped: int = 0) -> dict[str, int]:
    return {
        "num_samples": num_samples,
        "num_steps": num_steps,
        "num_updates": num_updates,
        "current_epoch": current_epoch,
        "num_skipped_updates": num_skipped,
    }


def test_returns_what_was_recorded_with_the_counters_of_the_moment() -> None:
    history = make_history()
    assert history.get_metric_names() == {"train_loss_epoch", "eval_loss_epoch"}
    assert history.get_metric_values("train_loss_epoch") == [1.5, 0.75]
    assert history.get_metric_counters("train_loss_epoch") == [at(8, 4, 2, 1), at(16, 8, 4, 2)]
    assert history.get_metric_values("eval_loss_epoch") == pytest.approx(
        [1.75, 1.25, 1, math.nan, math.inf], nan_ok=True
    )
    assert history.get_metric_counters("eval_loss_epoch") == [at(8, 4, 2, 1), at(16, 8, 3, 2), *[at(16, 8, 4, 2)] * 3]
    assert history.get_latest_metric("train_loss_epoch") == 0.75
    assert history.get_latest_metric("eval_loss_epoch") == math.inf
    assert history.current_epoch == 2


def test_hands_out_copies() -> None:
    history = make_history()
    history.get_metric_names().clear()
    history.get_metric_values("train_loss_epoch").append(3.0)
    history.get_metric_counters("train_loss_epoch")[0]["num_updates"] = 99
    assert history.state_dict()["metrics"]["train_loss_epoch"] == [[1.5, at(8, 4, 2, 1)], [0.75, at(16, 8, 4, 2)]]


@pytest.mark.parametrize("read", ["get_metric_values", "get_metric_counters", "get_latest_metric"])
def test_unknown_name_is_an_error_and_stays_unknown(read: str) -> None:
    history = make_history()
    before = history.state_dict()
    with pytest.raises(KeyError) as caught:
        getattr(history, read)("train_los_epoch")
    assert caught.value.args == (
        "no metric 'train_los_epoch' has been recorded; there are ['eval_loss_epoch', 'train_loss_epoch']. "
        "Did you mean 'train_loss_epoch'?",
    )
    with pytest.raises(KeyError) as caught:
        getattr(RunHistory(), read)("loss")
    assert caught.value.args == ("no metric 'loss' has been recorded; there are [].",)
    assert str(history.state_dict()) == str(before)
    assert history.get_metric_names() == {"train_loss_epoch", "eval_loss_epoch"}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.tensor(1.5, requires_grad=True), 1.5),
        (torch.tensor(3), 3),
        (torch.tensor(True), True),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16), [[1.0, 2.0], [3.0, 4.0]]),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.array([1, 2]), [1, 2]),
        (0.25, 0.25),
        ([1, [2.5]], [1, [2.5]]),
        (None, None),
    ],
)
def test_numbers_of_any_kind_become_plain(given: Any, kept: Any) -> None:
    history = RunHistory()
    history.update_metric("metric", given)
    value = history.get_latest_metric("metric")
    assert value == kept
    assert type(value) is type(kept)
    assert json.loads(json.dumps(history.state_dict()))["metrics"]["metric"][0][0] == kept


def test_table_has_a_row_for_each_moment() -> None:
    history = make_history()
    history.update_metric("accuracy", 0.5)
    table = history.to_pandas()
    nan = math.nan
    expected = pd.DataFrame(
        [
            [8, 4, 2, 1, 0, 1.5, 1.75, nan],
            [16, 8, 3, 2, 0, nan, 1.25, nan],
            [16, 8, 4, 2, 0, 0.75, 1.0, 0.5],
            [16, 8, 4, 2, 0, nan, nan, nan],
            [16, 8, 4, 2, 0, nan, math.inf, nan],
        ],
        columns=[*at(0, 0, 0, 0), "train_loss_epoch", "eval_loss_epoch", "accuracy"],
    )
    pd.testing.assert_frame_equal(table, expected)


def test_table_is_in_the_order_of_the_run_whatever_was_recorded_first() -> None:
    history = RunHistory()
    for update in (2, 10, 30):  # numbers, not words
        history.counters.num_updates = update
        history.update_metric("late" if update == 2 else "early", update)
    history.counters.num_updates = 5
    history.update_metric("late", 5)
    assert history.to_pandas()["num_updates"].tolist() == [2, 5, 10, 30]
    assert history.to_pandas().columns.tolist()[-2:] == ["late", "early"]


def test_empty_table() -> None:
    table = RunHistory().to_pandas()
    assert table.shape == (0, 5)


def test_only_the_table_needs_pandas() -> None:
    script = (
        "import sys; sys.modules['pandas'] = None\n"
        "from pytorch_accelerated import RunHistory\n"
        "history = RunHistory(); history.update_metric('a', 1)\n"
        "assert history.get_latest_metric('a') == 1\n"
        "history.to_pandas()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "ImportError: RunHistory.to_pandas needs pandas: pip install pandas"


def assert_same(first: RunHistory, second: RunHistory) -> None:
    assert str(first.state_dict()) == str(second.state_dict())  # as words, in which NaN equals NaN
    pd.testing.assert_frame_equal(first.to_pandas(), second.to_pandas())


def test_survives_json_with_nan_and_infinity(tmp_path: Path) -> None:
    history = make_history()
    history.update_metric("least", -math.inf)
    history.update_metric("confusion", [[1, 2], [3, 4]])
    history.save_json(tmp_path / "history.json")
    loaded = RunHistory.load_json(tmp_path / "history.json")
    assert_same(loaded, history)
    assert loaded.counters == RunCounters(16, 8, 4, 2, 0)
    assert math.isnan(loaded.get_metric_values("eval_loss_epoch")[3])
    assert loaded.get_latest_metric("least") == -math.inf


def test_state_goes_to_another_history_and_both_go_their_ways() -> None:
    history, other = make_history(), RunHistory()
    other.update_metric("forgotten", 1)
    state = history.state_dict()
    other.load_state_dict(state)
    assert_same(other, history)
    kept = str(state)
    for each in (history, other):
        each.counters.num_updates += 1
        each.update_metric("train_loss_epoch", 0.5)
    assert str(state) == kept
    assert_same(other, history)
    assert other.get_metric_counters("train_loss_epoch")[-1] == at(16, 8, 5, 2)
    state["metrics"]["train_loss_epoch"][0][1]["num_updates"] = 99
    assert other.get_metric_counters("train_loss_epoch")[0] == at(8, 4, 2, 1)


def test_reset_forgets_everything() -> None:
    history = make_history()
    history.reset()
    assert_same(history, RunHistory())
    assert history.counters == RunCounters(0, 0, 0, 0, 0)
    assert history.current_epoch == 0
    history.update_metric("train_loss_epoch", 3.0)
    assert history.get_metric_counters("train_loss_epoch") == [at(0, 0, 0, 0)]
    assert len(history.to_pandas()) == 1


def test_counters_and_names_of_the_published_library() -> None:
    assert InMemoryRunHistory is RunHistory
    assert dataclasses.asdict(RunCounters()) == at(0, 0, 0, 0)


# --------------------------------------------------------------------------------------------------------------------
# Sums of losses
# --------------------------------------------------------------------------------------------------------------------


def test_sum_of_many_losses_is_exact_to_double_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(100_000, generator=generator) * 1e3
    counts = torch.randint(1, 65, (100_000,), generator=generator).tolist()
    loss_sum = LossSum(CPU)
    for loss, count in zip(losses, counts, strict=True):
        loss_sum.update(loss, count)
    expected = math.fsum(loss * count for loss, count in zip(losses.tolist(), counts, strict=True)) / sum(counts)
    assert loss_sum.local_mean() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_counts_may_be_tensors(dtype: torch.dtype) -> None:
    by_number, by_tensor = LossSum(CPU), LossSum(CPU)
    pairs = [(0.1, 3), (2.7, 0), (0.3, 70_001), (1.9, 1)]
    for loss, count in pairs:
        by_number.update(torch.tensor(loss, dtype=dtype), count)
        by_tensor.update(torch.tensor(loss, dtype=dtype), torch.tensor(count))
    expected = sum(torch.tensor(loss, dtype=dtype).item() * count for loss, count in pairs) / 70_005
    assert by_number.local_mean() == by_tensor.local_mean() == pytest.approx(expected, rel=1e-15)


def test_no_items_have_no_mean() -> None:
    loss_sum = LossSum(CPU)
    assert loss_sum.local_mean() is None
    assert loss_sum.sums().tolist() == [0.0, 0.0]
    loss_sum.update(torch.tensor(2.0), 0)
    assert loss_sum.local_mean() is None
    loss_sum.update(torch.tensor(2.0), 4)
    assert loss_sum.local_mean() == 2.0
    assert loss_sum.sums().tolist() == [8.0, 4.0]
    loss_sum.reset()
    assert loss_sum.local_mean() is None
    assert loss_sum.sums().tolist() == [0.0, 0.0]
    loss_sum.update(torch.tensor(3.0), 2)
    assert loss_sum.local_mean() == 3.0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("count", [0, torch.tensor(0)])
def test_a_mean_over_nothing_weighs_nothing(loss: float, count: Any) -> None:
    loss_sum = LossSum(CPU)
    loss_sum.update(torch.tensor(loss), count)
    assert loss_sum.local_mean() is None
    loss_sum.update(torch.tensor(2.0), 3)
    assert loss_sum.local_mean() == 2.0


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("counts", [(1, 3), (torch.tensor(1), torch.tensor(3))])
def test_a_loss_that_is_not_finite_counts_unless_it_is_to_be_left_out(loss: float, counts: tuple[Any, Any]) -> None:
    for skips in (False, True):
        loss_sum = LossSum(CPU)
        if skips:
            loss_sum.skips_non_finite = True
        for each, count in zip((2.0, loss, 6.0), (*counts, 3), strict=True):
            loss_sum.update(torch.tensor(each), count)
        mean = loss_sum.local_mean()
        assert mean == (2 + 3 * 6) / 4 if skips else str(mean) == str(loss)


def test_the_sums_of_processes_add_up_to_a_mean_that_is_weighed() -> None:
    here, there = LossSum(CPU), LossSum(CPU)
    here.update(torch.tensor(2.0), 1)
    there.update(torch.tensor(5.0), 3)
    total, num_items = (here.sums() + there.sums()).tolist()
    assert total / num_items == (2 + 3 * 5) / 4
    assert here.local_mean() == 2.0


@pytest.mark.parametrize("count", [3, torch.tensor(3)])
def test_graphs_are_let_go(count: Any) -> None:
    def hook(gradient: Tensor) -> None:
        """Live as long as the graph."""

    loss = torch.ones(3, requires_grad=True).exp().mean()
    loss.register_hook(hook)
    graph, loss_sum = weakref.ref(hook), LossSum(CPU)
    del hook
    loss_sum.update(loss, count)
    assert graph() is not None
    del loss
    assert graph() is None
    assert loss_sum.local_mean() == pytest.approx(math.e)


def growth(function: Callable[[], None]) -> int:
    """Return by how many bytes Python's memory grows over 5000 more calls."""
    for _ in range(100):
        function()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(5000):
            function()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_steps() -> None:
    loss, loss_sum, window = torch.tensor(1.0), LossSum(CPU), AccumulationWindow(2, 1, lambda sums: sums, CPU)

    def step(num_items: Any, total_items: int | None) -> None:
        loss_sum.update(loss, num_items)
        closes = window.begin_step(is_last=False)
        window.weight(num_items, total_items)
        if closes:
            window.close([])

    kept: list[Tensor] = []
    assert growth(lambda: kept.append(loss)) > 5000 * 8  # a pointer for each call would be seen
    for num_items, total_items in [(3, 3), (3, None), (torch.tensor(3), None)]:
        assert growth(partial(step, num_items, total_items)) < 10_000


# --------------------------------------------------------------------------------------------------------------------
# Accumulation windows
# --------------------------------------------------------------------------------------------------------------------


def never(sums: Tensor) -> Tensor:
    raise AssertionError("nothing is to be reduced")


def untouchable() -> Iterator[Tensor]:
    raise AssertionError("the gradients are right as they are")
    yield


def windows_of(counts: list[Any], full_size: int) -> list[list[Any]]:
    return [counts[start : start + full_size] for start in range(0, len(counts), full_size)]


def run_epoch(
    window: AccumulationWindow, counts: list[Any], gradients: Tensor, totals: list[int] | None
) -> list[Tensor]:
    """Return the gradient of each update of an epoch in which micro-batch i has the gradient ``gradients[i]``."""
    weight = nn.Parameter(torch.zeros(gradients.shape[1], dtype=torch.float64))
    idle = nn.Parameter(torch.zeros(1))  # has no gradient
    updates = []
    for i, count in enumerate(counts):
        closes = window.begin_step(is_last=i == len(counts) - 1)
        loss = (weight * gradients[i]).sum()
        (loss * window.weight(count, None if totals is None else totals[i])).backward()
        if closes:
            window.close([idle, weight])
            assert weight.grad is not None
            updates.append(weight.grad)
            weight.grad = None
    return updates


def expected_updates(counts: Tensor, gradients: Tensor, full_size: int) -> list[Tensor]:
    """Return ``sum(n * g) / sum(n)`` of each window, over processes (the first dimension) and micro-batches."""
    updates = []
    for start in range(0, counts.shape[1], full_size):
        n = counts[:, start : start + full_size, None].double()
        updates.append((n * gradients[:, start : start + full_size]).sum((0, 1)) / n.sum().clamp(min=1))
    return updates


def assert_close(found: list[Tensor], wanted: list[Tensor], case: Any, rtol: float = 1e-12) -> None:
    assert len(found) == len(wanted), case
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= rtol * other.norm(), (case, one, other)


def random_counts(chance: random.Random, num_steps: int, kind: str) -> list[int]:
    if kind == "equal":
        return [4] * num_steps
    if kind == "ragged":
        return [4] * (num_steps - 1) + [chance.randint(1, 4)]
    return [chance.choice([0, 0, 1, 2, 5, 1000]) for _ in range(num_steps)]


@pytest.mark.parametrize("kind", ["equal", "ragged", "tokens"])
@pytest.mark.parametrize("form", ["totals", "numbers", "tensors"])
def test_weighed_gradients_are_those_of_the_big_batch(kind: str, form: str) -> None:
    """Windows of 1 to 5 in epochs of 1 to 12 micro-batches, of known and unknown length, one after the other."""
    chance = random.Random(0)
    torch.manual_seed(0)
    for full_size, is_known in product(range(1, 6), (True, False)):
        window = AccumulationWindow(full_size, 1, never, CPU)
        for num_steps in [*range(1, 13), 2]:
            counts = random_counts(chance, num_steps, kind)
            gradients = torch.randn(num_steps, 3, dtype=torch.float64)
            window.begin_epoch(num_steps if is_known else None)
            given = [torch.tensor(count) for count in counts] if form == "tensors" else counts
            found = run_epoch(window, given, gradients, counts if form == "totals" else None)
            wanted = expected_updates(torch.tensor([counts]), gradients[None], full_size)
            rtol = 1e-6 if form == "tensors" else 1e-12  # the quotient of two int64 tensors is float32
            assert_close(found, wanted, (full_size, is_known, counts), rtol)


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("knows_totals", [True, False])
def test_gradients_averaged_over_processes_are_those_of_the_big_batch(num_processes: int, knows_totals: bool) -> None:
    """The processes' sums are worked out beforehand, and are asked for no more often than is promised."""
    chance = random.Random(1)
    torch.manual_seed(1)
    for full_size, num_steps, is_known in product(range(1, 5), range(1, 10), (True, False)):
        counts = torch.tensor([random_counts(chance, num_steps, "tokens") for _ in range(num_processes)])
        gradients = torch.randn(num_processes, num_steps, 3, dtype=torch.float64)
        sums = []  # of the first micro-batch of each window, and of the others where there are any
        for part in windows_of(counts.sum(0).tolist(), full_size):
            sums += [part[0], sum(part[1:])] if len(part) > 1 else part
        averaged: list[Tensor] = []
        for process in range(num_processes):
            asked = iter([] if knows_totals else sums)
            window = AccumulationWindow(
                full_size, num_processes, lambda _, asked=asked: torch.tensor(next(asked), dtype=torch.float64), CPU
            )
            window.begin_epoch(num_steps if is_known else None)
            totals = counts.sum(0).tolist() if knows_totals else None
            found = run_epoch(window, counts[process].tolist(), gradients[process], totals)
            averaged = [a + b for a, b in zip(averaged, found, strict=True)] if averaged else found
            assert next(asked, None) is None
        averaged = [gradient / num_processes for gradient in averaged]
        assert_close(averaged, expected_updates(counts, gradients, full_size), (full_size, is_known, counts))


def test_a_process_gives_its_own_items_to_the_reduction() -> None:
    given: list[float] = []
    window = AccumulationWindow(3, 2, lambda items: given.append(items.item()) or items * 2, CPU)  # type: ignore[func-returns-value]
    for counts in ([5, 7, 9], [2, torch.tensor(3), 1]):
        window.begin_epoch(3)
        for count in counts:
            window.begin_step(is_last=False)
            window.weight(count, None)
        window.close([])
    assert given == [5, 16, 2, 4]


@pytest.mark.parametrize("num_steps", [6, 8, 1])
def test_equal_batches_need_no_correction(num_steps: int) -> None:
    """Nor do they in a last, shorter window of an epoch whose length is known."""
    window = AccumulationWindow(3, 2, never, CPU)
    window.begin_epoch(num_steps)
    weights, closings = [], []
    for i in range(num_steps):
        closes = window.begin_step(is_last=i == num_steps - 1)
        weights.append(window.weight(4, 8))
        closings.append(closes)
        if closes:
            window.close(untouchable())
    last = num_steps % 3 or 3
    assert weights == pytest.approx([1 / 3] * (num_steps - last) + [1 / last] * last)
    assert closings == [i % 3 == 2 or i == num_steps - 1 for i in range(num_steps)]


@pytest.mark.parametrize("full_size", [1, 4])
def test_an_epoch_begins_with_a_new_window(full_size: int) -> None:
    window = AccumulationWindow(full_size, 1, never, CPU)
    window.begin_epoch(9)
    window.begin_step(is_last=False)
    window.weight(1000, None)  # and here the epoch was interrupted
    window.begin_epoch(2)
    gradients = torch.tensor([[1.0], [4.0]], dtype=torch.float64)
    found = run_epoch(window, [2, 1], gradients, None)
    assert_close(found, expected_updates(torch.tensor([[2, 1]]), gradients[None], full_size), full_size)


@pytest.mark.parametrize("counts", [[2, 6], [torch.tensor(2), torch.tensor(6)]])
def test_gradients_of_several_types_are_corrected_each_in_its_own(counts: list[Any]) -> None:
    parameters = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.bfloat16, torch.float64, torch.float32)]
    window = AccumulationWindow(2, 1, never, CPU)
    window.begin_epoch(2)
    for count in counts:
        window.begin_step(is_last=False)
        window.weight(count, None)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    window.close(parameters)
    for parameter in parameters:
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype
        assert parameter.grad.tolist() == [0.5, 0.5]  # two batches of 2 were expected, and there were 8 items


@pytest.mark.parametrize("counts", [[0.5], [0.25, 0.125], [torch.tensor(0.5)]])
def test_items_may_be_sums_of_weights_below_one(counts: list[Any]) -> None:
    window = AccumulationWindow(2, 1, never, CPU)
    window.begin_epoch(len(counts))
    [found] = run_epoch(window, counts, torch.ones(len(counts), 1), None)
    assert found.item() == pytest.approx(1.0)

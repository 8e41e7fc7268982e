"""Random streams put aside and put back: nobody can tell from the global ones that others were in use."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pytorch_accelerated.randomness import OwnStreams, SeededCalls, seed_host_streams, seeded

NUMPY: Any = np.random  # whose stubs leave out the functions that exchange its generator


@pytest.fixture(autouse=True)
def same_generator() -> Iterator[None]:
    """Give numpy's global functions the generator back that they had, whatever a test puts in its place."""
    generator = NUMPY.get_bit_generator()
    try:
        yield
    finally:
        NUMPY.set_bit_generator(generator)
        np.random.seed(0)


def draw() -> list[float]:
    """Draw from every stream; an odd number of normal ones, so that the second of a pair waits or was used."""
    return [
        torch.rand(()).item(),
        torch.randn(()).item(),
        np.random.rand(),
        np.random.normal(),
        random.random(),
        random.gauss(0, 1),
    ]


def draw_normal() -> list[float]:
    """Draw first what may wait."""
    return [np.random.normal(), random.gauss(0, 1), torch.randn(()).item(), np.random.normal(), random.gauss(0, 1)]


def draw_on() -> list[float]:
    return [*draw_normal(), *draw(), *draw(), *draw_normal()]


def has_waiting_normal() -> bool:
    return bool(NUMPY.get_state(legacy=False)["has_gauss"])


# --------------------------------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------------------------------


def nothing() -> None:
    """Draw nothing."""


def some() -> None:
    for _ in range(2):  # an even number: nothing waits
        draw()
    assert not has_waiting_normal()


def one_normal() -> None:
    np.random.normal()
    assert has_waiting_normal()


def one_gauss() -> None:
    random.gauss(0, 1)
    assert random.getstate()[2] is not None


def one_of_each() -> None:
    draw()


def all_words_but_one() -> None:
    np.random.bytes(4 * 623)
    random.randbytes(4 * 623)


def own_generator() -> None:
    NUMPY.set_bit_generator(np.random.PCG64(1))


def own_generator_and_one_normal() -> None:
    own_generator()
    one_normal()


def nested() -> None:
    with seeded(8):
        draw()
        with seeded(9):
            draw()


def fail() -> None:
    draw()
    raise ZeroDivisionError


def seed_again() -> None:
    seed_host_streams(0)
    np.random.normal()


BEFORE = [
    nothing,
    some,
    one_normal,
    one_gauss,
    one_of_each,
    all_words_but_one,
    own_generator,
    own_generator_and_one_normal,
]
INSIDE = [nothing, some, one_normal, one_gauss, one_of_each, nested, fail, seed_again]


def run_block(seed: int, function: Callable[[], Any]) -> None:
    try:
        with seeded(seed):
            function()
    except ZeroDivisionError:
        assert function is fail


def draw_undisturbed(before: Callable[[], None]) -> list[Any]:
    """Return what is drawn after ``before``, and be there once more."""
    generator = NUMPY.get_bit_generator()
    seed_host_streams(3)
    before()
    expected = draw_on()
    NUMPY.set_bit_generator(generator)
    seed_host_streams(3)
    before()
    return expected


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("before", BEFORE)
def test_after_a_block_the_streams_go_on_as_if_there_had_been_none(
    before: Callable[[], None], inside: Callable[[], None]
) -> None:
    expected = draw_undisturbed(before)
    current = NUMPY.get_bit_generator()
    run_block(4, inside)
    assert NUMPY.get_bit_generator() is current
    run_block(5, inside)  # a second time, when the states are known
    assert draw_on() == expected


@pytest.mark.parametrize("before", BEFORE)
def test_a_block_draws_what_the_seed_gives(before: Callable[[], None]) -> None:
    seed_host_streams(2**40 + 7)
    expected = draw_on()
    seed_host_streams(3)
    before()
    for _ in range(2):
        with seeded(2**40 + 7):
            assert draw_on() == expected


def test_nested_blocks_go_on_where_they_were() -> None:
    seed_host_streams(1)
    outer = [draw(), draw_normal(), draw()]
    seed_host_streams(2)
    inner = draw_on()
    seed_host_streams(3)
    with seeded(1):
        found = [draw()]  # a number waits
        with seeded(2):
            assert draw_on() == inner
        found.append(draw_normal())
        with pytest.raises(ZeroDivisionError), seeded(2):
            fail()
        found.append(draw())
    assert found == outer


def test_what_is_drawn_between_blocks_is_noticed_though_the_position_is_the_same() -> None:
    """All 624 words of a stream used up, the last of them for a pair of which one waits."""

    def use_all_words() -> None:
        np.random.rand(310)
        np.random.normal()  # four words, with this seed; a pair may take more
        for _ in range(312):
            random.random()

    def run(with_blocks: bool) -> list[float]:
        seed_host_streams(1)
        draw()
        np.random.normal()  # the one that waits
        position, random_position = np.random.get_state()[2], random.getstate()[1][-1]
        if with_blocks:
            run_block(4, nothing)
        use_all_words()
        assert (np.random.get_state()[2], random.getstate()[1][-1]) == (position, random_position)
        assert has_waiting_normal()
        if with_blocks:
            run_block(4, draw)
        return draw_on()

    assert run(with_blocks=True) == run(with_blocks=False)


@pytest.mark.parametrize("way", ["seed", "state"])
def test_a_number_that_waits_is_kept_where_the_stream_has_been_at_the_same_place_without(way: str) -> None:
    """The second number of a pair leaves the words and the position as they were."""

    def go_back() -> None:
        if way == "seed":
            np.random.seed(3)
            np.random.normal()
        else:
            np.random.set_state(state)

    np.random.seed(3)
    np.random.normal()
    state = np.random.get_state()
    expected = np.random.normal(size=3).tolist()
    go_back()
    np.random.normal()
    run_block(4, nothing)
    go_back()
    assert has_waiting_normal()
    run_block(4, nothing)
    assert np.random.normal(size=3).tolist() == expected


# --------------------------------------------------------------------------------------------------------------------
# Calls
# --------------------------------------------------------------------------------------------------------------------

LATE = 2  # the number of the call in which some functions draw for the first time


def draws_nothing(number: int) -> Any:
    return number


def draws_from_torch(number: int) -> Any:
    return torch.rand(()).item(), torch.randn(()).item()


def draws_from_numpy(number: int) -> Any:
    return np.random.rand()


def draws_from_random(number: int) -> Any:
    return random.random()


def draws_a_normal(number: int) -> Any:
    return np.random.normal()


def draws_from_numpy_late(number: int) -> Any:
    return torch.rand(()).item(), np.random.rand() if number >= LATE else 0.0


def draws_all_words_of_numpy_late(number: int) -> Any:
    return np.random.rand(312).tolist() if number >= LATE else 0.0


def draws_all_words_of_random_late(number: int) -> Any:
    return [random.random() for _ in range(312)] if number >= LATE else 0.0


def draws_a_gauss_late(number: int) -> Any:
    return random.gauss(0, 1) if number >= LATE else 0.0


def draws_a_normal_late(number: int) -> Any:
    return np.random.normal() if number >= LATE else 0.0


def draws_late_and_seldom(number: int) -> Any:
    return draw_on() if number in (LATE, LATE + 2) else 0.0


def raises_late(number: int) -> Any:
    if number == LATE:
        raise ZeroDivisionError("of its own accord")
    return torch.rand(()).item()


def raises_after_a_late_draw(number: int) -> Any:
    if number == LATE:
        raise ZeroDivisionError(str([torch.rand(()).item(), np.random.normal(), random.gauss(0, 1)]))
    return torch.rand(()).item()


NEVER_WITHOUT_SEED = [draws_from_numpy, draws_from_random, draws_a_normal]
SPARED = [draws_nothing, draws_from_torch, raises_late]
LATE_ONES = [
    draws_from_numpy_late,
    draws_all_words_of_numpy_late,
    draws_all_words_of_random_late,
    draws_a_gauss_late,
    draws_a_normal_late,
    draws_late_and_seldom,
    raises_after_a_late_draw,
]


def result_of(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except ZeroDivisionError as error:
        return "raised", str(error)


def draw_outside(waits: bool | None) -> list[float]:
    """Draw from all streams, and then see to it that a normal number waits, or none does; None for either."""
    numbers = draw()
    while waits is not None and has_waiting_normal() is not waits:
        numbers.append(np.random.normal())
    return numbers


@pytest.mark.parametrize("waits", [True, False, None])
@pytest.mark.parametrize("function", [*NEVER_WITHOUT_SEED, *SPARED, *LATE_ONES])
def test_calls_draw_what_their_seeds_give_and_nothing_from_outside(
    function: Callable[[int], Any], waits: bool | None
) -> None:
    def call_seeded(number: int) -> Any:
        with seeded(50 + number):
            return function(number)

    expected = [result_of(lambda number=number: call_seeded(number)) for number in range(6)]  # type: ignore[misc]
    seed_host_streams(3)
    outside = [draw_outside(waits) for _ in range(7)]

    def note_and_call(number: int) -> Any:
        called.append(number)
        return function(number)

    seed_host_streams(3)
    calls, called = SeededCalls(), list[int]()
    found_outside = [draw_outside(waits)]
    for number, result in enumerate(expected):
        assert result_of(lambda number=number: calls(50 + number, note_and_call, number)) == result  # type: ignore[misc]
        found_outside.append(draw_outside(waits))
    assert found_outside == outside
    # A number that waits outside is seen to be used, so that it makes no difference.
    assert called == sorted([*range(6), *([LATE] if function in LATE_ONES else [])])


@pytest.mark.parametrize("function", [*NEVER_WITHOUT_SEED, *SPARED, *LATE_ONES])
def test_calls_one_after_the_other_with_nothing_drawn_in_between(function: Callable[[int], Any]) -> None:
    def call_seeded(number: int) -> Any:
        with seeded(number):
            return function(number)

    expected = [result_of(lambda number=number: call_seeded(number)) for number in range(6)]  # type: ignore[misc]
    seed_host_streams(3)
    after = draw_on()
    seed_host_streams(3)
    calls = SeededCalls()
    found = [result_of(lambda number=number: calls(number, function, number)) for number in range(6)]  # type: ignore[misc]
    assert found == expected
    assert draw_on() == after


def test_a_function_that_fails_at_once_is_called_on_seeded_streams_again() -> None:
    calls = SeededCalls()
    with pytest.raises(ZeroDivisionError):
        calls(1, lambda _: 1 / 0, None)
    with seeded(2):
        expected = draw()
    assert calls(2, lambda _: draw(), None) == expected


def test_an_interrupted_call_leaves_the_streams_alone() -> None:
    def interrupt(number: int) -> None:
        if number == LATE:
            draw()
            raise KeyboardInterrupt

    seed_host_streams(3)
    expected = draw_on()
    seed_host_streams(3)
    calls = SeededCalls()
    for number in range(LATE):
        calls(number, interrupt, number)
    with pytest.raises(KeyboardInterrupt):
        calls(LATE, interrupt, LATE)
    assert draw_on() == expected


@pytest.mark.parametrize("before", [own_generator, own_generator_and_one_normal])
def test_a_generator_that_cannot_be_watched_is_put_aside_for_every_call(before: Callable[[], None]) -> None:
    expected = draw_undisturbed(before)
    calls, called = SeededCalls(), list[int]()

    def function(number: int) -> Any:
        called.append(number)
        return draws_a_normal_late(number)

    found = [calls(number, function, number) for number in range(4)]
    assert draw_on() == expected
    assert called == [0, 1, 2, 3]
    for number in range(4):
        with seeded(number):
            assert draws_a_normal_late(number) == found[number]


# --------------------------------------------------------------------------------------------------------------------
# Streams of one's own
# --------------------------------------------------------------------------------------------------------------------

TURNS = [draw, draw_normal, draw_on, draw]  # after the first a normal number waits in each stream that has such


def own_numbers(seed: int) -> list[list[float]]:
    seed_host_streams(seed)
    return [turn() for turn in TURNS]


@pytest.mark.parametrize("before", BEFORE)
def test_own_streams_go_on_in_turns_and_the_global_ones_between_them(before: Callable[[], None]) -> None:
    generator = NUMPY.get_bit_generator()
    expected = own_numbers(6)
    seed_host_streams(3)
    before()
    outside = [draw_normal() for _ in TURNS]
    NUMPY.set_bit_generator(generator)
    seed_host_streams(3)
    before()
    streams = OwnStreams(6)
    found, found_outside = [], []
    for turn in TURNS:
        with streams.in_use():
            found.append(turn())
        found_outside.append(draw_normal())
    assert found == expected
    assert found_outside == outside


@pytest.mark.parametrize("num_turns", [0, 1, 2, 3])
def test_own_streams_go_on_elsewhere_from_their_state(num_turns: int) -> None:
    expected = own_numbers(6)
    seed_host_streams(3)
    one_normal()
    outside = draw_on()
    seed_host_streams(3)
    one_normal()
    streams = OwnStreams(6)
    for turn in TURNS[:num_turns]:
        with streams.in_use():
            turn()
    file = io.BytesIO()
    torch.save(streams.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert bool(state) is (num_turns > 0)
    other = OwnStreams(6 if num_turns == 0 else 7)
    with other.in_use():
        draw()  # which the state it takes up makes up for
    other.load_state_dict(state)
    again = OwnStreams(6)
    again.load_state_dict(other.state_dict())  # before it was used there
    for own in (streams, other, again):
        found = []
        for turn in TURNS[num_turns:]:
            with own.in_use():
                found.append(turn())
        assert found == expected[num_turns:]
    assert draw_on() == outside


def test_an_error_in_own_streams_leaves_the_global_ones_alone() -> None:
    seed_host_streams(3)
    one_normal()
    expected = draw_on()
    seed_host_streams(3)
    one_normal()
    streams = OwnStreams(6)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), streams.in_use():
            fail()
    assert draw_on() == expected

"""Events, the handler, accepted spellings, state of callbacks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from pytorch_accelerated import DEFAULT_CALLBACKS, Trainer
from pytorch_accelerated.callbacks import (
    CallbackHandler,
    LambdaCallback,
    TerminateOnNaNCallback,
    TrainerCallback,
)
from pytorch_accelerated.callbacks.base import ACCEPTED_SPELLINGS, EVENTS
from tests.support import make_data, make_mlp


def make_trainer(callbacks: Any, trainer_class: type[Trainer] = Trainer) -> Trainer:
    return trainer_class(make_mlp(), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), callbacks)


def recorder(events: Any, name: str | None = None, heard: list[str] | None = None) -> Any:
    """Return a callback that notes which of ``events``, methods of its own, were called."""
    heard = [] if heard is None else heard

    def method(event: str) -> Any:
        return lambda self, trainer, **kwargs: heard.append(f"{name}.{event}" if name else event)

    members: dict[str, Any] = {event: method(event) for event in events}
    return type("Recorder", (TrainerCallback,), members | {"heard": heard, "name": name})()


def test_the_published_spellings_are_heard_once_and_at_the_same_moment() -> None:
    old, new = recorder(ACCEPTED_SPELLINGS), recorder(ACCEPTED_SPELLINGS.values())
    trainer = make_trainer([old, new])
    trainer.train(make_data(8), 2, make_data(4))
    trainer.evaluate(make_data(4))
    assert len(new.heard) > 10
    assert [ACCEPTED_SPELLINGS[name] for name in old.heard] == new.heard
    assert set(new.heard) == set(ACCEPTED_SPELLINGS.values())


def test_both_spellings_on_one_callback_are_refused() -> None:
    both = recorder(["on_train_step_begin", "on_train_step_start"])
    with pytest.raises(ValueError, match="has two methods for the event 'on_train_step_begin': 'on_train_step_"):
        CallbackHandler([both])


def test_a_callback_written_for_the_published_library_runs() -> None:
    """Signatures as in 0.1.x: batch, batch_output, and no **kwargs where that library had none."""

    class Old(TrainerCallback):
        def on_training_run_start(self, trainer: Any, **kwargs: Any) -> None:
            self.steps: list[int] = []

        def on_train_step_end(self, trainer: Any, batch: Any, batch_output: Any, step: int, **kwargs: Any) -> None:
            assert set(batch_output) >= {"loss", "model_outputs", "batch_size"}
            self.steps.append(step)

    old = Old()
    make_trainer([old]).train(make_data(8), 2, per_device_batch_size=4)
    assert old.steps == [0, 1, 0, 1]


def test_callbacks_are_called_in_list_order_and_several_of_one_class_are_welcome() -> None:
    heard: list[str] = []
    first, second = (recorder(["on_train_epoch_begin"], name, heard) for name in ("first", "second"))
    again = type(first)()  # a second instance of the class of the first
    make_trainer([second, first, again]).train(make_data(4), 1)
    assert heard == ["second.on_train_epoch_begin", "first.on_train_epoch_begin", "first.on_train_epoch_begin"]


def test_classes_are_made_into_instances_of_each_trainer() -> None:
    first, second = make_trainer(DEFAULT_CALLBACKS), make_trainer(DEFAULT_CALLBACKS)
    assert [type(callback) for callback in first.callback_handler] == list(DEFAULT_CALLBACKS)
    assert not set(map(id, first.callback_handler)) & set(map(id, second.callback_handler))
    assert list(make_trainer(None).callback_handler) == []


def test_callbacks_come_and_go() -> None:
    callback, other = recorder(["on_train_epoch_begin"]), recorder(["on_train_epoch_begin"])
    trainer = make_trainer([callback])
    trainer.callback_handler.add_callback(other)
    trainer.callback_handler.remove_callback(callback)
    trainer.train(make_data(4), 1)
    assert (len(callback.heard), len(other.heard)) == (0, 1)
    with pytest.raises(ValueError):
        trainer.callback_handler.remove_callback(callback)
    trainer.callback_handler.clear_callbacks()
    trainer.train(make_data(4), 1)
    assert len(other.heard) == 1


def test_a_subclass_may_have_events_of_its_own() -> None:
    class Own(Trainer):
        EVENTS = (*Trainer.EVENTS, "on_half_time")

        def training_run_start(self) -> None:
            self.callback_handler.call_event("on_half_time", self, minute=45)

    minutes: list[int] = []
    callback = LambdaCallback(on_half_time=lambda trainer, minute, **kwargs: minutes.append(minute))
    make_trainer([callback], Own).train(make_data(4), 1)
    assert minutes == [45]
    with pytest.raises(ValueError, match="there is no such event"):
        make_trainer([callback])
    with pytest.raises(KeyError):
        make_trainer(None).callback_handler.call_event("on_half_time", None)  # type: ignore[arg-type]


def test_events_without_a_listener_call_nothing() -> None:
    handler = CallbackHandler([TrainerCallback(), recorder(["on_init_end"])])
    assert {event for event, listeners in handler.listeners.items() if listeners} == {"on_init_end"}


def test_a_missing_attribute_inside_a_callback_is_an_error() -> None:
    class Typo(TrainerCallback):
        def on_train_epoch_begin(self, trainer: Any, **kwargs: Any) -> None:
            self.not_there += 1  # type: ignore[attr-defined]

    assert not hasattr(Typo(), "anything")
    with pytest.raises(AttributeError, match="not_there"):
        make_trainer([Typo]).train(make_data(4), 1)


class Counter(TrainerCallback):
    def __init__(self, count: int = 0, name: str | None = None) -> None:
        self.count = count
        self.name = name

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def test_states_are_keyed_by_class_name_and_position() -> None:
    handler = CallbackHandler([Counter(1), Counter(2, "b"), Counter(3), TrainerCallback()])
    assert handler.state_dict() == {"Counter": {"count": 1}, "Counter:b": {"count": 2}, "Counter#2": {"count": 3}}
    other = CallbackHandler([Counter(name="b"), Counter(), Counter(), Counter(9, "not saved")])
    other.load_state_dict(handler.state_dict())
    assert [callback.count for callback in other] == [2, 1, 3, 9]  # type: ignore[attr-defined]


def test_a_lambda_callback_takes_only_events_and_functions() -> None:
    with pytest.raises(TypeError, match=r"LambdaCallback takes on_\*=function, got on_init_end=3"):
        LambdaCallback(on_init_end=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got train_epoch_end="):
        LambdaCallback(train_epoch_end=print)
    with pytest.raises(ValueError, match="no such event"):
        make_trainer([LambdaCallback(on_train_epoch=print)])


def test_every_event_has_a_method_and_each_is_documented() -> None:
    assert len(EVENTS) == len(set(EVENTS)) == 23
    for event in EVENTS:
        assert getattr(TrainerCallback, event).__doc__.startswith("Listen to")


def test_a_callback_that_leaves_or_joins_while_an_event_is_called_disturbs_no_other() -> None:
    heard: list[str] = []

    class Once(TrainerCallback):
        def on_train_epoch_begin(self, trainer: Any, **kwargs: Any) -> None:
            heard.append("once")
            trainer.callback_handler.remove_callback(self)

    last = recorder(["on_train_epoch_begin"], "last", heard)
    make_trainer([recorder(["on_train_epoch_begin"], "first", heard), Once(), last]).train(make_data(4), 2)
    first, last_name = "first.on_train_epoch_begin", "last.on_train_epoch_begin"
    assert heard == [first, "once", last_name, first, last_name]


@pytest.mark.parametrize("run", ["train", "evaluate", "predict"])
def test_a_failure_at_the_end_keeps_no_other_callback_from_hearing_of_it(run: str) -> None:
    event = {"train": "on_train_run_end", "evaluate": "on_evaluation_run_end", "predict": "on_prediction_run_end"}[run]

    def fail(trainer: Any, **kwargs: Any) -> None:
        raise KeyError(len(heard))

    heard: list[str] = []
    callbacks = [LambdaCallback(**{event: fail}), LambdaCallback(**{event: fail}), recorder([event], None, heard)]
    callbacks.append(recorder(["on_exception"], None, heard))
    trainer = make_trainer(callbacks)
    with pytest.raises(KeyError) as raised:
        getattr(trainer, run)(make_data(4), *([1] if run == "train" else []))
    assert heard == [event, "on_exception"]
    [note] = [note for note in raised.value.__notes__ if "as well" in note]
    assert note.endswith(f"fail failed as well, at {event}: KeyError: 0")


def test_the_nearer_spelling_of_an_event_wins() -> None:
    """A subclass of one of our callbacks, written for the published library, overrides what it means to."""
    from pytorch_accelerated.callbacks import PrintProgressCallback

    heard: list[str] = []

    class Mine(PrintProgressCallback):
        def on_training_run_start(self, trainer: Any, **kwargs: Any) -> None:
            heard.append("mine")

    make_trainer([Mine]).train(make_data(4), 1)
    assert heard == ["mine"]


def test_methods_without_kwargs_are_given_what_they_take() -> None:
    got: list[Any] = []

    class Strict(TrainerCallback):
        def on_train_epoch_begin(self, trainer: Any) -> None:  # type: ignore[override]
            got.append("begin")

        def on_eval_epoch_end(self, trainer: Any) -> None:  # type: ignore[override]
            got.append("eval")

        def on_eval_step_end(self, trainer: Any, batch_output: Any, batch: Any) -> None:  # type: ignore[override]
            got.append(sorted(batch_output))

    make_trainer([Strict]).train(make_data(4), 1, make_data(4))
    assert got == ["begin", ["batch_size", "loss", "model_outputs"], "eval"]


def test_an_event_of_the_published_library_without_a_twin_is_refused_with_advice() -> None:
    with pytest.raises(
        ValueError, match="after each epoch's evaluation: use 'on_eval_epoch_end' or, where there is no"
    ):
        make_trainer([recorder(["on_training_run_epoch_end"])])


def test_an_instance_takes_the_place_of_the_class_among_the_defaults() -> None:
    mine = TerminateOnNaNCallback("skip")
    trainer = make_trainer([*DEFAULT_CALLBACKS, mine, TerminateOnNaNCallback("stop")])
    guards = [callback for callback in trainer.callback_handler if isinstance(callback, TerminateOnNaNCallback)]
    assert [guard.policy for guard in guards] == ["skip", "stop"]  # instances are all kept, the class is left out
    assert len(trainer.callback_handler.callbacks) == len(DEFAULT_CALLBACKS) + 1


def test_an_unknown_event_is_named_where_it_is_called() -> None:
    trainer = make_trainer(None)
    with pytest.raises(KeyError, match=r"there is no event 'on_train_epoch_ends'\. Did you mean 'on_train_epoch_end'"):
        trainer.callback_handler.call_event("on_train_epoch_ends", trainer)


def test_a_callback_that_joins_while_an_event_is_called_hears_the_next() -> None:
    heard: list[str] = []

    class Inviting(TrainerCallback):
        def on_train_epoch_begin(self, trainer: Any, **kwargs: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.callback_handler.add_callback(recorder(["on_train_epoch_begin"], "guest", heard))
            heard.append(f"epoch {trainer.current_epoch}")

    make_trainer([Inviting]).train(make_data(4), 2)
    assert heard == ["epoch 1", "epoch 2", "guest.on_train_epoch_begin"]

"""What a callback is, the events it can listen to, and the handler that calls it."""

from __future__ import annotations

import bisect
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pytorch_accelerated.errors import did_you_mean

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

ACCEPTED_SPELLINGS = {
    "on_training_run_start": "on_train_run_begin",
    "on_train_epoch_start": "on_train_epoch_begin",
    "on_train_step_start": "on_train_step_begin",
    "on_eval_epoch_start": "on_eval_epoch_begin",
    "on_eval_step_start": "on_eval_step_begin",
    "on_training_run_end": "on_train_run_end",
    "on_evaluation_run_start": "on_evaluation_run_begin",
}
"""How pytorch-accelerated 0.1.x spells events, and what they are called here."""


_FORMER_EVENTS = {
    "on_training_run_epoch_end": " The published library fired it after each epoch's evaluation: use "
    "'on_eval_epoch_end' or, where there is no evaluation set, 'on_train_epoch_end'."
}


class TrainerCallback:
    """Listen to the events of a run; override what is of interest, the rest does nothing.

    An event follows the hook of the same moment, on every process. Callbacks are called in list order. An exception
    raised in one ends the run; ``StopTrainingError`` ends training in good order. Methods take ``**kwargs`` so that
    events can grow; arguments that a method without it does not take are left out.
    """

    name: str | None = None
    """Tells instances of one class apart, in checkpoints and messages."""

    order: int = 0
    """Callbacks of a lower order are called before those of a higher one, whatever their order in the list.

    0 for all but those that save, as the state they save must be the one after all others have heard the event, and
    one whose values those that print the history are to find.
    """

    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the end of ``Trainer.__init__``."""

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the beginning of a training run: loaders, scheduler and run configuration are there."""

    def on_train_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the beginning of a pass over the training data."""

    def on_train_step_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the moment before a training batch goes through the model."""

    def on_train_step_end(self, trainer: Trainer, batch: Any, batch_output: dict[str, Any], **kwargs: Any) -> None:
        """Listen to the loss of a training batch, before the backward pass: the weights have not moved yet."""

    def on_optimizer_step_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the moment before an update: the gradients are summed, averaged and clipped."""

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the end of an update: weights and learning rate have moved, the gradients are gone."""

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the end of a pass over the training data: its metrics are in the history."""

    def on_eval_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the beginning of a pass over an evaluation set."""

    def on_eval_step_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the moment before an evaluation batch goes through the model."""

    def on_eval_step_end(self, trainer: Trainer, batch: Any, batch_output: dict[str, Any], **kwargs: Any) -> None:
        """Listen to the loss of an evaluation batch."""

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the end of a pass over an evaluation set: its metrics are in the history."""

    def on_train_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the end of a training run, also of one that failed."""

    def on_evaluation_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the beginning of ``Trainer.evaluate``."""

    def on_evaluation_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the end of ``Trainer.evaluate``, also of one that failed."""

    def on_prediction_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the beginning of ``Trainer.predict``."""

    def on_predict_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the beginning of the pass over the data to predict."""

    def on_predict_step_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the moment before a batch to predict goes through the model."""

    def on_predict_step_end(self, trainer: Trainer, batch: Any, batch_output: Any, **kwargs: Any) -> None:
        """Listen to the predictions for a batch."""

    def on_predict_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the end of the pass over the data to predict."""

    def on_prediction_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to the end of ``Trainer.predict``, also of one that failed."""

    def on_stop_training_error(self, trainer: Trainer, **kwargs: Any) -> None:
        """Listen to a request to end training early (``StopTrainingError``)."""

    def on_exception(self, trainer: Trainer, exception: BaseException, **kwargs: Any) -> None:
        """Listen to any other exception, which ends the run and is raised once the callbacks have heard of it."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive an interruption: plain dicts, lists, numbers, strings, tensors.

        Called on the main process for each checkpoint; the default returns nothing.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned before the interruption.

        Called on every process, twice: before ``on_train_run_begin``, and again just before the run goes on, so that
        what was reset in between does not count. The default does nothing.
        """


EVENTS = tuple(name for name in vars(TrainerCallback) if name.startswith("on_"))
"""The names of all events of the library, in the order of a run."""


class CallbackHandler:
    """Hold the callbacks of a trainer and call those that listen to an event, in list order."""

    def __init__(
        self, callbacks: Iterable[TrainerCallback | type[TrainerCallback]], events: Iterable[str] = EVENTS
    ) -> None:
        """Check and register ``callbacks``.

        Args:
            callbacks: instances, or classes of which one instance each is made.
            events: the names of all events.

        Raises:
            TypeError: if something in ``callbacks`` is no callback.
            ValueError: if a callback has an ``on_*`` method for which there is no event.
        """
        self.callbacks: list[TrainerCallback] = []
        self.listeners: dict[str, list[Callable[..., None]]] = {event: [] for event in events}
        """What is called at each event, with the trainer and the facts of the event."""
        self._methods: list[dict[str, Callable[..., None]]] = []  # of each callback, by event
        self.add_callbacks(callbacks)

    def __iter__(self) -> Iterator[TrainerCallback]:
        """Iterate over the callbacks in the order in which they are called."""
        return iter(self.callbacks)

    def add_callbacks(self, callbacks: Iterable[TrainerCallback | type[TrainerCallback]]) -> None:
        """Append several callbacks; see ``add_callback``.

        A class is left out where an instance of exactly this class is among them, which takes its place: so an instance
        after ``*DEFAULT_CALLBACKS`` replaces the default one.

        Raises:
            TypeError: if ``callbacks`` is a callback itself.
        """
        if isinstance(callbacks, TrainerCallback | type):
            raise TypeError(f"callbacks must be a list of callbacks, got {callbacks!r}.")
        several = list(callbacks)
        given = {type(callback) for callback in several}
        for callback in several:
            if callback not in given:
                self.add_callback(callback)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Append a callback. Several instances of one class may be there at once.

        Raises:
            TypeError: if it is no callback.
            ValueError: if it has an ``on_*`` method for which there is no event.
        """
        instance = callback() if isinstance(callback, type) else callback
        if not isinstance(instance, TrainerCallback):
            raise TypeError(f"a callback must be a TrainerCallback (an instance or a class), got {callback!r}.")
        methods = self._find_listeners(instance)
        position = bisect.bisect_right(self.callbacks, instance.order, key=lambda other: other.order)
        self.callbacks.insert(position, instance)
        self._methods.insert(position, methods)
        for event in methods:
            # A new list, because a callback may come or go while the old one is being called.
            self.listeners[event] = [others[event] for others in self._methods if event in others]

    def remove_callback(self, callback: TrainerCallback) -> None:
        """Take a callback out. Raises ValueError if it is not there."""
        remaining = [other for other in self.callbacks if other is not callback]
        if len(remaining) == len(self.callbacks):
            raise ValueError(f"{callback!r} is not among the callbacks.")
        self.clear_callbacks()
        self.add_callbacks(remaining)

    def clear_callbacks(self) -> None:
        """Take all callbacks out."""
        self.callbacks = []
        self.listeners = {event: [] for event in self.listeners}
        self._methods = []

    def _find_listeners(self, callback: TrainerCallback) -> dict[str, Callable[..., None]]:
        nearest: dict[str, tuple[int, str]] = {}
        for name in dir(callback):
            if not name.startswith("on_") or not callable(getattr(callback, name)):
                continue
            event = ACCEPTED_SPELLINGS.get(name, name)
            if event not in self.listeners:
                known = [*self.listeners, *ACCEPTED_SPELLINGS]
                hint = _FORMER_EVENTS.get(name) or did_you_mean(name, known)
                raise ValueError(
                    f"{type(callback).__name__} has a method {name!r}, but there is no such event, so it would never "
                    f"be called.{hint} The events are: {', '.join(self.listeners)}. For an event of your own, add "
                    "its name to EVENTS of your Trainer subclass."
                )
            depth = _depth(callback, name)
            if depth is None:
                continue  # not overridden: nobody listens
            other_depth, other = nearest.get(event, (depth + 1, name))
            if depth == other_depth:
                raise ValueError(
                    f"{type(callback).__name__} has two methods for the event {event!r}: {other!r} and {name!r}."
                )
            if depth < other_depth:
                nearest[event] = depth, name
        return {event: _lenient(getattr(callback, name)) for event, (_, name) in nearest.items()}

    def call_event(self, event: str, trainer: Trainer, **kwargs: Any) -> None:
        """Call the callbacks that listen to ``event``.

        Args:
            event: the name of the event.
            trainer: passed to each callback.
            **kwargs: passed to each callback.

        Raises:
            KeyError: if there is no such event.
        """
        try:
            listeners = self.listeners[event]
        except KeyError:
            hint = did_you_mean(event, self.listeners)
            raise KeyError(f"there is no event {event!r}.{hint} Add it to EVENTS.") from None
        for listener in listeners:
            listener(trainer, **kwargs)

    def call_end_event(self, event: str, trainer: Trainer, error: BaseException | None = None, **kwargs: Any) -> None:
        """Call all callbacks that listen to ``event``, whatever happens in one of them.

        Args:
            event: the name of the event.
            trainer: passed to each callback.
            error: an exception that is on its way. What callbacks raise becomes a note of it, so that neither hides it.
            **kwargs: passed to each callback; once one has failed, ``exception`` is that failure where it was None.

        Raises:
            Exception: the first that a callback raised, where there is no ``error``; all have been called by then.
        """
        first: Exception | None = None
        for listener in self.listeners[event]:
            try:
                listener(trainer, **kwargs)
            except Exception as second:
                if error is None and first is None:
                    first = second
                    if "exception" in kwargs:
                        kwargs["exception"] = first  # those after it must not take the end for a good one
                    continue
                name = getattr(listener, "__qualname__", repr(listener))
                (error or first).add_note(  # type: ignore[union-attr]  # one of them is there
                    f"pytorch_accelerated: {name} failed as well, at {event}: {type(second).__name__}: {second}"
                )
        if first is not None:
            raise first

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the states of the callbacks that have one, keyed by class, name and, where these repeat, position."""
        return {key: state for key, callback in self._keyed() if (state := callback.state_dict())}

    def load_state_dict(self, state_dict: dict[str, dict[str, Any]]) -> None:
        """Give each callback its state back; a callback without one in ``state_dict`` is left as it is."""
        for key, callback in self._keyed():
            if key in state_dict:
                callback.load_state_dict(state_dict[key])

    def _keyed(self) -> Iterator[tuple[str, TrainerCallback]]:
        seen: dict[str, int] = {}
        for callback in self.callbacks:
            key = type(callback).__qualname__ + (f":{callback.name}" if callback.name else "")
            seen[key] = seen.get(key, 0) + 1
            yield (key if seen[key] == 1 else f"{key}#{seen[key]}"), callback


def _depth(callback: TrainerCallback, name: str) -> int | None:
    """Return how far from the instance an attribute was defined: the nearer, the more particular. None for our own."""
    if name in vars(callback):
        return 0
    owner = next(cls for cls in type(callback).__mro__ if name in vars(cls))
    return None if owner is TrainerCallback else 1 + type(callback).__mro__.index(owner)


def _lenient(method: Callable[..., None]) -> Callable[..., None]:
    """Return the method, or where it takes no ``**kwargs`` a function that drops what it does not take."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):  # some built-in functions do not say
        return method
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return method
    names = {parameter.name for parameter in parameters}

    @functools.wraps(method)
    def call(trainer: Trainer, **kwargs: Any) -> None:
        method(trainer, **{name: value for name, value in kwargs.items() if name in names})

    return call


class LambdaCallback(TrainerCallback):
    """Call functions at events, without a class of one's own."""

    def __init__(self, **functions: Callable[..., None]) -> None:
        """Take functions by event: ``LambdaCallback(on_train_epoch_end=lambda trainer, **kwargs: ...)``.

        Raises:
            TypeError: if a name is no event's, or a value is no function.
        """
        for name, function in functions.items():
            if not name.startswith("on_") or not callable(function):
                raise TypeError(f"LambdaCallback takes on_*=function, got {name}={function!r}.")
            setattr(self, name, function)

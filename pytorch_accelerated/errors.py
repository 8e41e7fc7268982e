"""The exceptions that the library raises on its own account.

::

    Exception
    └── TrainerError
        ├── StopTrainingError      a request to end training early and in good order
        ├── BatchError             a batch, or what a hook made of it, is not what was expected
        ├── NonFiniteError         a loss or a gradient is infinite or not a number
        ├── LaunchError            the processes of the launcher and those of Accelerate differ
        ├── ProcessFailedError     another process failed, which is why this one cannot go on
        ├── RunDirectoryError      a run directory cannot be made, is in use, or is none
        ├── TrackerError           a tracker is unknown, not installed, or cannot be opened
        └── CheckpointError        a checkpoint cannot be written, or is damaged
            └── CheckpointMismatchError   a checkpoint is of another model, optimizer, dataset or batch size

    SystemExit
    └── TrainingInterrupted        not a failure: the run was asked to stop, has saved its state, and is leaving

Wrong arguments raise the built-in ``ValueError`` or ``TypeError``. Exceptions of the user's own code keep their type
and traceback and receive a note that says where in the run they happened.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class TrainerError(Exception):
    """Be the common ancestor of the exceptions of this library."""


class StopTrainingError(TrainerError):
    """Ask the trainer to end the training run in good order.

    Raise it from any hook or callback between the beginning of a training run and its end, on every process alike. The
    epoch in progress is left as it is; ``on_stop_training_error``, ``training_run_end``, ``on_train_run_end`` follow.
    Raised anywhere else, in ``evaluate`` for example, it is an exception like any other.
    """


class BatchError(TrainerError, TypeError):
    """Report a batch that the default hooks cannot use, or a hook that returned something unusable for it."""


class NonFiniteError(TrainerError, ArithmeticError):
    """Report a loss or a gradient that is infinite or not a number."""


class LaunchError(TrainerError, RuntimeError):
    """Report that a launcher started several processes which do not know of each other."""


class ProcessFailedError(TrainerError, RuntimeError):
    """Report the failure of another process of the same run."""


class RunDirectoryError(TrainerError):
    """Report a run directory that cannot be made or read, that another process uses, or whose code is in no commit."""


class TrackerError(TrainerError):
    """Report a tracker that is unknown, is not installed, or could not be opened."""


class CheckpointError(TrainerError):
    """Report a checkpoint that could not be written, is not there, or is damaged."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """Report a checkpoint that belongs to another model, optimizer, dataset, batch size or seed than the run's."""


class TrainingInterrupted(SystemExit):
    """Leave a training run that was asked to stop, once its state is saved.

    Raised by ``SaveTrainingStateCallback`` on every process, after a signal or at the end of its time budget. Nobody
    has to catch it: a script ends with ``code`` and prints no traceback. It is no ``Exception``, so that ``except
    Exception`` does not take it for a failure.
    """

    def __init__(self, reason: str, code: int, checkpoint: Path) -> None:
        """Store why, and what was saved.

        Args:
            reason: the name of the signal, ``"time budget"``, or ``"launcher gone"``.
            code: the exit code: 130 after SIGINT, else 143.
            checkpoint: the directory that holds the state of the run.
        """
        super().__init__(code)
        self.reason = reason
        self.checkpoint = checkpoint

    def __reduce__(self) -> tuple[Any, ...]:
        """Let it be pickled, as on the way from one process to another."""
        return type(self), (self.reason, self.code, self.checkpoint)


def outcome_of(exception: BaseException | None) -> str:
    """Return how a run has ended: ``"finished"``, ``"failed"`` or ``"interrupted"``.

    Args:
        exception: what its end events were told; None where nothing was raised.
    """
    if isinstance(exception, TrainingInterrupted | KeyboardInterrupt):
        return "interrupted"
    return "finished" if exception is None else "failed"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence, with a leading space, that proposes the known name most like ``name``; empty if none is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


_SYNONYMS = {
    "begin": "start",
    "training": "train",
    "val": "eval",
    "valid": "eval",
    "validation": "eval",
    "evaluation": "eval",
    "compute": "calculate",
    "calc": "calculate",
    "loader": "dataloader",
    "dl": "dataloader",
    "grad": "gradient",
    "grads": "gradients",
}


# Of the published library, and what does their work here.
_FORMER_HOOKS = {
    "training_run_epoch_end": "eval_epoch_end",  # no hook of ours has its moment
    "_create_accelerator": "create_accelerator",
    "_clip_gradients": "clip_gradients",
    "_prepare_model_optimizer_and_dataloaders": "create_train_dataloader",
    "_create_run_config": "training_run_start",
}

# Of Lightning's and Hugging Face's trainers. Where our hook is overridden, it may well call a helper by such a name.
_FOREIGN_HOOKS = {
    "training_step": "calculate_train_batch_loss",
    "validation_step": "calculate_eval_batch_loss",
    "test_step": "calculate_eval_batch_loss",
    "predict_step": "calculate_predictions",
    "compute_loss": "calculate_train_batch_loss",
    "train_dataloader": "create_train_dataloader",
    "val_dataloader": "create_eval_dataloader",
    "get_train_dataloader": "create_train_dataloader",
    "get_eval_dataloader": "create_eval_dataloader",
}


def refuse_near_misses(owner: type, base: type, hooks: Iterable[str], events: Iterable[str]) -> None:
    """Refuse a subclass with a method that would never be called, because its name is almost a hook's or is an event's.

    Almost a hook's is a name that differs by at most two typing errors, by another word for the same thing (begin for
    start, val for eval) or by a word that is missing, and a name by which another library calls its hook, where ours is
    not overridden. Names that merely look alike are left alone, as are those that begin with an underscore.

    Raises:
        ValueError: if there is such a method.
    """
    for subclass in owner.__mro__[: owner.__mro__.index(base)]:
        for name, method in vars(subclass).items():
            if hasattr(base, name) or not callable(method) or (name.startswith("_") and name not in _FORMER_HOOKS):
                continue
            if name in events:
                raise ValueError(
                    f"{subclass.__name__}.{name} has the name of an event, which only callbacks hear. Override a hook "
                    f"instead: {', '.join(hooks)}."
                )
            hook = _FORMER_HOOKS.get(name) or _find_near_miss(name, hooks)
            foreign = _FOREIGN_HOOKS.get(name)
            if foreign is not None and getattr(owner, foreign) is getattr(base, foreign):
                hook = foreign
            if hook is not None:
                raise ValueError(
                    f"{subclass.__name__}.{name} is no hook and would never be called. Did you mean {hook!r}? If it "
                    f"is a helper of your own, begin its name with an underscore. The hooks are: {', '.join(hooks)}."
                )


def _find_near_miss(name: str, hooks: Iterable[str]) -> str | None:
    words = _in_our_words(name)
    for hook in hooks:
        wanted = _in_our_words(hook)
        lacks_a_word = len(words) > 1 and any(words == wanted[:i] + wanted[i + 1 :] for i in range(len(wanted)))
        if words == wanted or lacks_a_word or _count_typing_errors(name, hook, limit=2) <= 2:
            return hook
    return None


def _in_our_words(name: str) -> list[str]:
    return [_SYNONYMS.get(word, word) for word in name.split("_")]


def _count_typing_errors(first: str, second: str, limit: int) -> int:
    """Return the Levenshtein distance, or ``limit + 1`` for anything above ``limit``."""
    if abs(len(first) - len(second)) > limit:
        return limit + 1
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (letter != other))
    return row[-1]

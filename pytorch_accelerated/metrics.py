"""Metrics that take part in some passes only, metrics of the last steps, and sets of metrics for common tasks.

It imports torchmetrics, so the package imports it only where there are metrics.
"""

from __future__ import annotations

import importlib.util
import string
from collections import Counter, deque
from collections.abc import Callable, Collection, ItemsView, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryF1Score,
    BinaryMatthewsCorrCoef,
    BinaryPrecision,
    BinaryRecall,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.functional.text import rouge_score
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score
from torchmetrics.text import SacreBLEUScore, SQuAD
from torchmetrics.wrappers.abstract import WrapperMetric

from pytorch_accelerated import distributed

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

# --------------------------------------------------------------------------------------------------------------------
# Which metrics take part in a pass
# --------------------------------------------------------------------------------------------------------------------


class When(WrapperMetric):
    """Let a metric take part in some passes only; in the others it costs nothing and records nothing.

    It is decided when a pass begins, for all processes alike. ``update_metrics`` is given the metrics that take part,
    without this wrapper: ask ``"bleu" in metrics`` before costly work for one of them. Use it in ``Trainer(metrics=)``:
    ``{"bleu": When(BLEUScore(), training=False, every_n_epochs=5)}``.
    """

    def __init__(
        self,
        metric: Metric | MetricCollection,
        *,
        training: bool = True,
        evaluation: bool = True,
        intermediate: bool = True,
        eval_names: Collection[str] | None = None,
        every_n_epochs: int = 1,
        condition: Callable[[Trainer], bool] | None = None,
    ) -> None:
        """Store the metric and the passes it is for; all that is said must hold.

        Args:
            metric: a metric, or a collection of several.
            training: whether it takes part in passes over the training data.
            evaluation: whether it takes part in evaluations.
            intermediate: whether it takes part in evaluations within an epoch.
            eval_names: the names of the evaluation sets that it is for; None for all. An evaluation set without a name
                is none of them. It says nothing of training.
            every_n_epochs: it takes part in the epochs n, 2n, 3n and so on: in the pass over their training data, and
                in the evaluation at their end. Of 1 it takes part in all passes. ``Trainer.evaluate`` is of no epoch.
            condition: called with the trainer when a pass begins, on the main process only, whose answer holds for all.

        Raises:
            TypeError: if an argument is of a wrong type.
            ValueError: if ``every_n_epochs`` is below 1, or the metric would never take part.
        """
        super().__init__()
        if isinstance(metric, When) or not isinstance(metric, Metric | MetricCollection):
            raise TypeError(f"When takes a torchmetrics Metric or MetricCollection, got {type(metric).__name__}.")
        if isinstance(eval_names, str):
            raise TypeError(f"eval_names takes several names, got {eval_names!r}: write [{eval_names!r}].")
        if not isinstance(every_n_epochs, int) or every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be a whole number of at least 1, got {every_n_epochs!r}.")
        if condition is not None and not callable(condition):
            raise TypeError(f"condition must be a function of the trainer, got {condition!r}.")
        if not (training or evaluation):
            raise ValueError("a metric with training=False and evaluation=False would never take part.")
        self.metric = metric
        self._training = training
        self._evaluation = evaluation
        self._intermediate = intermediate
        self._eval_names = None if eval_names is None else frozenset(eval_names)
        self._every_n_epochs = every_n_epochs
        self.condition = condition

    def takes_part(self, is_training: bool, eval_name: str | None, is_intermediate: bool, epoch: int | None) -> bool:
        """Return whether the metric takes part in a pass, but for its ``condition``.

        Args:
            is_training: whether the pass is over training data.
            eval_name: the name of the evaluation set, if it has one.
            is_intermediate: whether the evaluation is within an epoch.
            epoch: number of the epoch, from 1; None outside of training runs.
        """
        if epoch is not None and self._every_n_epochs > 1 and (is_intermediate or epoch % self._every_n_epochs):
            return False
        if is_training:
            return self._training
        is_meant = self._eval_names is None or eval_name in self._eval_names
        return self._evaluation and is_meant and (self._intermediate or not is_intermediate)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Update the metric."""
        self.metric.update(*args, **kwargs)

    def compute(self) -> Any:
        """Return the value of the metric."""
        return self.metric.compute()


def choose_metrics(
    trainer: Trainer,
    is_training: bool,
    eval_name: str | None = None,
    is_intermediate: bool = False,
    pass_states: Sequence[Mapping[str, Any]] = (),
) -> Metric | MetricCollection | None:
    """Return those of the trainer's metrics that take part in the pass that begins, None for none.

    Collective where a metric has a condition.

    Args:
        trainer: whose metrics they are.
        is_training: whether the pass is over training data.
        eval_name: the name of the evaluation set, if it has one.
        is_intermediate: whether the evaluation is within an epoch.
        pass_states: what the pass had summed up before an interruption; the metrics that took part then go on.
    """
    metrics: Any = trainer.metrics
    if metrics is None:
        return None
    is_single = isinstance(metrics, Metric)
    members: dict[str, Any] = {"": metrics} if is_single else dict(metrics.items(keep_base=True, copy_state=False))
    if not any(isinstance(_inner(member), Windowed) or isinstance(member, When) for member in members.values()):
        return metrics  # type: ignore[no-any-return]  # one of both
    epoch = trainer.current_epoch if trainer.is_training_run else None
    chosen = {
        name: member
        for name, member in members.items()
        if (is_training or not isinstance(_inner(member), Windowed))
        and (not isinstance(member, When) or member.takes_part(is_training, eval_name, is_intermediate, epoch))
    }
    conditions = {
        name: member.condition
        for name, member in chosen.items()
        if isinstance(member, When) and member.condition is not None
    }
    if conditions:

        def ask() -> set[str]:
            if pass_states:  # the first process has those of the first, where the conditions were asked
                packed = pass_states[0]["metrics"] or {}
                return {name for name in conditions if _first_name(name, members[name]) in packed}
            return {name for name, condition in conditions.items() if condition(trainer)}

        held = distributed.on_main_process(trainer.accelerator, ask, RuntimeError)
        chosen = {name: member for name, member in chosen.items() if name not in conditions or name in held}
    if not chosen:
        return None
    if is_single:
        return _inner(metrics)  # type: ignore[no-any-return]  # one of both
    inner = {name: _inner(member) for name, member in chosen.items()}
    if isinstance(metrics, CollectedMetrics):
        return collect_metrics(inner)
    groups = metrics._enable_compute_groups  # torchmetrics 1.9 has no public name for what it was given
    if not isinstance(groups, bool):
        groups = [left for group in groups if (left := [n for n in group if isinstance(inner.get(n), Metric)])]
    return MetricCollection(inner, prefix=metrics.prefix, postfix=metrics.postfix, compute_groups=groups)


class CollectedMetrics(MetricCollection):
    """What ``collect_metrics`` returns."""


def collect_metrics(metrics: Mapping[str, Any] | Sequence[Any]) -> CollectedMetrics:
    """Return several metrics as one object, in which those that sum up the same are updated once.

    Torchmetrics finds these by the states after the first batch. Metrics that differ, such as by a threshold, may well
    agree on that, and would share their states from then on; here they must be updated by the same code.

    Args:
        metrics: by name, or without names, which are those of their classes then.
    """
    given: Any = dict(metrics) if isinstance(metrics, Mapping) else list(metrics)
    members = MetricCollection(given, compute_groups=False).items(keep_base=True, copy_state=False)
    groups: list[tuple[Metric, list[str]]] = []
    for name, member in members:
        for first, names in groups:
            if _are_updated_alike(first, member):
                names.append(name)
                break
        else:
            groups.append((member, [name]))
    return CollectedMetrics(given, compute_groups=[names for _, names in groups])


def _are_updated_alike(first: Metric, second: Metric) -> bool:
    for member in (first, second):
        has_parts = member._modules or any(buffer is not None for buffer in member._buffers.values())
        if has_parts or not member._defaults:
            return False
    codes = [[vars(kind)["update"] for kind in type(m).__mro__ if "update" in vars(kind)] for m in (first, second)]
    if codes[0] != codes[1] or first._defaults.keys() != second._defaults.keys():
        return False
    own, other = vars(first), vars(second)
    # What only one of them has, the common code does not know.
    names = (own.keys() & other.keys()) - vars(nn.Module()).keys() - first._defaults.keys() - _OWN_OF_EACH
    return all(own[n] is other[n] or (isinstance(own[n], _PLAIN) and own[n] == other[n]) for n in names)


_OWN_OF_EACH = {"update", "compute", "_update_signature", "_defaults", "_reductions", "_persistent", "validate_args"}
_PLAIN = (bool, int, float, str, tuple, torch.device, torch.dtype)  # settings that are the same where they are equal


def _inner(member: Any) -> Any:
    return member.metric if isinstance(member, When) else member


def _first_name(name: str, member: Any) -> str:
    """Return the name that the member, or the first metric of a collection, has in the collection of a pass."""
    inner = _inner(member)
    if not isinstance(inner, MetricCollection):
        return name
    return f"{name}_{next(iter(inner.keys()))}" if name else str(next(iter(inner.keys(keep_base=True))))


def gather_lists(metrics: Metric | MetricCollection) -> None:
    """Give each process the whole of the lists that torchmetrics would exchange an entry at a time. Collective.

    Torchmetrics 1.9 does so with list states that are not reduced (ROUGE, retrieval): it hangs where one process has
    more entries than another. What is gathered here it leaves alone afterwards, so the metrics can only be computed.
    """
    for part in metrics.modules():
        if not isinstance(part, Metric) or type(part)._sync_dist is not Metric._sync_dist:
            continue
        names = [name for name, reduction in part._reductions.items() if reduction is None]
        lists = {name: state for name in names if isinstance(state := getattr(part, name), list)}
        if not lists:
            continue
        on_host = {name: send_to_device(state, "cpu") for name, state in lists.items()}  # waits: a log point
        rows = gather_object([(part.update_count, on_host)])
        for name in lists:
            setattr(part, name, send_to_device([entry for _, row in rows for entry in row[name]], part.device))
            del part._reductions[name]


# --------------------------------------------------------------------------------------------------------------------
# The last steps
# --------------------------------------------------------------------------------------------------------------------


class Windowed(WrapperMetric):
    """A metric over the last steps of an epoch of training, of all processes: ``Windowed(accuracy, num_steps=100)``.

    It takes part in training only. The window begins anew with each epoch, and is shorter at its beginning. It keeps
    the states of each step in it, which are small for most metrics; those that keep all samples keep the window's.
    """

    def __init__(self, metric: Metric, num_steps: int) -> None:
        """Store the metric and the length of the window.

        Args:
            metric: of which the value over the window is wanted.
            num_steps: batches of one process that the window holds.

        Raises:
            TypeError: if it is no metric, or one whose states of several batches cannot be put together.
            ValueError: if ``num_steps`` is below 1.
        """
        super().__init__()
        if not isinstance(metric, Metric) or isinstance(metric, WrapperMetric):
            raise TypeError(f"Windowed takes a torchmetrics Metric that wraps no other, got {type(metric).__name__}.")
        if not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"num_steps must be a whole number of at least 1, got {num_steps!r}.")
        if not metric._defaults or None in metric._reductions.values():
            raise TypeError(
                f"{type(metric).__name__} cannot be windowed: its states of several batches cannot be put together "
                "(a state has no dist_reduce_fx)."
            )
        self.metric = metric
        self.num_steps = num_steps
        self._step: int | None = None  # of the pass; None where nobody says, and each update is one
        self._parts: deque[tuple[int, dict[str, Any]]] = deque()
        self._is_joined = False

    def begin_step(self, step: int) -> None:
        """Note that step number ``step`` begins, also where this process will have no samples in it."""
        self._step, self._is_joined = step, False
        self._forget(step - self.num_steps)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add a batch to the step in progress."""
        step = self._step
        if step is None:  # nobody says, outside of a pass: each update is a step
            step = self._parts[-1][0] + 1 if self._parts else 0
            self._forget(step - self.num_steps)
        self.metric.reset()
        self.metric.update(*args, **self.metric._filter_kwargs(**kwargs))
        states = {name: [*value] if isinstance(value, list) else value for name, value in _states_of(self.metric)}
        self._parts.append((step, states))
        self.metric.reset()  # which empties lists in place, and leaves tensors alone
        self._is_joined = False

    def _forget(self, last: int) -> None:
        while self._parts and self._parts[0][0] <= last:
            self._parts.popleft()

    def join(self) -> None:
        """Put the states of the window together, as those of several processes are."""
        metric, parts = self.metric, [states for _, states in self._parts]
        metric.reset()
        if parts:
            reductions: dict[str, Any] = metric._reductions
            for name, reduction in reductions.items():
                values = [states[name] for states in parts]
                if isinstance(values[0], list):
                    setattr(metric, name, [entry for value in values for entry in value])
                elif len(values) > 1:
                    setattr(metric, name, reduction(torch.stack(values)))
                else:
                    setattr(metric, name, values[0].clone())
            metric._update_count = len(parts)  # torchmetrics 1.9 has no setter
        self._is_joined = True

    def compute(self) -> Any:
        """Return the value over the window. Collective."""
        if not self._is_joined:
            self.join()
        value = self.metric.compute()
        self.metric.reset()
        self._is_joined = False
        return value

    def reset(self) -> None:
        """Begin with an empty window."""
        super().reset()
        self.metric.reset()
        self._parts.clear()
        self._step, self._is_joined = None, False

    def pack(self) -> list[list[Any]]:
        """Return the states in the window, each with the number of steps since."""
        now = self._step if self._step is not None else max((step for step, _ in self._parts), default=0)
        return [[now - step, dict(states)] for step, states in self._parts]

    def add_packed(self, packed: list[list[Any]]) -> None:
        """Add what ``pack`` returned, before an interruption or on another process, at this step."""
        now = self._step or 0
        parts = [(now - age, send_to_device(states, self.metric.device)) for age, states in packed]
        self._parts = deque(sorted([*self._parts, *parts], key=lambda part: part[0]))
        self._is_joined = False


def _states_of(metric: Metric) -> ItemsView[str, Any]:
    return metric.metric_state.items()


def windows_of(metrics: Metric | MetricCollection) -> Windowed | MetricCollection | None:
    """Return those of the metrics of a pass that are windowed, the same objects; None for none."""
    if isinstance(metrics, Metric):
        return metrics if isinstance(metrics, Windowed) else None
    members = dict(metrics.items(keep_base=True, copy_state=False))
    windows: dict[str, Any] = {name: member for name, member in members.items() if isinstance(member, Windowed)}
    if not windows:
        return None
    return MetricCollection(windows, prefix=metrics.prefix, postfix=metrics.postfix, compute_groups=False)


# --------------------------------------------------------------------------------------------------------------------
# Classification
# --------------------------------------------------------------------------------------------------------------------


class _Binary:
    """Takes what models of two classes return, of shape (N,) or (N, 1), and targets of any type and the same shapes.

    Torchmetrics looks at each batch to see whether it holds logits, and takes one for probabilities in which all happen
    to be between 0 and 1. Here it is said once.
    """

    def __init__(self, from_logits: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._from_logits = from_logits

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        preds = preds.float().sigmoid() if self._from_logits else preds.float()
        super().update(preds.flatten(), target.flatten().long())  # type: ignore[misc]  # of the metric beside it


class _BinaryAccuracy(_Binary, BinaryAccuracy):
    pass


class _BinaryPrecision(_Binary, BinaryPrecision):
    pass


class _BinaryRecall(_Binary, BinaryRecall):
    pass


class _BinaryF1(_Binary, BinaryF1Score):
    pass


class _BinaryMatthews(_Binary, BinaryMatthewsCorrCoef):
    pass


class _BinaryAUROC(_Binary, BinaryAUROC):
    pass


class _BinaryAveragePrecision(_Binary, BinaryAveragePrecision):
    pass


class _MulticlassAUROC(MulticlassAUROC):
    """Takes logits for what they are; see ``_Binary``."""

    def __init__(self, from_logits: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._from_logits = from_logits

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        super().update(preds.float().softmax(1) if self._from_logits else preds, target)


class MostFrequentPrediction(Metric):
    """The share of the class that is predicted most often: 1 where a model predicts the same for every sample.

    It is the first thing to look at where an accuracy does not move.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int, threshold: float = 0.5, ignore_index: int | None = None) -> None:
        """Start with no predictions.

        Args:
            num_classes: number of classes.
            threshold: where there is one score for a sample, those above are of class 1.
            ignore_index: samples with this target are left out.
        """
        super().__init__()
        self._threshold = threshold
        self._ignore_index = ignore_index
        self.add_state("counts", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: classes, or scores, of which those of all classes are in dimension 1."""
        if preds.ndim == target.ndim + 1:
            preds = preds.argmax(1)
        elif preds.is_floating_point():
            preds = preds > self._threshold
        labels = preds.flatten().long()
        weights = torch.ones_like(labels)
        if self._ignore_index is not None:
            weights = (target.flatten() != self._ignore_index).long()
        self.counts = self.counts.scatter_add(0, labels, weights)

    def compute(self) -> Tensor:
        """Return the share."""
        return self.counts.max() / self.counts.sum()


class _BinaryMostFrequent(_Binary, MostFrequentPrediction):
    pass


def binary_classification_metrics(threshold: float = 0.5, from_logits: bool = True) -> dict[str, Metric]:
    """Return metrics of two classes: accuracy, precision, recall, F1, Matthews' correlation, ranking.

    ``auroc`` and ``average_precision`` keep the scores of all samples of a pass.

    Args:
        threshold: samples with a probability above it are predicted to be of class 1.
        from_logits: whether the model returns logits, as ``BCEWithLogitsLoss`` takes them; if not, probabilities.

    Returns:
        Metrics that take predictions and targets of shape (N,) or (N, 1).
    """
    return {
        "accuracy": _BinaryAccuracy(from_logits, threshold=threshold),
        "precision": _BinaryPrecision(from_logits, threshold=threshold),
        "recall": _BinaryRecall(from_logits, threshold=threshold),
        "f1": _BinaryF1(from_logits, threshold=threshold),
        "matthews_correlation": _BinaryMatthews(from_logits, threshold=threshold),
        "auroc": _BinaryAUROC(from_logits),
        "average_precision": _BinaryAveragePrecision(from_logits),
        "most_frequent_prediction": _BinaryMostFrequent(from_logits, num_classes=2, threshold=threshold),
    }


def multiclass_classification_metrics(
    num_classes: int, average: str = "macro", from_logits: bool = True, ignore_index: int | None = None
) -> dict[str, Metric]:
    """Return metrics of several classes: accuracy over all samples; precision, recall, F1 and AUROC over the classes.

    ``auroc`` keeps the scores of all samples of a pass.

    Args:
        num_classes: number of classes.
        average: how precision, recall, F1 and AUROC are averaged over the classes: ``"macro"`` or ``"weighted"``.
        from_logits: whether the model returns logits, as ``CrossEntropyLoss`` takes them; if not, probabilities.
        ignore_index: samples with this target are left out.

    Returns:
        Metrics that take predictions of shape (N, classes) or (N, classes, ...) and targets of shape (N) or (N, ...).
    """
    kwargs: dict[str, Any] = {"num_classes": num_classes, "average": average, "ignore_index": ignore_index}
    return {
        "accuracy": MulticlassAccuracy(num_classes, average="micro", ignore_index=ignore_index),
        "precision": MulticlassPrecision(**kwargs),
        "recall": MulticlassRecall(**kwargs),
        "f1": MulticlassF1Score(**kwargs),
        "auroc": _MulticlassAUROC(from_logits, **kwargs),
        "most_frequent_prediction": MostFrequentPrediction(num_classes, ignore_index=ignore_index),
    }


# --------------------------------------------------------------------------------------------------------------------
# Regression
# --------------------------------------------------------------------------------------------------------------------


class _Columns:
    """Takes (N, 1) for (N,), which models with one output return."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        super().update(_without_last(preds), _without_last(target))  # type: ignore[misc]  # of the metric beside it


def _without_last(values: Tensor) -> Tensor:
    return values.squeeze(1) if values.ndim == 2 and values.shape[1] == 1 else values


class _MeanAbsoluteError(_Columns, MeanAbsoluteError):
    pass


class _MeanSquaredError(_Columns, MeanSquaredError):
    pass


class _R2(_Columns, R2Score):
    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        if num_outputs > 1:  # states of their final shape, also on a process that is given no sample
            for name in ("sum_squared_error", "sum_error", "residual"):
                self.add_state(name, torch.zeros(num_outputs), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Return the share of the variance that is explained; NaN of less than two samples."""
        if self.total < 2:  # waits for the device: a log point
            return torch.full((), torch.nan, device=self.device)
        value: Tensor = super().compute()
        return value


def regression_metrics(num_outputs: int = 1) -> dict[str, Metric]:
    """Return metrics of numbers: mean absolute and mean squared error, its root, and R2.

    Args:
        num_outputs: numbers that are predicted for a sample. The errors are over all; R2 is the mean of theirs.

    Returns:
        Metrics that take predictions and targets of shape (N,), (N, 1) or (N, num_outputs).
    """
    return {
        "mae": _MeanAbsoluteError(),
        "mse": _MeanSquaredError(),
        "rmse": _MeanSquaredError(squared=False),
        "r2": _R2(num_outputs),
    }


# --------------------------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------------------------


def _texts(preds: Any, target: Any) -> tuple[list[str], list[list[str]]]:
    """Return predictions, and the references of each.

    Raises:
        TypeError: if there is anything but strings.
        ValueError: if the numbers differ, or a sample has no reference.
    """
    is_fine = isinstance(preds, list | tuple) and isinstance(target, list | tuple)
    # Torchmetrics takes a reference that is no list for a list of letters.
    references = [[given] if isinstance(given, str) else list(given) for given in target] if is_fine else []
    strings = [*preds, *(text for row in references for text in row)] if is_fine else [None]
    if not all(isinstance(text, str) for text in strings):
        raise TypeError(
            "metrics of texts take a list of strings as predictions, and as targets a list of strings, or of lists of "
            f"strings where a sample has several references; got {_kind(preds)} and {_kind(target)}. Decode tokens in "
            "calculate_*_batch_loss, and return the texts as 'predictions' and 'targets'."
        )
    if len(preds) != len(references) or not all(references):
        raise ValueError(
            f"got {len(preds)} predictions and {len(references)} targets, {sum(not row for row in references)} of them "
            "empty: each prediction needs at least one reference."
        )
    return list(preds), references


def _kind(values: Any) -> str:
    kinds = sorted({type(value).__name__ for value in values}) if isinstance(values, list | tuple) else []
    return f"{type(values).__name__} of {', '.join(kinds)}" if kinds else type(values).__name__


class _Text:
    """Takes a list of strings, and a list of strings or of lists of strings."""

    def update(self, preds: Any, target: Any) -> None:
        """Add a batch."""
        super().update(*_texts(preds, target))  # type: ignore[misc]  # of the metric beside it


class _Bleu(_Text, SacreBLEUScore):
    full_state_update = False  # its states are sums


class _Chrf(Metric):
    """chrF++ of Popovic (2017): the F-score of n-grams of letters and words that recall counts for more in.

    Torchmetrics 1.9 leaves out of it each text that has nothing in common with its reference.
    """

    full_state_update = False
    counts: Tensor  # of n-grams in common, in the prediction, in the reference: for each order
    _num_letters, _num_words, _beta = 6, 2, 2

    def __init__(self, lowercase: bool) -> None:
        super().__init__()
        self._lowercase = lowercase
        shape = (self._num_letters + self._num_words, 3)
        self.add_state("counts", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Any, target: Any) -> None:
        """Add a batch."""
        for text, references in zip(*_texts(preds, target), strict=True):
            own = self._ngrams(text)
            found = [self._compare(own, self._ngrams(reference)) for reference in references]
            self.counts += max(found, key=self._score).to(self.device)  # the first of those that are as good

    def _ngrams(self, text: str) -> list[Counter[tuple[str, ...]]]:
        text = text.lower() if self._lowercase else text
        letters, words = "".join(text.split()), [part for word in text.split() for part in _off_punctuation(word)]
        orders = [(letters, n + 1) for n in range(self._num_letters)] + [(words, n + 1) for n in range(self._num_words)]
        return [Counter(tuple(units[i : i + n]) for i in range(len(units) - n + 1)) for units, n in orders]

    def _compare(self, own: list[Counter[tuple[str, ...]]], other: list[Counter[tuple[str, ...]]]) -> Tensor:
        rows = zip(own, other, strict=True)
        return torch.tensor([[(a & b).total(), a.total(), b.total()] for a, b in rows])

    def _score(self, counts: Tensor) -> float:
        rows: list[list[int]] = counts.tolist()  # waits for nothing in an update, and for the device at a log point
        rows = [row for row in rows if row[1] and row[2]]
        if not rows:
            return 0.0
        precision = sum(common / own for common, own, _ in rows) / len(rows)
        recall = sum(common / other for common, _, other in rows) / len(rows)
        factor = self._beta**2
        return (1 + factor) * precision * recall / (factor * precision + recall) if precision + recall else 0.0

    def compute(self) -> Tensor:
        """Return the score over all texts."""
        return torch.tensor(self._score(self.counts), device=self.device)


def _off_punctuation(word: str) -> list[str]:
    """Return a word with a mark at its end or, else, at its beginning as a word of its own."""
    if len(word) > 1 and word[-1] in string.punctuation:
        return [word[:-1], word[-1]]
    if len(word) > 1 and word[0] in string.punctuation:
        return [word[0], word[1:]]
    return [word]


class _Rouge(Metric):
    """The mean F-measure of one kind of ROUGE, kept as a sum: see ``gather_lists`` for what torchmetrics keeps."""

    full_state_update = False
    total: Tensor
    num_texts: Tensor

    def __init__(self, key: str, use_stemmer: bool) -> None:
        super().__init__()
        self._key = key
        self._use_stemmer = use_stemmer
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("num_texts", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Any, target: Any) -> None:
        """Add a batch."""
        predictions, references = _texts(preds, target)
        scores = rouge_score(predictions, references, rouge_keys=self._key, use_stemmer=self._use_stemmer)
        self.total += scores[f"{self._key}_fmeasure"].to(self.device) * len(predictions)
        self.num_texts += len(predictions)

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.num_texts


class _Answers(SQuAD):
    """One of the two values of SQuAD, between 0 and 1."""

    key: ClassVar[str]

    def update(self, preds: Any, target: Any) -> None:
        """Add a batch."""
        predictions, references = _texts(preds, target)
        answers: Any = [{"prediction_text": text, "id": str(number)} for number, text in enumerate(predictions)]
        known: list[Any] = [
            {"answers": {"answer_start": [0] * len(texts), "text": texts}, "id": str(number)}
            for number, texts in enumerate(references)
        ]
        super().update(answers, known)

    def compute(self) -> Any:
        """Return the mean."""
        value: Tensor = super().compute()[self.key] / 100
        return value


class _ExactMatch(_Answers):
    key = "exact_match"


class _AnswerF1(_Answers):
    key = "f1"


def translation_metrics(tokenize: Any = "13a", lowercase: bool = False) -> dict[str, Metric]:
    """Return BLEU and chrF++ as sacrebleu computes them, but between 0 and 1.

    Args:
        tokenize: how BLEU divides texts into words, by sacrebleu's names: ``"13a"``, ``"zh"``, ``"char"``, ``"none"``;
            ``"intl"`` needs the package regex.
        lowercase: whether in both capital letters are the same as small ones.

    Returns:
        Metrics that take a list of strings, and a list of strings or of lists of several references.

    Raises:
        ImportError: if ``tokenize`` needs a package that is not installed.
    """
    try:
        bleu = _Bleu(tokenize=tokenize, lowercase=lowercase)
    except ImportError as error:
        what = 'pip install "pytorch-accelerated[text]"'
        raise ImportError(f"tokenize={tokenize!r} needs more than is installed: {what} ({error})") from error
    return {"bleu": bleu, "chrf": _Chrf(lowercase=lowercase)}


def summarisation_metrics(use_stemmer: bool = False) -> dict[str, Metric]:
    """Return the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, between 0 and 1; the best where there are references.

    ``rougeLsum`` is not among them: torchmetrics downloads a model for it while it computes.

    Args:
        use_stemmer: whether endings of English words are cut off first, which needs the package nltk.

    Returns:
        Metrics that take a list of strings, and a list of strings or of lists of several references.

    Raises:
        ImportError: if there is no nltk, and a need for it.
    """
    if use_stemmer and importlib.util.find_spec("nltk") is None:
        raise ImportError('use_stemmer=True needs nltk: pip install "pytorch-accelerated[text]"')
    return {key: _Rouge(key, use_stemmer) for key in ("rouge1", "rouge2", "rougeL")}


def question_answering_metrics() -> dict[str, Metric]:
    """Return the share of exact answers and the mean F1 of their words, as SQuAD defines them, between 0 and 1.

    Capital letters, articles and punctuation do not count; of several right answers the best fit does.

    Returns:
        Metrics that take a list of strings, and a list of strings or of lists of several right answers.
    """
    return {"exact_match": _ExactMatch(), "answer_f1": _AnswerF1()}

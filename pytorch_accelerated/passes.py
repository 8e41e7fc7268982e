"""One pass over data: from batches to losses, and from these to the results of the pass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Mapping, Set
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import find_batch_size, recursively_apply, send_to_device
from torch import Tensor, nn

from pytorch_accelerated import distributed
from pytorch_accelerated.data import ShardedDataLoader, describe
from pytorch_accelerated.errors import BatchError
from pytorch_accelerated.tracking import AccumulationWindow, LossSum, Number, without_empty

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

_DEFAULT_IGNORE_INDEX = -100  # torch's

BatchOutput = dict[str, Any]
"""Holds ``loss`` and ``batch_size``, and whatever else a hook wants to pass on."""


def calculate_batch_loss(
    model: nn.Module, loss_func: Callable[..., Tensor] | None, batch: Any, data_pass: DataPass | None
) -> BatchOutput:
    """Return loss, model outputs and number of samples of a batch, in the usual ways.

    Args:
        model: called with the inputs of the batch, or with all of it where there is no loss function.
        loss_func: called with the model's output and the targets; None for the model's own loss.
        batch: the batch.
        data_pass: the pass that the batch is of, which knows how many samples it has; None to count its rows.

    Raises:
        BatchError: if there is no telling inputs from targets, or there is neither a loss function nor a loss of the
            model.
    """
    num_samples = data_pass.loader.num_samples if data_pass is not None else find_batch_size(batch)
    if loss_func is None:
        outputs = _call_with_whole_batch(model, batch)
        loss = _get(outputs, "loss")
        if loss is None:
            raise BatchError(
                f"the trainer has no loss_func, and the model's output has no loss of its own: {describe(outputs)}. "
                "Pass loss_func, return 'loss' from the model, or override calculate_train_batch_loss and "
                "calculate_eval_batch_loss."
            )
        if data_pass is not None and data_pass.step == 0 and _has_ignored_labels(batch):
            warnings.warn(
                "some labels are -100, which losses of models usually ignore. Batches must then be weighed by the "
                "number of the others: override calculate_train_batch_loss and calculate_eval_batch_loss, and return "
                "it as 'num_items_in_batch'.",
                stacklevel=2,
            )
        return {"loss": loss, "model_outputs": outputs, "batch_size": num_samples}
    inputs, targets = split_batch(batch)
    if targets is None:
        raise BatchError(
            f"the default hooks take a batch (inputs, targets), or a dict with 'labels', but got: {describe(batch)}. "
            "Override calculate_train_batch_loss and calculate_eval_batch_loss to say what goes where."
        )
    # A look at a list or tuple is ten times faster than one at a mapping.
    outputs = model(inputs) if isinstance(batch, list | tuple) or not isinstance(batch, Mapping) else model(**inputs)
    output = {"loss": loss_func(outputs, targets), "model_outputs": outputs, "batch_size": num_samples}
    num_items = _count_items(loss_func, targets)
    return output if num_items is None else {**output, "num_items_in_batch": num_items}


def _call_with_whole_batch(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    try:
        return model(*batch) if isinstance(batch, list | tuple) else model(batch)
    except TypeError as error:
        error.add_note("pytorch_accelerated: the trainer has no loss_func, so the whole batch went to the model.")
        raise


def _get(outputs: Any, name: str) -> Any:
    """Return an entry of a mapping or an attribute of an object, as models of Hugging Face return both; else None."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _has_ignored_labels(batch: Any) -> bool:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    # Waits for the device, once in each pass.
    return (
        isinstance(labels, Tensor) and not labels.is_floating_point() and bool((labels == _DEFAULT_IGNORE_INDEX).any())
    )


def _count_items(loss_func: Callable[..., Tensor], targets: Any) -> Tensor | None:
    """Return what torch's mean cross entropy divides by where that is not the number of samples, else None.

    It is the sum of the class weights of the targets that are not ignored: https://docs.pytorch.org/docs/stable/
    generated/torch.nn.CrossEntropyLoss.html. Targets in one dimension are counted only if ``weight`` or
    ``ignore_index`` was given, because counting costs a reduction over the processes.
    """
    if (
        not isinstance(loss_func, nn.CrossEntropyLoss | nn.NLLLoss)
        or loss_func.reduction != "mean"
        or not isinstance(targets, Tensor)
        or targets.is_floating_point()  # probabilities of classes, of which the mean is over samples
        or (loss_func.weight is None and targets.ndim < 2 and loss_func.ignore_index == _DEFAULT_IGNORE_INDEX)
    ):
        return None
    counts = targets != loss_func.ignore_index
    if loss_func.weight is None:
        return counts.sum()
    return (loss_func.weight[torch.where(counts, targets, 0)] * counts).sum()


def as_predictions(outputs: Any) -> Any:
    """Return the outputs of a model that makes its own loss without that loss, which is none of any sample's."""
    if is_dataclass(outputs) and not isinstance(outputs, Mapping | type):
        outputs = dict(vars(outputs))
    return {key: value for key, value in outputs.items() if key != "loss"} if isinstance(outputs, Mapping) else outputs


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Return inputs and targets of a batch; None for the targets where there is no telling."""
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping) and "labels" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    return batch, None


def as_metric(metrics: Any) -> Metric | MetricCollection | None:
    """Return a torchmetrics object, or several by name, as one object; None for None.

    Raises:
        TypeError: if it is something else.
    """
    if metrics is None:
        return None
    from torchmetrics import Metric, MetricCollection

    if isinstance(metrics, Metric | MetricCollection):
        return metrics
    if isinstance(metrics, Mapping | list | tuple):
        from pytorch_accelerated.metrics import collect_metrics

        return collect_metrics(metrics)
    raise TypeError(
        f"metrics must be a torchmetrics Metric, a MetricCollection or a dict of metrics, got {type(metrics).__name__}."
    )


def predictions_and_targets(batch: Any, batch_output: BatchOutput) -> tuple[Any, Any]:
    """Return what a model predicted for a batch, detached, and what was to be predicted, in the usual ways.

    Args:
        batch: the batch.
        batch_output: what a ``calculate_*`` hook returned; its ``"predictions"`` and ``"targets"`` come first, then its
            ``"model_outputs"`` and the targets of the batch.

    Raises:
        BatchError: if there are no predictions or no targets.
    """
    predictions = batch_output.get("predictions")
    if predictions is None:
        predictions = batch_output.get("model_outputs")
        if not isinstance(predictions, Tensor | list | tuple | None):
            predictions = _get(predictions, "logits")
    targets = batch_output["targets"] if "targets" in batch_output else split_batch(batch)[1]
    if predictions is None or targets is None:
        raise BatchError(
            "metrics need predictions and targets. Return them from calculate_*_batch_loss as 'model_outputs' (or "
            f"'predictions') and 'targets', or override update_metrics. Got the entries {sorted(batch_output)} and "
            f"the batch {describe(batch)}."
        )
    # Who keeps what it is given would keep the graph as well.
    return recursively_apply(lambda tensor: tensor.detach(), predictions), targets


def update_metrics(metrics: Metric | MetricCollection, batch: Any, batch_output: BatchOutput) -> None:
    """Add a batch to metrics, in the usual ways: see ``predictions_and_targets``.

    Args:
        metrics: what to update.
        batch: the batch.
        batch_output: what a ``calculate_*`` hook returned.

    Raises:
        BatchError: if there are no predictions or no targets.
    """
    metrics.update(*predictions_and_targets(batch, batch_output))


def _pack_metrics(metrics: Metric | MetricCollection) -> dict[str, Any]:
    """Return the states of a metric and of those inside it, by name."""
    from torchmetrics import Metric, MetricCollection

    from pytorch_accelerated.metrics import Windowed

    for module in metrics.modules():
        if isinstance(module, MetricCollection):
            module.items(copy_state=True)  # some members share the states of another, which fills theirs
    return {
        name: {"states": part.metric_state, "num_updates": part.update_count}
        | ({"window": part.pack()} if isinstance(part, Windowed) else {})
        for name, part in metrics.named_modules()
        if isinstance(part, Metric)
    }


def _add_packed_metrics(metrics: Metric | MetricCollection, packed: dict[str, Any]) -> None:
    """Add to metrics the states that ``_pack_metrics`` returned on another process, or before an interruption."""
    from torchmetrics import Metric

    from pytorch_accelerated.metrics import Windowed

    for name, part in metrics.named_modules():
        if not isinstance(part, Metric) or name not in packed:
            continue
        if isinstance(part, Windowed):
            part.add_packed(packed[name].get("window", []))
        states, num_updates = packed[name]["states"], packed[name]["num_updates"]
        states = send_to_device(states, part.device)
        if part.update_count > 0 and num_updates > 0:
            part._update_count += num_updates  # torchmetrics 1.9 has no setter
            part.merge_state(states)
        elif num_updates > 0:
            for attribute, value in states.items():
                setattr(part, attribute, value)
            part._update_count = num_updates
        part._computed = None


def _is_same_device(one: torch.device, other: torch.device) -> bool:
    # Accelerate's device has no number where there is one process, and the CPU has one where there are several.
    return one.type == other.type and (
        one.type == "cpu" or None in (one.index, other.index) or one.index == other.index
    )


def _is_number(num_items: Any) -> bool:
    if isinstance(num_items, Tensor):
        return num_items.ndim == 0
    return isinstance(num_items, int | float) and num_items >= 0


_NO_BATCH = object()

# Entries of an output that mean something already, so that they are not averaged.
_NO_SCALARS = frozenset({"loss", "batch_size", "num_items_in_batch", "model_outputs", "predictions", "targets"})


class DataPass:
    """A pass over data in progress: its loader, the sum of its losses, its metrics."""

    def __init__(
        self,
        kind: str,
        loader: ShardedDataLoader,
        accelerator: Accelerator,
        metrics: Metric | MetricCollection | None,
        window: AccumulationWindow | None,
    ) -> None:
        """Begin with no batch seen.

        Args:
            kind: what the pass is for, as messages say it: training, evaluating or predicting.
            loader: where the batches come from.
            accelerator: the processes and the device.
            metrics: of which the pass has a copy of its own; None for none.
            window: weighs the losses of a training pass; None for a pass without gradients.
        """
        self.kind = kind
        self.loader = loader
        self.step = -1
        self._batch: Any = _NO_BATCH
        self._is_iterating = False
        self.metrics = metrics if metrics is None else metrics.clone().to(accelerator.device)
        self._windowed: Any = None
        if self.metrics is not None:
            from pytorch_accelerated.metrics import windows_of

            self.metrics.reset()
            self._windowed = windows_of(self.metrics)
        self._accelerator = accelerator
        self._device: torch.device = accelerator.device
        self._is_on_host = self._device.type == "cpu"
        self._loss: float | Tensor = 0.0
        self._is_one_batch = window is not None and window.is_one_batch
        self._window = window
        self._num_items: Number = 0
        self._total_items: int | None = None
        self._loss_sum = LossSum(accelerator.device)
        self._scalar_sums: dict[str, LossSum] = {}
        self._known_entries: Set[str] = frozenset()  # of the outputs in which scalars have been looked for
        self._counts_items: bool | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what the pass has summed up on this process: losses, and states of metrics."""
        metrics = None if self.metrics is None else _pack_metrics(self.metrics)
        return {
            "loss": self._loss_sum.state_dict(),
            "scalars": {name: sums.state_dict() for name, sums in self._scalar_sums.items()},
            "counts_items": self._counts_items,
            "metrics": metrics,
        }

    def go_on(self, num_steps: int, state_dicts: list[dict[str, Any]]) -> None:
        """Go on where another process stopped; the loader is told apart.

        Args:
            num_steps: steps of the epoch that were made, in batches of this pass.
            state_dicts: what ``state_dict`` returned on the processes whose sums are to be this one's: usually one,
                fewer or more where the number of processes has changed.
        """
        self.step = num_steps - 1
        for window in self._windows:
            window.begin_step(self.step)
        for state_dict in state_dicts:
            self._loss_sum.add_state_dict(state_dict["loss"])
            for name, sums in state_dict.get("scalars", {}).items():  # which older checkpoints have not
                self._sum_of(name).add_state_dict(sums)
            self._counts_items = state_dict["counts_items"]
            if self.metrics is not None and state_dict["metrics"] is not None:
                _add_packed_metrics(self.metrics, state_dict["metrics"])

    def iterate(self, epoch: int) -> Generator[Any, None, None]:
        """Yield the batches of an epoch that are left, and keep track of where the pass is."""
        self._is_iterating = True
        windows = self._windows
        if self._window is not None:
            num_steps = self.loader.num_steps
            self._window.begin_epoch(None if num_steps is None else num_steps - self.step - 1)
        for batch in self.loader.iterate(epoch):
            self.step += 1
            for window in windows:
                window.begin_step(self.step)
            self._batch = batch
            yield batch
            self._batch = _NO_BATCH
        self._is_iterating = False

    def describe_position(self) -> str:
        """Return in words where the pass is, and the structure of the batch in use."""
        of_all = f" of {self.num_steps}" if self.num_steps is not None else ""
        if self._batch is not _NO_BATCH:
            return f"batch {self.step + 1}{of_all}: {describe(self._batch)}"
        if self._is_iterating:
            return f"fetching batch {self.step + 2}{of_all}"
        return f"at the {'beginning' if self.step < 0 else 'end'} of the pass"

    @property
    def num_steps(self) -> int | None:
        """Return the steps of the pass; None where its length is not known."""
        return self.loader.num_steps

    @property
    def num_samples_in_step(self) -> int:
        """Return the samples of the current step, over all processes."""
        return self.loader.round_samples

    @property
    def loss_in_step(self) -> float | Tensor:
        """Return the loss of the current step on this process; zero where it is the mean of no items.

        A number on the CPU, where it has been read; on other devices a scalar tensor, detached.
        """
        loss = self._loss
        if isinstance(loss, Tensor):
            return without_empty(loss, self._num_items)
        return loss if self._num_items else 0.0

    def leave_out_non_finite_losses(self) -> None:
        """Let the mean loss of the pass be that of the batches whose loss is finite."""
        for sums in (self._loss_sum, *self._scalar_sums.values()):
            sums.skips_non_finite = True

    def own_loss_sums(self) -> tuple[float, float]:
        """Return the sum of the losses so far on this process, and of the items they are of. Waits for the device."""
        loss, num_items = self._loss_sum.sums().tolist()  # waits for the device: the caller wants to show it
        return loss, num_items

    def mean_loss_so_far(self) -> float | None:
        """Return the mean loss on this process; None before the first batch. Waits for the device."""
        return self._loss_sum.local_mean()

    def account(self, output: BatchOutput | Tensor) -> BatchOutput:
        """Add what a ``calculate_*`` hook returned to the loss of the pass, and return it with loss and batch size.

        Raises:
            BatchError: if it cannot be used.
        """
        loader = self.loader
        batch_output = output if isinstance(output, dict) else {"loss": output}
        loss, num_items = batch_output.get("loss"), batch_output.get("num_items_in_batch")
        size = batch_output.get("batch_size")
        if (
            not isinstance(loss, Tensor)
            or loss.ndim != 0
            or not (loss.requires_grad or self._window is None)
            or not (loss.device == self._device or _is_same_device(loss.device, self._device))
            or not (num_items is None or _is_number(num_items))
            or not (size is None or size == loader.num_samples or not loader.knows_sizes or not loader.has_samples)
        ):
            hook = f"calculate_{'eval' if self._window is None else 'train'}_batch_loss"
            raise BatchError(f"{hook} {self._find_problem(output, loss, num_items, size)}.")
        if size is None:  # what the hook returned is never changed
            batch_output = {**batch_output, "batch_size": loader.num_samples}
        counts_items = num_items is not None
        if self._counts_items is not counts_items:
            if self._counts_items is not None:
                raise BatchError(
                    "some batches came with 'num_items_in_batch' and some without: one loss would be weighed by items "
                    "and the other by samples. Return it for every batch or for none."
                )
            self._counts_items = counts_items
        # On the CPU reading waits for nothing, and costs less than any operation on tensors.
        self._loss = value = loss.item() if self._is_on_host else loss.detach()
        if loader.has_samples:
            self._num_items = num_items if num_items is not None else batch_output["batch_size"]
            self._loss_sum.update(value, self._num_items)
            if batch_output.keys() != self._known_entries:
                self._find_scalars(batch_output)
            if self._scalar_sums:
                for name in self._scalar_sums.keys() & self._known_entries:
                    sums = self._scalar_sums[name]
                    sums.update(self._as_scalar(batch_output[name]), self._num_items)
        else:
            self._num_items = 0
        self._total_items = None if counts_items or not loader.knows_sizes else loader.round_samples
        return batch_output

    def weigh(self, loss: Tensor) -> Tensor:
        """Return the loss of the batch just accounted for, weighed for its window; ``loss`` stays as it is."""
        if self._is_one_batch:
            return without_empty(loss, self._num_items)
        assert self._window is not None, "only the losses of a training pass are weighed"
        weight = self._window.weight(self._num_items, self._total_items)
        if isinstance(weight, Tensor):
            weight = weight.to(loss.dtype)
        elif weight == 1:
            return loss
        return without_empty(loss, self._num_items) * weight

    def _find_scalars(self, batch_output: BatchOutput) -> None:
        """Note which other entries of an output are scalars, whose means are wanted."""
        self._known_entries = frozenset(batch_output)
        metrics: Any = getattr(self.metrics, "keys", tuple)()  # a single metric has none
        for name, value in batch_output.items():
            is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool | np.complexfloating)
            is_scalar = value.ndim == 0 and not value.is_complex() if isinstance(value, Tensor) else is_number
            if is_scalar and name not in _NO_SCALARS and name not in metrics:
                self._sum_of(name)

    def _sum_of(self, name: str) -> LossSum:
        if name not in self._scalar_sums:
            self._scalar_sums[name] = sums = LossSum(self._device)
            sums.skips_non_finite = self._loss_sum.skips_non_finite
        return self._scalar_sums[name]

    def _as_scalar(self, value: Any) -> float | Tensor:
        if isinstance(value, Tensor):
            return value
        if self._is_on_host:
            return float(value)
        # Filled there, for which nothing is waited.
        return torch.full((), float(value), dtype=torch.float32, device=self._device)

    def sums_so_far(self) -> dict[str, tuple[float, float]]:
        """Return the sums of loss and other scalars so far, each with the items it is of, over all processes.

        Collective; waits for the device. The loss goes by ``"loss"``, the others by their names in the outputs.
        """
        own: dict[str, LossSum] = {"loss": self._loss_sum, **self._scalar_sums}
        names = dict.fromkeys(name for row in distributed.gather_rows(self._accelerator, list(own)) for name in row)
        empty = LossSum(self._device)
        stacked = torch.stack([own.get(name, empty).sums() for name in names])
        rows = distributed.reduce_sum(self._accelerator, stacked).tolist()  # waits for the device: a log point
        return {name: (total, num_items) for name, (total, num_items) in zip(names, rows, strict=True)}

    def _find_problem(self, output: Any, loss: Any, num_items: Any, size: Any) -> str:
        """Return in words what is wrong with the output of a hook that cannot be used."""
        if not isinstance(loss, Tensor):
            return f"returned {describe(output)}; expected a dict with a tensor under 'loss', or the loss tensor"
        if loss.ndim != 0:
            return f"returned a loss of shape {tuple(loss.shape)}; expected a scalar: reduce it, as with loss.mean()"
        if not _is_same_device(loss.device, self._device):
            return f"returned a loss on {loss.device}, but the run is on {self._device}"
        if self._window is not None and not loss.requires_grad:
            return (
                "returned a loss that depends on no trainable parameter: it was detached (.item(), .detach(), "
                "no_grad, numpy), or every parameter is frozen"
            )
        if num_items is not None and not _is_number(num_items):
            return f"returned num_items_in_batch {describe(num_items)}; expected a number >= 0, or a scalar tensor"
        return (
            f"returned batch_size {size}, but the loader made a batch of {self.loader.num_samples} samples. Leave "
            "batch_size out; if the loss is a mean over something else than samples, say over how many with "
            "'num_items_in_batch'"
        )

    def results(self, loss_name: str, prefix: str) -> dict[str, Any]:
        """Return loss and metrics over all processes by name. Collective; waits for the device."""
        self._batch, self._is_iterating = _NO_BATCH, False
        means = {name: total / items if items else math.nan for name, (total, items) in self.sums_so_far().items()}
        results: dict[str, Any] = {loss_name: means.pop("loss")}
        suffix = "_epoch" if loss_name.endswith("_epoch") else ""
        results |= {f"{prefix}_{name}{suffix}": mean for name, mean in means.items()}
        if self.metrics is not None:
            results |= {f"{prefix}_{name}": value for name, value in self._compute(self.metrics).items()}
        return results

    @property
    def has_windowed_metrics(self) -> bool:
        """Return whether ``windowed_results`` has anything to return."""
        return self._windowed is not None

    def windowed_results(self) -> dict[str, Any]:
        """Return the metrics of the last steps by their names, over all processes. Collective; waits for the device."""
        return {} if self._windowed is None else self._compute(self._windowed)

    @property
    def _windows(self) -> list[Any]:
        if self._windowed is None:
            return []
        return list(getattr(self._windowed, "values", lambda: [self._windowed])())

    def _compute(self, metrics: Metric | MetricCollection) -> dict[str, Any]:
        for window in self._windows:
            window.join()
        if self._accelerator.num_processes > 1:
            from pytorch_accelerated.metrics import gather_lists

            gather_lists(metrics)
            distributed.fill_empty_states(metrics)
        computed = metrics.compute()
        named = computed if isinstance(computed, dict) else {type(metrics).__name__: computed}
        # Some metrics compute tuples of tensors. Waits for the device: a log point.
        return {name: recursively_apply(lambda tensor: tensor.tolist(), value) for name, value in named.items()}

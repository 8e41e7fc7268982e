"""The page of a run, and what it shows of predictions, written while the run goes on."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor, nn

from pytorch_accelerated import distributed, randomness
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.data import describe
from pytorch_accelerated.errors import BatchError, did_you_mean
from pytorch_accelerated.metrics_log import write_whole
from pytorch_accelerated.passes import predictions_and_targets, split_batch
from pytorch_accelerated.run_directory import REPORT_DATA

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

MAX_CLASSES = 1024
"""Up to how many classes there is a confusion matrix."""

MAX_PAIRS = 2000
"""How many pairs of a true and a predicted value are kept of an evaluation."""

_MAX_ATTENTION = 256  # queries and keys; longer sequences are averaged
_MAX_OUTPUTS = 32  # of more, as of images, the residuals are taken together
_MAX_SHOWN = 8  # outputs of a sample
_TASKS = ("classification", "regression", "none")


class ReportCallback(TrainerCallback):
    """Write the page of the run, ``report.html`` in its directory, and collect what it shows of predictions.

    During each evaluation of a training run it collects, for each evaluation set, what the newest page shows: of a
    classification the confusion matrix and the samples of the greatest loss; of a regression figures of the residuals,
    and pairs of true and predicted values. What it keeps does not grow with the data, stays on the device, and is
    fetched when the evaluation ends. The main process writes the page when the training run ends, also by a failure.

    Classification are integer targets with one more dimension in the predictions, the logits of the classes; -100 and
    other targets that are no class are left out. Regression are floating point targets. Everything else is refused,
    unless ``task="none"``, for a page without predictions.
    """

    order = 10  # after all others, so that the page has what they wrote when the run ended

    def __init__(
        self,
        class_names: Sequence[str] | None = None,
        num_samples: int = 16,
        to_image: Callable[[Any], Any] | None = None,
        task: str | None = None,
        every_n_epochs: int | None = None,
        attention_layer: str | None = None,
        best: Mapping[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        """Take what the page is to show.

        Args:
            class_names: a name for each class.
            num_samples: how many of the samples with the greatest loss are kept of each evaluation set; 0 for none.
            to_image: makes an image, as an array or a tensor of shape (H, W), (H, W, C) or (C, H, W), of the inputs of
                one sample, on the CPU; called on the main process. None shows inputs of shape (C, H, W) with one or
                three channels as they are. Inputs whose size differs between batches are filled up with zeros.
            task: ``"classification"``, ``"regression"`` or ``"none"``; None goes by the targets. Logits of one number
                are taken for two classes where it says so.
            every_n_epochs: how often the page is written within the run; None for its end alone.
            attention_layer: the name of a module in the model whose attention is shown, such as ``"blocks.0.attn"``: an
                ``nn.MultiheadAttention``, or one that returns weights of shape (B, H, T, T) or (B, T, T), alone or
                second. The first batch of each evaluation goes through the model once more for it.
            best: ``"min"`` or ``"max"`` by the name of a metric, to mark its best value on the page.
            name: tells several of these callbacks apart, and begins the names of their files.

        Raises:
            ValueError: if a number is too small, or there is no such task or direction.
        """
        if num_samples < 0:
            raise ValueError(f"num_samples must be at least 0, got {num_samples}.")
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, or None, got {every_n_epochs}.")
        if task is not None and task not in _TASKS:
            raise ValueError(f"task must be one of {_TASKS}, or None, got {task!r}.{did_you_mean(task, _TASKS)}")
        for metric, direction in (best or {}).items():
            if direction not in ("min", "max"):
                raise ValueError(f"the best value of {metric!r} must be 'min' or 'max', got {direction!r}.")
        self.class_names = None if class_names is None else [str(one) for one in class_names]
        self.num_samples = num_samples
        self.to_image = to_image
        self.task = task
        self.every_n_epochs = every_n_epochs
        self.attention_layer = attention_layer
        self.best = dict(best or {})
        self.name = name
        self._collected: _Collector | None = None
        self._attention: Tensor | None = None
        self._is_looking = False

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check that the page can be written, and that the layer is there.

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: if the trainer has no run directory, or the model no such layer.
        """
        from pytorch_accelerated.report import check_matplotlib  # here and below: a report is not for every run

        check_matplotlib()
        if trainer.run_dir is None:
            raise ValueError("ReportCallback needs a run directory to write to: Trainer(..., run_dir='runs/name').")
        self._collected, self._attention = None, None
        if self.attention_layer is not None:
            _find_layer(trainer, self.attention_layer)

    def on_train_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Write the page of the epochs that are over."""
        done = trainer.current_epoch - 1
        if self.every_n_epochs is not None and done > 0 and done % self.every_n_epochs == 0:
            self._write_page(trainer)

    def on_eval_epoch_begin(self, trainer: Trainer, eval_name: str | None = None, **kwargs: Any) -> None:
        """Begin to collect."""
        self._collected, self._attention = None, None
        self._is_looking = trainer.is_training_run

    def on_eval_step_end(self, trainer: Trainer, batch: Any, batch_output: dict[str, Any], **kwargs: Any) -> None:
        """Take what is wanted of a batch, without waiting for the device."""
        if not self._is_looking:
            return
        if self.attention_layer is not None and trainer.data_pass is not None and trainer.data_pass.step == 0:
            self._attention = _look_at_attention(trainer, self.attention_layer, batch)
        if self.task == "none" or not trainer.has_samples:
            return
        try:
            predictions, targets = predictions_and_targets(batch, batch_output)
        except BatchError as error:
            error.add_note('ReportCallback needs them as well; ReportCallback(task="none") does not.')
            raise
        if self._collected is None:
            self._collected = _choose_collector(self.task, predictions, targets, self.num_samples)
            self._check_class_names(self._collected)
        self._collected.add(predictions, targets, split_batch(batch)[0])

    def on_eval_epoch_end(self, trainer: Trainer, eval_name: str | None = None, **kwargs: Any) -> None:
        """Join what the processes have collected, and write it into the run directory. Waits for the device."""
        if not self._is_looking:
            return
        self._is_looking = False
        facts: dict[str, Any] = {"format": 1, "eval_name": eval_name, **_counters(trainer)}
        stem = "-".join(quote(part, safe="") for part in (self.name, "eval", eval_name) if part is not None)
        collected, self._collected = self._collected, None
        if self.task != "none":
            # A process that had no samples at all must take part.
            kinds = distributed.gather_rows(trainer.accelerator, None if collected is None else collected.describe())
            found = next((kind for kind in kinds if kind is not None), None)
            if found is not None:
                own = collected if collected is not None else _Collector.like(found, trainer.device)
                arrays, more = own.join(trainer)
                if trainer.accelerator.is_main_process:
                    self._add_images(arrays, more)
                    _write(trainer, f"{stem}.npz", {**facts, **more, "class_names": self.class_names}, arrays)
        attention, self._attention = self._attention, None
        if attention is not None and trainer.accelerator.is_main_process:
            weights = attention.float().cpu()  # waits for the device: the evaluation is over
            shape = list(weights.shape)
            if max(shape[1:]) > _MAX_ATTENTION:
                small = (min(shape[1], _MAX_ATTENTION), min(shape[2], _MAX_ATTENTION))
                weights = nn.functional.adaptive_avg_pool2d(weights, small)
            facts |= {"task": "attention", "layer": self.attention_layer, "shape": shape}
            _write(trainer, f"{stem}-attention.npz", facts, {"attention": weights.numpy()})

    def on_train_run_end(self, trainer: Trainer, exception: BaseException | None = None, **kwargs: Any) -> None:
        """Write the page. Where the run failed, a failure of the page becomes a note of the run's exception."""
        self._collected = self._attention = None
        self._is_looking = False
        self._write_page(trainer)

    def _check_class_names(self, collected: _Collector) -> None:
        if self.class_names is None or not isinstance(collected, _Classification):
            return
        if len(self.class_names) != collected.num_classes:
            raise ValueError(
                f"ReportCallback was given {len(self.class_names)} class_names, but the model's predictions are of "
                f"{collected.num_classes} classes."
            )

    def _write_page(self, trainer: Trainer) -> None:
        run_dir = trainer.run_dir
        if run_dir is None or not trainer.accelerator.is_main_process:
            return
        known = trainer.run_history.get_metric_names()
        from pytorch_accelerated.report import write_report

        try:
            page = write_report([run_dir], best={name: kind for name, kind in self.best.items() if name in known})
        except OSError as error:  # such as a full disk: all is in the log, so the page can be made later
            trainer.print(
                f"The report could not be written ({type(error).__name__}: {error}). Nothing else is missing; to write "
                f"it later: python -m pytorch_accelerated.report {run_dir}"
            )
        else:
            trainer.print(f"Report: {page}")

    def _add_images(self, arrays: dict[str, Any], facts: dict[str, Any]) -> None:
        """Put the images of the samples that were kept in the place of their inputs."""
        inputs = arrays.pop("sample_input", None)
        if inputs is None:
            return
        if self.to_image is None and not _is_image(inputs):
            return
        is_stretched = False
        for number in range(len(arrays["sample_loss"])):
            sample = _rows_of(inputs, number)
            made = sample if self.to_image is None else self.to_image(sample)
            arrays[f"image_{number}"], stretched = _as_pixels(made)
            is_stretched |= stretched
        if is_stretched:
            facts["image_note"] = "Where values lie outside of 0 to 1, the brightness is stretched over their range."


def _counters(trainer: Trainer) -> dict[str, int]:
    return {
        "num_samples": trainer.num_samples,
        "num_updates": trainer.num_updates,
        "current_epoch": trainer.current_epoch,
    }


def _write(trainer: Trainer, name: str, facts: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    run_dir = trainer.run_dir
    assert run_dir is not None, "it was there when the run began"
    file = io.BytesIO()
    np.savez_compressed(file, facts=np.array(json.dumps(facts)), **arrays)
    (run_dir / REPORT_DATA).mkdir(exist_ok=True)
    write_whole(run_dir / REPORT_DATA / name, file.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# What is collected
# ---------------------------------------------------------------------------------------------------------------------


class _Collector:
    """Collects from the batches of one process; what it keeps has a fixed size."""

    def __init__(self, num_outputs: int, num_kept: int, device: torch.device) -> None:
        self.num_outputs, self.num_kept = num_outputs, num_kept
        self.device = device
        self.kept: dict[str, Any] = {}  # of the samples with the greatest loss

    @staticmethod
    def like(description: Mapping[str, Any], device: torch.device) -> _Collector:
        """Return a collector without samples that can be joined with another of that description."""
        made = _COLLECTORS[description["task"]](description["num_outputs"], description["num_kept"], device)
        made.kept = {name: _empty(form, device) for name, form in description["kept"].items()}
        return made

    def describe(self) -> dict[str, Any]:
        task = next(task for task, kind in _COLLECTORS.items() if type(self) is kind)
        kept = {name: _form_of(value) for name, value in self.kept.items()}
        return {"task": task, "num_outputs": self.num_outputs, "num_kept": self.num_kept, "kept": kept}

    def add(self, predictions: Any, targets: Any, inputs: Any) -> None:
        raise NotImplementedError

    def join(self, trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return arrays and facts of all processes. Collective; waits for the device."""
        raise NotImplementedError

    def _keep(self, rows: dict[str, Any]) -> None:
        """Keep the rows of the greatest ``sample_loss`` of those kept and new; NaN is greater than all."""
        if self.num_kept == 0:
            return
        both = {name: _joined(self.kept.get(name), value) for name, value in rows.items()}
        rank = torch.nan_to_num(both["sample_loss"], nan=torch.inf)
        chosen = rank.topk(min(self.num_kept, len(rank))).indices
        self.kept = {name: _rows_of(value, chosen) for name, value in both.items()}

    def _join_kept(self, trainer: Trainer) -> dict[str, Any]:
        # Not trainer.gather, which leaves out a process that had nothing in the last round alone.
        gathered = {name: distributed.gather(trainer.accelerator, self.kept[name], 0) for name in sorted(self.kept)}
        self.kept = {}
        if gathered:
            self._keep(gathered)
        return {name: distributed.to_host(value) for name, value in self.kept.items()}


class _Classification(_Collector):
    def __init__(self, num_outputs: int, num_kept: int, device: torch.device) -> None:
        super().__init__(num_outputs, num_kept, device)
        self.num_classes = max(num_outputs, 2)  # one logit tells two classes apart
        is_small = self.num_classes <= MAX_CLASSES
        size = self.num_classes**2 if is_small else 1
        self.counts = torch.zeros(size, dtype=torch.int64, device=device)
        self.is_small = is_small

    def add(self, predictions: Any, targets: Any, inputs: Any) -> None:
        logits, true = _class_last(predictions, targets)
        if logits.shape[-1] == 1:  # the log-odds of the second class
            logits = torch.cat([torch.zeros_like(logits), logits], dim=-1)
        true = true.long()
        is_counted = (true >= 0) & (true < self.num_classes)
        known = torch.where(is_counted, true, 0)
        guesses = logits.argmax(dim=-1)
        cells = known * self.num_classes + guesses if self.is_small else torch.zeros_like(known)
        self.counts.index_add_(0, cells.flatten(), is_counted.flatten().long())
        if self.num_kept == 0:
            return
        losses = -logits.float().log_softmax(dim=-1)
        loss = torch.where(is_counted, losses.gather(-1, known.unsqueeze(-1)).squeeze(-1), 0.0)
        size = len(true)
        loss = loss.reshape(size, -1)
        num_counted = is_counted.reshape(size, -1).sum(dim=1)
        rows = {"sample_loss": loss.sum(dim=1) / num_counted.clamp(min=1)}
        # What a sample of many items, as of pixels, is shown with is its worst one.
        worst = loss.argmax(dim=1, keepdim=True)
        rows["sample_true"] = true.reshape(size, -1).gather(1, worst).squeeze(1)
        rows["sample_predicted"] = guesses.reshape(size, -1).gather(1, worst).squeeze(1)
        certainty = (-losses.amin(dim=-1)).exp().reshape(size, -1)
        rows["sample_probability"] = certainty.gather(1, worst).squeeze(1)
        self._keep(rows | _kept_inputs(inputs, size))

    def join(self, trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any]]:
        summed = distributed.reduce_sum(trainer.accelerator, self.counts)
        counts = summed.cpu().numpy()  # waits for the device: the evaluation is over
        facts = {"task": "classification", "num_items": int(counts.sum()), "num_classes": self.num_classes}
        arrays = _as_arrays(self._join_kept(trainer))
        if self.is_small:
            arrays["confusion"] = counts.reshape(self.num_classes, self.num_classes)
        else:
            facts["left_out"] = f"Left out: there are {self.num_classes} classes, more than {MAX_CLASSES}."
        return arrays, facts


class _Regression(_Collector):
    def __init__(self, num_outputs: int, num_kept: int, device: torch.device) -> None:
        super().__init__(num_outputs, num_kept, device)
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which MPS does not have
        self.sums = torch.zeros(6, num_outputs, dtype=dtype, device=device)
        self.pairs = torch.zeros(0, 2, num_outputs, device=device)
        self._stride = 1  # of how many rows one is kept as a pair
        self._num_rows = 0

    def add(self, predictions: Any, targets: Any, inputs: Any) -> None:
        predicted, true = predictions.reshape(len(targets), -1), targets.reshape(len(targets), -1)
        loss = (predicted - true).float().pow(2).mean(dim=1)
        rows = {
            "sample_loss": loss,
            "sample_true": true[:, :_MAX_SHOWN].float(),
            "sample_predicted": predicted[:, :_MAX_SHOWN].float(),
        }
        self._keep(rows | _kept_inputs(inputs, len(loss)))
        predicted, true = predicted.reshape(-1, self.num_outputs), true.reshape(-1, self.num_outputs)
        exact = true.to(self.sums.dtype)
        residual = predicted.to(self.sums.dtype) - exact
        parts = (torch.ones_like(exact), residual, residual.abs(), residual**2, exact, exact**2)
        self.sums += torch.stack([part.sum(dim=0) for part in parts])
        first = -self._num_rows % self._stride
        self._num_rows += len(true)
        self.pairs = torch.cat([self.pairs, torch.stack([true, predicted], dim=1)[first :: self._stride].float()])
        while len(self.pairs) * self.num_outputs > 2 * MAX_PAIRS and len(self.pairs) > 1:
            self.pairs, self._stride = self.pairs[::2].clone(), self._stride * 2

    def join(self, trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any]]:
        summed = distributed.reduce_sum(trainer.accelerator, self.sums)
        sums = summed.cpu().numpy().astype(np.float64)  # waits for the device: the evaluation is over
        pairs = distributed.to_host(distributed.gather(trainer.accelerator, self.pairs)).numpy()
        step = max(1, -(-pairs[:, 0].size // MAX_PAIRS))
        outputs = []
        for number in range(self.num_outputs):
            count, residual, absolute, squared, true, true_squared = (float(value) for value in sums[:, number])
            spread = true_squared - true**2 / max(count, 1.0)
            r2 = 1 - squared / spread if spread > 0 else None
            means = {"bias": residual / count, "mae": absolute / count, "rmse": (squared / count) ** 0.5}
            outputs.append({"output": number, "num_items": int(count), **means, "r2": r2})
        arrays = _as_arrays(self._join_kept(trainer))
        arrays |= {"pairs_true": pairs[::step, 0].ravel(), "pairs_predicted": pairs[::step, 1].ravel()}
        return arrays, {"task": "regression", "num_items": int(sums[0].sum()), "outputs": outputs}


_COLLECTORS: dict[str, type[_Collector]] = {"classification": _Classification, "regression": _Regression}


def _choose_collector(task: str | None, predictions: Any, targets: Any, num_kept: int) -> _Collector:
    """Return a collector for the task, or for the one that predictions and targets tell."""
    if isinstance(predictions, Tensor) and isinstance(targets, Tensor):
        if task is None and not predictions.is_floating_point():
            task = "unknown"  # classes without their logits
        if task is None:
            task = "regression" if targets.is_floating_point() else "classification"
        if task == "classification" and (rows := _find_classes(predictions, targets)) is not None:
            return _Classification(rows[0].shape[-1], num_kept, predictions.device)
        is_real = predictions.is_floating_point() and predictions.numel() == targets.numel()
        if task == "regression" and is_real and predictions.shape[:1] == targets.shape[:1] and targets.numel():
            num_outputs = targets[0].numel()
            return _Regression(num_outputs if num_outputs <= _MAX_OUTPUTS else 1, num_kept, predictions.device)
    raise BatchError(
        f"ReportCallback can make nothing of the predictions {describe(predictions)} and the targets "
        f"{describe(targets)}. It expects logits (N, C, ...) or (N, ..., C) with integer targets (N, ...), or floating "
        "point targets of the shape of the predictions. Return others as 'predictions' and 'targets' from "
        'calculate_eval_batch_loss, say task="classification" or task="regression", or task="none" for a page without '
        "predictions."
    )


def _find_classes(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return logits with the classes in the last dimension, and targets; None where they do not fit."""
    if not predictions.is_floating_point():
        return None
    if predictions.ndim == targets.ndim + 1:
        if predictions.ndim > 2 and predictions.shape[:1] + predictions.shape[2:] == targets.shape:
            return predictions.movedim(1, -1), targets
        return (predictions, targets) if predictions.shape[:-1] == targets.shape else None
    if predictions.shape == targets.shape and (targets.ndim == 1 or targets.shape[-1] == 1):
        single = predictions.reshape(*targets.shape[:1], -1, 1)  # one logit for each sample
        return (single.squeeze(1), targets.reshape(-1)) if single.shape[1] == 1 else None
    return None


def _class_last(predictions: Any, targets: Any) -> tuple[Tensor, Tensor]:
    found = _find_classes(predictions, targets)
    if found is None:
        raise BatchError(
            f"ReportCallback got logits for its first batch, and now predictions {describe(predictions)} with targets "
            f"{describe(targets)}. All batches of an evaluation must be alike."
        )
    return found


def _kept_inputs(inputs: Any, num_samples: int) -> dict[str, Any]:
    """Return the inputs of a batch where each sample has its part in all of them."""
    leaves = [inputs] if isinstance(inputs, Tensor) else list(inputs.values()) if isinstance(inputs, Mapping) else []
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.shape[:1] == (num_samples,) for leaf in leaves):
        return {}
    return {"sample_input": inputs if isinstance(inputs, Tensor) else dict(inputs)}


def _joined(kept: Any, new: Any) -> Any:
    """Return rows end to end, filled up with zeros where they differ in size."""
    if kept is None:
        return new
    if isinstance(new, Mapping):
        return {name: _joined(kept[name], value) for name, value in new.items()}
    sizes = [max(pair) for pair in zip(kept.shape[1:], new.shape[1:], strict=True)]
    return torch.cat([_filled(kept, sizes), _filled(new, sizes)])


def _filled(rows: Tensor, sizes: list[int]) -> Tensor:
    missing = [size - there for there, size in zip(rows.shape[1:], sizes, strict=True)]
    if not any(missing):
        return rows
    return nn.functional.pad(rows, [number for one in reversed(missing) for number in (0, one)])


def _rows_of(value: Any, index: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rows_of(item, index) for name, item in value.items()}
    return value[index]


def _form_of(value: Any) -> Any:
    """Return what ``_empty`` needs to make rows that fit."""
    if isinstance(value, Mapping):
        return {name: _form_of(item) for name, item in value.items()}
    return (tuple(value.shape[1:]), value.dtype)


def _empty(form: Any, device: torch.device) -> Any:
    if isinstance(form, Mapping):
        return {name: _empty(item, device) for name, item in form.items()}
    return torch.zeros(0, *form[0], dtype=form[1], device=device)


def _as_arrays(kept: dict[str, Any]) -> dict[str, Any]:
    """Return tensors on the host as arrays, the inputs left as they are."""
    return {name: value if name == "sample_input" else value.numpy() for name, value in kept.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def _is_image(inputs: Any) -> bool:
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or inputs.is_complex():
        return False
    return inputs.shape[1] in (1, 3) or (inputs.shape[3] == 3 and inputs.dtype == torch.uint8)


def _as_pixels(made: Any) -> tuple[Any, bool]:
    """Return an image as an array of bytes of shape (H, W) or (H, W, 3), and whether its brightness was stretched."""
    if isinstance(made, Tensor):
        made = made.detach().float().numpy() if made.is_floating_point() else made.numpy()  # on the host already
    pixels = np.asarray(made)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3) or 0 in pixels.shape:
        raise ValueError(
            f"an image for the report has the shape {pixels.shape}; expected (H, W), (H, W, C) or (C, H, W) with one "
            "or three channels. Let to_image return such."
        )
    if pixels.dtype == np.uint8:
        return pixels, False
    pixels = np.nan_to_num(pixels.astype(np.float64), posinf=1.0, neginf=0.0)
    low, high = float(pixels.min()), float(pixels.max())
    is_stretched = low < 0 or high > 1
    if is_stretched:
        pixels = (pixels - low) / (high - low) if high > low else np.zeros_like(pixels)
    return (255 * pixels).round().astype(np.uint8), is_stretched


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def _find_layer(trainer: Trainer, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(trainer.get_model().named_modules())
    if name not in modules or not name:
        known = [known for known in modules if known]
        hint = did_you_mean(name, known)
        raise ValueError(f"the model has no layer {name!r} for ReportCallback to look at.{hint} It has: {known[:30]}.")
    return modules[name]


def _look_at_attention(trainer: Trainer, name: str, batch: Any) -> Tensor:
    """Return the weights (H, T, S) of the first sample of a batch, which goes through the model once more.

    Once more, because a hook makes torch take other ways through its layers, and with other ways come other roundings:
    the numbers of the evaluation are those of a run without this callback.
    """
    layer = _find_layer(trainer, name)
    found: list[Tensor] = []
    hooks = []
    if isinstance(layer, nn.MultiheadAttention):
        wanted = _WantedWeights(found)
        hooks.append(layer.register_forward_pre_hook(wanted.ask, with_kwargs=True))
        hooks.append(layer.register_forward_hook(wanted.take))
    else:
        hooks.append(layer.register_forward_hook(lambda module, args, output: found.extend(_weights_in(output)[:1])))
    streams = randomness.get_streams(trainer.device)
    try:
        trainer.calculate_eval_batch_loss(batch)
    finally:
        randomness.set_streams(streams, trainer.device)
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError(
            f"ReportCallback saw no attention weights of the layer {name!r} ({type(layer).__name__}). It must be an "
            "nn.MultiheadAttention or return weights of shape (B, H, T, T) or (B, T, T), alone or second, and be "
            "called in evaluation. A model compiled as a whole does not call its layers so that they can be watched: "
            "use it uncompiled."
        )
    weights = found[0][0].detach().clone()
    return weights if weights.ndim == 3 else weights.unsqueeze(0)


def _weights_in(output: Any) -> list[Tensor]:
    """Return the tensor in the output of a layer that may be attention weights, if there is one."""
    candidates = [output] if isinstance(output, Tensor) else list(output[1:2]) if isinstance(output, tuple) else []
    return [one for one in candidates if isinstance(one, Tensor) and one.ndim in (3, 4) and _sums_to_one(one)]


def _sums_to_one(weights: Tensor) -> bool:
    sums = weights[0].detach().float().sum(dim=-1)
    # Waits for the device, once in each evaluation. A row that is masked as a whole may be zero.
    return bool((((sums - 1).abs() < 0.02) | (sums == 0)).all())


class _WantedWeights:
    """Asks an ``nn.MultiheadAttention`` for its weights, and returns to its caller what that had asked for."""

    def __init__(self, found: list[Tensor]) -> None:
        self._found = found
        self._asked: list[dict[str, Any]] = []

    def ask(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = inspect.signature(nn.MultiheadAttention.forward).bind(layer, *args, **kwargs)
        given.apply_defaults()
        asked = dict(given.arguments)
        del asked["self"]
        self._asked.append(asked)
        return (), {**asked, "need_weights": True, "average_attn_weights": False}

    def take(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        asked, (result, weights) = self._asked.pop(), output
        batched = weights if weights.ndim == 4 else weights.unsqueeze(0)
        if not self._found:
            self._found.append(batched[:1].detach().clone())
        if not asked["need_weights"]:
            return result, None
        return result, weights.mean(dim=-3) if asked["average_attn_weights"] else weights

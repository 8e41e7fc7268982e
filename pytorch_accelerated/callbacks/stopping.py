"""Reasons to end a run, or to leave out an update: numbers that are not numbers, and metrics that no longer improve."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pytorch_accelerated import distributed
from pytorch_accelerated.callbacks.base import TrainerCallback
from pytorch_accelerated.callbacks.watching import MetricWatcher
from pytorch_accelerated.engine import optimized_parameters, raw_optimizer
from pytorch_accelerated.errors import NonFiniteError, StopTrainingError

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer

Policy = Literal["raise", "stop", "skip"]

_MAX_BAD_IN_A_ROW = 100


class _Moment(NamedTuple):
    """When an update was made. Kept for each that has not been looked at, so it is put into words only when needed."""

    epoch: int
    step: int
    update: int
    rates: list[float | Tensor]

    @classmethod
    def of(cls, trainer: Trainer) -> _Moment:
        # A learning rate that lives on the device is copied there: reading it would wait, and it will change in place.
        rates = [group["lr"] for group in raw_optimizer(trainer.optimizer).param_groups]
        rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
        return cls(trainer.current_epoch, trainer.num_steps, trainer.num_updates + 1, rates)

    def __str__(self) -> str:
        rates = ", ".join(f"{rate:g}" for rate in sorted({float(rate) for rate in self.rates}))
        return f"epoch {self.epoch}, step {self.step}, update {self.update}, lr {rates}"


class TerminateOnNaNCallback(TrainerCallback):
    """Keep losses and gradients that are infinite or NaN away from the weights.

    Each update is checked before the optimizer moves: the losses of its window and the summed gradients, over all
    processes, so that all act together. On the CPU the answer is there at once and a bad update is never made. A device
    that runs ahead of the host is not waited for: there the answer is read every ``read_every_n_updates`` updates and
    at the end of each epoch, and until then a bad update is undone on the device: optimizers made with ``fused=True``
    leave weights and state untouched; for all others the gradients are set to zero, so that momentum and weight decay
    still act once. With an fp16 gradient scaler the gradients are the scaler's affair, which skips such updates by
    itself, and only the losses are checked.

    Policies:
        ``"raise"``: end the run with ``NonFiniteError``, which names epoch, step, loss, learning rate and process.
        ``"stop"``: print the same words and end the run in good order.
        ``"skip"``: leave the update out, print the same words, count it in ``trainer.num_skipped_updates``, and go on.
        The learning rate schedule does not advance, and the mean loss of the epoch is that of the batches with a finite
        one. After 100 such updates in a row, or where running statistics (batch norm) have taken the numbers in, which
        cannot be undone, it raises all the same. Where answers are read late, the update counts as made when the
        schedule advances, and is added to ``num_skipped_updates`` when it is read.
    """

    def __init__(self, policy: Policy = "raise", read_every_n_updates: int | None = None) -> None:
        """Take a policy and how often to look.

        Args:
            policy: what to do about it.
            read_every_n_updates: updates between two looks at the answer; None for 1 on the CPU and 50 elsewhere.

        Raises:
            ValueError: if the policy is unknown or the interval below one.
        """
        if policy not in get_args(Policy):
            raise ValueError(f"policy must be one of {get_args(Policy)}, got {policy!r}.")
        if read_every_n_updates is not None and read_every_n_updates < 1:
            raise ValueError(f"read_every_n_updates must be at least 1, got {read_every_n_updates}.")
        self.policy = policy
        self.read_every_n_updates = read_every_n_updates
        self._is_set_up = False

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Prepare the flags on the device."""
        self._is_set_up = True
        device = trainer.device
        self._optimizer = raw_optimizer(trainer.optimizer)
        self._sizes: list[int] = []
        self._interval = self.read_every_n_updates or (1 if device.type == "cpu" else 50)
        self._checks_gradients = trainer.accelerator.scaler is None
        self._one = torch.ones((), device=device)
        self._losses: float | Tensor | None = None
        self._found = torch.zeros((), device=device)
        self._num_bad = torch.zeros((), device=device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)  # position in _moments
        self._first_bad_loss = torch.zeros((), device=device)
        self._num_bad_in_a_row = 0
        self._moments: list[_Moment] = []  # of the updates since the last look, which the device knows by number

    def on_train_epoch_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Keep the losses of skipped updates out of the mean loss of the epoch."""
        self._sizes = []
        if self.policy == "skip" and trainer.data_pass is not None:
            trainer.data_pass.leave_out_non_finite_losses()

    def on_train_step_end(self, trainer: Trainer, batch: Any, batch_output: dict[str, Any], **kwargs: Any) -> None:
        """Add the loss of the batch to those of its window."""
        if not self._is_set_up:  # added in the middle of a run
            self.on_train_run_begin(trainer)
        assert trainer.data_pass is not None, "the event is one of a pass"
        loss = trainer.data_pass.loss_in_step
        self._losses = loss if self._losses is None else self._losses + loss

    def on_optimizer_step_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Check the update that is about to be made."""
        losses, self._losses = self._losses, None
        if losses is None:  # added since the last step
            return
        if self._interval > 1:
            self._found = torch.zeros_like(self._one)  # the optimizer may hold the last one
        gradients: list[Tensor] = []
        for is_plain, parameters in self._group_parameters() if self._checks_gradients else ():
            tensors = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
            if not is_plain:
                tensors = [_local(gradient) for gradient in tensors]
            # The kernel of torch's own GradScaler: one pass over all gradients, which it multiplies by one.
            torch._amp_foreach_non_finite_check_and_unscale_(tensors, self._found, self._one)
            gradients += tensors
        if isinstance(losses, Tensor):
            torch._amp_foreach_non_finite_check_and_unscale_([losses.clone()], self._found, self._one)
        elif not math.isfinite(losses):
            self._found.fill_(1)
        if trainer.run_config.num_processes > 1:
            self._found = distributed.reduce_sum(trainer.accelerator, self._found).clamp_(max=1)
        if self._interval > 1:
            self._undo_on_the_device(trainer, gradients, losses)
        elif self._found.item():  # on the CPU this waits for nothing; elsewhere the user asked for every update
            self._found.zero_()
            self._num_bad_in_a_row += 1
            self._act(trainer, _Moment.of(trainer), losses)
            trainer.skip_update()
        else:
            self._num_bad_in_a_row = 0

    def on_train_update_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Read the flags if it is time."""
        if self._interval > 1 and trainer.num_updates % self._interval == 0:
            self._read(trainer)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Read the flags of the last updates."""
        if self._interval > 1:
            self._read(trainer)

    def on_train_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Let go of the optimizer."""
        for name in ("found_inf", "grad_scale"):
            vars(raw_optimizer(trainer.optimizer)).pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been found and not been looked at yet."""
        if not self._is_set_up:
            return {}
        flags = {name: getattr(self, f"_{name}").clone() for name in ("num_bad", "first_bad", "first_bad_loss")}
        return {**flags, "num_bad_in_a_row": self._num_bad_in_a_row, "moments": [list(m) for m in self._moments]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what had been found and not been looked at."""
        if self._is_set_up:  # else there is no device yet; it comes again when the run begins
            for name in ("num_bad", "first_bad", "first_bad_loss"):
                getattr(self, f"_{name}").copy_(state_dict[name])
            self._num_bad_in_a_row = state_dict["num_bad_in_a_row"]
            self._moments = [_Moment(*moment) for moment in state_dict["moments"]]

    def _group_parameters(self) -> list[tuple[bool, list[Tensor]]]:
        """Return the optimizer's parameters by the kind of their gradients, and for each kind whether it is plain.

        It is found out anew in each epoch and when the optimizer has other parameters.
        """
        sizes = [len(group["params"]) for group in self._optimizer.param_groups]
        if sizes != self._sizes:
            groups: dict[Any, list[Tensor]] = {}
            for parameter in optimized_parameters(self._optimizer):
                gradient = parameter.grad
                is_plain = type(gradient) is Tensor and gradient.layout is torch.strided and not gradient.is_complex()
                groups.setdefault((is_plain, parameter.dtype), []).append(parameter)
            self._sizes, self._groups = sizes, [(key[0], group) for key, group in groups.items()]
        return self._groups

    def _undo_on_the_device(self, trainer: Trainer, gradients: list[Tensor], losses: float | Tensor) -> None:
        found = self._found
        losses = torch.as_tensor(losses, device=found.device)
        is_first = (found > 0) & (self._first_bad < 0)
        self._first_bad = torch.where(is_first, len(self._moments), self._first_bad)
        self._first_bad_loss = torch.where(is_first, losses.float(), self._first_bad_loss)
        self._moments.append(_Moment.of(trainer))
        self._num_bad += found
        if not self._checks_gradients:
            return  # the scaler finds the gradients of such a loss, and leaves the update out by itself
        optimizer = self._optimizer
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf, optimizer.grad_scale = found, None
        else:
            is_bad = found.bool()
            for gradient in gradients:
                gradient.masked_fill_(is_bad, 0.0)

    def _read(self, trainer: Trainer) -> None:
        moments, self._moments = self._moments, []
        num_bad = int(self._num_bad.item())  # waits for the device: a log point
        if num_bad:
            if self._checks_gradients:  # else the trainer has counted what the scaler left out
                trainer.run_history.counters.num_skipped_updates += num_bad
            moment, loss = moments[int(self._first_bad.item())], self._first_bad_loss  # waits no longer
            self._num_bad.zero_()
            self._first_bad.fill_(-1)
            self._num_bad_in_a_row = self._num_bad_in_a_row + num_bad if num_bad == len(moments) else 0
            self._act(trainer, moment, loss, num_bad)

    def _act(self, trainer: Trainer, moment: _Moment, losses: float | Tensor, num_bad: int = 1) -> None:
        # Collective: all processes found the same, and come here together.
        mine = torch.as_tensor(losses, dtype=torch.float32, device=trainer.device)
        by_process = distributed.gather(trainer.accelerator, mine).tolist()  # waits for the device
        culprits = [number for number, loss in enumerate(by_process) if not math.isfinite(loss)]
        if culprits:
            what = ", ".join(f"loss {by_process[number]} on process {number}" for number in culprits)
        else:
            what = f"loss {by_process[0]}, but a gradient is not finite"
            names = (name for name, parameter in trainer.get_model().named_parameters() if _is_bad(parameter.grad))
            what += f" ({name})" if (name := next(names, None)) else ""
        message = f"numbers that are not finite: {what}; {moment}, {len(by_process)} process(es)."
        if num_bad > 1:
            message += f" {num_bad} updates since the last look were so; this is the first."
        buffers = [name for name, buffer in trainer.get_model().named_buffers() if _is_bad(buffer)]
        if buffers:
            message += f" These buffers have taken the numbers in: {', '.join(buffers)}."
        if self.policy == "raise":
            raise NonFiniteError(
                f"{message} The weights were left as they were. Usual causes: a learning rate that is too high, a "
                "division by zero or a logarithm of zero in the loss, NaN in the data. To go on without such "
                "updates: TerminateOnNaNCallback(policy='skip')."
            )
        if self.policy == "skip" and distributed.any_process(trainer.accelerator, bool(buffers)):
            raise NonFiniteError(
                f"{message} Leaving out the update does not undo that, and evaluation would be of no use any more: "
                "take such batches out of the data, or use layers without running statistics."
            )
        if self.policy == "skip" and self._num_bad_in_a_row >= _MAX_BAD_IN_A_ROW:
            raise NonFiniteError(f"{message} So were {self._num_bad_in_a_row} updates in a row: there is no way on.")
        if self.policy == "stop":
            trainer.print(f"{message} Ending the run.")
            raise StopTrainingError(message)
        skipped = trainer.num_skipped_updates + (self._interval == 1)  # this one is counted after the event
        trainer.print(f"{message} Left out, {skipped} so far.")


def _local(gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        return gradient._values()  # coalesced or not, these are what will be added to the weights
    if gradient.is_complex():
        return torch.view_as_real(gradient)
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient  # a DTensor of FSDP2 has to_local


def _is_bad(tensor: Tensor | None) -> bool:
    # Waits for the device: something is wrong, and time is of no matter.
    return tensor is not None and not bool(torch.isfinite(_local(tensor)).all())


class EarlyStoppingCallback(MetricWatcher):
    """End training when a metric has stopped getting better."""

    def __init__(
        self,
        early_stopping_patience: int = 1,
        early_stopping_threshold: float = 0.0,
        watch_metric: str = "eval_loss_epoch",
        greater_is_better: bool | None = None,
        reset_on_train: bool = True,
    ) -> None:
        """Take what to watch and how long to wait.

        Args:
            early_stopping_patience: how many new values in a row may fail to improve before training ends.
            early_stopping_threshold: by how much a value must beat the best one to count as better, in units of the
                metric.
            watch_metric: name of the metric in the run history. A NaN never counts as better.
            greater_is_better: the direction; may be left out only for the trainer's own losses.
            reset_on_train: whether a new training run forgets the best value.

        Raises:
            ValueError: if the direction is missing, the patience is below one, or the threshold is negative.
        """
        super().__init__(watch_metric, greater_is_better)
        if early_stopping_patience < 1 or early_stopping_threshold < 0:
            raise ValueError(
                "early_stopping_patience must be at least 1 and early_stopping_threshold at least 0, got "
                f"{early_stopping_patience} and {early_stopping_threshold}."
            )
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold
        self.reset_on_train = reset_on_train
        self.best_value: float | None = None
        self.num_worse = 0

    def on_train_run_begin(self, trainer: Trainer, **kwargs: Any) -> None:
        """Forget the best value, and check that the metric can appear. Raises ValueError if it cannot."""
        super().on_train_run_begin(trainer, **kwargs)
        if self.reset_on_train:
            self.best_value, self.num_worse = None, 0

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        """Look for a new value. Raises StopTrainingError when it is time to stop."""
        value = self.find_new_value(trainer)
        message = None if value is None else self._judge(value)
        if message is not None:
            trainer.print(message)
            raise StopTrainingError(message)

    on_eval_epoch_end = on_train_epoch_end

    def _judge(self, value: float) -> str | None:
        is_better = self.is_better(value, self.best_value, self.early_stopping_threshold)
        if is_better:
            self.best_value, self.num_worse = value, 0
            return None
        self.num_worse += 1
        if self.num_worse < self.early_stopping_patience:
            return None
        best = "nothing" if self.best_value is None else f"{self.best_value:.6g}"
        return (
            f"Stopping early: {self.watch_metric} has not improved on {best} by more than "
            f"{self.early_stopping_threshold:g} in {self.num_worse} evaluation(s), last value {value:.6g}."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and how often it was missed since."""
        return {"best_value": self.best_value, "num_worse": self.num_worse}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best value and how often it was missed since."""
        self.best_value = state_dict["best_value"]
        self.num_worse = state_dict["num_worse"]

"""Warm-up, a stable phase, and a short decay."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch.optim import Optimizer

from pytorch_accelerated.schedulers.base import UpdateLrScheduler, check_phases, warmup_lr

DecayShape = Literal["sqrt", "linear", "cosine"]


def wsd_lr(
    update: int,
    base_lr: float,
    num_updates: int,
    num_warmup_updates: int = 0,
    num_decay_updates: int = 0,
    lr_min: float = 0.0,
    warmup_starting_lr: float = 0.0,
    decay_shape: DecayShape = "sqrt",
) -> float:
    """Return the learning rate after ``update`` updates.

    It rises in a straight line during the warm-up, stays at ``base_lr``, and falls to ``lr_min`` in the last
    ``num_decay_updates`` updates: by the factor ``1 - sqrt(x)`` (Haegele et al. 2024, "Scaling Laws and Compute-Optimal
    Training Beyond Fixed Training Durations", equation 1), ``1 - x`` or ``(1 + cos(pi * x)) / 2``, x from 0 to 1.

    Args:
        update: updates made.
        base_lr: peak, held in the stable phase.
        num_updates: length of the schedule in updates, all phases included.
        num_warmup_updates: updates of rising.
        num_decay_updates: updates of falling.
        lr_min: lowest value, kept afterwards.
        warmup_starting_lr: value at update 0 where there is a warm-up.
        decay_shape: form of the fall.
    """
    if update < num_warmup_updates:
        return warmup_lr(update, base_lr, num_warmup_updates, warmup_starting_lr)
    num_into_decay = update - (num_updates - num_decay_updates)
    if num_into_decay <= 0:
        return base_lr
    if num_into_decay >= num_decay_updates:
        return lr_min if num_decay_updates else base_lr
    x = num_into_decay / num_decay_updates
    factors = {"sqrt": 1 - math.sqrt(x), "linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2}
    return lr_min + (base_lr - lr_min) * factors[decay_shape]


class WSDLrScheduler(UpdateLrScheduler):
    """Follow ``wsd_lr``."""

    def __init__(
        self,
        optimizer: Optimizer,
        num_updates: int,
        num_warmup_updates: int = 0,
        decay_phase_ratio: float = 0.1,
        lr_min: float = 0.0,
        warmup_starting_lr: float = 0.0,
        decay_shape: DecayShape = "sqrt",
    ) -> None:
        """Take the numbers of ``wsd_lr``; the decay takes ``decay_phase_ratio`` of ``num_updates``, rounded up.

        Raises:
            ValueError: if the phases do not fit into ``num_updates``, or the shape is unknown.
        """
        if not 0 <= decay_phase_ratio <= 1 or decay_shape not in get_args(DecayShape):
            raise ValueError(
                f"decay_phase_ratio must be between 0 and 1 and decay_shape one of {get_args(DecayShape)}, got "
                f"{decay_phase_ratio} and {decay_shape!r}."
            )
        # Rounded first, because 100 * 0.55 is a little more than 55.
        num_decay_updates = math.ceil(round(num_updates * decay_phase_ratio, 6))
        check_phases(num_updates, num_warmup_updates=num_warmup_updates, num_decay_updates=num_decay_updates)
        self.num_updates = num_updates
        self.num_warmup_updates = num_warmup_updates
        self.num_decay_updates = num_decay_updates
        self.lr_min = lr_min
        self.warmup_starting_lr = warmup_starting_lr
        self.decay_shape: DecayShape = decay_shape
        super().__init__(optimizer)

    def lr_at(self, update: int, base_lr: float) -> float:
        """Return ``wsd_lr`` with the numbers of this schedule."""
        return wsd_lr(
            update,
            base_lr,
            self.num_updates,
            self.num_warmup_updates,
            self.num_decay_updates,
            self.lr_min,
            self.warmup_starting_lr,
            self.decay_shape,
        )

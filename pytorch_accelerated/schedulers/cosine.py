"""Half a cosine wave, after a linear warm-up."""

from __future__ import annotations

import math

from torch.optim import Optimizer

from pytorch_accelerated.schedulers.base import UpdateLrScheduler, check_phases, warmup_lr


def cosine_lr(
    update: int,
    base_lr: float,
    num_updates: int,
    num_warmup_updates: int = 0,
    num_cooldown_updates: int = 0,
    lr_min: float = 0.0,
    warmup_starting_lr: float = 0.0,
    k_decay: float = 1.0,
) -> float:
    """Return the learning rate after ``update`` updates.

    It rises in a straight line during the warm-up, falls as ``lr_min + (base_lr - lr_min) / 2 * (1 + cos(pi * x**k))``
    (Loshchilov & Hutter 2017, equation 5; k from Zhang & Li 2020) with x from 0 to 1 over the updates between warm-up
    and cool-down, and stays at ``lr_min`` during the cool-down and afterwards.

    Args:
        update: updates made.
        base_lr: peak, reached at the end of the warm-up.
        num_updates: length of the schedule in updates, warm-up and cool-down included.
        num_warmup_updates: updates of rising.
        num_cooldown_updates: updates at the end that stay at ``lr_min``.
        lr_min: lowest value.
        warmup_starting_lr: value at update 0 where there is a warm-up.
        k_decay: 1 for the plain cosine; above, the rate stays high for longer.
    """
    if update < num_warmup_updates:
        return warmup_lr(update, base_lr, num_warmup_updates, warmup_starting_lr)
    num_decay = num_updates - num_warmup_updates - num_cooldown_updates
    if update - num_warmup_updates >= num_decay:
        return lr_min
    progress = (update - num_warmup_updates) / num_decay
    return lr_min + (base_lr - lr_min) / 2 * (1 + math.cos(math.pi * progress**k_decay))


class CosineLrScheduler(UpdateLrScheduler):
    """Follow ``cosine_lr``."""

    def __init__(
        self,
        optimizer: Optimizer,
        num_updates: int,
        num_warmup_updates: int = 0,
        num_cooldown_updates: int = 0,
        lr_min: float = 0.0,
        warmup_starting_lr: float = 0.0,
        k_decay: float = 1.0,
    ) -> None:
        """Take the numbers of ``cosine_lr``. Raises ValueError if the phases do not fit into ``num_updates``."""
        check_phases(num_updates, num_warmup_updates=num_warmup_updates, num_cooldown_updates=num_cooldown_updates)
        self.num_updates = num_updates
        self.num_warmup_updates = num_warmup_updates
        self.num_cooldown_updates = num_cooldown_updates
        self.lr_min = lr_min
        self.warmup_starting_lr = warmup_starting_lr
        self.k_decay = k_decay
        super().__init__(optimizer)

    def lr_at(self, update: int, base_lr: float) -> float:
        """Return ``cosine_lr`` with the numbers of this schedule."""
        return cosine_lr(
            update,
            base_lr,
            self.num_updates,
            self.num_warmup_updates,
            self.num_cooldown_updates,
            self.lr_min,
            self.warmup_starting_lr,
            self.k_decay,
        )

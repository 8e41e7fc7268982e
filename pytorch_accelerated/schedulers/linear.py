"""A straight line down, after a linear warm-up."""

from __future__ import annotations

from torch.optim import Optimizer

from pytorch_accelerated.schedulers.base import UpdateLrScheduler, check_phases, warmup_lr


def linear_lr(
    update: int,
    base_lr: float,
    num_updates: int,
    num_warmup_updates: int = 0,
    lr_min: float = 0.0,
    warmup_starting_lr: float = 0.0,
) -> float:
    """Return the learning rate after ``update`` updates.

    It rises in a straight line during the warm-up, falls in another to ``lr_min`` at ``num_updates``, and stays.

    Args:
        update: updates made.
        base_lr: peak, reached at the end of the warm-up.
        num_updates: length of the schedule in updates, warm-up included.
        num_warmup_updates: updates of rising.
        lr_min: lowest value.
        warmup_starting_lr: value at update 0 where there is a warm-up.
    """
    if update < num_warmup_updates:
        return warmup_lr(update, base_lr, num_warmup_updates, warmup_starting_lr)
    if update >= num_updates:
        return lr_min
    return base_lr + (lr_min - base_lr) * (update - num_warmup_updates) / (num_updates - num_warmup_updates)


class LinearLrScheduler(UpdateLrScheduler):
    """Follow ``linear_lr``."""

    def __init__(
        self,
        optimizer: Optimizer,
        num_updates: int,
        num_warmup_updates: int = 0,
        lr_min: float = 0.0,
        warmup_starting_lr: float = 0.0,
    ) -> None:
        """Take the numbers of ``linear_lr``. Raises ValueError if the warm-up does not fit into ``num_updates``."""
        check_phases(num_updates, num_warmup_updates=num_warmup_updates)
        self.num_updates = num_updates
        self.num_warmup_updates = num_warmup_updates
        self.lr_min = lr_min
        self.warmup_starting_lr = warmup_starting_lr
        super().__init__(optimizer)

    def lr_at(self, update: int, base_lr: float) -> float:
        """Return ``linear_lr`` with the numbers of this schedule."""
        return linear_lr(
            update, base_lr, self.num_updates, self.num_warmup_updates, self.lr_min, self.warmup_starting_lr
        )

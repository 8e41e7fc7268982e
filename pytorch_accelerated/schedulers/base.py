"""What the schedules have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pytorch_accelerated.run_config import TrainerPlaceholderValues


class UpdateLrScheduler(LRScheduler):
    """Set learning rates that are a function of the number of updates made, and of nothing else.

    It is a torch scheduler: ``step`` after each update, ``state_dict`` and ``load_state_dict`` carry it over an
    interruption. Each parameter group follows the schedule from its own learning rate.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Begin at update 0; subclasses set their numbers first, because the first learning rates are set here."""
        super().__init__(optimizer)

    @abstractmethod
    def lr_at(self, update: int, base_lr: float) -> float:
        """Return the learning rate after ``update`` updates, of a parameter group that has ``base_lr`` at its peak."""

    def get_lr(self) -> list[Any]:
        """Return the learning rate of each parameter group; called by ``step``."""
        return [self.lr_at(self.last_epoch, float(base_lr)) for base_lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule is and from which learning rates each group follows it, not its numbers.

        So a run that is resumed with other limits, such as the decay phase of a longer one, follows its own schedule.
        """
        return {"last_epoch": self.last_epoch, "base_lrs": list(self.base_lrs), "_last_lr": list(self._last_lr)}

    @classmethod
    def create_scheduler_fn(cls, **kwargs: Any) -> Callable[[Optimizer], UpdateLrScheduler]:
        """Return a factory for ``Trainer.train(create_scheduler_fn=...)``.

        Args:
            **kwargs: arguments of the class but the optimizer. ``num_updates`` defaults to those of the run; lengths
                may be given in epochs, as ``num_warmup_epochs=2`` or ``0.5`` instead of ``num_warmup_updates``, and are
                rounded to whole updates.

        Raises:
            ValueError: if a length is given in both.
        """
        arguments: dict[str, Any] = {"num_updates": TrainerPlaceholderValues.NUM_UPDATES}
        for name, value in kwargs.items():
            if name.startswith("num_") and name.endswith("_epochs"):
                name = f"{name.removesuffix('_epochs')}_updates"
                if name in kwargs:
                    raise ValueError(f"got both {name} and {name.removesuffix('_updates')}_epochs; give one of them.")
                value = (TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH * value).rounded()
            arguments[name] = value
        return partial(cls, **arguments)


def check_phases(num_updates: int, **phases: int) -> None:
    """Refuse phases that are negative or do not fit into the run.

    Raises:
        ValueError: if one is negative, or all together are longer than ``num_updates``.
    """
    if num_updates < 1 or min(phases.values()) < 0 or sum(phases.values()) > num_updates:
        given = ", ".join(f"{name}={number}" for name, number in phases.items())
        raise ValueError(f"the phases of the schedule must fit into num_updates={num_updates}, got {given}.")


def warmup_lr(update: int, base_lr: float, num_warmup_updates: int, warmup_starting_lr: float) -> float:
    """Return a learning rate on the straight line from ``warmup_starting_lr`` to ``base_lr``."""
    return warmup_starting_lr + (base_lr - warmup_starting_lr) * update / num_warmup_updates

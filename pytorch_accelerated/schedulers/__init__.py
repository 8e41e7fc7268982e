"""Learning rate schedules that are functions of the number of updates."""

from pytorch_accelerated.schedulers.base import UpdateLrScheduler
from pytorch_accelerated.schedulers.cosine import CosineLrScheduler, cosine_lr
from pytorch_accelerated.schedulers.linear import LinearLrScheduler, linear_lr
from pytorch_accelerated.schedulers.wsd import WSDLrScheduler, wsd_lr

__all__ = [
    "CosineLrScheduler",
    "LinearLrScheduler",
    "UpdateLrScheduler",
    "WSDLrScheduler",
    "cosine_lr",
    "linear_lr",
    "wsd_lr",
]

"""Trackers: TensorBoard, Weights & Biases, MLflow, and whatever Accelerate knows or the user writes."""

from pytorch_accelerated.trackers.base import AccelerateTracker, Counters, Opening, Tracker, group
from pytorch_accelerated.trackers.media import as_plain
from pytorch_accelerated.trackers.opening import check_trackers, open_trackers

__all__ = [
    "AccelerateTracker",
    "Counters",
    "Opening",
    "Tracker",
    "as_plain",
    "check_trackers",
    "group",
    "open_trackers",
]

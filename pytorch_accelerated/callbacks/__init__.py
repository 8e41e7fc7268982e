"""Callbacks: what a run does besides the loop."""

from pytorch_accelerated.callbacks.base import CallbackHandler, LambdaCallback, TrainerCallback
from pytorch_accelerated.callbacks.evaluation import StepBasedEvaluationCallback
from pytorch_accelerated.callbacks.limits import LimitBatches, LimitBatchesCallback, LimitEvalStepsCallback
from pytorch_accelerated.callbacks.placement import MoveModulesToDeviceCallback
from pytorch_accelerated.callbacks.profiling import ProfilerCallback, ThroughputCallback
from pytorch_accelerated.callbacks.progress import LogMetricsCallback, PrintProgressCallback, ProgressBarCallback
from pytorch_accelerated.callbacks.saving import (
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    WSDCheckpointCallback,
)
from pytorch_accelerated.callbacks.stopping import EarlyStoppingCallback, TerminateOnNaNCallback
from pytorch_accelerated.errors import StopTrainingError

DEFAULT_CALLBACKS = (
    MoveModulesToDeviceCallback,
    TerminateOnNaNCallback,
    PrintProgressCallback,
    ProgressBarCallback,
    LogMetricsCallback,
)
"""The callbacks of a trainer that was given none; classes, so that each trainer has instances of its own."""

__all__ = [
    "DEFAULT_CALLBACKS",
    "CallbackHandler",
    "EarlyStoppingCallback",
    "LambdaCallback",
    "LimitBatches",
    "LimitBatchesCallback",
    "LimitEvalStepsCallback",
    "LogMetricsCallback",
    "MoveModulesToDeviceCallback",
    "PrintProgressCallback",
    "ProfilerCallback",
    "ProgressBarCallback",
    "SaveBestModelCallback",
    "SaveTrainingStateCallback",
    "StepBasedEvaluationCallback",
    "StopTrainingError",
    "TerminateOnNaNCallback",
    "ThroughputCallback",
    "TrainerCallback",
    "WSDCheckpointCallback",
]

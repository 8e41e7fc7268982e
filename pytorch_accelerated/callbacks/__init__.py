"""Callbacks: what a run does besides the loop."""

from pytorch_accelerated.callbacks.base import CallbackHandler, LambdaCallback, TrainerCallback
from pytorch_accelerated.callbacks.evaluation import StepBasedEvaluationCallback
from pytorch_accelerated.callbacks.limits import LimitBatches, LimitBatchesCallback, LimitEvalStepsCallback
from pytorch_accelerated.callbacks.notifications import (
    CommandAtEndCallback,
    MetricThreshold,
    Notification,
    NotificationCallback,
    Smtp,
    Webhook,
)
from pytorch_accelerated.callbacks.placement import MoveModulesToDeviceCallback
from pytorch_accelerated.callbacks.profiling import ProfilerCallback, ThroughputCallback
from pytorch_accelerated.callbacks.progress import (
    LogMetricsCallback,
    PrintProgressCallback,
    ProgressBarCallback,
    SummaryCallback,
)
from pytorch_accelerated.callbacks.report import ReportCallback
from pytorch_accelerated.callbacks.saving import (
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    WSDCheckpointCallback,
)
from pytorch_accelerated.callbacks.stopping import EarlyStoppingCallback, TerminateOnNaNCallback
from pytorch_accelerated.callbacks.system import SystemStatsCallback
from pytorch_accelerated.errors import StopTrainingError

DEFAULT_CALLBACKS = (
    MoveModulesToDeviceCallback,
    TerminateOnNaNCallback,
    PrintProgressCallback,
    ProgressBarCallback,
    LogMetricsCallback,
    SummaryCallback,
)
"""The callbacks of a trainer that was given none; classes, so that each trainer has instances of its own."""

__all__ = [
    "DEFAULT_CALLBACKS",
    "CallbackHandler",
    "CommandAtEndCallback",
    "EarlyStoppingCallback",
    "LambdaCallback",
    "LimitBatches",
    "LimitBatchesCallback",
    "LimitEvalStepsCallback",
    "LogMetricsCallback",
    "MetricThreshold",
    "MoveModulesToDeviceCallback",
    "Notification",
    "NotificationCallback",
    "PrintProgressCallback",
    "ProfilerCallback",
    "ProgressBarCallback",
    "ReportCallback",
    "SaveBestModelCallback",
    "SaveTrainingStateCallback",
    "Smtp",
    "StepBasedEvaluationCallback",
    "StopTrainingError",
    "SummaryCallback",
    "SystemStatsCallback",
    "TerminateOnNaNCallback",
    "ThroughputCallback",
    "TrainerCallback",
    "WSDCheckpointCallback",
    "Webhook",
]

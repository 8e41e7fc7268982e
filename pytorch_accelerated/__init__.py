"""One subclassable Trainer for PyTorch, on Hugging Face Accelerate. Importing it changes nothing."""

from pytorch_accelerated._version import __version__
from pytorch_accelerated.callbacks import DEFAULT_CALLBACKS
from pytorch_accelerated.distributed import notebook_launcher
from pytorch_accelerated.errors import StopTrainingError
from pytorch_accelerated.run_config import TrainerPlaceholderValues, TrainerRunConfig
from pytorch_accelerated.run_directory import RunDirectory
from pytorch_accelerated.tracking import InMemoryRunHistory, RunHistory
from pytorch_accelerated.trainer import Trainer

__all__ = [
    "DEFAULT_CALLBACKS",
    "InMemoryRunHistory",
    "RunDirectory",
    "RunHistory",
    "StopTrainingError",
    "Trainer",
    "TrainerPlaceholderValues",
    "TrainerRunConfig",
    "__version__",
    "notebook_launcher",
]

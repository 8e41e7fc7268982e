"""Checkpoints: writing them so that no kill leaves half of one, verifying, finding and loading them.

``python -m pytorch_accelerated.checkpoint inspect|verify DIR`` looks at them from a shell.
"""

from pytorch_accelerated.checkpoint.content import (
    Checkpoint,
    Snapshot,
    capture,
    check_can_save,
    find,
    hyperparameters_of,
    load_state,
    modes_of,
    save_state,
    write_together,
)
from pytorch_accelerated.checkpoint.files import (
    find_newest,
    is_superseded,
    list_checkpoints,
    read_manifest,
    verify,
)
from pytorch_accelerated.checkpoint.portable import load_portable, read_metadata, save_portable
from pytorch_accelerated.checkpoint.saving import Boundary, CheckpointStore, capture_alone, prepare_directory
from pytorch_accelerated.checkpoint.weights import read_weights, save_weights, weights_of

__all__ = [
    "Boundary",
    "Checkpoint",
    "CheckpointStore",
    "Snapshot",
    "capture",
    "capture_alone",
    "check_can_save",
    "find",
    "find_newest",
    "hyperparameters_of",
    "is_superseded",
    "list_checkpoints",
    "load_portable",
    "load_state",
    "modes_of",
    "prepare_directory",
    "read_manifest",
    "read_metadata",
    "read_weights",
    "save_portable",
    "save_state",
    "save_weights",
    "verify",
    "weights_of",
    "write_together",
]

"""Keep tests that share a process apart."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

torch.set_num_threads(1)  # two cores are shared by all


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Give each test the environment and Accelerate's process-wide state as they are in a new process."""
    environment = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(environment)

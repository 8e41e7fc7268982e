"""What Accelerate does for the loop, and how to use it without paying for what a run does not need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

_NOTHING = nullcontext()


class Engine:
    """Let Accelerate place, wrap and synchronise model and optimizer.

    Each is prepared once, because a second time would wrap it again, and both in one call where both are new, which
    FSDP and DeepSpeed need.
    """

    is_plain = True
    """Whether Accelerate's wrappers of backward and of the optimizer have nothing to do."""

    stepped_optimizer: Any = None
    """What ``optimizer_step`` is to call: the user's own optimizer where that is enough."""

    def __init__(self, accelerator: Accelerator) -> None:
        """Begin with nothing prepared."""
        self._accelerator = accelerator
        self._model: nn.Module | None = None
        self._optimizer: Any = None
        self._forward: tuple[Any, Any] | None = None
        self._num_users = 0

    def prepare(self, model: nn.Module, optimizer: Any, others: Iterable[nn.Module]) -> tuple[nn.Module, Any]:
        """Return model and optimizer as Accelerate wraps them; those that are prepared already as they are.

        Args:
            model: the model, raw or prepared.
            optimizer: an optimizer, raw or prepared, a function that makes one of the model's parameters, or None.
            others: further modules whose parameters the optimizer may hold.

        Raises:
            ValueError: if the optimizer holds parameters of something else.
        """
        is_new_model, is_new_optimizer = model is not self._model, optimizer is not self._optimizer
        if is_new_optimizer and optimizer is not None:
            if not hasattr(optimizer, "param_groups"):
                optimizer = optimizer(model.parameters())
            _check_parameters(optimizer, [model, *others])
        if is_new_model:
            self._forward = None
        if is_new_model and is_new_optimizer and optimizer is not None:
            model, optimizer = self._accelerator.prepare(model, optimizer)
        elif is_new_model:
            model = self._accelerator.prepare_model(model)
        elif is_new_optimizer and optimizer is not None:
            optimizer = self._accelerator.prepare_optimizer(optimizer)
        self._model, self._optimizer = model, optimizer
        # AcceleratedOptimizer's step and zero_grad take as long as the whole step of a small model, for look-ups alone.
        self.is_plain = (
            self._accelerator.scaler is None
            and self._accelerator.distributed_type
            not in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
            and not self._accelerator.has_lomo_optimizer
        )
        self.stepped_optimizer = raw_optimizer(optimizer) if self.is_plain else optimizer
        return model, optimizer

    def choose_accumulation_steps(self, steps: int) -> int:
        """Return the steps in a window: those of the argument or, where that is 1, of Accelerate's settings.

        Raises:
            ValueError: if both are set and differ.
        """
        configured = int(self._accelerator.gradient_accumulation_steps)
        if self._num_users > 0 or steps == configured or 1 in (steps, configured):
            return max(steps, configured)
        raise ValueError(
            f"gradient_accumulation_steps is {steps} in train() and {configured} in Accelerate's configuration; set "
            "one of them."
        )

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Set Accelerate and the model up for a run, and leave both afterwards as they were found; may be nested."""
        steps = self._accelerator.gradient_accumulation_steps
        if self._num_users == 0:
            self._put_forward()
            # The window is ours: Accelerate's backward divides by its own count, also where a window is shorter.
            self._accelerator.gradient_accumulation_steps = 1
            self._accelerator.sync_gradients = True
        self._num_users += 1
        try:
            yield
        finally:
            self._num_users -= 1
            if self._num_users == 0:
                self._take_forward()
                self._accelerator.gradient_accumulation_steps = steps
                self._accelerator.sync_gradients = True

    def gradient_sync(self, is_update: bool, accumulation_steps: int) -> AbstractContextManager[Any]:
        """Return a context for forward and backward, in which processes exchange gradients only if ``is_update``."""
        if accumulation_steps == 1:
            return _NOTHING
        self._accelerator.sync_gradients = is_update
        return _NOTHING if is_update else self._accelerator.no_sync(self._model)

    def step_was_skipped(self) -> bool:
        """Return whether the gradient scaler left the last optimizer step out."""
        return not self.is_plain and bool(self._accelerator.optimizer_step_was_skipped)

    def _put_forward(self) -> None:
        """Put the forward that Accelerate made for mixed precision back on the module."""
        if self._forward is not None:
            module: Any = self._unwrapped()
            module.forward, module._original_forward = self._forward

    def _take_forward(self) -> None:
        """Take Accelerate's forward off the module, which between runs is the user's own to copy, save and call."""
        module = self._unwrapped()
        attributes = vars(module)
        if "_original_forward" in attributes:
            self._forward = attributes.pop("forward"), attributes.pop("_original_forward")
            original = self._forward[1]
            if getattr(original, "__func__", None) is not type(module).forward:
                attributes["forward"] = original  # the user had put one on the module before

    def _unwrapped(self) -> nn.Module:
        module: nn.Module = self._accelerator.unwrap_model(self._model, keep_torch_compile=False)
        return module


def raw_optimizer(optimizer: Any) -> Any:
    """Return the user's optimizer from inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _check_parameters(optimizer: Any, modules: Iterable[nn.Module]) -> None:
    known = {id(parameter) for module in modules for parameter in module.parameters()}
    held: list[Tensor] = [parameter for group in raw_optimizer(optimizer).param_groups for parameter in group["params"]]
    strange = [parameter for parameter in held if id(parameter) not in known]
    if strange:
        raise ValueError(
            f"{len(strange)} of the {len(held)} parameters of the optimizer do not belong to the model (first shape "
            f"{tuple(strange[0].shape)}), so training would not move the model. Was the model, or a layer of it, "
            "replaced or copied after the optimizer was made? Make the optimizer last, or pass a function: "
            "optimizer=partial(AdamW, lr=1e-3)."
        )

"""What Accelerate does for the loop, and how to use it without paying for what a run does not need."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

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
        self._given: Any = None  # the model before it was prepared: a wrapper of torch.compile, or the module itself
        self._forward: tuple[Any, Any] | None = None
        self._scale = 0.0
        self._num_users = 0
        self._is_ddp = accelerator.distributed_type.name.startswith("MULTI_")
        self._trainable: set[int] = set()
        self._parameters: list[Tensor] = []
        self._sizes: list[int] = []

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
        if is_new_optimizer and optimizer is not None and not hasattr(optimizer, "param_groups"):
            optimizer = optimizer(model.parameters())
        if optimizer is not None and (is_new_model or is_new_optimizer):
            _check_parameters(optimizer, model, others, self._accelerator.num_processes)
        if is_new_model:
            self._forward, self._given = None, model
        is_frozen = self._is_ddp and not _find_trainable(model)
        if is_new_model and is_new_optimizer and optimizer is not None and not is_frozen:
            model, optimizer = self._accelerator.prepare(model, optimizer)
        else:
            if is_new_model:
                # DistributedDataParallel refuses a model without trainable parameters, which evaluates well without it.
                model = self._accelerator.prepare_model(model, evaluation_mode=is_frozen)
            if is_new_optimizer and optimizer is not None:
                optimizer = self._accelerator.prepare_optimizer(optimizer)
        if is_new_model:
            self._trainable = _find_trainable(model)
        self._model, self._optimizer, self._sizes = model, optimizer, []
        # AcceleratedOptimizer's step and zero_grad take as long as the whole step of a small model, for look-ups alone.
        self.is_plain = (
            self._accelerator.scaler is None
            and self._accelerator.distributed_type
            not in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)
            and not self._accelerator.has_lomo_optimizer
        )
        self.stepped_optimizer = raw_optimizer(optimizer) if self.is_plain else optimizer
        zero_grad = getattr(self.stepped_optimizer, "zero_grad", None)
        self._forgets_gradients = self.is_plain and getattr(zero_grad, "__func__", None) is Optimizer.zero_grad
        if self._num_users == 0:
            self._take_forward()
        return self.follow_freezing(), optimizer

    def check_what_moves(self, has_schedule: bool) -> None:
        """Look for parameters that training would not move, though it seems to be meant to.

        Raises:
            ValueError: if that is so for all.
        """
        assert self._model is not None, "prepare has been called"
        held = {id(parameter) for parameter in self.parameters if parameter.requires_grad}
        if not held:
            raise ValueError(
                "none of the parameters of the optimizer is trainable: all have requires_grad=False. Unfreeze those "
                "that are to be trained."
            )
        left_out = [name for name, p in self._model.named_parameters() if p.requires_grad and id(p) not in held]
        if left_out:
            warnings.warn(
                f"{len(left_out)} trainable parameters of the model are in no group of the optimizer, so they will "
                f"not move (first: {left_out[0]}). Freeze them with requires_grad_(False), or add them to the "
                "optimizer.",
                stacklevel=3,
            )
        rates = [float(group["lr"]) for group in raw_optimizer(self._optimizer).param_groups if "lr" in group]
        if rates and not any(rates) and not has_schedule:
            warnings.warn(
                "all learning rates are 0, so the weights will not move. A schedule of an earlier run leaves its "
                "last learning rate behind: set it in optimizer.param_groups, or pass create_scheduler_fn again.",
                stacklevel=3,
            )

    def follow_freezing(self) -> nn.Module:
        """Return the model, wrapped anew if others of its parameters are trainable than when it was wrapped.

        DistributedDataParallel exchanges the gradients of those that were trainable when it was made, and waits for
        them.
        """
        assert self._model is not None, "prepare has been called"
        if self._has_other_trainable_parameters():
            wrapper, module = self._model, self._unwrapped()
            self._take_forward()
            vars(module).pop("_is_accelerate_prepared", None)
            models = self._accelerator._models
            models[:] = [other for other in models if other is not wrapper and other is not module]
            self._trainable = _find_trainable(module)
            self._given = module
            self._model = self._accelerator.prepare_model(module, evaluation_mode=not self._trainable)
            if self._num_users == 0:
                self._take_forward()
        return self._model

    def refuse_freezing_within_epoch(self) -> None:
        """Raise RuntimeError if other parameters are trainable than when the model was wrapped, where that matters."""
        if self._has_other_trainable_parameters():
            raise RuntimeError(
                "parameters were frozen or unfrozen in the middle of an epoch: with several processes their "
                "gradients have not been exchanged since, and the processes may hold different weights. Freeze and "
                "unfreeze between epochs, as in train_epoch_start or on_train_epoch_begin."
            )

    def _has_other_trainable_parameters(self) -> bool:
        assert self._model is not None, "prepare has been called"
        return self._is_ddp and self._trainable != _find_trainable(self._model)

    @property
    def parameters(self) -> list[Tensor]:
        """Return the parameters that the optimizer moves, those of the model in its order first."""
        sizes = [len(group["params"]) for group in raw_optimizer(self._optimizer).param_groups]
        if sizes != self._sizes:  # a walk through the model takes its time, and groups seldom change
            assert self._model is not None
            held = {id(parameter): parameter for parameter in optimized_parameters(self._optimizer)}
            own = [parameter for parameter in self._model.parameters() if held.pop(id(parameter), None) is not None]
            self._parameters, self._sizes = [*own, *held.values()], sizes
        return self._parameters

    def clip_values(self, limit: float) -> None:
        """Limit the magnitude of each element of the gradients; those that are not finite become NaN."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        # Clamped, an infinite gradient would look like any other and reach the weights: x - x is NaN for it, else 0.
        marks = [gradient - gradient for gradient in gradients]
        self._accelerator.clip_grad_value_(self.parameters, limit)
        for gradient, mark in zip(gradients, marks, strict=True):
            gradient += mark

    def zero_gradients(self) -> None:
        """Set the gradients of the parameters that the optimizer moves to None."""
        if not self._forgets_gradients:
            self.stepped_optimizer.zero_grad()
            return
        # All that torch's own does, but for its label in profiles, which takes ten times as long.
        for parameter in self.parameters:
            parameter.grad = None

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
            if self._accelerator.scaler is not None:
                self._scale = self._accelerator.scaler.get_scale()  # waits for the device, once in a run
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
        scaler = self._accelerator.scaler
        if scaler is not None and getattr(raw_optimizer(self._optimizer), "_step_supports_amp_scaling", False):
            # A fused optimizer is called in any case and leaves the step out by itself, which Accelerate does not
            # notice (accelerate#4242); remove when it does. Waits for the device, as torch's scaler does for others.
            before, self._scale = self._scale, scaler.get_scale()
            return self._scale < before
        return bool(self._accelerator.optimizer_step_was_skipped)

    def _put_forward(self) -> None:
        """Put the forward that Accelerate made for mixed precision back on the module."""
        if self._forward is not None:
            self._given.forward, vars(self._unwrapped())["_original_forward"] = self._forward

    def _take_forward(self) -> None:
        """Take Accelerate's forward off the module, which between runs is the user's own to copy, save and call."""
        # A wrapper of torch.compile has a forward of its own, and passes all other attributes on to its module.
        holder, module = self._given, self._unwrapped()
        attributes = vars(module)
        if "_original_forward" in attributes:
            self._forward = vars(holder).pop("forward"), attributes.pop("_original_forward")
            # The mark that keeps Accelerate from wrapping twice; the module is not wrapped any more.
            attributes.pop("_is_accelerate_prepared", None)
            original = self._forward[1]
            if getattr(original, "__func__", None) is not type(holder).forward:
                vars(holder)["forward"] = original  # it had one before, from the user or from torch.compile

    def _unwrapped(self) -> nn.Module:
        assert self._model is not None, "prepare has been called"
        return unwrapped(self._accelerator, self._model)


def unwrapped(accelerator: Accelerator, model: nn.Module, keep_torch_compile: bool = False) -> nn.Module:
    """Return the user's module from inside the wrappers of Accelerate and, if wanted, of torch.compile."""
    module: nn.Module = accelerator.unwrap_model(model, keep_torch_compile=keep_torch_compile)
    # Accelerate leaves a torch.compile of the user's that is inside of another wrapper.
    compiled = None if keep_torch_compile else module._modules.get("_orig_mod")
    return module if compiled is None else compiled


def raw_optimizer(optimizer: Any) -> Any:
    """Return the user's optimizer from inside Accelerate's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def optimized_parameters(optimizer: Any) -> list[Tensor]:
    """Return the parameters in all groups of an optimizer, raw or wrapped."""
    return [parameter for group in raw_optimizer(optimizer).param_groups for parameter in group["params"]]


def _find_trainable(model: nn.Module) -> set[int]:
    return {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def _check_parameters(optimizer: Any, model: nn.Module, others: Iterable[nn.Module], num_processes: int) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    known = own | {id(parameter) for module in others for parameter in module.parameters()}
    held = optimized_parameters(optimizer)
    strange = [parameter for parameter in held if id(parameter) not in known]
    if strange:
        raise ValueError(
            f"{len(strange)} of the {len(held)} parameters of the optimizer do not belong to the model (first shape "
            f"{tuple(strange[0].shape)}), so training would not move the model. Was the model, or a layer of it, "
            "replaced or copied after the optimizer was made? Make the optimizer last, or pass a function: "
            "optimizer=partial(AdamW, lr=1e-3)."
        )
    outside = [parameter for parameter in held if id(parameter) not in own]
    if outside and num_processes > 1:
        raise ValueError(
            f"{len(outside)} of the {len(held)} parameters of the optimizer belong to another module than the model, "
            f"such as the loss function, (first shape {tuple(outside[0].shape)}): {num_processes} processes would not "
            "exchange their gradients. Make that module a part of the model."
        )

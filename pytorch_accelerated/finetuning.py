"""Freezing and unfreezing the layers of a model in stages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class LayerGroup(NamedTuple):
    """A part of a model that is frozen as a whole."""

    layer_group_idx: int
    """Position in the model, from 0."""
    name: str
    """Name of the child module; empty for the parameters that the model itself owns."""
    module: nn.Module
    """The child, or the model itself for the parameters that it owns."""
    is_frozen: bool
    """Whether no parameter of the group is trained."""


class ModelFreezer:
    """Freeze and unfreeze a model by groups of layers.

    A group is a child of the model, in the order of definition; a lone child, as in a wrapper, is opened. Parameters
    that the model itself owns, such as a class token, are the first group. Indices may be negative, to count from the
    end; both ends of a range belong to it.
    """

    def __init__(self, model: nn.Module, freeze_batch_norms: bool = False) -> None:
        """Take the model as it is.

        Args:
            model: the model; not yet wrapped by Accelerate.
            freeze_batch_norms: whether ``freeze`` also freezes the weights of batch norms.
        """
        self.model = model
        self.freeze_batch_norms = freeze_batch_norms

    def get_layer_groups(self) -> list[LayerGroup]:
        """Return the groups with their present state."""
        groups = []
        for index, (name, module) in enumerate(self._named_groups()):
            parameters = list(self._parameters(name, module))
            is_frozen = bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
            groups.append(LayerGroup(index, name, module, is_frozen))
        return groups

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained at present, to make an optimizer of."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def freeze(self, from_index: int = 0, to_index: int = -2, set_modules_as_eval: bool = False) -> None:
        """Freeze groups; by default all but the last.

        Args:
            from_index: first group.
            to_index: last group, included.
            set_modules_as_eval: whether to put the modules of these groups in evaluation mode, where dropout is off and
                batch norms keep their statistics. The rest of the model is put in training mode first, because the
                trainer leaves the modes inside a model in training mode as they are.

        Raises:
            IndexError: if there is no such group.
        """
        if set_modules_as_eval and not self.model.training:
            self.model.train()
        for name, module in self._range(from_index, to_index):
            for parameter in self._parameters(name, module, spare_batch_norms=not self.freeze_batch_norms):
                parameter.requires_grad_(False)
            if set_modules_as_eval and name:
                module.eval()

    def unfreeze(
        self, from_index: int = -1, to_index: int = 0, set_modules_as_training: bool = True
    ) -> list[nn.Parameter]:
        """Unfreeze groups; by default all.

        Args:
            from_index: one end of the range.
            to_index: the other end, included.
            set_modules_as_training: whether to put the modules of these groups in training mode.

        Returns:
            The parameters that were frozen before, to be added to an optimizer: ``add_param_group({"params": ...})``.

        Raises:
            IndexError: if there is no such group.
        """
        thawed = []
        for name, module in self._range(from_index, to_index):
            for parameter in self._parameters(name, module):
                if not parameter.requires_grad:
                    parameter.requires_grad_(True)
                    thawed.append(parameter)
            if set_modules_as_training and name:
                module.train()
        return thawed

    def _named_groups(self) -> list[tuple[str, nn.Module]]:
        root, children = self.model, list(self.model.named_children())
        while len(children) == 1 and not list(root.parameters(recurse=False)) and list(children[0][1].children()):
            root = children[0][1]
            children = list(root.named_children())
        own = [("", root)] if list(root.parameters(recurse=False)) else []
        return own + children

    def _range(self, first: int, last: int) -> list[tuple[str, nn.Module]]:
        groups = self._named_groups()
        positions = []
        for index in (first, last):
            if not -len(groups) <= index < len(groups):
                raise IndexError(
                    f"there is no layer group {index}; the model has {len(groups)}: {[n for n, _ in groups]}."
                )
            positions.append(index % len(groups))
        return groups[min(positions) : max(positions) + 1]

    @staticmethod
    def _parameters(name: str, module: nn.Module, spare_batch_norms: bool = False) -> Iterator[nn.Parameter]:
        """Yield the parameters of a group, also those that its inner modules own themselves."""
        for part in module.modules() if name else [module]:
            if not (spare_batch_norms and isinstance(part, _BatchNorm)):
                yield from part.parameters(recurse=False)

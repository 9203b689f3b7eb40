"""Groups of a traced model: heads, dimensions of heads, units and widths, where the forward reshapes by numbers.

The numbers in the forward shrink with the weights, so the result is a graph module. Names of layers are the model's
own; of ``nn.MultiheadAttention`` the fused projection becomes the layer ``….in_proj``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from nas.compression.base import layers_of
from nas.compression.groups import Group, Groups, Slices, unprunable
from nas.errors import CompressionError
from nas.tracing import Structure, shrunk
from nas.tracing.dims import Var
from nas.tracing.shrink import with_modes
from nas.tracing.structure import Group as Variable

ROLES = ("heads", "head_dim")
READERS = (nn.Conv1d, nn.Conv2d, nn.Linear)


class TracedGroups(Groups):
    """Groups as the axes of the traced model show them.

    Args:
        model: which stays as it is.
        sample: raw inputs ``[n, *input_shape]``.
        here: whether the slices are of ``model`` itself, and not of the traced copy.

    Raises:
        CompressionError: the forward cannot be traced.
    """

    def __init__(self, model: nn.Module, sample: torch.Tensor, here: bool = False) -> None:
        self._given = model
        self.structure = Structure(model, sample)
        self.model = model if here else self.structure.model

    def all(self, leave_out: bool = False) -> list[Group]:
        return [self._group(group.name, group.variable) for group in self.structure.groups]

    def named(self, name: str) -> Group:
        return self._group(name, self._variable(name))

    def without(self, lost: Mapping[str, Sequence[int]], sample: torch.Tensor) -> nn.Module:
        chosen: dict[Var, torch.Tensor] = {}
        for name, places in lost.items():
            variable = self._variable(name)
            kept = torch.ones(variable.size, dtype=torch.bool)
            kept[list(places)] = False
            if variable in chosen and len(chosen[variable]) != int(kept.sum()):
                raise CompressionError(f"channel_prune: {name!r} is in a group with another layer that is named.")
            chosen.setdefault(variable, kept.nonzero().flatten())
        return with_modes(shrunk(self.structure.axes, chosen), self._given)

    def apart(self, sample: torch.Tensor) -> TracedGroups:
        return self  # :meth:`without` makes another model

    def _variable(self, name: str) -> Var:
        """By the name of a group, of any layer in it, or of one with the role that is meant."""
        for group in self.structure.groups:
            if group.name == name:
                return group.variable
        layer, _, role = name.rpartition(".")
        if role in ROLES and layer in self.structure.axes.layers:
            own = [group for group in self._made_by(layer) if group.variable.role == role]
            if len(own) == 1:
                return own[0].variable
            raise unprunable(name, self._reason(layer) or f"the outputs of {layer!r} are no {role}")
        try:
            *_, path = layers_of(self.structure.model, name, "channel_prune")
        except CompressionError as error:
            if role not in ROLES:
                raise
            known = [group.name for group in self.structure.groups if group.variable.role] or ["no attention"]
            raise CompressionError(
                f"channel_prune: the model has no group {name!r}.", expected=f"one of {known}"
            ) from error
        own = self._made_by(path)
        whole = self.structure.axes.layers[path][1].terms if path in self.structure.axes.layers else ()
        if len(own) == 1 and whole == ((own[0].variable,),):
            return own[0].variable
        if own:
            names = [f"{path}.{group.variable.role}" if group.variable.role else group.name for group in own]
            raise unprunable(name, f"its outputs are made of {names}, which are named instead")
        raise unprunable(name, self._reason(path) or "the forward does not use it")

    def _made_by(self, path: str) -> list[Variable]:
        """Groups that the outputs of a layer are made of."""
        if path not in self.structure.axes.layers:
            return []
        own = self.structure.axes.layers[path][1].variables
        return [group for group in self.structure.groups if group.variable in own]

    def _reason(self, path: str) -> str:
        """Why the outputs of a layer stay."""
        if path not in self.structure.axes.layers:
            return ""
        return next((v.tied for v in self.structure.axes.layers[path][1].variables if v.tied), "")

    def _group(self, name: str, variable: Var) -> Group:
        makers = tuple(
            path
            for path, (_, out) in self.structure.axes.layers.items()
            if variable in out.variables and not isinstance(self.structure.modules[path], nn.LayerNorm)
        )
        return Group(name, variable.size, tuple(self._slices(variable)), makers, variable.role)

    def _slices(self, variable: Var) -> list[Slices]:
        """Every parameter's part that the places of a variable own."""
        parameters = dict(self.structure.model.named_parameters())
        found = []
        for use in self.structure.axes.uses:
            if variable not in use.dim.variables or use.tensor not in parameters:
                continue
            places = use.dim.place(variable)
            here = (places >= 0).nonzero().flatten()
            layer, attribute = self._owner(use.tensor)
            reads = use.axis == 1 and isinstance(self.structure.modules.get(use.tensor.rpartition(".")[0]), READERS)
            found.append(Slices(layer, attribute, partial(_rows, axis=use.axis), here, places[here], reads))
        return found

    def _owner(self, tensor: str) -> tuple[nn.Module, str]:
        """The module that has a tensor of the traced model, and its attribute.

        What was a layer's ``in_proj_weight`` is called ``in_proj.weight`` since it was traced.
        """
        parent, _, leaf = tensor.rpartition(".")
        modules = dict(self.model.named_modules())
        if parent in modules and hasattr(modules[parent], leaf):
            return modules[parent], leaf
        outer, _, inner = parent.rpartition(".")
        return modules[outer], f"{inner}_{leaf}"


def _rows(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)

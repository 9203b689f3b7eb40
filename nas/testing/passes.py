"""The contract of a compression pass: apply, train, restore, export, rewrite."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from nas.compression import Pass
from nas.compression.fold import fold_batchnorm
from nas.errors import CompressionError
from nas.student.export import export_float
from nas.testing.agreement import check_agreement
from nas.testing.require import require


def check_pass(
    pass_class: Callable[[Mapping[str, Any]], Pass], model: nn.Module, settings: Mapping[str, Any], sample: torch.Tensor
) -> None:
    """Check a compression pass: apply, train, restore, export and rewrite, each on a copy of ``model``.

    Args:
        pass_class: the pass; built as ``pass_class(settings)``.
        model: a traceable module, uncompressed.
        settings: module name → what is asked of it; at least one.
        sample: raw inputs ``[n, *input_shape]``, n ≥ 3.

    Raises:
        AssertionError: names the clause that is broken.
    """
    name = getattr(pass_class, "__name__", "pass")
    with torch.no_grad():
        shape = model.eval()(sample).shape
    kinds = {type(module) for module in model.modules()}
    step = pass_class(settings)
    compressed = step.apply(copy.deepcopy(model), sample)
    with torch.no_grad():
        found = compressed.eval()(sample).shape
    require(found == shape, f"{name}: apply changes the output from {tuple(shape)} to {tuple(found)}.")
    _check_trainable(compressed, sample, name)
    plain = step.restore(copy.deepcopy(compressed).eval())
    helpers = {type(m).__name__ for m in plain.modules() if type(m) not in kinds and not _plain(type(m))}
    require(not helpers, f"{name}: restore leaves {sorted(helpers)}, which are no layers of torch.nn.")
    exported = step.rewrite(export_float(fold_batchnorm(plain), sample[:1]), sample.numpy())
    check_agreement(compressed, exported, sample, name)
    wrong = {"no.such.layer": next(iter(settings.values()))}
    try:
        pass_class(wrong).apply(copy.deepcopy(model), sample)
    except CompressionError as error:
        require("no.such.layer" in str(error), f"{name}: the error does not name the layer that is missing: {error}")
    else:
        raise AssertionError(f"{name}: a layer that does not exist raises no CompressionError.")


def _plain(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith(("torch.nn.", "torch.fx."))


def _check_trainable(model: nn.Module, sample: torch.Tensor, name: str) -> None:
    """One step of training on a copy reaches every parameter."""
    pupil = copy.deepcopy(model).train()
    output = pupil(sample)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    lost = [key for key, p in pupil.named_parameters() if p.grad is None or not bool(torch.isfinite(p.grad).all())]
    require(not lost, f"{name}: after apply, no finite gradient reaches {lost}.")

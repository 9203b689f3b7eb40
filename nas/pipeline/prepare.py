"""What is done to a user's own model before its first step."""

from __future__ import annotations

import torch
from torch import nn


def prepare(model: nn.Module, sample: torch.Tensor) -> nn.Module:
    """The model as the passes get it; it computes the same, and its state has the same names.

    Args:
        model: the user's own, in evaluation mode.
        sample: raw inputs ``[n, *input_shape]``.
    """
    return model

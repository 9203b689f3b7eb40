"""Models traced: the graph is the model, its groups and blocks are found, and cut out of it."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from nas.errors import CompressionError
from nas.student.export import export_float
from nas.tracing import Structure, shrunk, trace
from tests.own_models import MODELS, made

EVERY = pytest.mark.parametrize("name", MODELS)


# ---- tracing -----------------------------------------------------------------------------------------


@EVERY
def test_a_traced_model_is_the_model(name: str) -> None:
    model, x, _ = made(name)
    traced = trace(model, x[:2])
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(traced(x[:1]), model(x[:1]), rtol=1e-5, atol=1e-5)
    assert {id(p) for p in traced.parameters()}.isdisjoint(id(p) for p in model.parameters())
    assert not model.training


def test_tracing_keeps_names_and_layers() -> None:
    model, x, _ = made("residual")
    traced = trace(model, x[:2])
    assert set(traced.state_dict()) == set(model.state_dict())
    assert isinstance(traced.get_submodule("layers.1.down.0"), nn.Conv2d)


def test_a_traced_model_trains_as_the_model_does() -> None:
    model, x, _ = made("vision transformer")
    traced = trace(model, x[:2])
    for module in (model, traced):
        module.eval()(x).square().mean().backward()
    grads = dict(traced.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(grads[key].grad, parameter.grad, rtol=1e-4, atol=1e-6)


@EVERY
def test_a_traced_model_exports_with_a_free_batch(name: str) -> None:
    model, x, _ = made(name)
    exported = export_float(trace(model, x[:2]), x[:1])
    session = ort.InferenceSession(exported.SerializeToString())
    with torch.no_grad():
        wanted = model(x).numpy()
    np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], wanted, rtol=1e-3, atol=1e-4)


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Fixed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(3, -1)[:, :10]


class Two(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("model", "words"),
    [(Branching(), "cannot be traced.*data-dependent"), (Fixed(), "cannot be traced.*size"), (Two(), "returns tuple")],
)
def test_what_cannot_be_traced_is_said(model: nn.Module, words: str) -> None:
    with pytest.raises(CompressionError, match=words) as caught:
        trace(model, torch.rand(2, 1, 8, 8))
    assert caught.value.expected


# ---- groups -------------------------------------------------------------------------------------------


def groups(name: str) -> dict[str, int]:
    model, x, _ = made(name)
    return {group.name: group.variable.size for group in Structure(model, x).groups}


def test_groups_of_a_residual_network() -> None:
    found = groups("residual")
    # The stream of each stage is one group with its shortcut; the inner channels of a block are one of their own.
    assert found == {
        "stem": 16, "layers.0.conv1": 16, "layers.1.conv1": 32, "layers.1.conv2": 32, "layers.2.conv1": 64,
        "layers.2.conv2": 64,
    }  # fmt: skip


def test_heads_are_groups_however_attention_is_written() -> None:
    found = groups("vision transformer")
    for layer in (0, 1):
        assert found[f"layers.{layer}.attention.qkv.heads"] == 4
        assert found[f"layers.{layer}.attention.qkv.head_dim"] == 8
        assert found[f"layers.{layer}.mlp.0"] == 64
    assert groups("text transformer")["encoder.layers.0.self_attn.in_proj.heads"] == 4


@pytest.mark.parametrize("name", ["residual", "inverted", "dense", "vision transformer", "text transformer"])
def test_pruning_zeroed_places_changes_nothing(name: str) -> None:
    """Channels without weights are removed: what is left computes what the whole did."""
    model, x, _ = made(name)
    structure = Structure(model, x)
    state = structure.model.state_dict()
    checked = 0
    for group in structure.groups:
        variable = group.variable
        # A layer normalisation counts its channels, and heads' dimensions scale the attention; both see what is gone.
        norms = [n for n, layer in structure.modules.items() if isinstance(layer, nn.LayerNorm)]
        touched = {use.tensor.rpartition(".")[0] for use in structure.axes.uses if variable in use.dim.variables}
        if touched & set(norms) or variable.role == "head_dim":
            continue
        gone = torch.arange(1, variable.size, 2)
        for use in structure.axes.uses:
            if variable in use.dim.variables:
                places = torch.isin(use.dim.place(variable), gone)
                if use.tensor.endswith("running_var"):
                    continue
                state[use.tensor].movedim(use.axis, 0)[places] = 0.0
        with torch.no_grad():
            whole = structure.model(x)
            small = shrunk(structure.axes, {variable: torch.arange(0, variable.size, 2)})
            torch.testing.assert_close(small(x), whole, rtol=1e-4, atol=1e-5)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in structure.model.parameters())
        checked += 1
    assert checked

"""What NNI's quantisers trained runs in onnxruntime's integers, on NNI's own scales, with the accuracy that it had."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load, save
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from nas.errors import CompressionError
from nas.nni.quantizers import QuantizedModel, calibration_json, load_state, quantized_onnx
from tests.helpers import fused, run_onnx

nni = pytest.importorskip("nni")
# NNI 3.0 on a torch and a pydantic of today warns on import and in its own code.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

POINTS = 0.002  # accuracies of the simulation and of the file may differ by 0.2 points
KERNELS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
ALL = ("_input_", "weight", "_output_")


class Net(nn.Module):
    """Convolutions with normalisation, a residual addition, pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        for i, (cin, cout) in enumerate(((1, 16), (16, 16), (16, 16), (16, 32)), 1):
            setattr(self, f"conv{i}", nn.Conv2d(cin, cout, 3, padding=1, bias=i == 3))
            setattr(self, f"bn{i}", nn.BatchNorm2d(cout))
            setattr(self, f"relu{i}", nn.ReLU())
        self.pool, self.average, self.head = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        inner = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(x)))))
        x = self.relu4(self.bn4(self.conv4(self.pool(self.relu3(inner + x)))))
        return self.head(self.average(x).flatten(1))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu1, self.second = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False)
        self.relu2, self.head = nn.ReLU(), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.relu2(self.second(self.relu1(self.first(x.flatten(1))))))


CONVS = ["conv1", "conv2", "conv3", "conv4"]
FUSED = [("conv1", "bn1", "relu1"), ("conv2", "bn2", "relu2"), ("conv3", "bn3"), ("conv4", "bn4", "relu4")]


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


Digits = tuple[torch.Tensor, torch.Tensor]


def fit(model: nn.Module, digits: Digits, optimiser: Any, epochs: int, steps: int | None = None) -> nn.Module:
    """A short training on the first 1,200 digits."""
    generator = torch.Generator().manual_seed(0)
    model.train()
    rows = [part for _ in range(epochs) for part in torch.randperm(1200, generator=generator).split(64)[:18]]
    for part in rows[:steps]:
        optimiser.zero_grad()
        F.cross_entropy(model(digits[0][part]), digits[1][part]).backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained(digits: Digits) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    return fit(model, digits, torch.optim.Adam(model.parameters(), 3e-3), 8)


@pytest.fixture(scope="module")
def dense(digits: Digits) -> nn.Module:
    torch.manual_seed(0)
    model = Dense()
    return fit(model, digits, torch.optim.Adam(model.parameters(), 3e-3), 8)


def settings(
    weights: str = "int8", granularity: str = "default", activations: str = "int8", scheme: str = "symmetric",
    targets: Sequence[str] = ALL, types: Sequence[str] = ("Conv2d", "Linear"), **others: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """A configuration list of NNI."""
    around = {"quant_dtype": activations, "quant_scheme": scheme}
    own = {
        "_input_": around,
        "_output_": around,
        "weight": {"quant_dtype": weights, "quant_scheme": "symmetric", "granularity": granularity},
    }
    return [
        {
            "op_types": list(types),
            "target_names": list(targets),
            "target_settings": own,
            "quant_dtype": "int8",
            **others,
        }
    ]


def evaluator_of(model: nn.Module, digits: Digits) -> Any:
    """NNI's evaluator over the digits."""
    from nni.compression.utils import TorchEvaluator

    def training(
        model: nn.Module, optimizer: Any, step: Any, scheduler: Any = None, *steps: Any, **limits: Any
    ) -> None:
        most = dict(zip(("max_steps", "max_epochs"), steps, strict=False)) | limits
        fit(model, digits, optimizer, most["max_epochs"] or 1, most["max_steps"])

    def evaluating(model: nn.Module) -> None:
        with torch.no_grad():
            model.eval()(digits[0][:512])

    optimiser = nni.trace(torch.optim.Adam)(model.parameters(), lr=1e-3)
    return TorchEvaluator(training, optimiser, lambda batch, model: None, evaluating_func=evaluating)


def quantizer_of(
    kind: str, model: nn.Module, config: list[dict[str, Any]], digits: Digits, epochs: int = 2, compress: bool = True
) -> tuple[Any, Any]:
    """One of NNI's quantisers after its ``compress``, and the calibration configuration that this returned."""
    from nni.compression import quantization

    torch.manual_seed(0)
    own = copy.deepcopy(model)
    quantizer = getattr(quantization, kind)(own, config, evaluator_of(own, digits))
    if not compress:
        return quantizer, None
    _, calibration = quantizer.compress(1, None) if kind == "PtqQuantizer" else quantizer.compress(None, epochs)
    return quantizer, calibration


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def agree(simulated: nn.Module, exported: QuantizedModel, digits: Digits, share: float = 0.995) -> float:
    """The file says what NNI's simulation says of all 1,797 digits, and is as often right; gives its accuracy."""
    onnx.checker.check_model(exported.model, full_check=True)
    x, y = digits[0], digits[1].numpy()
    with torch.no_grad():
        wanted = simulated.eval()(x).numpy().argmax(1)
    got = run_onnx(exported.model, x).argmax(1)
    assert np.mean(got == wanted) >= share
    assert abs(np.mean(got == y) - np.mean(wanted == y)) <= POINTS
    return float(np.mean(wanted == y))


def integers(exported: QuantizedModel) -> list[str]:
    """Layers that are said to compute in integers, of which the runtime has as many kernels."""
    names = [layer.name for layer in exported.layers if layer.integers]
    kernels = fused(exported.model)
    assert sum(kernels.get(kind, 0) for kind in KERNELS) == len(names), kernels
    return names


# ---- the three quantisers --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["QATQuantizer", "PtqQuantizer", "LsqQuantizer"])
@pytest.mark.parametrize("granularity", ["default", "out_channel"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_convolutional_network_keeps_its_accuracy(
    kind: str, granularity: str, weights: str, trained: nn.Module, digits: Digits
) -> None:
    quantizer, _ = quantizer_of(kind, trained, settings(weights, granularity), digits)
    exported = quantized_onnx(quantizer, digits[0][:1])
    accuracy = agree(quantizer.bound_model, exported, digits)
    assert accuracy > (0.9 if weights == "int8" or kind != "PtqQuantizer" else 0.1)
    assert integers(exported) == [*CONVS, "head"]
    found = operators(exported.model)
    assert found["QuantizeLinear"] >= 10  # five inputs, five outputs
    assert found["DequantizeLinear"] >= 15  # and five weights
    assert operators(exported.model)["BatchNormalization"] == 4  # behind rounded outputs: not folded
    if weights == "int4":
        eight = quantized_onnx(quantizer_of(kind, trained, settings("int8", granularity), digits, 1)[0], digits[0][:1])
        assert exported.model.ByteSize() < eight.model.ByteSize() - 3000  # of 7,376 weights, half a byte each


@pytest.mark.parametrize("kind", ["QATQuantizer", "PtqQuantizer", "LsqQuantizer"])
def test_a_perceptron_keeps_its_accuracy(kind: str, dense: nn.Module, digits: Digits) -> None:
    quantizer, _ = quantizer_of(kind, dense, settings(granularity="out_channel"), digits)
    exported = quantized_onnx(quantizer, digits[0][:1])
    assert agree(quantizer.bound_model, exported, digits) > 0.9
    assert integers(exported) == ["first", "second", "head"]


def test_the_scales_and_zero_points_are_those_of_nni(dense: nn.Module, digits: Digits) -> None:
    config = settings(activations="uint8", scheme="affine", granularity="out_channel")
    quantizer, calibration = quantizer_of("QATQuantizer", dense, config, digits)
    graph = quantized_onnx(quantizer, digits[0][:1]).model.graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pairs = [tuple(tensors[name].item() for name in n.input[1:]) for n in graph.node if n.op_type == "QuantizeLinear"]
    # A ReLU cuts codes below zero off: what comes behind it starts there.
    for layer, zero in (("first", None), ("second", 0), ("head", 0)):
        found = calibration[layer]["_input_0"]
        assert (found["scale"].item(), found["zero_point"].item() if zero is None else zero) in pairs
    by_name = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    for layer in ("first", "second", "head"):
        scale = tensors[by_name[f"{layer}.weight_quantized"].input[1]]
        assert np.array_equal(scale, calibration[layer]["weight"]["scale"].flatten().numpy())


def test_exact_but_for_codes_at_the_border(dense: nn.Module, digits: Digits) -> None:
    quantizer, calibration = quantizer_of("PtqQuantizer", dense, settings(), digits)
    exported = quantized_onnx(quantizer, digits[0][:1])
    with torch.no_grad():
        difference = np.abs(run_onnx(exported.model, digits[0]) - quantizer.bound_model(digits[0]).numpy())
    step = calibration["head"]["_output_0"]["scale"].item()
    assert difference.max() < 2.5 * step  # of the last layer's codes
    assert np.mean(difference < 1e-5) > 0.9


# ---- forms ---------------------------------------------------------------------------------------------------


def test_what_nni_fuses_becomes_one_integer_convolution(trained: nn.Module, digits: Digits) -> None:
    config = settings(granularity="out_channel", fuse_names=FUSED)
    quantizer, _ = quantizer_of("QATQuantizer", trained, config, digits)
    exported = quantized_onnx(quantizer, digits[0][:1])
    assert agree(quantizer.bound_model, exported, digits) > 0.9
    assert integers(exported) == [*CONVS, "head"]
    assert not {"BatchNormalization", "Relu"} & set(operators(exported.model))
    assert fused(exported.model)["QLinearAdd"] == 1


def test_a_normalisation_behind_a_product_goes_into_the_scales(trained: nn.Module, digits: Digits) -> None:
    model = copy.deepcopy(trained)
    with torch.no_grad():  # gains of both signs and of zero
        for norm in (model.bn2, model.bn4):
            norm.weight[::3] *= -1
            norm.weight[1] = 0
    for weights in ("int8", "uint8", "int3"):
        config = settings(weights, activations="uint8", scheme="affine", targets=["_input_", "weight"])
        quantizer, _ = quantizer_of("QATQuantizer", model, config, digits, 1)
        exported = quantized_onnx(quantizer, digits[0][:1])
        agree(quantizer.bound_model, exported, digits)
        assert "BatchNormalization" not in operators(exported.model)
        # The others give their result to the addition, or to the average, as it is.
        assert integers(exported) == ["conv2", "head"]
        with torch.no_grad():
            wanted = quantizer.bound_model(digits[0]).numpy()
        assert np.mean(np.abs(run_onnx(exported.model, digits[0]) - wanted)) < 0.01 * np.abs(wanted).max()


def test_nnis_own_example_configuration(trained: nn.Module, digits: Digits) -> None:
    config = [
        {"op_types": ["Conv2d", "Linear"], "target_names": list(ALL), "quant_dtype": "int8", "quant_scheme": "affine",
         "granularity": "default"},
        {"op_types": ["ReLU"], "target_names": ["_output_"], "quant_dtype": "int8", "quant_scheme": "affine",
         "granularity": "default"},
    ]  # fmt: skip
    quantizer, _ = quantizer_of("QATQuantizer", trained, config, digits)
    exported = quantized_onnx(quantizer, digits[0][:1])
    assert agree(quantizer.bound_model, exported, digits) > 0.9
    assert integers(exported) == [*CONVS, "head"]
    assert "relu1 (ReLU): _output_0 int8, one scale; floats: it has no weight" in "\n".join(exported.report())


@pytest.mark.parametrize("granularity", ["default", "out_channel"])
def test_weights_alone_are_stored_small_and_run_in_floats(granularity: str, trained: nn.Module, digits: Digits) -> None:
    config = settings("int4", granularity, targets=["weight"])
    quantizer, _ = quantizer_of("QATQuantizer", trained, config, digits)
    exported = quantized_onnx(quantizer, digits[0][:1])
    agree(quantizer.bound_model, exported, digits)
    assert not integers(exported)
    assert all("its input is not quantised" in line for line in exported.report())
    with torch.no_grad():
        assert np.allclose(run_onnx(exported.model, digits[0]), quantizer.bound_model(digits[0]).numpy(), atol=1e-3)
    assert exported.model.ByteSize() < 10_000  # 7,856 weights: 31 KB in floats
    assert fused(exported.model)["Conv"] == 4  # decoded at load


def test_activations_of_fewer_bits(trained: nn.Module, digits: Digits) -> None:
    config = settings("int4", "out_channel", activations="uint4", scheme="affine", fuse_names=FUSED)
    quantizer, _ = quantizer_of("QATQuantizer", trained, config, digits, 4)
    exported = quantized_onnx(quantizer, digits[0][:1])
    # A code of four bits is a large step, so that a sum at its border tells.
    agree(quantizer.bound_model, exported, digits, share=0.98)
    assert integers(exported) == [*CONVS, "head"]


def test_a_part_of_the_model(trained: nn.Module, digits: Digits) -> None:
    config = settings(granularity="out_channel", exclude_op_names=["conv1", "head"])
    quantizer, _ = quantizer_of("PtqQuantizer", trained, config, digits)
    exported = quantized_onnx(quantizer, digits[0][:1])
    assert agree(quantizer.bound_model, exported, digits) > 0.9
    assert integers(exported) == ["conv2", "conv3", "conv4"]
    assert fused(exported.model)["Gemm"] == 1


def test_an_input_on_its_makers_grid_needs_no_rounding_of_its_own(trained: nn.Module, digits: Digits) -> None:
    config = settings(granularity="out_channel", targets=["weight", "_output_"], fuse_names=FUSED)
    quantizer, _ = quantizer_of("PtqQuantizer", trained, config, digits)
    exported = quantized_onnx(quantizer, digits[0][:1])
    agree(quantizer.bound_model, exported, digits)
    assert integers(exported) == ["conv2", "conv3"]  # the others read the image, a sum, an average


def test_two_roundings_that_are_one_become_one(trained: nn.Module, digits: Digits) -> None:
    """What NNI rounds as a result and again as the next layer's input."""
    quantizer, _ = quantizer_of("PtqQuantizer", trained, settings(fuse_names=FUSED), digits)
    exported = quantized_onnx(quantizer, digits[0][:1])
    agree(quantizer.bound_model, exported, digits)
    assert integers(exported) == [*CONVS, "head"]
    # Calibrated on the same data, both have one grid: nothing is left that would change values.
    assert quantized_onnx(quantizer, digits[0][:1], exact=False).model == exported.model


def test_roundings_on_grids_that_differ_are_kept_unless_told(dense: nn.Module, digits: Digits) -> None:
    quantizer, calibration = quantizer_of("PtqQuantizer", dense, settings(), digits)
    wider = copy.deepcopy(dict(calibration))
    wider["second"]["_input_0"]["scale"] *= 1.1
    quantizer.update_calibration_config(wider)
    exact, fast = (quantized_onnx(quantizer, digits[0][:1], exact=exact) for exact in (True, False))
    agree(quantizer.bound_model, exact, digits)
    agree(quantizer.bound_model, fast, digits, share=0.99)
    assert integers(fast) == integers(exact) == ["first", "second", "head"]
    assert operators(fast.model)["QuantizeLinear"] == operators(exact.model)["QuantizeLinear"] - 1
    with torch.no_grad():
        wanted = quantizer.bound_model(digits[0]).numpy()
    far, near = (np.abs(run_onnx(found.model, digits[0]) - wanted).mean() for found in (fast, exact))
    assert near < 0.5 * far


class Odd(nn.Module):
    """Layers without an integer form, one that is used twice, a product of three dimensions, a bounded activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cut = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU6()
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.token, self.head = nn.ConvTranspose2d(8, 8, 2, 2), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(self.cut(4 * self.stem(x))))
        x = self.token(self.up(x).flatten(2).transpose(1, 2))
        return self.head(x.mean(1))


def test_layers_without_an_integer_form_stay_floats_and_say_so(digits: Digits) -> None:
    torch.manual_seed(0)
    config = settings(types=["Conv2d", "ConvTranspose2d", "Linear"])
    config += [{"op_types": ["ReLU6"], "target_names": ["_output_"], "quant_dtype": "int8"}]
    model = Odd()
    model = fit(model, digits, torch.optim.Adam(model.parameters(), 3e-3), 3)
    quantizer, _ = quantizer_of("PtqQuantizer", model, config, digits)
    exported = quantized_onnx(quantizer, digits[0][:1])
    agree(quantizer.bound_model, exported, digits, share=0.99)
    by_name = {layer.name: layer for layer in exported.layers}
    assert not by_name["up"].integers
    assert "ONNX has no integer operator for a ConvTranspose2d" in by_name["up"].why
    assert {name for name, layer in by_name.items() if layer.integers} == {"stem", "twice", "token", "head"}
    kernels = fused(exported.model)
    assert kernels["QLinearConv"] == 3
    assert kernels["ConvTranspose"] == 1


def test_scales_of_inputs_by_channel_and_of_weights_by_block(trained: nn.Module, digits: Digits) -> None:
    config = settings()
    config[0]["target_settings"]["_input_"] = {
        "quant_dtype": "int8", "quant_scheme": "symmetric", "granularity": "per_channel",
    }  # fmt: skip
    config[0] |= {"op_names": ["conv2"]}
    blocks = settings(granularity=[4, -1, -1, -1], op_names=["conv4"])  # type: ignore[arg-type]
    columns = settings(granularity="in_channel", op_names=["conv3"])
    quantizer, _ = quantizer_of("PtqQuantizer", trained, [*config, *blocks, *columns], digits)
    exported = quantized_onnx(quantizer, digits[0][:1])
    agree(quantizer.bound_model, exported, digits)
    by_name = {layer.name: layer for layer in exported.layers}
    assert by_name["conv2"].why == "its input has a scale for each channel"
    assert "its weight has no scale of output channels" in by_name["conv3"].why
    assert by_name["conv4"].integers  # every channel has its block's


def test_masks_of_a_pruner_in_the_same_pipeline(trained: nn.Module, digits: Digits) -> None:
    from nni.compression.pruning import L1NormPruner
    from nni.compression.quantization import PtqQuantizer

    model = copy.deepcopy(trained)
    masked = [{"op_names": ["conv1", "conv2"], "sparse_ratio": 0.25}]
    pruner = L1NormPruner(model, masked, evaluator_of(model, digits))
    pruner.compress()
    config = settings(granularity="out_channel", op_names=["conv2", "conv3"])
    quantizer = PtqQuantizer.from_compressor(pruner, config)
    quantizer.compress(1, None)
    assert pruner.get_masks()["conv2"]["weight"].mean() == 0.75
    exported = quantized_onnx(quantizer, digits[0][:1])
    agree(model, exported, digits)
    with torch.no_grad():
        wanted = model(digits[0]).numpy()
    assert np.mean(np.abs(run_onnx(exported.model, digits[0]) - wanted)) < 0.01 * np.abs(wanted).max()


# ---- alive and saved -------------------------------------------------------------------------------------


def test_the_quantiser_goes_on_after_an_export(trained: nn.Module, digits: Digits) -> None:
    quantizer, _ = quantizer_of("QATQuantizer", trained, settings(fuse_names=FUSED), digits, 1)
    model = quantizer.bound_model.eval()
    with torch.no_grad():
        before = model(digits[0][:64])
    first = quantized_onnx(quantizer, digits[0][:1])
    with torch.no_grad():
        assert torch.equal(model(digits[0][:64]), before)
    assert quantized_onnx(model, digits[0][:1]).model == first.model  # the wrapped model alone is enough
    parameters = dict(model.named_parameters())
    fit(model, digits, torch.optim.Adam(parameters.values(), 1e-3), 1)
    after = quantized_onnx(quantizer, digits[0][:1])
    agree(model, after, digits)
    assert after.model != first.model


@pytest.mark.parametrize("fuse", [[], FUSED])
def test_what_was_saved_is_enough(fuse: list[tuple[str, ...]], trained: nn.Module, digits: Digits) -> None:
    config = settings(granularity="out_channel", **({"fuse_names": fuse} if fuse else {}))
    quantizer, calibration = quantizer_of("QATQuantizer", trained, config, digits, 1)
    alive = quantized_onnx(quantizer, digits[0][:1])
    with torch.no_grad():
        quantizer.bound_model.eval()(digits[0][:8])
    saved = {key: value.contiguous() for key, value in quantizer.bound_model.state_dict().items()}
    text = json.dumps(calibration_json(calibration))

    wrapped = load_state(Net(), load(save(saved)))
    again = quantized_onnx(wrapped, digits[0][:1], json.loads(text), fuse_names=fuse)
    assert again.model == alive.model
    assert again.layers == alive.layers

    quantizer.unwrap_model()
    plain = Net()
    plain.load_state_dict(quantizer.bound_model.state_dict())
    assert quantized_onnx(plain, digits[0][:1], calibration, fuse_names=fuse).model == alive.model


def test_the_file_and_its_report(dense: nn.Module, digits: Digits, tmp_path: Any) -> None:
    quantizer, _ = quantizer_of("PtqQuantizer", dense, settings(), digits)
    exported = quantized_onnx(quantizer, digits[0][:1])
    exported.save(tmp_path / "model.onnx")
    assert onnx.load(tmp_path / "model.onnx") == exported.model
    assert exported.report()[0] == (
        "first (Linear): weight int8, one scale, _input_0 int8, one scale, _output_0 int8, one scale; integers"
    )


# ---- what a user gets wrong ------------------------------------------------------------------------------


def test_a_quantiser_that_was_not_calibrated(trained: nn.Module, digits: Digits) -> None:
    for kind in ("QATQuantizer", "PtqQuantizer", "LsqQuantizer"):
        quantizer, _ = quantizer_of(kind, trained, settings(), digits, compress=False)
        with pytest.raises(CompressionError, match=r"conv1\.\w+ has no scale: it was never calibrated"):
            quantized_onnx(quantizer, digits[0][:1])


def test_a_configuration_of_another_model(dense: nn.Module, trained: nn.Module, digits: Digits) -> None:
    _, calibration = quantizer_of("PtqQuantizer", dense, settings(granularity="out_channel"), digits)
    with pytest.raises(CompressionError, match="names \\['first', 'second'\\], which the model does not have"):
        quantized_onnx(trained, digits[0][:1], calibration)
    other = Dense()
    other.second = nn.Linear(64, 32, bias=False)
    other.head = nn.Linear(32, 10)
    with pytest.raises(CompressionError, match=r"second\.weight has scales \[64, 1\] for a tensor \[32, 64\]"):
        quantized_onnx(other, digits[0][:1], calibration)
    with pytest.raises(CompressionError, match="does not fit the model at"):
        load_state(Net(), dense.state_dict())
    moved = {**calibration, "relu1": calibration["first"]}
    with pytest.raises(CompressionError, match="a scale for weight of 'relu1', which is a ReLU without one"):
        quantized_onnx(dense, digits[0][:1], moved)


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "int16", "int1", "float"])
def test_a_type_that_is_not_an_integer_of_2_to_8_bits(dtype: str, dense: nn.Module, digits: Digits) -> None:
    entry = {"scale": 0.1, "zero_point": 0, "quant_dtype": dtype}
    with pytest.raises(CompressionError, match=f"first.weight has the type '{dtype}'"):
        quantized_onnx(dense, digits[0][:1], {"first": {"weight": entry}})


@pytest.mark.parametrize(("scale", "zero"), [(float("nan"), 0), (-0.1, 3), (0.1, 0.5), (0.1, 300)])
def test_a_scale_that_cannot_be(scale: float, zero: float, dense: nn.Module, digits: Digits) -> None:
    entry = {"scale": scale, "zero_point": zero, "quant_dtype": "int8"}
    with pytest.raises(CompressionError, match=r"first._input_0 has the scale \["):
        quantized_onnx(dense, digits[0][:1], {"first": {"_input_0": entry}})


def test_quantisers_whose_rounding_onnx_does_not_have(dense: nn.Module, digits: Digits) -> None:
    quantizer, _ = quantizer_of("BNNQuantizer", dense, settings(targets=["weight"]), digits, compress=False)
    with pytest.raises(CompressionError, match="'first' rounds weight by 'bnn_clamp_round'"):
        quantized_onnx(quantizer, digits[0][:1])


def test_arguments(dense: nn.Module, digits: Digits) -> None:
    entry = {"first": {"weight": {"scale": 0.1, "zero_point": 0, "quant_dtype": "int8"}}}
    with pytest.raises(CompressionError, match="a plain model without a calibration configuration"):
        quantized_onnx(dense, digits[0][:1])
    with pytest.raises(CompressionError, match="cannot export a str"):
        quantized_onnx("model", digits[0][:1], entry)
    with pytest.raises(CompressionError, match="the example is a ndarray"):
        quantized_onnx(dense, digits[0][:1].numpy(), entry)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="nothing is quantised"):
        quantized_onnx(dense, digits[0][:1], {})
    for chain, message in (
        (("first", "bn"), r"fuse_names has \['bn'\]"),
        (("head", "relu1"), "starts with 'head', which is not quantised"),
        (("first", "second"), "puts 'second', a Linear, behind 'first'"),
    ):
        with pytest.raises(CompressionError, match=message):
            quantized_onnx(dense, digits[0][:1], entry, fuse_names=[chain])

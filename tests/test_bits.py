"""Few bits: what is trained is what is exported, the file shrinks by the bits, the runtime decodes them at load."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load, save
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from nas.compression import Cluster, Quantize, WeightPrune, apply_passes, restore
from nas.compression.cluster import ClusterConv2d, ClusterLinear, cluster_values
from nas.compression.fake_quant import QuantConv2d, QuantLinear, Setting, fake_quantize_weight, weight_grid
from nas.compression.fold import fold_batchnorm
from nas.compression.storage import Affine, Codebook, Decode, Signed, decoded, spell_out, store_codes
from nas.errors import CompressionError
from nas.student.export import INPUT, deployable, export_float, onnx_macs_params, to_onnx
from nas.testing import check_pass
from tests.helpers import fused, run_onnx

DECODING = {"BitShift", "BitwiseAnd", "Einsum", "Cast", "Reshape", "Sub", "Mul", "Slice", "Gather"}
POINTS = 0.002  # accuracies of torch and of the file may differ by 0.2 points
CHAIN = 500  # bytes that the nodes and constants of one decoding take at most, before names are shortened


class Net(nn.Module):
    """A plain start, a residual block, a pooled linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.inner = self._unit(1, 16), self._unit(16, 32, 2), self._unit(32, 32)
        self.outer = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.relu, self.last = nn.ReLU(), self._unit(32, 64, 2)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(64, 10)

    @staticmethod
    def _unit(cin: int, cout: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        x = self.relu(self.outer(self.inner(x)) + x)
        return self.head(self.pool(self.last(x)).flatten(1))


CONVS = ["first.0", "second.0", "inner.0", "outer.0", "last.0"]
LAYERS = [*CONVS, "head"]
SIZES = {"first.0": 144, "second.0": 4608, "inner.0": 9216, "outer.0": 9216, "last.0": 18432, "head": 640}


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


DENSE = ["1", "3", "5"]


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


Digits = tuple[torch.Tensor, torch.Tensor]


def fit(model: nn.Module, digits: Digits, epochs: int, lr: float) -> nn.Module:
    """A short training on the first 1,200 digits."""
    x, y = digits[0][:1200], digits[1][:1200]
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-2)
    steps = epochs * 18
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(1200, generator=generator).split(64)[:18]:
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained(digits: Digits) -> nn.Module:
    torch.manual_seed(0)
    return fit(Net(), digits, 8, 0.01)


@pytest.fixture(scope="module")
def dense(digits: Digits) -> nn.Module:
    torch.manual_seed(0)
    return fit(perceptron(), digits, 8, 0.01)


def tuned(model: nn.Module, plan: dict[str, Any], digits: Digits, epochs: int = 2) -> tuple[nn.Module, onnx.ModelProto]:
    """Compressed, fine-tuned, exported; the counts are those of the uncompressed model, the checker is content."""
    x = digits[0]
    compressed = fit(apply_passes(copy.deepcopy(model), plan, x[:256]), digits, epochs, 0.003)
    exported = to_onnx(compressed, plan, x[:1], x[:512].numpy())
    onnx.checker.check_model(exported, full_check=True)
    assert onnx_macs_params(exported) == onnx_macs_params(export_float(deployable(model, {}), x[:1]))
    return compressed, exported


def agree(model: nn.Module, exported: onnx.ModelProto, digits: Digits) -> float:
    """Torch and the file say the same of all 1,797 digits, and are as often right; gives torch's accuracy."""
    x, y = digits[0], digits[1].numpy()
    with torch.no_grad():
        wanted = model(x).numpy().argmax(1)
    got = run_onnx(exported, x).argmax(1)
    assert np.mean(got == wanted) >= 0.995
    assert abs(np.mean(got == y) - np.mean(wanted == y)) <= POINTS
    return float(np.mean(wanted == y))


# ---- storage -----------------------------------------------------------------------------------------


def reading(shape: tuple[int, ...], elem: int) -> onnx.ModelProto:
    """A graph that adds a stored weight to its input, through a dequantisation where it is int8."""
    weight = helper.make_tensor("w", elem, shape, np.zeros(math.prod(shape)).astype(int).tolist())
    nodes, name = [], "w"
    if elem == onnx.TensorProto.INT8:
        nodes.append(helper.make_node("DequantizeLinear", ["w", "one"], ["floats"]))
        name = "floats"
    nodes.append(helper.make_node("Add", [INPUT, name], ["y"]))
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(INPUT, 1, shape)], [helper.make_tensor_value_info("y", 1, shape)],
        [weight, numpy_helper.from_array(np.float32(1), "one")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def decodings(bits: int, channels: int, columns: int = 60) -> dict[str, Decode]:
    rng = np.random.default_rng(bits)
    zero = rng.integers(0, 2 ** min(bits, 7), channels).astype(np.float32)
    return {
        "affine": Affine(rng.random(channels).astype(np.float32), zero),
        "one scale": Affine(np.array(0.5, np.float32), np.array(3, np.float32)),
        "along 1": Affine(rng.random(columns).astype(np.float32), np.zeros(columns, np.float32), axis=1),
        "signed": Signed(zero if bits < 8 else np.array(128, np.float32)),
        "codebook": Codebook(rng.normal(size=2**bits).astype(np.float32)),
    }


@pytest.mark.parametrize("kind", decodings(1, 1))
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_come_back(bits: int, kind: str) -> None:
    """Whatever the bits, channels and left-over weights of the last byte; nothing is left to do at run time."""
    for shape in ((64, 60, 9), (63, 59, 9)):
        decode = decodings(bits, *shape[:2])[kind]
        codes = np.random.default_rng(0).integers(0, 2**bits, shape).astype(np.uint8)
        signed = isinstance(decode, Signed)
        model = reading(shape, onnx.TensorProto.INT8 if signed else onnx.TensorProto.FLOAT)
        before = model.ByteSize()
        assert store_codes(model, "w", codes, bits, decode) is (not signed or bits < 8)
        onnx.checker.check_model(model, full_check=True)
        got = run_onnx(model, torch.zeros(shape))
        np.testing.assert_array_equal(got, decoded(codes, decode).astype(np.float32))
        # the optimised graph holds the decoded weight
        assert not DECODING & set(fused(model))
        stored = bits * math.ceil(codes.size / 8)
        extra = model.ByteSize() - (before - codes.size * (1 if signed else 4)) - stored
        assert extra <= CHAIN + 250 + (4 * 2**bits if kind == "codebook" else 8 * 64)


def test_what_packing_would_enlarge_is_written_out() -> None:
    model = reading((2, 3), onnx.TensorProto.FLOAT)
    codes = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert not store_codes(model, "w", codes, 3, Affine(np.float32(0.5), np.float32(2)))
    assert [node.op_type for node in model.graph.node] == ["Add"]
    np.testing.assert_array_equal(run_onnx(model, torch.zeros(2, 3)), (np.arange(6).reshape(2, 3) - 2) * 0.5)


@pytest.mark.parametrize(
    ("name", "codes", "bits", "message"),
    [
        ("v", np.zeros((2, 3), np.uint8), 2, "no initializer 'v'"),
        ("w", np.zeros((3, 2), np.uint8), 2, r"codes uint8 \[3, 2\][^$]*Expected: uint8 \[2, 3\]"),
        ("w", np.full((2, 3), 4, np.uint8), 2, "up to 4[^$]*below 4"),
        ("w", np.zeros((2, 3), np.int64), 2, "codes int64"),
        ("w", np.zeros((2, 3), np.uint8), 9, "9 bits for 'w'"),
        ("w", np.zeros((2, 3), np.uint8), 0, "0 bits for 'w'"),
    ],
)
def test_codes_that_do_not_fit(name: str, codes: Any, bits: int, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        store_codes(reading((2, 3), 1), name, codes, bits, Affine(np.float32(1), np.float32(0)))


def test_stored_weights_can_be_spelt_out_again() -> None:
    """A later pass gets initializers, whatever an earlier one made of them; what others need stays."""
    model = reading((64, 32), onnx.TensorProto.FLOAT)
    codes = np.random.default_rng(0).integers(0, 8, (64, 32)).astype(np.uint8)
    decode = Affine(np.float32(0.1), np.float32(4))
    assert spell_out(model, ["w"]) is model
    store_codes(model, "w", codes, 3, decode)
    size = model.ByteSize()
    whole = spell_out(model, ["w"])
    assert model.ByteSize() == size
    assert [node.op_type for node in whole.graph.node] == ["Add"]
    assert {t.name for t in whole.graph.initializer} == {"w", "one"}
    np.testing.assert_array_equal(numpy_helper.to_array(whole.graph.initializer[-1]), decoded(codes, decode))


# ---- bits --------------------------------------------------------------------------------------------


def most(values: Any, slow: Any) -> list[Any]:
    """Some of many similar cases run in the slow round alone."""
    return [pytest.param(value, marks=pytest.mark.slow if value in slow else ()) for value in values]


@pytest.mark.parametrize("bits", most(range(2, 9), slow=(3, 5, 6)))
def test_trained_bits_are_exported_bits(bits: int, trained: nn.Module, digits: Digits) -> None:
    plan = {"quantize": dict.fromkeys(LAYERS, bits)}
    model, exported = tuned(trained, plan, digits)
    assert agree(model, exported, digits) > 0.9
    kernels = fused(exported)
    assert (kernels["QLinearConv"], kernels["QGemm"], kernels["QLinearAdd"]) == (5, 1, 1)
    assert not {"Conv", "Gemm", *DECODING} & set(kernels)


def test_files_shrink_by_the_bits(trained: nn.Module, digits: Digits) -> None:
    x = digits[0]

    def size(bits: int) -> int:
        plan = {"quantize": dict.fromkeys(LAYERS, bits)}
        return to_onnx(apply_passes(copy.deepcopy(trained), plan, x[:64]), plan, x[:1], x[:64].numpy()).ByteSize()

    eight = size(8)
    for bits in range(2, 8):
        saved = sum(n - bits * math.ceil(n / 8) for n in SIZES.values())
        assert saved - CHAIN * len(SIZES) <= eight - size(bits) <= saved


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", most([2, 4, 7], slow=(4,)))
def test_the_exported_weight_is_on_the_trained_grid(
    bits: int, symmetric: bool, trained: nn.Module, digits: Digits
) -> None:
    """The tensor that the integer kernel reads times its scale is the weight that training computed with."""
    setting = {"weights": bits, "symmetric": symmetric}
    plan = {"quantize": dict.fromkeys(LAYERS, setting)}
    model, exported = tuned(trained, plan, digits, epochs=1)
    for name in LAYERS:
        layer: Any = model.get_submodule(name)
        grid = weight_grid(layer.weight, layer.setting)
        wanted = fake_quantize_weight(layer.weight, grid, training=False).detach().numpy()
        quantized = spell_out(exported, [f"{name}.weight_quantized"], onnx.TensorProto.INT8)
        tensors = {t.name: numpy_helper.to_array(t) for t in quantized.graph.initializer}
        reader = next(n for n in quantized.graph.node if f"{name}.weight_quantized" in n.input)
        codes, scale = tensors[reader.input[0]], tensors[reader.input[1]].reshape(-1, *[1] * (wanted.ndim - 1))
        np.testing.assert_allclose(codes * scale, wanted, rtol=1e-6, atol=1e-9)
        assert max(len(np.unique(row)) for row in codes) <= 2**bits - symmetric
        if symmetric:
            assert np.abs(codes.astype(int)).max() == 2 ** (bits - 1) - 1


SETTINGS: dict[str, dict[str, Any]] = {
    "asymmetric": {"weights": 4, "symmetric": False},
    "weights only": {"weights": 3, "activations": None},
    "weights only, asymmetric": {"weights": 8, "activations": None, "symmetric": False},
    "four and four": {"weights": 4, "activations": 4},
    "activations only": {"activations": 3},
    "six": {"weights": 6, "activations": 6},
}


@pytest.mark.parametrize("kind", most(SETTINGS, slow=("six", "weights only, asymmetric")))
def test_other_settings(kind: str, trained: nn.Module, digits: Digits) -> None:
    setting = SETTINGS[kind]
    model, exported = tuned(trained, {"quantize": dict.fromkeys(LAYERS, setting)}, digits)
    assert agree(model, exported, digits) > 0.9
    kernels = fused(exported)
    if setting.get("activations", 8) is None:
        assert (kernels["Conv"], kernels["Gemm"]) == (5, 1)
        assert not {"QuantizeLinear", *DECODING} & set(kernels)
        x = digits[0][:300]
        with torch.no_grad():
            np.testing.assert_allclose(run_onnx(exported, x), model(x).numpy(), atol=1e-3)
    else:
        assert (kernels["QLinearConv"], kernels["QGemm"]) == (5, 1)
        assert not {"Conv", "Gemm", *DECODING} & set(kernels)
        # one pass over the codes for every narrow input
        assert kernels.get("Clip", 0) == (6 if setting.get("activations", 8) < 8 else 0)


@pytest.mark.parametrize("setting", [8, 4, 2, SETTINGS["asymmetric"], SETTINGS["four and four"]], ids=str)
def test_without_sums_and_pooling_the_file_is_the_simulation(setting: Any, dense: nn.Module, digits: Digits) -> None:
    """Nothing is rounded in the file that training did not round: logits agree to the last bits of a float."""
    model, exported = tuned(dense, {"quantize": dict.fromkeys(DENSE, setting)}, digits)
    with torch.no_grad():
        wanted = model(digits[0]).numpy()
    assert np.mean(np.abs(run_onnx(exported, digits[0]) - wanted) > 1e-3) < (0.01 if setting != 8 else 0.05)
    agree(model, exported, digits)


@pytest.mark.parametrize("setting", [{"dynamic": True}, {"weights": 3, "dynamic": True, "symmetric": False}])
def test_dynamic_ranges(setting: dict[str, Any], dense: nn.Module, digits: Digits) -> None:
    plan = {"quantize": dict.fromkeys(DENSE, setting)}
    model, exported = tuned(dense, plan, digits)
    assert agree(model, exported, digits) > 0.9
    kernels = fused(exported)
    assert kernels["DynamicQuantizeMatMul"] == 3
    assert not {"Gemm", "MatMul", *DECODING} & set(kernels)
    # a brighter picture saturates fixed ranges, and not these
    x = 4 * digits[0][:300]
    with torch.no_grad():
        assert np.abs(run_onnx(exported, x) - model(x).numpy()).mean() < 0.01
    check_pass(Quantize, dense, plan["quantize"], digits[0][:32])


def test_mixed_and_partial(trained: nn.Module, digits: Digits) -> None:
    """Every layer its own way, and the ones that are not named as they were."""
    settings: dict[str, Any] = {
        "second.0": 8, "inner.0": 3, "outer.0": {"weights": 5, "activations": 4},
        "last.0": {"weights": 2, "activations": None}, "head": {"weights": 4, "dynamic": True},
    }  # fmt: skip
    model, exported = tuned(trained, {"quantize": settings}, digits)
    assert agree(model, exported, digits) > 0.9
    kernels = fused(exported)
    assert (kernels["QLinearConv"], kernels["Conv"], kernels["DynamicQuantizeMatMul"]) == (3, 2, 1)
    (first,) = [t for t in exported.graph.initializer if list(t.dims) == [16, 1, 3, 3]]
    plain = deployable(model, {"quantize": settings})
    np.testing.assert_array_equal(numpy_helper.to_array(first), plain.get_submodule("first.0").weight.detach().numpy())


def test_restored_layers_are_the_trained_ones(trained: nn.Module, digits: Digits) -> None:
    """Below 8 bits the float weights of a student are those of the grid: in floats it is as good as it was trained."""
    plan = {"quantize": dict.fromkeys(LAYERS, 2)}
    model, _ = tuned(trained, plan, digits)
    x, y = digits
    plain = deployable(model, plan)
    for name in LAYERS:
        layer: Any = plain.get_submodule(name)
        assert type(layer) in (nn.Conv2d, nn.Linear)
        assert all(len(row.unique()) <= 3 for row in layer.weight)
    with torch.no_grad():
        assert float((plain(x).argmax(1) == y).float().mean()) > float((model(x).argmax(1) == y).float().mean()) - 0.02


@pytest.mark.parametrize("setting", [4, SETTINGS["weights only"], {"activations": 4}, {"dynamic": True}], ids=str)
def test_layers_that_were_split(setting: Any, digits: Digits) -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.Conv2d(4, 8, 1))
            self.linear = nn.Sequential(nn.Linear(288, 16, bias=False), nn.Linear(16, 10))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.relu(self.conv(x)).flatten(1))

    torch.manual_seed(0)
    names = ["linear"] if isinstance(setting, dict) and "dynamic" in setting else ["conv", "linear"]
    check_pass(Quantize, Split().eval(), dict.fromkeys(names, setting), digits[0][:32])
    check_pass(Cluster, Split().eval(), dict.fromkeys(names, 8), digits[0][:32])


def test_twin_layers_of_one_content(digits: Digits) -> None:
    """The exporter merges equal tensors: here the biases, all of them zero after an untrained normalisation."""
    torch.manual_seed(0)
    check_pass(Quantize, Net().eval(), dict.fromkeys(LAYERS, 4), digits[0][:32])


@pytest.mark.parametrize("compression", ["quantize", "cluster"])
def test_a_saved_state_fits_the_skeleton(compression: str, trained: nn.Module, digits: Digits) -> None:
    x = digits[0]
    settings = {"quantize": {"first.0": 3, "last.0": SETTINGS["four and four"]}, "cluster": {"first.0": 16, "head": 5}}
    plan = {compression: settings[compression]}
    model, _ = tuned(trained, plan, digits, epochs=1)
    state = load(save({key: value.contiguous() for key, value in model.state_dict().items()}))
    torch.manual_seed(1)
    skeleton = apply_passes(Net().eval(), plan, x[:16]).eval()
    skeleton.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(skeleton(x[:64]), model(x[:64]))


@pytest.mark.parametrize(
    "plan",
    [
        {"quantize": {"first.0": 4, "head": SETTINGS["asymmetric"]}},
        {"quantize": {"first.0": SETTINGS["four and four"], "head": {"dynamic": True}}},
        {"cluster": {"first.0": 16, "head": 4}},
    ],
    ids=str,
)
def test_the_simulation_is_a_program_of_torch_export(plan: dict[str, Any], trained: nn.Module, digits: Digits) -> None:
    x = digits[0]
    model = apply_passes(copy.deepcopy(trained), plan, x[:64]).eval()
    batch = torch.export.Dim("batch", min=1, max=65536)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(buffer).module()(x[:64]), model(x[:64]))


# ---- what is asked -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"first.0": bits}, rf"{bits!r} bits for 'first\.0'[^$]*2\.\.8") for bits in (0, 1, 9, 3.5, True, "4", None)),
        ({"first.0": {"weights": 1}}, r"1 bits for the weights for 'first\.0'[^$]*2\.\.8"),
        ({"first.0": {"activations": 9}}, r"9 bits for the activations for 'first\.0'[^$]*or None"),
        ({"first.0": {"bits": 4}}, r"'first\.0' sets \['bits'\][^$]*weights, activations, symmetric, dynamic"),
        ({"first.0": {"symmetric": 1}}, r"symmetric is 1 for 'first\.0'"),
        ({"first.0": {"dynamic": True}}, r"dynamic ranges for the Conv2d 'first\.0'[^$]*Linear"),
        ({"head": {"dynamic": True, "activations": 4}}, "dynamic with activations 4 for 'head'"),
        ({"head": {"symmetric": False}}, "asymmetric weights of 8 bits[^$]*at most 7"),
        ({"first.1": 4}, r"'first\.1' is a BatchNorm2d"),
        ({"frist.0": 4}, r"no module 'frist\.0'[^$]*first\.0"),
    ],
)
def test_impossible_quantisation(settings: dict[str, Any], message: str, digits: Digits) -> None:
    with pytest.raises(CompressionError, match=message):
        Quantize(settings).apply(Net(), digits[0][:8])


@pytest.mark.parametrize("clusters", [0, 1, 257, 3.5, True, "16", None])
def test_impossible_numbers_of_clusters(clusters: Any, digits: Digits) -> None:
    with pytest.raises(CompressionError, match=rf"{clusters!r} values for 'first\.0'[^$]*2\.\.256"):
        Cluster({"first.0": clusters}).apply(Net(), digits[0][:8])


@pytest.mark.parametrize("order", [("quantize", "cluster"), ("cluster", "quantize")])
def test_one_layer_has_either_bits_or_clusters(order: tuple[str, str], trained: nn.Module, digits: Digits) -> None:
    values = {"quantize": 4, "cluster": 16}
    plan = {kind: {"inner.0": values[kind]} for kind in order}
    with pytest.raises(CompressionError, match=rf"{order[1]}: 'inner\.0' is a (Quant|Cluster)Conv2d[^$]*one of"):
        apply_passes(copy.deepcopy(trained), plan, digits[0][:8])


@pytest.mark.parametrize("order", [("quantize", "cluster"), ("cluster", "quantize")])
def test_different_layers_may_have_either(order: tuple[str, str], trained: nn.Module, digits: Digits) -> None:
    settings: dict[str, Any] = {"quantize": {"first.0": 4, "inner.0": 8}, "cluster": {"last.0": 16, "outer.0": 8}}
    model, exported = tuned(trained, {kind: settings[kind] for kind in order}, digits)
    assert agree(model, exported, digits) > 0.9
    kernels = fused(exported)
    assert kernels["QLinearConv"] >= 2  # the runtime makes an integer kernel of a layer between two such, too
    assert not DECODING & set(kernels)


def test_options_become_settings(digits: Digits) -> None:
    model, x = Net(), digits[0][:8]
    assert Quantize.settings_for(model, x) == dict.fromkeys(LAYERS, 8)
    assert Quantize.settings_for(model, x, bits=4, skip=["first.0", "head"]) == dict.fromkeys(LAYERS[1:5], 4)
    assert Quantize.settings_for(model, x, weights=3, activations=None, layers=["*er.0"]) == {
        name: {"weights": 3, "activations": None} for name in ("inner.0", "outer.0")
    }
    assert Quantize.settings_for(model, x, bits=5, symmetric=False, layers=["head"]) == {
        "head": {"weights": 5, "symmetric": False}
    }
    assert Quantize.settings_for(model, x, dynamic=True) == {"head": {"weights": 8, "dynamic": True}}
    assert Cluster.settings_for(model, x) == dict.fromkeys(LAYERS, 16)
    assert Cluster.settings_for(model, x, clusters=4, layers=["head"]) == {"head": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "9 bits for the weights"),
        ({"activations": "none"}, "'none' bits for the activations"),
        ({"layers": ["frist*"]}, r"'frist\*' fits no Conv2d or Linear[^$]*first"),
        ({"skip": ["*"]}, "skip leaves none"),
        ({"dynamic": True, "layers": ["first.0"]}, r"'first\.0' fits no Linear[^$]*head"),
        ({"ratio": 0.5}, "no option 'ratio'[^$]*symmetric"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str, digits: Digits) -> None:
    with pytest.raises(CompressionError, match=message):
        Quantize.settings_for(Net(), digits[0][:8], **options)


def test_impossible_options_of_clusters(digits: Digits) -> None:
    with pytest.raises(CompressionError, match="257 values"):
        Cluster.settings_for(Net(), digits[0][:8], clusters=257)
    with pytest.raises(CompressionError, match="no option 'bits'"):
        Cluster.settings_for(Net(), digits[0][:8], bits=4)


def test_narrow_inputs_need_their_trained_ranges(digits: Digits) -> None:
    exported = export_float(fold_batchnorm(Net().eval()), digits[0][:1])
    with pytest.raises(CompressionError, match=r"no trained range for the 4-bit input of 'first\.0'[^$]*restore"):
        Quantize({"first.0": {"activations": 4}}).rewrite(exported, digits[0][:64].numpy())


def test_settings_are_written_as_short_as_they_can_be() -> None:
    for value in (8, 3, {"weights": 3, "activations": None}, {"weights": 7, "symmetric": False}):
        assert Setting.of(value, "x").written() == value
    assert Setting.of({"weights": 4, "activations": 8, "symmetric": True}, "x").written() == 4


# ---- clusters ----------------------------------------------------------------------------------------


def test_clusters_are_those_of_k_means() -> None:
    """As close to the weights as scikit-learn's from the same start, and every weight goes to its nearest value."""
    weight = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    for clusters in (2, 8, 16, 64):
        codebook, index = cluster_values(weight, clusters)
        start = np.linspace(weight.min(), weight.max(), clusters)[:, None]
        wanted = KMeans(clusters, init=start, n_init=1, max_iter=300, tol=0).fit(weight.reshape(-1, 1))
        assert np.square(codebook[index] - weight).sum() < 1.02 * wanted.inertia_
        assert len(np.unique(index)) == clusters
        nearest = np.abs(weight[..., None] - codebook).argmin(-1)
        assert np.mean(nearest == index) > 0.999


@pytest.mark.parametrize("weight", [np.zeros((3, 3), np.float32), np.arange(6, dtype=np.float32).reshape(2, 3)])
def test_fewer_weights_than_clusters(weight: Any) -> None:
    codebook, index = cluster_values(weight, 16)
    assert codebook.shape == (16,)
    np.testing.assert_allclose(codebook[index], weight, atol=1e-6)


def test_a_value_gets_the_gradients_of_all_its_weights() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    layer = ClusterLinear(copy.deepcopy(linear), 4)
    x = torch.rand(7, 6)
    layer(x).square().sum().backward()
    plain = layer.plain()
    plain.weight.requires_grad_()
    plain(x).square().sum().backward()
    assert plain.weight.grad is not None
    wanted = torch.zeros(4).index_add_(0, layer.index.flatten().long(), plain.weight.grad.flatten())
    torch.testing.assert_close(layer.codebook.grad, wanted)


@pytest.mark.parametrize("clusters", most([2, 5, 16, 200], slow=(16,)))
def test_trained_values_are_exported_values(clusters: int, trained: nn.Module, digits: Digits) -> None:
    plan = {"cluster": dict.fromkeys(LAYERS, clusters)}
    model, exported = tuned(trained, plan, digits)
    assert agree(model, exported, digits) > 0.8
    x = digits[0][:300]
    with torch.no_grad():
        np.testing.assert_allclose(run_onnx(exported, x), model(x).numpy(), atol=1e-3)
    kernels = fused(exported)
    assert (kernels["Conv"], kernels["Gemm"]) == (5, 1)
    assert not DECODING & set(kernels)
    plain = restore(copy.deepcopy(model), plan)
    for name in LAYERS:
        layer: Any = plain.get_submodule(name)
        assert type(layer) in (nn.Conv2d, nn.Linear)
        assert len(layer.weight.unique()) <= clusters
    # what a float file has more: four bytes a weight, less the bits of an index and the codebook
    bits = math.ceil(math.log2(clusters))
    saved = sum(4 * n - bits * math.ceil(n / 8) for n in SIZES.values())
    extra = (CHAIN + 4 * clusters) * len(SIZES)
    assert saved - extra <= export_float(plain, x[:1]).ByteSize() - exported.ByteSize()


def test_pruned_weights_stay_zero_among_the_values(trained: nn.Module, digits: Digits) -> None:
    plan = {"weight_prune": dict.fromkeys(LAYERS, 0.7), "cluster": dict.fromkeys(LAYERS, 16)}
    model, exported = tuned(trained, plan, digits)
    x = digits[0][:300]
    with torch.no_grad():
        np.testing.assert_allclose(run_onnx(exported, x), model(x).numpy(), atol=1e-3)
    untrained = apply_passes(Net(), plan, x[:8])
    untrained.load_state_dict(model.state_dict())  # zeros or not, the structure is the settings' own
    plain = restore(copy.deepcopy(model), plan)
    for name in LAYERS:
        weight = plain.get_parameter(f"{name}.weight")
        assert float((weight == 0).float().mean()) >= 0.69
        assert 2 < len(weight.unique()) <= 16


def test_a_layer_of_zeros_stays_one(digits: Digits) -> None:
    linear = nn.Linear(4, 3)
    nn.init.zeros_(linear.weight)
    layer = ClusterLinear(linear, 2)
    assert layer.codebook.shape == (2,)
    assert not layer.plain().weight.any()


def test_pruning_comes_before_clustering(trained: nn.Module, digits: Digits) -> None:
    plan = {"cluster": {"head": 16}, "weight_prune": {"head": 0.5}}
    with pytest.raises(CompressionError, match=r"'head' is a ClusterLinear[^$]*weight_prune before cluster"):
        apply_passes(copy.deepcopy(trained), plan, digits[0][:8])
    clustered = apply_passes(copy.deepcopy(trained), {"cluster": {"head": 16}}, digits[0][:8])
    with pytest.raises(CompressionError, match="weight_prune before cluster"):
        WeightPrune.settings_for(clustered, digits[0][:8])


def test_linear_layers_are_quantised_in_models_that_cannot_be_traced(digits: Digits) -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.head((x if x.sum() > 0 else -x).mean((2, 3)))

    model = Quantize({"head": 8}).apply(Moody(), digits[0][:8])
    assert isinstance(model.get_submodule("head"), QuantLinear)
    with pytest.raises(CompressionError, match="cannot be traced"):
        Quantize({"stem": 8}).apply(Moody(), digits[0][:8])


def test_fine_tuned_values_are_better(trained: nn.Module, digits: Digits) -> None:
    x, y = digits[0][:1200], digits[1][:1200]
    before = Cluster(dict.fromkeys(LAYERS, 3)).apply(copy.deepcopy(trained), x[:64]).eval()
    index = before.get_submodule("inner.0").index.clone()
    with torch.no_grad():
        first = float(F.cross_entropy(before(x), y))
    after = fit(before, digits, 3, 0.003)
    with torch.no_grad():
        assert float(F.cross_entropy(after(x), y)) < 0.5 * first
    tuned_layer = after.get_submodule("inner.0")
    assert isinstance(tuned_layer, ClusterConv2d)
    assert torch.equal(tuned_layer.index, index)


def test_weights_that_are_no_longer_shared(trained: nn.Module, digits: Digits) -> None:
    exported = export_float(fold_batchnorm(copy.deepcopy(trained)), digits[0][:1])
    with pytest.raises(CompressionError, match=r"'inner\.0\.weight' has \d+ values[^$]*at most 16"):
        Cluster({"inner.0": 16}).rewrite(exported, digits[0].numpy())
    with pytest.raises(CompressionError, match=r"cluster: no exported node carries the weights of \['gone'\]"):
        Cluster({"gone": 16}).rewrite(exported, digits[0].numpy())


def test_simulating_layers_keep_their_kind(trained: nn.Module, digits: Digits) -> None:
    model = apply_passes(copy.deepcopy(trained), {"quantize": dict.fromkeys(LAYERS, 3)}, digits[0][:8])
    assert isinstance(model.get_submodule("head"), QuantLinear)
    assert all(isinstance(model.get_submodule(name), QuantConv2d) for name in CONVS)


def test_bits_for_weights_that_an_earlier_rewrite_has_packed(trained: nn.Module, digits: Digits) -> None:
    """Whatever form a rewrite finds the weight in, it gets the weight."""
    x = digits[0]
    plain = Cluster({"inner.0": 16}).restore(Cluster({"inner.0": 16}).apply(copy.deepcopy(trained), x[:64]).eval())
    exported = export_float(fold_batchnorm(plain), x[:1])
    packed = Cluster({"inner.0": 16}).rewrite(exported, x.numpy())
    assert packed.ByteSize() < exported.ByteSize() - 3 * SIZES["inner.0"]
    np.testing.assert_allclose(run_onnx(packed, x[:64]), run_onnx(exported, x[:64]), atol=1e-4)
    once, twice = (Quantize({"inner.0": 4}).rewrite(model, x[:256].numpy()) for model in (exported, packed))
    np.testing.assert_array_equal(run_onnx(once, x[:64]), run_onnx(twice, x[:64]))
    assert abs(once.ByteSize() - twice.ByteSize()) < 100

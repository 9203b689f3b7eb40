"""Runtimes: every registered one keeps the contract, and each refuses what it cannot do."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from helpers import TinySpace
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from nas.errors import ExtraError, TableError
from nas.latency import Device
from nas.latency.measure import interleave
from nas.latency.runtimes import OnnxRuntime, Runner, Runtime, random_inputs, runtimes
from nas.latency.sessions import Session, bind, executed, run_bound, session_options
from nas.parts import Boundary, Conv, Part
from nas.student.export import export_float
from nas.testing import check_runtime

PART = Part((Conv(8, 3, activation="relu6"),), (4, 8, 8))
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def opened(kind: str) -> type[Runtime]:
    try:
        runtimes.get(kind)()
    except ExtraError as error:
        pytest.skip(str(error))
    return runtimes.get(kind)


# ---- the contract --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in runtimes if kind != "torch-compiled"])
def test_every_runtime_keeps_the_contract(kind: str) -> None:
    check_runtime(opened(kind))


@COMPILER
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
def test_the_compiled_runtime_keeps_the_contract() -> None:
    check_runtime(opened("torch-compiled"))


@CUDA
@pytest.mark.parametrize("kind", ["torch", "onnxruntime"])
def test_the_contract_on_a_gpu(kind: str) -> None:
    if kind == "onnxruntime" and "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA")
    check_runtime(opened(kind), provider="cuda", tolerance=1e-2)
    device = Device.local(runtime=kind, provider="cuda:0")
    assert device.accelerator == torch.cuda.get_device_name(0)


class Broken(OnnxRuntime):
    """A correct runtime; the tests break it clause by clause."""


def breaking(**methods: Any) -> type[Runtime]:
    return type("Broken", (Broken,), methods)


def runner(**methods: Any) -> Callable[..., Runner]:
    def load(self: OnnxRuntime, model: onnx.ModelProto, *, threads: int, batch: int) -> Runner:
        good = OnnxRuntime.load(self, model, threads=threads, batch=batch)
        kept = {
            name: lambda self, *args, name=name: getattr(good, name)(*args) for name in ("time", "outputs", "fused")
        }
        kind = type("BrokenRunner", (Runner,), {"__call__": lambda self: good(), **kept, **methods})
        return kind()  # type: ignore[no-any-return]

    return load


@pytest.mark.parametrize(
    ("methods", "clause"),
    [
        ({"version": lambda self: ""}, "version"),
        ({"find_provider": lambda self, name: ""}, "a provider that does not exist raises no TableError"),
        ({"find_graph": lambda self, level: ""}, "a graph level that does not exist raises no TableError"),
        ({"precisions": ("fp32",)}, "is none of its precisions"),
        ({"load": runner(time=lambda self, calls: [0.0] * calls)}, "not three positive times"),
        ({"load": runner(time=lambda self, calls: [1.0])}, "not three positive times"),
        ({"load": runner(__call__=lambda self: 1)}, "a call returns something"),
        ({"load": runner(fused=lambda self: {"Conv": 0})}, "fused"),
        ({"load": runner(outputs=lambda self: [np.zeros(3)])}, "an output is"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_check_finds_what_is_broken(methods: dict[str, Any], clause: str) -> None:
    check_runtime(breaking(), parts=[PART])
    with pytest.raises(AssertionError, match=clause):
        check_runtime(breaking(**methods), parts=[PART, Part(PART.ops, PART.shape, "int8")])


def test_the_input_is_the_same_everywhere() -> None:
    for part, kind in ((Part((Boundary("quantize"),), (4, 2, 2), "boundary"), np.float32),
                       (Part((Boundary("dequantize"),), (4, 2, 2), "boundary"), np.uint8)):  # fmt: skip
        model = part.to_onnx(3)
        (feed,) = random_inputs(model, 3).values()
        assert (feed.dtype, feed.shape) == (kind, (3, 4, 2, 2))
        (same,) = Session(model.SerializeToString(), threads=1, batch=3).feed.values()
        np.testing.assert_array_equal(feed, same)
    model = PART.to_onnx(1)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    assert random_inputs(model, 5)["x"].shape == (5, 4, 8, 8)


@pytest.mark.parametrize("kind", [kind for kind in runtimes if kind != "torch-compiled"])
def test_every_runtime_is_measured_by_the_protocol(kind: str) -> None:
    runtime = opened(kind)()
    small, large = (Part((Conv(c, 3),), (c, 24, 24)) for c in (8, 64))
    runners = {part.key: runtime.load(part.to_onnx(), threads=1, batch=1) for part in (small, large)}
    seen = interleave(runners, runtime.load(PART.to_onnx(), threads=1, batch=1), seconds=0.1)
    a, b = seen.values([small.key, large.key], "min")
    assert 0 < a < b


# ---- onnxruntime ---------------------------------------------------------------------------------------


def test_sessions_run_in_order_with_the_threads_asked_for() -> None:
    options = session_options(3, "basic")
    assert options.intra_op_num_threads == 3
    assert options.inter_op_num_threads == 1
    assert options.execution_mode == ort.ExecutionMode.ORT_SEQUENTIAL
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_BASIC


@pytest.mark.parametrize("name", ["", "cpu", "CPU", "CPUExecutionProvider"])
def test_the_cpu_by_all_its_names(name: str) -> None:
    assert OnnxRuntime(name).provider == ""


@pytest.mark.parametrize("name", ["abacus", "cpu:x", "CUDAExecutionProvider:first", ":1"])
def test_an_unknown_provider_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(TableError, match=f"no provider '{name}'[^$]*CPUExecutionProvider"):
        OnnxRuntime(name)


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_a_provider_that_falls_back_is_refused() -> None:
    """A session that asks for what does not start comes up on the CPU; that must not be timed as the other."""
    missing = {"CUDAExecutionProvider", "TensorrtExecutionProvider", "OpenVINOExecutionProvider"}
    missing -= set(ort.get_available_providers())
    if not missing:
        pytest.skip("this build has them all")
    runtime = OnnxRuntime()
    runtime.provider = missing.pop()  # as if it were listed
    with pytest.raises(TableError, match="fell back to the CPU"):
        runtime.load(PART.to_onnx(), threads=1, batch=1)


@pytest.mark.parametrize(("graph", "fuses"), [("", True), ("all", True), ("disabled", False)])
def test_the_graph_level_is_the_runtimes(graph: str, fuses: bool) -> None:
    fused = OnnxRuntime("", graph).load(PART.to_onnx(), threads=1, batch=1).fused()
    assert ("Clip" not in fused) == fuses
    assert fused["Conv"] == 1


def test_a_run_with_tensors_on_the_device_is_the_same_run() -> None:
    """The path of a GPU, with the processor as the device."""
    session = Session(PART.to_onnx(2).SerializeToString(), threads=1, batch=2)
    binding = bind(session.session, session.feed, "cpu", 0)
    run_bound(session.session, binding)
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu(), session.outputs())


def test_what_a_provider_left_to_the_cpu_is_marked(tmp_path: Path) -> None:
    options = session_options(1)
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = ort.InferenceSession(PART.to_onnx().SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, random_inputs(PART.to_onnx(), 1))
    profile = Path(session.end_profiling())
    assert executed(profile, "CPUExecutionProvider")["Conv"] == 1
    assert executed(profile, "XnnpackExecutionProvider")["Conv (CPU)"] == 1


@pytest.mark.parametrize("load", [OnnxRuntime.load, OnnxRuntime.load_part])
def test_one_run_is_counted(load: Callable[..., Runner]) -> None:
    assert load(OnnxRuntime(), PART.to_onnx(), threads=1, batch=1).fused()["Conv"] == 1


def test_an_input_that_has_no_random_numbers() -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "text",
        [helper.make_tensor_value_info("x", TensorProto.STRING, [1])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, [1])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    with pytest.raises(TableError, match=r"an input of tensor\(string\)"):
        OnnxRuntime().load(model, threads=1, batch=1)


# ---- torch ---------------------------------------------------------------------------------------------


def test_torch_executes_no_int8() -> None:
    with pytest.raises(TableError, match=r"executes no int8[^$]*profile fp32 only"):
        runtimes.get("torch")().load(Part(PART.ops, PART.shape, "int8").to_onnx(), threads=1, batch=1)


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "cpu:1"])
def test_torch_names_the_devices_that_there_are(name: str) -> None:
    with pytest.raises(TableError, match=f"no device '{name}'[^$]*cpu"):
        runtimes.get("torch")(name)


def test_torch_leaves_the_processes_threads_alone() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    loaded: Any = runtimes.get("torch")().load(PART.to_onnx(), threads=2, batch=1)
    module = loaded.module
    loaded.module = lambda *x: (seen.append(torch.get_num_threads()), module(*x))[1]
    loaded()
    loaded.time(2)
    assert seen == [2, 2, 2]
    assert torch.get_num_threads() == before


def test_torch_says_what_it_calls() -> None:
    assert runtimes.get("torch")().load(PART.to_onnx(), threads=1, batch=1).fused() == {"conv2d": 1, "relu6": 1}


def test_a_whole_net_of_a_space() -> None:
    space = TinySpace()
    model = space.build(space.decode(space.sample(np.random.default_rng(0), 1)[0])).eval()
    agrees(export_float(model, torch.rand(1, 1, 8, 8)), batch=3)


class Attention(nn.Module):
    """A small vision transformer as people write it: patches, a class token, one block."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.zeros(1, 1, 16))
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.norms = nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm(16)])
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = self.qkv(self.norms[0](x)).reshape(x.shape[0], x.shape[1], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return self.head((x + self.mlp(self.norms[1](x)))[:, 0])


class Mixed(nn.Module):
    """Convolutional odds and ends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.excite = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(self.first(x - 0.5))
        x = torch.cat([x, F.leaky_relu(self.second(x))], 1)
        a, b = x.split(8, 1)
        x = F.max_pool2d(a * self.excite(a), 2) + F.avg_pool2d(b, 2).sigmoid() / 2
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = torch.cat([x, torch.tanh(x).pow(2), (x + 6).sqrt(), -x], 1)
        return F.log_softmax(self.head(x.mean((2, 3))), 1)


@pytest.mark.parametrize("kind", [Attention, Mixed])
@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_nets_as_people_write_them(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, sample, buffer = kind().eval(), torch.rand(2, 3, 16, 16), io.BytesIO()
    torch.onnx.export(
        model, (sample,), buffer, dynamo=False, opset_version=18, input_names=["x"], dynamic_axes={"x": {0: "n"}}
    )  # type: ignore[arg-type]
    agrees(onnx.load_from_string(buffer.getvalue()), batch=2)


def agrees(model: onnx.ModelProto, batch: int) -> None:
    (got,) = runtimes.get("torch")().load(model, threads=1, batch=batch).outputs()
    (wanted,) = OnnxRuntime().load(model, threads=1, batch=batch).outputs()
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-4)


def node_model(
    op: str, inputs: list[Any], shape: tuple[int, ...], domain: str = "", **attributes: Any
) -> onnx.ModelProto:
    """One node on an input ``x`` of the given shape, further inputs constant ("" leaves one out)."""
    names = ["x", *(f"c{i}" if not isinstance(c, str) else "" for i, c in enumerate(inputs))]
    stored = [numpy_helper.from_array(c, f"c{i}") for i, c in enumerate(inputs) if not isinstance(c, str)]
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], domain=domain, **attributes)], "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], stored,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


IMAGE = (2, 3, 8, 8)
LINEAR = {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"}
RNG = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("op", "inputs", "shape", "attributes"),
    [
        ("Conv", [normal(4, 3, 3, 3)], IMAGE, {"pads": [0, 0, 1, 1], "strides": [2, 2]}),
        ("Conv", [normal(4, 3, 3), normal(4)], (2, 3, 9), {"pads": [1, 1]}),
        ("Clip", [np.float32(-1), np.float32(3)], IMAGE, {}),
        ("Clip", ["", np.float32(3)], IMAGE, {}),
        ("Div", [np.float32(3)], IMAGE, {}),
        ("Sub", [normal(1, 3, 1, 1)], IMAGE, {}),
        ("Pow", [np.float32(2)], IMAGE, {}),
        ("Gemm", [normal(5, 8), normal(5)], (2, 8), {"transB": 1}),
        ("Gemm", [normal(8, 5), normal(5)], (2, 8), {"alpha": 0.5, "beta": 2.0}),
        ("Gemm", [normal(2, 5)], (2, 8), {"transA": 1}),
        ("MatMul", [normal(8, 5)], IMAGE, {}),
        ("Gelu", [], IMAGE, {}),
        ("Gelu", [], IMAGE, {"approximate": "tanh"}),
        ("LayerNormalization", [normal(8), normal(8)], IMAGE, {"epsilon": 1e-6}),
        ("LayerNormalization", [normal(8)], IMAGE, {}),
        ("Resize", ["", np.array([1, 1, 1.5, 2], np.float32)], IMAGE, LINEAR),
        ("Resize", ["", "", np.array([2, 3, 5, 16])], IMAGE, {"mode": "linear"}),
        ("Flatten", [], IMAGE, {"axis": 2}),
        ("Reshape", [np.array([0, -1, 4])], IMAGE, {}),
        ("Transpose", [], IMAGE, {}),
        ("Slice", [np.array([1]), np.array([7]), np.array([-1]), np.array([2])], IMAGE, {}),
        ("Gather", [np.array(1)], IMAGE, {"axis": 2}),
        ("Gather", [np.array([2, 0])], IMAGE, {"axis": 1}),
        ("Unsqueeze", [np.array([0, -1])], IMAGE, {}),
        ("Squeeze", [np.array([1])], (2, 1, 4), {}),
        ("Squeeze", [], (2, 1, 4), {}),
        ("Expand", [np.array([3, 1, 4])], (1, 2, 1), {}),
        ("ReduceMean", [np.array([-1])], IMAGE, {"keepdims": 0}),
        ("ReduceSum", [], IMAGE, {}),
        ("Softmax", [], IMAGE, {"axis": 1}),
        ("HardSigmoid", [], IMAGE, {}),
        ("Cast", [], IMAGE, {"to": TensorProto.FLOAT}),
        ("MaxPool", [], IMAGE, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("AveragePool", [], IMAGE, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        ("BatchNormalization", [normal(3), normal(3), normal(3), np.abs(normal(3))], IMAGE, {}),
        ("Max", [np.full((1, 3, 1, 1), 2, np.float32)], IMAGE, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_torch_operators(op: str, inputs: list[Any], shape: tuple[int, ...], attributes: dict[str, Any]) -> None:
    agrees(node_model(op, inputs, shape, **attributes), batch=1)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "why"),
    [
        ("Det", [], {}, "no translation of Det"),
        ("Conv", [normal(4, 3, 3, 3)], {"auto_pad": "SAME_UPPER"}, "cannot execute Conv: auto_pad SAME_UPPER"),
        ("Resize", ["", np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest"}, "execute Resize: mode nearest"),
        ("Slice", [np.array([7]), np.array([0]), np.array([3]), np.array([-1])], {}, "Slice: steps below 1"),
        ("MatMul", [normal(5, 5)], {}, "cannot execute MatMul"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_torch_names_what_it_cannot_execute(op: str, inputs: list[Any], attributes: dict[str, Any], why: str) -> None:
    with pytest.raises(TableError, match=f"{why}[^$]*onnxruntime"):
        runtimes.get("torch")().load(node_model(op, inputs, IMAGE, **attributes), threads=1, batch=1)


def test_modes_of_the_compiler() -> None:
    compiled = runtimes.get("torch-compiled")
    assert compiled("", "default").graph == ""
    assert compiled("", "max-autotune").graph == "max-autotune"
    with pytest.raises(TableError, match=r"no mode 'fastest'[^$]*reduce-overhead"):
        compiled("", "fastest")


# ---- openvino ------------------------------------------------------------------------------------------


def test_openvino_computes_in_single_precision_unless_asked() -> None:
    runtime: Any = opened("openvino")()
    loaded: Any = runtime.load(PART.to_onnx(), threads=1, batch=1)
    assert loaded.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert loaded.compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert loaded.compiled.get_property("NUM_STREAMS") == 1
    assert opened("openvino")("cpu", "f32").graph == ""  # type: ignore[call-arg]
    with pytest.raises(TableError, match="does not compute in 'int3'"):
        opened("openvino")("", "int3")


def test_openvino_is_an_extra() -> None:
    try:
        import openvino  # noqa: F401
    except ImportError:
        with pytest.raises(ExtraError, match=r"latency-nas\[openvino\]"):
            runtimes.get("openvino")()


def test_a_bound_part_computes_and_executes_what_a_whole_model_does() -> None:
    """Its tensors stay where they are; nothing else is different."""
    part = Part((Conv(8, 3, activation="relu6"), Conv(16, 1)), (4, 8, 8))
    runtime = runtimes.get("onnxruntime")()
    free = runtime.load(part.to_onnx(2), threads=1, batch=2)
    bound = runtime.load_part(part.to_onnx(2), threads=1, batch=2)
    assert bound.fused() == free.fused()
    assert bound.fused()["Conv"] == 2
    np.testing.assert_array_equal(bound.outputs()[0], free.outputs()[0])
    bound()
    assert all(ms > 0 for ms in bound.time(3))

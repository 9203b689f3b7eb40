"""What the parts of a candidate execute is what its whole exported net executes: the point of a latency table."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from nas import content
from nas.compression import apply_passes
from nas.latency.runtimes.onnxruntime_cpu import session_options
from nas.parts import Boundary, Part
from nas.space import Candidate, SearchSpace, TaskInfo
from nas.student.export import to_onnx

COLOURS = TaskInfo((3, 24, 24), 10, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
# Changes of layout at the borders: a net has one where its parts have two each. Convolutions run in blocked layout in
# fp32 and in NHWC in int8.
BORDERS = {"ReorderInput", "ReorderOutput", "Flatten"}
# An activation is one with its convolution, or with the quantisation after it, or it stands alone. Where a sum in
# blocked layout does not become part of a convolution, Reshape, which moves nothing, stands around it.
CONVOLUTIONAL = BORDERS | {"Transpose", "Relu", "Clip", "Reshape"}
SMALL: dict[str, dict[str, Any]] = {
    "mobilenet": {
        "resolutions": [16, 24], "widths": [[16], [16, 24], [32, 48]], "depths": [[1, 2], [1, 2], [1, 2]],
        "strides": [1, 1, 2],
    },
    "resnet": {"resolutions": [16, 24], "widths": [[16, 32], [16, 32], [32, 48]], "strides": [1, 1, 2]},
    "vit": {"resolutions": [16, 24], "patches": [4, 8], "depths": [[1, 2], [1, 2]]},
}  # fmt: skip
BITS = {"fp32": [32], "int8": [8], "mixed": [32, 8]}


def executed(model: onnx.ModelProto) -> Counter[str]:
    """Operators of the graph that onnxruntime executes."""
    options = session_options(threads=1)
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for node in onnx.load(options.optimized_model_filepath).graph.node:
            found[node.op_type] += 1
            # In blocked layout a convolution may add a residual to its result: the same addition.
            if node.domain == "com.microsoft.nchwc" and node.op_type == "Conv" and len(node.input) > 3:
                found["Add"] += bool(node.input[3])
    return found


def whole(space: SearchSpace, candidate: Candidate) -> Counter[str]:
    x = torch.rand(8, *COLOURS.input_shape, generator=torch.Generator().manual_seed(0))
    plan = space.training(candidate).compression
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = apply_passes(space.build(candidate).eval(), plan, x).eval()
    return executed(to_onnx(model, plan, x, x.numpy()))


def in_parts(parts: list[Part]) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update({kind: count * part.count for kind, count in executed(part.to_onnx()).items()})
    return total


def check(space: SearchSpace, candidate: Candidate, allowed: set[str]) -> None:
    net, parts = whole(space, candidate), in_parts(space.parts(candidate))
    different = {kind: (net[kind], parts[kind]) for kind in net.keys() | parts.keys() if net[kind] != parts[kind]}
    assert different.keys() <= allowed, f"(whole net, parts) {different} of {candidate}"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", SMALL)
def test_parts_execute_what_the_whole_net_does(name: str, bits: str) -> None:
    space = content.load_space(name, COLOURS, {**SMALL[name], "bits": BITS[bits]})
    # A transformer's transpositions are work of its own.
    allowed = BORDERS if name == "vit" else CONVOLUTIONAL
    for genome in space.sample(np.random.default_rng(5), 4 if bits == "mixed" else 2):
        check(space, space.decode(genome), allowed)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_stem_with_pooling(bits: int) -> None:
    options: dict[str, Any] = {"resolutions": [24], "stem": [16, 2, 7], "pool": True, "strides": [1, 1, 2]}
    space = content.load_space("resnet", COLOURS, {**options, "bits": [bits]})
    check(space, space.ladder()[0], CONVOLUTIONAL)


def test_the_integer_operators_of_a_block() -> None:
    """Counted by hand on one part each: nothing in it runs in float that should not."""
    resnet = content.load_space("resnet", COLOURS, {"bits": [8]})
    vit = content.load_space("vit", COLOURS, {"bits": [8], "resolutions": [24], "patches": [4]})
    projected, plain = (resnet.sites[f"stage1.{which}"](resnet.ladder()[-1]) for which in ("first", "rest"))
    attention, mlp = (vit.sites[f"group0.{which}"](vit.ladder()[-1]) for which in ("attention", "mlp"))
    wanted = [
        (projected, {"QLinearConv": 3, "QLinearAdd": 1, "Transpose": 2}),
        (plain, {"QLinearConv": 2, "QLinearAdd": 1, "Transpose": 2}),
        (mlp, {"LayerNormalization": 1, "QuantizeLinear": 2, "QGemm": 2, "Gelu": 1, "Add": 1}),
        (
            attention,
            {
                "LayerNormalization": 1, "QuantizeLinear": 2, "QGemm": 4, "Reshape": 4, "Transpose": 4,
                "FusedMatMul": 1, "Softmax": 1, "MatMul": 1, "Add": 1,
            },
        ),
    ]  # fmt: skip
    for part, operators in wanted:
        assert isinstance(part, Part)
        assert executed(part.to_onnx()) == operators, part.key


@pytest.mark.parametrize(("name", "width", "copies"), [("mobilenet", 16, 2), ("mobilenet", 24, 1), ("resnet", 32, 2)])
def test_a_tensor_with_two_readers_is_dequantised_twice(name: str, width: int, copies: int) -> None:
    space = content.load_space(name, COLOURS, SMALL[name])
    values = {**space.ladder()[0].as_dict(), "stage0.bits": 8, "stage1.bits": 32, "stage1.width": width}
    boundaries = [p for p in space.parts(Candidate(values)) if p.ops == (Boundary("dequantize"),)]
    assert [part.count for part in boundaries] == [copies]
    check(space, Candidate(values), CONVOLUTIONAL)

"""The contract of a runtime: it loads parts of its precisions, answers as onnxruntime does, and times itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx

from nas.errors import TableError
from nas.latency.runtimes import OnnxRuntime, Runner, Runtime
from nas.parts import AddInput, Boundary, Conv, GlobalAveragePool, Normalize, Part, Resize
from nas.testing.require import require

BATCHES = (1, 4)
INT8_STEPS = 2  # of 255, by which roundings of an int8 part may differ
PARTS = (
    Part((Normalize(), Resize(6), Conv(8, 3, 2, activation="relu")), (3, 8, 8)),
    Part((Conv(24, 1, activation="relu6"), Conv(24, 3, groups=0), Conv(8, 1), AddInput()), (8, 6, 6)),
    Part((GlobalAveragePool(), Conv(5, 1)), (8, 6, 6)),
    Part((Conv(24, 1, activation="relu6"), Conv(8, 3), AddInput()), (8, 6, 6), "int8"),
    Part((Boundary("quantize"),), (8, 6, 6), "boundary"),
    Part((Boundary("dequantize"),), (8, 6, 6), "boundary"),
)  # fmt: skip


def check_runtime(
    runtime: Callable[..., Runtime],
    *,
    provider: str = "",
    graph: str = "",
    parts: Sequence[Part] = PARTS,
    tolerance: float = 1e-3,
) -> None:
    """Check a runtime on parts of all precisions, batches 1 and 4, fixed and symbolic.

    Args:
        runtime: built as ``runtime(provider, graph)``.
        parts: those of other precisions than the runtime's must be refused.
        tolerance: of float outputs, as a share of the largest; wider where the hardware computes in TF32 or bf16.

    Raises:
        AssertionError: names the clause that is broken.
    """
    opened = runtime(provider, graph)
    name = type(opened).__name__
    require(bool(opened.version()), f"{name}: version() is empty.")
    again = runtime(opened.provider, opened.graph)
    require(
        (again.provider, again.graph) == (opened.provider, opened.graph),
        f"{name}: {opened.provider!r} and {opened.graph!r} are renamed when they are given back.",
    )
    for what, wrong in (("provider", ("no such thing", "")), ("graph level", ("", "no such thing"))):
        try:
            runtime(*wrong)
        except TableError as error:
            require("no such thing" in str(error), f"{name}: the error does not name the {what}: {error}")
        else:
            raise AssertionError(f"{name}: a {what} that does not exist raises no TableError.")
    for part in parts:
        if part.precision in opened.precisions:
            _check_part(opened, part, name, tolerance)
        else:
            _check_refusal(opened, part, name)


def _check_part(runtime: Runtime, part: Part, name: str, tolerance: float) -> None:
    for batch in BATCHES:
        for symbolic in (False, True) if batch > 1 else (False,):
            model = _free_batch(part.to_onnx(1)) if symbolic else part.to_onnx(batch)
            where = f"{name}: {part.key!r}, {'symbolic ' if symbolic else ''}batch {batch}"
            runner = runtime.load(model, threads=1, batch=batch)
            require(runner() is None, f"{where}: a call returns something.")
            times = runner.time(3)
            require(
                len(times) == 3 and all(np.isfinite(t) and t > 0 for t in times),
                f"{where}: time(3) gives {times}, not three positive times.",
            )
            fused = runner.fused()
            require(all(n > 0 for n in fused.values()), f"{where}: fused() counts {fused}.")
            _check_outputs(runner, model, batch, where, tolerance)


def _check_outputs(runner: Runner, model: onnx.ModelProto, batch: int, where: str, tolerance: float) -> None:
    wanted = OnnxRuntime().load(model, threads=1, batch=batch).outputs()
    outputs = runner.outputs()
    if not outputs:
        return  # it cannot say
    require(len(outputs) == len(wanted), f"{where}: {len(outputs)} outputs, not {len(wanted)}.")
    for got, right in zip(outputs, wanted, strict=True):
        require(got.shape == right.shape, f"{where}: an output is {got.shape}, not {right.shape}.")
        error = float(np.abs(got.astype(np.float64) - right).max())
        limit = INT8_STEPS if right.dtype == np.uint8 else tolerance * max(float(np.abs(right).max()), 1e-9)
        require(error <= limit, f"{where}: an output is {error:.3g} off onnxruntime's; {limit:.3g} is allowed.")


def _check_refusal(runtime: Runtime, part: Part, name: str) -> None:
    try:
        runtime.load(part.to_onnx(1), threads=1, batch=1)
    except TableError:
        return
    raise AssertionError(f"{name}: {part.precision} is none of its precisions, but {part.key!r} raises no TableError.")


def _free_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return model

"""Devices and runtimes: who measured, and what the runtime says that it runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

from nas.errors import ContentError
from nas.latency import Device
from nas.latency.device import cpu_model
from nas.latency.runtimes import OnnxRuntime, runtimes
from nas.latency.sessions import session_options
from nas.parts import Boundary, Conv, Part

PART = Part((Conv(8, 3, activation="relu6"),), (4, 8, 8))


def test_the_local_device() -> None:
    device = Device.local()
    assert (device.threads, device.batch, device.runtime) == (1, 1, "onnxruntime")
    assert device.runtime_version == ort.__version__
    assert device.cpu == cpu_model() != ""
    assert device.cores >= 1
    assert device.name.endswith("-onnxruntime-t1")
    assert Device.local(batch=8, threads=2).name.endswith("-onnxruntime-t2-b8")
    assert Device.local(name="mine").name == "mine"


def test_the_fingerprint_is_everything_but_the_name() -> None:
    device = Device.local()
    assert len(device.fingerprint) == 12
    assert replace(device, name="other").fingerprint == device.fingerprint
    changed = {"cpu": "x", "cores": 99, "runtime": "y", "runtime_version": "0", "threads": 7, "batch": 9}
    prints = {replace(device, **{key: value}).fingerprint for key, value in changed.items()}  # type: ignore[arg-type]
    assert len(prints | {device.fingerprint}) == 7
    assert device.as_dict()["fingerprint"] == device.fingerprint


def test_an_unknown_runtime() -> None:
    with pytest.raises(ContentError, match=r"Unknown runtime 'abacus'[^$]*onnxruntime"):
        Device.local(runtime="abacus")


@pytest.mark.parametrize("kind", list(runtimes))
@pytest.mark.parametrize("batch", [1, 4])
def test_every_runtime_loads_and_runs(kind: str, batch: int) -> None:
    runtime = runtimes.get(kind)()
    assert runtime.version()
    for precision in ("fp32", "int8"):
        part = Part(PART.ops, PART.shape, precision)
        runner = runtime.load(part.to_onnx(batch), threads=1, batch=batch)
        assert runner() is None
        assert all(count > 0 for count in runner.fused().values())


def test_inputs_have_the_type_and_batch_that_the_model_asks_for() -> None:
    runtime = OnnxRuntime()
    for part, kind in ((Part((Boundary("quantize"),), (4, 2, 2), "boundary"), np.float32),
                       (Part((Boundary("dequantize"),), (4, 2, 2), "boundary"), np.uint8)):  # fmt: skip
        (feed,) = runtime.load(part.to_onnx(3), threads=1, batch=3).feed.values()  # type: ignore[attr-defined]
        assert feed.dtype == kind
        assert feed.shape == (3, 4, 2, 2)
    model = PART.to_onnx(1)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    (feed,) = runtime.load(model, threads=1, batch=5).feed.values()  # type: ignore[attr-defined]
    assert feed.shape == (5, 4, 8, 8)


def test_sessions_run_in_order_with_the_threads_asked_for() -> None:
    options = session_options(3)
    assert options.intra_op_num_threads == 3
    assert options.inter_op_num_threads == 1
    assert options.execution_mode == ort.ExecutionMode.ORT_SEQUENTIAL

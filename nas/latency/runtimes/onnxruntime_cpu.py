"""onnxruntime on the CPU, sequential execution, all graph optimisations."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from nas.latency.runtimes.base import Runner, Runtime, runtimes

DTYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int64)": np.int64}
ERRORS_ONLY = 3


def session_options(threads: int) -> ort.SessionOptions:
    """Options that a student's own ``predict.py`` uses too, so that what is measured is what users get."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = ERRORS_ONLY
    return options


class _Runner(Runner):
    def __init__(self, session: ort.InferenceSession, batch: int, fused: dict[str, int]) -> None:
        rng = np.random.default_rng(0)
        self.session, self._fused = session, fused
        self.feed: dict[str, Any] = {}
        for value in session.get_inputs():
            shape = [side if isinstance(side, int) else batch for side in value.shape]
            self.feed[value.name] = rng.integers(0, 6, shape).astype(DTYPES[value.type])

    def __call__(self) -> None:
        self.session.run(None, self.feed)

    def fused(self) -> dict[str, int]:
        return self._fused


@runtimes.register("onnxruntime")
class OnnxRuntimeCpu(Runtime):
    """The CPU execution provider."""

    def version(self) -> str:
        return str(ort.__version__)

    def load(self, model: onnx.ModelProto, *, threads: int, batch: int) -> Runner:
        options = session_options(threads)
        with tempfile.TemporaryDirectory() as folder:
            # The optimised graph is the only honest account of what was fused.
            optimised = Path(folder) / "optimised.onnx"
            options.optimized_model_filepath = str(optimised)
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            nodes = onnx.load(optimised).graph.node
        return _Runner(session, batch, dict(Counter(node.op_type for node in nodes)))

"""Whether an exported model gives PyTorch's outputs: shared by the checks of spaces and of passes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

from nas.latency.sessions import session_options
from nas.testing.require import require

FLOAT_TOLERANCE, INT8_TOLERANCE = 1e-4, 0.05  # root mean square, of the largest output
BATCHES = (1, 3)


def check_agreement(model: nn.Module, exported: onnx.ModelProto, x: torch.Tensor, where: str) -> None:
    """The exported model gives PyTorch's outputs (int8: but for rounding noise), whatever the batch size."""
    session = ort.InferenceSession(
        exported.SerializeToString(), session_options(threads=1), providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    with torch.no_grad():
        wanted = model.eval()(x).numpy()
    scale = max(float(np.abs(wanted).max()), 1e-9)
    quantized = any(node.op_type.endswith("QuantizeLinear") for node in exported.graph.node)
    tolerance = INT8_TOLERANCE if quantized else FLOAT_TOLERANCE
    for batch in (len(x), *BATCHES):
        got = session.run(None, {name: x[:batch].numpy()})[0]
        shape = (batch, *wanted.shape[1:])
        require(got.shape == shape, f"{where}: the ONNX gives {got.shape} for batch {batch}, not {shape}.")
        error = float(np.sqrt(np.mean((got - wanted[:batch]) ** 2))) / scale
        # A few samples may have bad luck; all of them together must not.
        limit = tolerance if batch == len(x) else 3 * tolerance
        require(
            error <= limit,
            f"{where}: ONNX and PyTorch differ by {100 * error:.2g} % of the largest output (batch {batch}); "
            f"at most {100 * limit:g} % are rounding.",
        )

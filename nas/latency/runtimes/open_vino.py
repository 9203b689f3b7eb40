"""OpenVINO on any of its devices, one stream, in the precision that the model says."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from nas.errors import ExtraError, TableError
from nas.latency.runtimes.base import Runner, Runtime, random_inputs, runtimes

#: Graph level → OpenVINO's name of the precision, and of the capability that a device must list for it.
PRECISIONS = {"": ("f32", "FP32"), "f16": ("f16", "FP16"), "bf16": ("bf16", "BF16")}


@runtimes.register("openvino")
class OpenVino(Runtime):
    """OpenVINO; the provider is its device, such as ``CPU`` (the default) or ``GPU``.

    The graph level is the precision of floating-point inference: ``f32`` (the default), ``f16`` or ``bf16``. Left
    alone, OpenVINO takes bf16 on processors that have it, and answers differently from every other runtime.
    """

    def __init__(self, provider: str = "", graph: str = "") -> None:
        self._version, self.core = _openvino()
        super().__init__(provider, graph)

    def find_provider(self, name: str) -> str:
        if (device := name.upper() or "CPU") not in self.core.available_devices:
            raise TableError(
                f"OpenVINO {self._version} has no device {name!r} here.",
                expected=f"one of {', '.join(self.core.available_devices)}",
            )
        return "" if device == "CPU" else device

    def find_graph(self, level: str) -> str:
        level = "" if level == "f32" else level
        capabilities = list(self.core.get_property(self._device, "OPTIMIZATION_CAPABILITIES"))
        if level not in PRECISIONS or PRECISIONS[level][1] not in capabilities:
            raise TableError(
                f"OpenVINO does not compute in {level!r} on {self._device}.",
                expected=f"f32, or f16 or bf16 where the device has it; it has {', '.join(capabilities)}",
            )
        return level

    def accelerator(self) -> str:
        return str(self.core.get_property(self.provider, "FULL_DEVICE_NAME")) if self.provider else ""

    def version(self) -> str:
        return self._version

    def load(self, model: onnx.ModelProto, *, threads: int, batch: int) -> Runner:
        inputs = random_inputs(model, batch)
        read = self.core.read_model(model.SerializeToString())
        read.reshape({name: list(array.shape) for name, array in inputs.items()})
        config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": PRECISIONS[self.graph][0],
        }  # fmt: skip
        if self._device == "CPU":
            config["INFERENCE_NUM_THREADS"] = threads
        return _Runner(self.core.compile_model(read, self._device, config), inputs)

    @property
    def _device(self) -> str:
        return self.provider or "CPU"


@lru_cache(maxsize=1)
def _openvino() -> tuple[str, Any]:
    """Version and core; a core takes 20 ms, and a runtime is opened for every model."""
    try:
        import openvino
    except ImportError as error:
        raise ExtraError(
            "The runtime openvino needs the package openvino.", remedy="pip install 'latency-nas[openvino]'"
        ) from error
    return str(openvino.__version__), openvino.Core()


class _Runner(Runner):
    def __init__(self, compiled: Any, inputs: dict[str, npt.NDArray[Any]]) -> None:
        import openvino

        self.compiled, self.request = compiled, compiled.create_infer_request()
        for name, array in inputs.items():
            self.request.set_tensor(name, openvino.Tensor(np.ascontiguousarray(array)))

    def __call__(self) -> None:
        self.request.infer()

    def outputs(self) -> list[npt.NDArray[Any]]:
        self.request.infer()
        return [np.array(self.request.get_output_tensor(i).data) for i in range(len(self.compiled.outputs))]

    def fused(self) -> dict[str, int]:
        """Layers of the compiled graph, with the precision in which they run."""
        kinds = []
        for op in self.compiled.get_runtime_model().get_ops():
            info = op.get_rt_info()
            kind = str(info["layerType"].astype(str)) if "layerType" in info else op.get_type_name()
            if kind not in ("Input", "Output", "Const"):
                kinds.append(kind)
        return dict(Counter(kinds))

"""onnxruntime with any of its execution providers, sequential execution."""

from __future__ import annotations

import onnx

from nas.errors import TableError
from nas.latency.hardware import nvidia_gpu
from nas.latency.runtimes.base import Runner, Runtime, runtimes
from nas.latency.sessions import Session, SessionError, gpu_index, graph_name, provider_name, version


class _Runner(Session, Runner):
    pass


@runtimes.register("onnxruntime")
class OnnxRuntime(Runtime):
    """Any execution provider of the installed build: ``cuda``, ``CUDAExecutionProvider``, ``cuda:1``; "" is the CPU.

    Graph levels are onnxruntime's: ``all`` (the default), ``extended``, ``basic``, ``disabled``.
    """

    def find_provider(self, name: str) -> str:
        try:
            return provider_name(name)
        except SessionError as error:
            raise _table_error(error) from error

    def find_graph(self, level: str) -> str:
        try:
            return graph_name(level)
        except SessionError as error:
            raise _table_error(error) from error

    def accelerator(self) -> str:
        index = gpu_index(self.provider)
        return "" if index is None else nvidia_gpu(index) or "NVIDIA GPU"

    def version(self) -> str:
        return version()

    def load(self, model: onnx.ModelProto, *, threads: int, batch: int) -> Runner:
        return self._load(model, threads, batch, bound=False)

    def load_part(self, model: onnx.ModelProto, *, threads: int, batch: int) -> Runner:
        return self._load(model, threads, batch, bound=True)

    def _load(self, model: onnx.ModelProto, threads: int, batch: int, *, bound: bool) -> Runner:
        try:
            return _Runner(
                model.SerializeToString(), threads=threads, batch=batch, provider=self.provider, graph=self.graph,
                bound=bound,
            )  # fmt: skip
        except SessionError as error:
            raise _table_error(error) from error


def _table_error(error: SessionError) -> TableError:
    return TableError(error.found, expected=error.expected, remedy=error.remedy)

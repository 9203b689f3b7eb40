"""The contract of a runtime: load an ONNX model, run it, time it, say what it fused."""

from __future__ import annotations

import abc
from typing import Any

import numpy.typing as npt
import onnx
from onnx import helper

from nas.errors import TableError
from nas.latency import sessions
from nas.parts import PRECISIONS
from nas.registry import Registry


class Runner(abc.ABC):
    """A loaded model with fixed input, that of :func:`random_inputs`."""

    @abc.abstractmethod
    def __call__(self) -> None:
        """One inference, done when it returns."""

    def time(self, calls: int) -> list[float]:
        """Milliseconds of ``calls`` inferences, one after the other; what the protocol records.

        Override it where the device has a clock of its own.
        """
        return sessions.clock(self, calls)

    def outputs(self) -> list[npt.NDArray[Any]]:
        """What the model answers, for checks against other runtimes; empty where it cannot say."""
        return []

    def fused(self) -> dict[str, int]:
        """Operators that the runtime really executes → how many; empty where it cannot say."""
        return {}


class Runtime(abc.ABC):
    """Executes ONNX models on this machine.

    Attributes:
        precisions: of the parts that it can execute; :meth:`load` refuses others with a TableError.
        provider, graph: as given, but by one name each, because they are part of a device's fingerprint.

    Args:
        provider: what executes within the runtime (an execution provider, a torch device); "" is its default.
        graph: how far the runtime may rewrite the graph; "" is its default.

    Raises:
        TableError: this runtime has no such provider here, or no such graph level.
        ExtraError: the runtime's package is not installed.
    """

    precisions: tuple[str, ...] = PRECISIONS

    def __init__(self, provider: str = "", graph: str = "") -> None:
        self.provider = self.find_provider(provider)
        self.graph = self.find_graph(graph)  # which may depend on the provider

    def find_provider(self, name: str) -> str:
        """The one name of a provider, "" for the default; raises TableError where there is none."""
        if name:
            raise TableError(f"{type(self).__name__} has no provider {name!r}.", expected="none: it has one way to run")
        return ""

    def find_graph(self, level: str) -> str:
        """The one name of a graph level, "" for the default; raises TableError where there is none."""
        if level:
            raise TableError(f"{type(self).__name__} has no graph level {level!r}.", expected="none")
        return ""

    def accelerator(self) -> str:
        """Name of the hardware beside the processor that executes, such as a GPU's; "" where there is none."""
        return ""

    @abc.abstractmethod
    def version(self) -> str:
        """Version string that goes into fingerprints."""

    @abc.abstractmethod
    def load(self, model: onnx.ModelProto, *, threads: int, batch: int) -> Runner:
        """Prepare ``model`` for timing; a symbolic batch dimension becomes ``batch``.

        Raises:
            TableError: the runtime cannot execute it.
        """


    def load_part(self, model: onnx.ModelProto, *, threads: int, batch: int) -> Runner:
        """Like :meth:`load` for a piece of a network, whose inputs and outputs are its neighbours' affair.

        Override it where inputs and outputs can stay in memory that is there already, as they do within a network.
        """
        return self.load(model, threads=threads, batch=batch)


def random_inputs(model: onnx.ModelProto, batch: int) -> dict[str, npt.NDArray[Any]]:
    """The input that every runtime feeds to ``model``; a symbolic dimension becomes ``batch``."""
    stored = {tensor.name for tensor in model.graph.initializer}
    described = []
    for value in model.graph.input:
        if value.name not in stored:
            tensor = value.type.tensor_type
            kind = helper.tensor_dtype_to_np_dtype(tensor.elem_type).type
            described.append((value.name, [side.dim_value for side in tensor.shape.dim], kind))
    return sessions.random_inputs(described, batch)


def is_int8(model: onnx.ModelProto) -> bool:
    """Whether anything is quantised in the model."""
    words = ("quantize", "qlinear", "integer")
    return any(word in node.op_type.lower() for node in model.graph.node for word in words)


runtimes: Registry[type[Runtime]] = Registry("runtime")

"""The contract of a runtime: load an ONNX model, run it once, say what it fused."""

from __future__ import annotations

import abc

import onnx

from nas.registry import Registry


class Runner(abc.ABC):
    """A loaded model with fixed random input."""

    @abc.abstractmethod
    def __call__(self) -> None:
        """One inference; what the protocol times."""

    def fused(self) -> dict[str, int]:
        """Operators that the runtime really executes → how many; empty where it cannot say."""
        return {}


class Runtime(abc.ABC):
    """Executes ONNX models on this machine.

    Args:
        provider: what executes within the runtime (an execution provider, a torch device); "" is its default.
        graph: how far the runtime may rewrite the graph; "" is everything that it can do.

    Raises:
        TableError: this runtime has no such provider here, or no such graph level.
        ExtraError: the runtime's package is not installed.
    """

    def __init__(self, provider: str = "", graph: str = "") -> None:
        self.provider, self.graph = provider, graph

    def accelerator(self) -> str:
        """Name of the hardware beside the processor that executes, such as a GPU's; "" where there is none."""
        return ""

    @abc.abstractmethod
    def version(self) -> str:
        """Version string that goes into fingerprints."""

    @abc.abstractmethod
    def load(self, model: onnx.ModelProto, *, threads: int, batch: int) -> Runner:
        """Prepare ``model`` for timing; a symbolic batch dimension becomes ``batch``."""


runtimes: Registry[type[Runtime]] = Registry("runtime")

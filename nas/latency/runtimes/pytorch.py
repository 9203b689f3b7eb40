"""PyTorch, eager and compiled, on the CPU or a CUDA GPU; torch itself is imported when a model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import onnx

from nas.errors import TableError
from nas.latency.runtimes.base import Runner, Runtime, random_inputs, runtimes
from nas.latency.sessions import clock

if TYPE_CHECKING:
    import torch

MODES = ("", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@runtimes.register("torch")
class Torch(Runtime):
    """Eager PyTorch in inference mode; the provider is ``cpu`` (the default), ``cuda`` or ``cuda:1``.

    Parts and nets are translated from ONNX, fp32 only. Single precision is what torch's own defaults make of it:
    on a GPU convolutions may use TF32.
    """

    precisions = ("fp32",)

    def find_provider(self, name: str) -> str:
        import torch

        kind, _, index = name.partition(":")
        if name in ("", "cpu"):
            return ""
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
        if kind != "cuda" or f"cuda:{index or 0}" not in gpus:
            raise TableError(
                f"torch {torch.__version__} has no device {name!r} here.",
                expected=f"one of {', '.join(['cpu', *gpus])}",
                remedy="" if gpus else "for a GPU, install a build of torch for CUDA and its driver",
            )
        return "cuda" if index in ("", "0") else name

    def accelerator(self) -> str:
        import torch

        return str(torch.cuda.get_device_name(self.provider)) if self.provider else ""

    def version(self) -> str:
        import torch

        return str(torch.__version__)

    def load(self, model: onnx.ModelProto, *, threads: int, batch: int) -> Runner:
        import torch

        from nas.latency.runtimes.onnx_to_torch import to_torch

        inputs = random_inputs(model, batch)
        module = to_torch(model, inputs).to(self.provider or "cpu")
        executed = Counter(node.target.__name__ for node in module.graph.nodes if node.op == "call_function")
        tensors = [torch.from_numpy(array).to(self.provider or "cpu") for array in inputs.values()]
        kind = _CudaRunner if self.provider else _Runner
        return self.prepare(kind(module, tensors, threads, dict(executed)))

    def prepare(self, runner: _Runner) -> Runner:
        """The last step of loading."""
        return runner


@runtimes.register("torch-compiled")
class TorchCompiled(Torch):
    """``torch.compile`` for fixed shapes; the graph level is its mode, "" is the default one.

    Compiling takes seconds a model and needs a C++ compiler (on a GPU, Triton). What it fuses it does not say.
    """

    def find_graph(self, level: str) -> str:
        if level not in (*MODES, "default"):
            raise TableError(f"torch.compile has no mode {level!r}.", expected=f"default, {', '.join(MODES[1:])}")
        return "" if level == "default" else level

    def prepare(self, runner: _Runner) -> Runner:
        import torch

        # fullgraph: a graph break, or giving up after too many recompilations, would be timed as if it were compiled.
        runner.module = torch.compile(runner.module, fullgraph=True, dynamic=False, mode=self.graph or None)
        runner.executed = {}
        try:
            runner()
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise TableError(
                f"torch.compile failed: {lines[0]}", remedy="is there a C++ compiler? The runtime torch needs none"
            ) from error
        return runner


class _Runner(Runner):
    """Calls a module; torch's number of threads belongs to the process, so it is set around each use."""

    def __init__(
        self, module: Callable[..., Any], inputs: list[torch.Tensor], threads: int, executed: dict[str, int]
    ) -> None:
        self.module, self.inputs, self.threads, self.executed = module, inputs, threads, executed

    def __call__(self) -> None:
        with self._scenario():
            self.once()

    def once(self) -> None:
        """One inference within the scenario, done when it returns."""
        self.module(*self.inputs)

    def time(self, calls: int) -> list[float]:
        with self._scenario():
            return clock(self.once, calls)

    def outputs(self) -> list[npt.NDArray[Any]]:
        with self._scenario():
            return [value.cpu().numpy() for value in self.module(*self.inputs)]

    def fused(self) -> dict[str, int]:
        return self.executed

    @contextmanager
    def _scenario(self) -> Iterator[None]:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before)


class _CudaRunner(_Runner):
    """Timed by the GPU's own events, one inference at a time: nothing is queued when an inference starts."""

    def once(self) -> None:
        import torch

        self.module(*self.inputs)
        torch.cuda.synchronize(self.inputs[0].device)

    def time(self, calls: int) -> list[float]:
        import torch

        times = []
        with self._scenario(), torch.cuda.device(self.inputs[0].device):
            for _ in range(calls):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                begin.record()
                self.module(*self.inputs)
                end.record()
                end.synchronize()
                times.append(float(begin.elapsed_time(end)))
        return times

"""onnxruntime sessions as they are timed: the same here and on a device that has nothing of ours.

This file needs numpy and onnxruntime only, and bundles take it along.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

CPU = "CPUExecutionProvider"
#: Providers whose tensors can be put on the device beforehand, so that copies are not timed → onnxruntime's device.
ON_DEVICE = {
    "CUDAExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "cuda",
    "NvTensorRTRTXExecutionProvider": "cuda",
}
#: Providers with threads of their own → the option that says how many.
THREADS = {"OpenVINOExecutionProvider": "num_of_threads", "XnnpackExecutionProvider": "intra_op_num_threads"}
GRAPHS = {
    "": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
DTYPES: dict[str, type] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8, "tensor(int8)": np.int8, "tensor(int32)": np.int32, "tensor(int64)": np.int64,
}  # fmt: skip
INDICES = (np.int32, np.int64)
ERRORS_ONLY = 3


class SessionError(Exception):
    """A provider, graph level or model that onnxruntime cannot do here: what was found, what was expected."""

    def __init__(self, found: str, expected: str = "", remedy: str = "") -> None:
        super().__init__(" ".join(part for part in (found, expected and f"Expected: {expected}.", remedy) if part))
        self.found, self.expected, self.remedy = found, expected, remedy


def version() -> str:
    """onnxruntime's."""
    return str(ort.__version__)


def provider_name(name: str) -> str:
    """``cuda``, ``CUDAExecutionProvider`` or ``cuda:1`` by onnxruntime's own name; "" is the CPU's.

    Raises:
        SessionError: this onnxruntime has no such provider.
    """
    short, colon, index = name.partition(":")
    known = {p.removesuffix("ExecutionProvider").lower(): p for p in ort.get_available_providers()}
    found = known.get(short.removesuffix("ExecutionProvider").lower(), CPU if not short else "")
    if not found or (colon and not (short and index.isdigit())):
        raise SessionError(
            f"onnxruntime {ort.__version__} has no provider {name!r} here.",
            f"one of {', '.join(ort.get_available_providers())}, where there are several devices with ':NUMBER'",
            "other providers come with other builds of onnxruntime, such as onnxruntime-gpu",
        )
    return "" if found == CPU else found + (colon + index if int(index or 0) else "")


def graph_name(level: str) -> str:
    """A graph optimisation level; ``all`` is the default, "".

    Raises:
        SessionError: there is no such level.
    """
    if level not in (*GRAPHS, "all"):
        raise SessionError(f"onnxruntime has no graph level {level!r}.", "all, extended, basic or disabled")
    return "" if level == "all" else level


def gpu_index(provider: str) -> int | None:
    """Which NVIDIA GPU a provider's full name means, None where it means none."""
    name, _, index = provider.partition(":")
    return int(index or 0) if ON_DEVICE.get(name) == "cuda" else None


def session_options(threads: int, graph: str = "") -> ort.SessionOptions:
    """Options that a student's own ``predict.py`` uses too, so that what is measured is what users get."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = GRAPHS[graph]
    options.log_severity_level = ERRORS_ONLY
    return options


class Session:
    """A loaded model with fixed random input.

    Args:
        model: a serialised ONNX model, or the path of one.
        batch: what a symbolic dimension becomes.
        provider, graph: as :func:`provider_name` and :func:`graph_name` give them.
        bound: inputs and outputs stay in memory that is there already, as they do between the parts of a network;
            otherwise every call makes its outputs anew, which large ones feel.

    Raises:
        SessionError: the provider is listed but does not start (onnxruntime would go on with the CPU).
    """

    def __init__(
        self,
        model: bytes | str,
        *,
        threads: int,
        batch: int,
        provider: str = "",
        graph: str = "",
        bound: bool = False,
    ) -> None:
        name, _, index = (provider or CPU).partition(":")
        options = session_options(threads, graph)
        with tempfile.TemporaryDirectory() as folder:
            # A profile of one run is the only account of what is executed that every provider gives. Once ended, it
            # costs the session nothing: medians of 1,500 calls were within 1 % of a session that never had one.
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            settings = {"device_id": index} if index else {}
            if name in THREADS:
                settings[THREADS[name]] = str(threads)
            providers = [(name, settings)]
            if "tensorrt" in name.lower():  # what it leaves is better off beside it than on the CPU
                providers.append(("CUDAExecutionProvider", settings))
            self.session = ort.InferenceSession(model, options, providers=providers)
            if self.session.get_providers()[0] != name:
                raise SessionError(
                    f"onnxruntime lists {name} but could not start it, and fell back to the CPU.",
                    remedy="its own message above says what is missing, mostly a library of the device's",
                )
            inputs = self.session.get_inputs()
            if odd := [value.type for value in inputs if value.type not in DTYPES]:
                raise SessionError(f"The model wants an input of {odd[0]}.", f"one of {', '.join(DTYPES)}")
            described = [(value.name, value.shape, DTYPES[value.type]) for value in inputs]
            self.feed = random_inputs(described, batch)
            outputs = self.session.run(None, self.feed)
            self._fused = executed(Path(self.session.end_profiling()), name)
        if name in ON_DEVICE:
            binding = bind(self.session, self.feed, ON_DEVICE[name], int(index or 0))
            self._run = partial(run_bound, self.session, binding)
        elif bound and name == CPU:
            self._run = partial(self.session.run_with_iobinding, bind_here(self.session, self.feed, outputs))
        else:
            self._run = partial(self.session.run, None, self.feed)

    def __call__(self) -> None:
        """One inference."""
        self._run()

    def time(self, calls: int) -> list[float]:
        """Milliseconds of ``calls`` inferences."""
        return clock(self._run, calls)

    def outputs(self) -> list[npt.NDArray[Any]]:
        """What the model answers to its fixed input."""
        return [np.asarray(value) for value in self.session.run(None, self.feed)]

    def fused(self) -> dict[str, int]:
        """Operators that were executed → how many; those that the provider left to the CPU are marked."""
        return self._fused


def clock(call: Callable[[], Any], calls: int) -> list[float]:
    """Milliseconds of ``calls`` calls, one after the other."""
    times = []
    for _ in range(calls):
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) / 1e6)
    return times


def random_inputs(
    described: Iterable[tuple[str, Sequence[int | str | None], type]], batch: int
) -> dict[str, npt.NDArray[Any]]:
    """Small whole numbers for every (name, shape, type): valid as images, as uint8 and as indices.

    Integers of 32 and 64 bits are indices, of tokens for example, and the graph alone does not say how many there are:
    they are 0 and 1, which every table of two rows has.

    Args:
        batch: what takes the place of a dimension that is no positive number.
    """
    rng = np.random.default_rng(0)
    feed: dict[str, npt.NDArray[Any]] = {}
    for name, shape, kind in described:
        sides = [side if isinstance(side, int) and side > 0 else batch for side in shape]
        feed[name] = rng.integers(0, 2 if kind in INDICES else 6, sides).astype(kind)
    return feed


def bind(session: ort.InferenceSession, feed: dict[str, npt.NDArray[Any]], device: str, index: int) -> Any:
    """Inputs put on the device, outputs left there: no copy is timed."""
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, device, index))
    for output in session.get_outputs():
        binding.bind_output(output.name, device, index)
    return binding


def bind_here(
    session: ort.InferenceSession, feed: dict[str, npt.NDArray[Any]], outputs: Sequence[npt.NDArray[Any]]
) -> Any:
    """Inputs and outputs bound to memory of the processor's that every call uses again."""
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    for output, array in zip(session.get_outputs(), outputs, strict=True):
        binding.bind_ortvalue_output(output.name, ort.OrtValue.ortvalue_from_numpy(array))
    return binding


def run_bound(session: ort.InferenceSession, binding: Any) -> None:
    """One inference on bound tensors, done when it returns."""
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()


def executed(profile: Path, provider: str) -> dict[str, int]:
    """Operators of a profile of one run → how many."""
    counts: Counter[str] = Counter()
    for event in json.loads(profile.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            where = event["args"].get("provider", provider)
            # Providers that compile whole subgraphs number them: one name for all.
            name = re.sub(r"_\d[_\d]*$", "", event["args"]["op_name"])
            counts[name if where == provider else f"{name} ({where.replace('ExecutionProvider', '')})"] += 1
    return dict(counts)

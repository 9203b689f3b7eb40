"""ExecuTorch's program for phones and embedded processors, lowered to XNNPACK from ``model.pt2``."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nas.errors import ExtraError, StudentError
from nas.files import write_atomic
from nas.student.formats.base import Format, formats
from nas.student.program import load_program, program_module


@formats.register("executorch")
class ExecuTorch(Format):
    """``model.pte``: one sample at a time, as a device meets them; what XNNPACK does not know runs in portable kernels.

    The weights are float: the integer arithmetic of a quantised student is simulated, as it is in ``model.pt2``.
    """

    def __init__(self) -> None:
        try:
            with _quiet():
                import executorch.exir
                import executorch.runtime  # noqa: F401
        except ImportError as error:
            raise ExtraError(
                f"The format executorch needs the package executorch: {error}.",
                remedy="pip install 'latency-nas[executorch]'",
            ) from error

    def write(self, student: Path) -> list[Path]:
        with _quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

        program = load_program(student / "model.pt2")
        if not program.example_inputs:
            raise StudentError(f"{student / 'model.pt2'} has no sample inputs.", remedy="make the student again")
        sample = program.example_inputs[0][0]
        try:
            with _quiet():
                single = torch.export.export(program_module(program), (sample[:1],))
                lowered = to_edge_transform_and_lower(single, partitioner=[XnnpackPartitioner()]).to_executorch()
        except Exception as error:
            raise StudentError(
                f"ExecuTorch does not lower {student / 'model.pt2'}: {type(error).__name__}: {error}.",
                remedy="another format",
            ) from error
        write_atomic(student / "model.pte", lowered.buffer)
        return [student / "model.pte"]

    def logits(self, student: Path, x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        from executorch.runtime import Runtime

        method: Any = Runtime.get().load_program(str(student / "model.pte")).load_method("forward")
        # Copied: the runtime gives out the memory that the next call writes to.
        rows = [method.execute([torch.from_numpy(x[i : i + 1])])[0].numpy().copy() for i in range(len(x))]
        return np.concatenate(rows)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Its passes log what they do on the root logger, and its dependencies warn of themselves."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)

"""``model.pt2``: a student as a torch.export program, and a loader that runs nothing but arithmetic from the file."""

from __future__ import annotations

import inspect
import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.errors import StudentError
from nas.files import write_atomic

#: What a program may call: torch's own operators on tensors, and arithmetic on sizes.
TARGETS = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed)\.\w+(\.\w+)?|torch\.sym_\w+"
    r"|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_)"
)
#: A size. torch evaluates these texts, so they may hold symbols, numbers and arithmetic, and no other name.
EXPRESSION = re.compile(
    r"(?:Symbol\('\w+'|\b(?:Integer|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|IntTrueDiv)\("
    r"|\b(?:integer|positive|nonnegative|negative)=(?:True|False)|\b\d+\b|\bs\d+\b|[\s(),*+/-])*"
)
#: The records of an archive that holds a program and nothing compiled, and no pickled weights.
RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+"
    r"|models/model\.json|data/sample_inputs/model\.pt|data/(weights|constants)/model_\w+_config\.json"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+"
)


def save_program(model: nn.Module, sample: torch.Tensor, path: Path) -> None:
    """Write ``model`` (in evaluation mode) as a program for any batch; it loads without this framework.

    Args:
        sample: raw inputs ``[n, *input_shape]``, n ≥ 2.
    """
    batch = torch.export.Dim("batch", min=1, max=65536)
    sample = sample[:2].clone()  # a view would take all of its data along into the file
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own notes on its serialiser, nothing a user could act on
        program = torch.export.export(model, (sample,), dynamic_shapes=({0: batch},))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of the machine where it was made
        torch.export.save(program, buffer)
    write_atomic(path, buffer.getvalue())


def load_program(path: Path) -> torch.export.ExportedProgram:
    """Read a program after checking that torch will unpickle and evaluate nothing of it.

    ``torch.export.load`` alone unpickles what a file asks it to, and looks up any function by name.

    Raises:
        StudentError: there is no such file, it is damaged, or it holds more than a plain program.
    """
    try:
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check(archive)
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise StudentError(f"{path} is no torch program: {error}.", expected="the model.pt2 of a student") from error
    except _UnsafeError as error:
        raise StudentError(
            f"{path} is not loaded: {error}.", expected="a program of torch's own operators, with plain weights",
            remedy="take the file from whoever made the student, and trust it no more than code",
        ) from error  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(io.BytesIO(data))


def program_module(program: torch.export.ExportedProgram) -> nn.Module:
    """The program as a module: raw inputs → logits. Its checks of shapes, which are code in text, are left out."""
    known = inspect.signature(program.module).parameters
    return program.module(**({"check_guards": False} if "check_guards" in known else {}))


class _UnsafeError(Exception):
    pass


def _check(archive: zipfile.ZipFile) -> None:
    for record in archive.namelist():
        name = record.partition("/")[2]
        if not RECORDS.fullmatch(name):
            raise _UnsafeError(f"it holds {record}")
        if name.endswith("_config.json"):
            for values in _values(json.loads(archive.read(record)), "use_pickle"):
                if values is not False:
                    raise _UnsafeError("it asks for unpickling")
        elif name == "models/model.json":
            _check_graph(json.loads(archive.read(record)))
        elif name == "data/sample_inputs/model.pt" and (content := archive.read(record)):
            try:
                torch.load(io.BytesIO(content), weights_only=True)
            except Exception as error:
                raise _UnsafeError("its sample inputs are no plain tensors") from error


def _check_graph(program: Any) -> None:
    for key in ("target", "as_operator"):
        for target in _values(program, key):
            if not (isinstance(target, str) and TARGETS.fullmatch(target)):
                raise _UnsafeError(f"it calls {target}")
    for text in _values(program, "expr_str"):
        if not (isinstance(text, str) and EXPRESSION.fullmatch(text)):
            raise _UnsafeError(f"a size in it is {text!r}")


def _values(content: Any, key: str) -> Iterator[Any]:
    """Every value that stands under ``key``, at any depth."""
    if isinstance(content, dict):
        for name, value in content.items():
            if name == key:
                yield value
            yield from _values(value, key)
    elif isinstance(content, list):
        for value in content:
            yield from _values(value, key)

"""An ONNX graph while it is changed: who makes a value, who reads it, nodes put in and taken out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

Array = npt.NDArray[Any]


class Graph:
    """A graph's nodes and tensors while they are changed; `write` brings them back into the model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                self.tensors[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self.nodes = [node for node in self.nodes if node.op_type != "Constant"]
        self.ends = {value.name for value in model.graph.output}

    def maker(self, name: str) -> onnx.NodeProto | None:
        """The node that makes a value."""
        return next((node for node in self.nodes if name in node.output), None)

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a value."""
        return [node for node in self.nodes if name in node.input]

    def sole(self, name: str) -> onnx.NodeProto | None:
        """The only reader of a value that is no output of the model."""
        found = self.readers(name)
        return found[0] if len(found) == 1 and name not in self.ends else None

    def store(self, value: Array, name: str) -> str:
        """A tensor of that name, or of one like it that is free."""
        free = name
        while free in self.tensors:
            free = f"{free}_"
        self.tensors[free] = np.array(value, order="C")
        return free

    def insert(self, nodes: list[onnx.NodeProto], before: onnx.NodeProto) -> None:
        """Put nodes before another."""
        place = next(i for i, node in enumerate(self.nodes) if node is before)
        self.nodes[place:place] = nodes

    def drop(self, node: onnx.NodeProto) -> None:
        """Take a node out; what read its result reads its first input."""
        self.nodes = [other for other in self.nodes if other is not node]
        for reader in self.readers(node.output[0]):
            reader.input[:] = [node.input[0] if name == node.output[0] else name for name in reader.input]

    def write(self) -> None:
        """Bring nodes and tensors back, but what nothing reads."""
        alive, kept = set(self.ends), []
        for node in reversed(self.nodes):
            if alive.intersection(node.output):
                alive.update(node.input)
                kept.append(node)
        tensors = [numpy_helper.from_array(value, name) for name, value in self.tensors.items() if name in alive]
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
        del self.model.graph.node[:], self.model.graph.initializer[:], self.model.graph.value_info[:]
        self.model.graph.node.extend(nodes)
        self.model.graph.initializer.extend(tensors)

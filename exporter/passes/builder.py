"""Writes new nodes in place of an old one: what every lowering pass does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir


class NodeBuilder:
    """Collects new nodes; called with an op type and inputs, it gives back the node's one output."""

    def __init__(self) -> None:
        self._tape = ir.tape.Tape()

    def __call__(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        return self._tape.op(op_type, inputs, attributes, domain=domain)

    def several(self, op_type: str, count: int, *inputs: ir.Value | None, **attributes: Any) -> Sequence[ir.Value]:
        """A node with ``count`` outputs."""
        return self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=count)

    def ints(self, *values: int) -> ir.Value:
        """A constant 1-D int64 tensor."""
        return self("Constant", value_ints=values)

    def scalar(self, value: int | float, dtype: ir.DataType) -> ir.Value:
        """A constant 0-D tensor."""
        return self("Constant", value=ir.tensor(value, dtype=dtype))

    def replace(self, node: ir.Node, outputs: Sequence[ir.Value]) -> None:
        """Put the collected nodes where ``node`` was and ``outputs`` in place of its outputs, names included."""
        assert node.graph is not None
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], self._tape.nodes, node.outputs, outputs)

    def insert_before(self, node: ir.Node) -> None:
        """Put the collected nodes before ``node`` and leave it there."""
        assert node.graph is not None
        node.graph.insert_before(node, self._tape.nodes)

    def append_to(self, graph: ir.Graph) -> None:
        """Put the collected nodes behind all others."""
        graph.extend(self._tape.nodes)


def nodes_of(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """Nodes of our semantic domain, in order; safe while they are being replaced."""
    for node in tuple(model.graph):
        if node.domain == "gemma4" and node.op_type in op_types:
            yield node


def dim(value: ir.Value, axis: int) -> int:
    """A static size of ``value``; tracing leaves only T, R and the numbers of slots dynamic."""
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int), f"{value.name}: axis {axis} is {size}, expected a static size"
    return size


def attribute(node: ir.Node, name: str) -> Any:
    return node.attributes[name].value


def input_of(node: ir.Node, index: int) -> ir.Value:
    """A required input of ``node``."""
    value = node.inputs[index]
    assert value is not None
    return value

"""Points every initialiser at its bytes in the artifact's files, and widens what is stored narrower than computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from gemma4_export.exporter.passes.builder import NodeBuilder
from gemma4_export.exporter.weights import PlacedWeight

_DTYPES = {"float32": ir.DataType.FLOAT, "bfloat16": ir.DataType.BFLOAT16}


class PlaceInitializers(ir.passes.InPlacePass):
    """``graph_folder`` is the graph's place in the artifact: external data is named relative to it."""

    def __init__(self, placed: Mapping[str, PlacedWeight], *, graph_folder: str) -> None:
        super().__init__()
        self.placed, self.graph_folder = placed, graph_folder

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        order = {node: index for index, node in enumerate(graph)}
        for name, value in tuple(graph.initializers.items()):
            if not value.uses():
                del graph.initializers[name]  # e.g. fused experts, once each expert is an initialiser of its own
                modified = True
                continue
            tensor = self._external(name)
            if not _same_bytes(value.const_value, tensor):
                _place(value, tensor, order)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _external(self, name: str) -> ir.ExternalTensor:
        weight = self.placed[name]
        return ir.ExternalTensor(
            Path(weight.file).relative_to(self.graph_folder).as_posix(),
            weight.offset,
            weight.num_bytes,
            _DTYPES[weight.format],
            shape=ir.Shape(weight.shape),
            name=name,
        )


def _same_bytes(found: ir.TensorProtocol | None, wanted: ir.ExternalTensor) -> bool:
    def place(tensor: ir.ExternalTensor) -> tuple[object, ...]:
        return tensor.location, tensor.offset, tensor.length, tensor.dtype

    return isinstance(found, ir.ExternalTensor) and place(found) == place(wanted)


def _place(value: ir.Value, tensor: ir.ExternalTensor, order: Mapping[ir.Node, int]) -> None:
    uses = value.uses()
    value.const_value, value.shape = tensor, ir.Shape(tensor.shape)
    value.type = ir.TensorType(tensor.dtype)
    if tensor.dtype != ir.DataType.FLOAT:
        op = NodeBuilder()
        widened = op("Cast", value, to=ir.DataType.FLOAT)
        op.insert_before(min((node for node, _ in uses), key=order.__getitem__))
        for node, index in uses:
            node.replace_input_with(index, widened)

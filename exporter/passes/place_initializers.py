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
            else:
                self._place(value, self.placed[name], order)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _place(self, value: ir.Value, weight: PlacedWeight, order: Mapping[ir.Node, int]) -> None:
        name, dtype = str(value.name), _DTYPES[weight.format]
        tensor = ir.ExternalTensor(
            Path(weight.file).relative_to(self.graph_folder).as_posix(),
            weight.offset,
            weight.num_bytes,
            dtype,
            shape=ir.Shape(weight.shape),
            name=name,
        )
        uses = value.uses()
        value.const_value, value.shape = tensor, ir.Shape(weight.shape)
        value.type = ir.TensorType(dtype)
        if dtype != ir.DataType.FLOAT:
            op = NodeBuilder()
            widened = op("Cast", value, to=ir.DataType.FLOAT)
            op.insert_before(min((node for node, _ in uses), key=order.__getitem__))
            for node, index in uses:
                node.replace_input_with(index, widened)

"""Points every initialiser at its bytes in the artifact's files, and widens what is stored narrower than computed."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from gemma4_export.exporter.passes.builder import NodeBuilder
from gemma4_export.exporter.passes.external import point_at_values
from gemma4_export.exporter.weights import Placement


class PlaceInitializers(ir.passes.InPlacePass):
    """Afterwards no initialiser holds a fake tensor; those that nobody reads are gone."""

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.placement = placement

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        order = {node: index for index, node in enumerate(graph)}
        for name, value in tuple(graph.initializers.items()):
            if not value.uses():
                del graph.initializers[name]  # fused experts, and matrices that became codes and scales
                modified = True
            elif not isinstance(value.const_value, ir.ExternalTensor):
                self._place(value, order)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _place(self, value: ir.Value, order: Mapping[ir.Node, int]) -> None:
        uses = value.uses()
        point_at_values(value, self.placement.weights[str(value.name)])
        if value.dtype != ir.DataType.FLOAT:
            op = NodeBuilder()
            widened = op("Cast", value, to=ir.DataType.FLOAT)
            op.insert_before(min((node for node, _ in uses), key=order.__getitem__))
            for node, index in uses:
                node.replace_input_with(index, widened)

"""Gemma4Linear -> MatMul with the transpose of a stored weight."""

from __future__ import annotations

import onnx_ir as ir

from gemma4_export.exporter.passes.builder import NodeBuilder, input_of, nodes_of
from gemma4_export.exporter.passes.trt_precision import Precision
from gemma4_export.exporter.passes.trt_weights import StoredWeights


class LowerLinearToTensorRT(ir.passes.InPlacePass):
    """Products in the float type; the router's, whose rounding would choose another expert, in float32."""

    def __init__(self, weights: StoredWeights, precision: Precision) -> None:
        super().__init__()
        self.weights, self.precision = weights, precision
        self._roles = {stored.name: stored.role for stored in weights.placement.stored}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in nodes_of(model, "Gemma4Linear"):
            rows, weight = input_of(node, 0), input_of(node, 1)
            is_router = self._roles.get(str(weight.name)) == "decoder.router"
            precision = Precision(ir.DataType.FLOAT) if is_router else self.precision
            op = NodeBuilder()
            values = self.weights.values(op, model, weight, precision.float_type)
            product = op("MatMul", precision.narrow(op, rows), op("Transpose", values, perm=[1, 0]))
            op.replace(node, [precision.widen(op, product)])
            modified = True
        return ir.passes.PassResult(model, modified)

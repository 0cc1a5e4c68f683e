"""Gemma4Linear -> Gemm or MatMulNBits: the weight stays [N, K] as stored, so no transposed copy is ever made."""

from __future__ import annotations

import onnx_ir as ir

from gemma4_export.exporter.passes.builder import NodeBuilder, dim, input_of, nodes_of
from gemma4_export.exporter.passes.matmul import MatMul


class LowerLinear(ir.passes.InPlacePass):
    """Flattens the leading axes, multiplies by the transposed weight, and restores them."""

    def __init__(self, matmul: MatMul) -> None:
        super().__init__()
        self.matmul = matmul

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in nodes_of(model, "Gemma4Linear"):
            hidden_states, weight = input_of(node, 0), input_of(node, 1)
            assert hidden_states.shape is not None
            leading = hidden_states.shape.dims[:-1]
            op = NodeBuilder()
            is_quantized = self.matmul.placement.weights[str(weight.name)].format.is_quantized
            if len(leading) == 1 or is_quantized:  # MatMulNBits takes any number of leading axes, Gemm one
                output = self.matmul(op, model, hidden_states, weight)
            else:
                # Reshape takes one -1: all leading axes but T (or R) are static.
                sizes = [size if isinstance(size, int) else -1 for size in leading]
                assert sizes.count(-1) <= 1, f"{hidden_states.name}: several dynamic axes in {hidden_states.shape}"
                rows = op("Reshape", hidden_states, op.ints(-1, dim(weight, 1)))
                output = op("Reshape", self.matmul(op, model, rows, weight), op.ints(*sizes, dim(weight, 0)))
            op.replace(node, [output])
            modified = True
        return ir.passes.PassResult(model, modified)

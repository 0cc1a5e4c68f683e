"""Gemma4Linear -> Gemm: the weight stays [N, K] as stored, so no transposed copy is ever made."""

from __future__ import annotations

import onnx_ir as ir

from gemma4_export.exporter.passes.builder import NodeBuilder, dim, input_of, nodes_of


class LowerLinear(ir.passes.InPlacePass):
    """Flattens the leading axes, multiplies by the transposed weight, and restores them."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in nodes_of(model, "Gemma4Linear"):
            hidden_states, weight = input_of(node, 0), input_of(node, 1)
            assert hidden_states.shape is not None
            leading = hidden_states.shape.dims[:-1]
            op = NodeBuilder()
            if len(leading) == 1:
                output = op("Gemm", hidden_states, weight, transB=1)
            else:
                # Reshape takes one -1: all leading axes but T (or R) are static.
                sizes = [size if isinstance(size, int) else -1 for size in leading]
                assert sizes.count(-1) <= 1, f"{hidden_states.name}: several dynamic axes in {hidden_states.shape}"
                rows = op("Reshape", hidden_states, op.ints(-1, dim(weight, 1)))
                output = op("Reshape", op("Gemm", rows, weight, transB=1), op.ints(*sizes, dim(weight, 0)))
            op.replace(node, [output])
            modified = True
        return ir.passes.PassResult(model, modified)

"""Weightless RMS norms: the scale of ones becomes a constant of the last axis, not one per activation."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gemma4_export.exporter.passes.builder import NodeBuilder, dim, input_of


class UnitNorms(ir.passes.InPlacePass):
    """torch.onnx writes ConstantOfShape(Shape(x)) as the scale, as large as x and filled anew in every call."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in tuple(model.graph):
            if node.op_type != "RMSNormalization":
                continue
            producer = input_of(node, 1).producer()
            if producer is None or producer.op_type != "ConstantOfShape":
                continue
            assert np.all(producer.attributes["value"].as_tensor().numpy() == 1), f"{node.name}: scale is not one"
            op = NodeBuilder()
            size = dim(input_of(node, 0), -1)
            ones = op("Constant", value=ir.tensor(np.ones(size, np.float32)))
            op.insert_before(node)
            node.replace_input_with(1, ones)
            modified = True
        return ir.passes.PassResult(model, modified)

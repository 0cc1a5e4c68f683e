"""Gives Reshape a constant shape wherever only one axis is dynamic, so that no node computes shapes at run time."""

from __future__ import annotations

import onnx_ir as ir

from gemma4_export.exporter.passes.builder import NodeBuilder


class StaticReshapes(ir.passes.InPlacePass):
    """Tracing writes sizes as Concat of constants and T; with one unknown axis, -1 says the same."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in tuple(model.graph):
            shape = node.outputs[0].shape
            if node.op_type != "Reshape" or shape is None or node.inputs[1] is None:
                continue
            sizes = [size if isinstance(size, int) else -1 for size in shape]
            if sizes.count(-1) > 1 or 0 in sizes or ir.convenience.get_const_tensor(node.inputs[1]) is not None:
                continue
            op = NodeBuilder()
            constant = op.ints(*sizes)
            op.insert_before(node)
            node.replace_input_with(1, constant)
            node.attributes.pop("allowzero", None)
            modified = True
        return ir.passes.PassResult(model, modified)

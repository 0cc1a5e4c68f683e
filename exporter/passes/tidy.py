"""Folds what tracing left behind: constants computed by nodes, repeated subexpressions, results that nobody reads."""

from __future__ import annotations

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common


class Tidy(ir.passes.InPlacePass):
    """Leaves a graph in which every node does work at run time. Weights are external and are not looked at."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        passes = (
            common.IdentityEliminationPass(),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedOpsetsPass(),
            common.ClearMetadataAndDocStringPass(),
            common.NameFixPass(),
        )
        folded = onnxscript.optimizer.fold_constants(model, onnx_shape_inference=False)
        modified = [bool(folded.modified), *(one(model).modified for one in passes)]
        return ir.passes.PassResult(model, any(modified))

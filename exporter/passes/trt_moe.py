"""Gemma4MoE -> our plugin's node, or one of two forms of standard ops.

``plugin``: the same op in the float type, weights as codes with their scales. The other two exist for machines without
the plugin's library. ``gather`` reads the chosen experts only and is for decoding: TensorRT moves Gather ahead of
DequantizeLinear. ``dense`` runs every expert on every token and is for prefill: 16 times the work of the best 8 of 128.
It takes a few experts at a time, so that their products for a whole chunk take bounded memory and each weight is read
once. A Loop over tokens is no way: TensorRT-RTX 1.7.1 refuses it for ``dense`` and expands all experts for ``gather``.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from gemma4_export.exporter.passes.builder import NodeBuilder, attribute, dim, input_of, nodes_of
from gemma4_export.exporter.passes.trt_precision import Precision, cast
from gemma4_export.exporter.passes.trt_weights import StoredWeights, scale_dtype

EXPERTS_AT_ONCE = 16
"""Of ``dense``: 92 MB of products for 2048 tokens of 26B-A4B."""
ExpertsForm = Literal["plugin", "gather", "dense"]


class LowerMoEToTensorRT(ir.passes.InPlacePass):
    """Routing is in float32, the experts' products in the float type, GELU and the weighted sum in float32."""

    def __init__(self, weights: StoredWeights, precision: Precision, form: ExpertsForm) -> None:
        super().__init__()
        self.weights, self.precision, self.form = weights, precision, form

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        lower = {"plugin": self._plugin, "gather": self._gather, "dense": self._dense}[self.form]
        modified = False
        for node in nodes_of(model, "Gemma4MoE"):
            if "block" in node.attributes:
                continue  # the plugin's own node, which has the semantic op's name
            op = NodeBuilder()
            op.replace(node, [self.precision.widen(op, lower(op, model, node))])
            modified = True
        return ir.passes.PassResult(model, modified)

    def _plugin(self, op: NodeBuilder, model: ir.Model, node: ir.Node) -> ir.Value:
        """Inputs of the contract; of a quantised weight codes, then scales: float16 as stored, else the float type."""
        hidden_states, logits, scale = (input_of(node, index) for index in range(3))
        stored: list[ir.Value] = []
        block = 0
        for weight in (input_of(node, 3), input_of(node, 4)):
            placed = self.weights.placed(weight)
            if not placed.format.is_quantized:
                stored.append(self.weights.plain(op, weight, self.precision.float_type))
                continue
            codes, scales = self.weights.codes_and_scales(model, weight)
            if placed.format.kind == "int4" and scale_dtype(placed) == ir.DataType.FLOAT:
                scales = cast(op, scales, ir.DataType.FLOAT, self.precision.float_type)
            stored += [codes, scales]
            block = placed.format.block
        inputs = (self.precision.narrow(op, hidden_states), logits, scale, *stored)
        return op("Gemma4MoE", *inputs, domain="gemma4", top_k=attribute(node, "top_k"), block=block)

    def _gather(self, op: NodeBuilder, model: ir.Model, node: ir.Node) -> ir.Value:
        hidden_states = input_of(node, 0)
        hidden_size, top_k = dim(hidden_states, 2), attribute(node, "top_k")
        experts, shares = _route(op, input_of(node, 1), input_of(node, 2), top_k)
        rows = op("Reshape", hidden_states, op.ints(-1, 1, 1, hidden_size))
        ids = op("Reshape", experts, op.ints(-1, top_k))
        gate_up = self._chosen(op, model, input_of(node, 3), ids)  # [T, k, E, 2F]
        products = op("MatMul", self.precision.narrow(op, rows), gate_up)
        gated = _gated(op, self.precision.widen(op, products), axis=3)
        down = self._chosen(op, model, input_of(node, 4), ids)  # [T, k, F, E]
        outputs = self.precision.widen(op, op("MatMul", self.precision.narrow(op, gated), down))
        weighted = op("Mul", outputs, op("Reshape", shares, op.ints(-1, top_k, 1, 1)))
        total = op("ReduceSum", op("Squeeze", weighted, op.ints(2)), op.ints(1), keepdims=0)
        return self.precision.narrow(op, op("Reshape", total, op.ints(1, -1, hidden_size)))

    def _chosen(self, op: NodeBuilder, model: ir.Model, weight: ir.Value, ids: ir.Value) -> ir.Value:
        values = self.weights.values(op, model, weight, self.precision.float_type)
        return op("Transpose", op("Gather", values, ids, axis=0), perm=[0, 1, 3, 2])

    def _dense(self, op: NodeBuilder, model: ir.Model, node: ir.Node) -> ir.Value:
        hidden_states, logits = input_of(node, 0), input_of(node, 1)
        num_experts, hidden_size, _ = (dim(input_of(node, 4), axis) for axis in range(3))
        experts, shares = _route(op, logits, input_of(node, 2), attribute(node, "top_k"))
        nothing = op.scalar(0.0, ir.DataType.FLOAT)
        by_expert = op("ScatterElements", op("Expand", nothing, op("Shape", logits)), experts, shares, axis=2)
        by_expert = op("Transpose", op("Reshape", by_expert, op.ints(-1, num_experts, 1)), perm=[1, 0, 2])
        rows = op("Reshape", hidden_states, op.ints(1, -1, hidden_size))
        total: ir.Value | None = None
        for start in range(0, num_experts, EXPERTS_AT_ONCE):
            run = (start, min(start + EXPERTS_AT_ONCE, num_experts))
            if total is not None:
                # Zero, and nobody may know before the last run is summed: else the builder holds all runs at once.
                first = op("Slice", total, op.ints(0), op.ints(1), op.ints(2))
                rows = op("Add", rows, op("Mul", first, nothing))
            some = op("Slice", by_expert, op.ints(run[0]), op.ints(run[1]), op.ints(0))  # [X', T, 1], 0 if not chosen
            products = op("MatMul", self.precision.narrow(op, rows), self._run(op, model, input_of(node, 3), run))
            gated = op("Mul", _gated(op, self.precision.widen(op, products), axis=2), some)  # [X', T, F]
            outputs = op("MatMul", self.precision.narrow(op, gated), self._run(op, model, input_of(node, 4), run))
            partial = op("ReduceSum", self.precision.widen(op, outputs), op.ints(0), keepdims=1)  # [1, T, E]
            total = partial if total is None else op("Add", total, partial)
        assert total is not None
        return self.precision.narrow(op, total)

    def _run(self, op: NodeBuilder, model: ir.Model, weight: ir.Value, run: tuple[int, int]) -> ir.Value:
        some = self.weights.experts(model, weight, *run)
        return op("Transpose", self.weights.values(op, model, some, self.precision.float_type), perm=[0, 2, 1])


def _route(op: NodeBuilder, logits: ir.Value, per_expert_scale: ir.Value, top_k: int) -> tuple[ir.Value, ir.Value]:
    """Chosen experts and their shares, [B, T, top_k] each: the softmax over the best is the renormalised one."""
    best, experts = op.several("TopK", 2, logits, op.ints(top_k), axis=-1)
    return experts, op("Mul", op("Softmax", best, axis=-1), op("Gather", per_expert_scale, experts, axis=0))


def _gated(op: NodeBuilder, products: ir.Value, *, axis: int) -> ir.Value:
    gate, up = op.several("Split", 2, products, num_outputs=2, axis=axis)
    return op("Mul", op("Gelu", gate, approximate="tanh"), up)

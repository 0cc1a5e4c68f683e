"""Gemma4MoE -> one pair of matrices per expert, each fed only the token rows that were routed to it.

Reading all experts for every token, or gathering whole experts per token, costs 100 times more at 26B size; an expert
that nobody chose gets zero rows and costs a few microseconds.
"""

from __future__ import annotations

import onnx_ir as ir

from gemma4_export.configs.names import expert_tensor
from gemma4_export.exporter.passes.builder import NodeBuilder, attribute, dim, input_of, nodes_of
from gemma4_export.exporter.passes.matmul import MatMul


class LowerMoE(ir.passes.InPlacePass):
    """Routes in fp32 (top-k, softmax over the chosen, per-expert scale), then runs each expert on its own rows."""

    def __init__(self, matmul: MatMul) -> None:
        super().__init__()
        self.matmul = matmul

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in nodes_of(model, "Gemma4MoE"):
            hidden_states, gate_up, down = input_of(node, 0), input_of(node, 3), input_of(node, 4)
            num_experts, hidden_size, width = (dim(down, axis) for axis in range(3))
            op = NodeBuilder()
            top_k = attribute(node, "top_k")
            rows = op("Reshape", hidden_states, op.ints(-1, hidden_size))
            experts, weights = _route(op, input_of(node, 1), input_of(node, 2), top_k)
            choices = op("Reshape", experts, op.ints(-1))  # [rows * top_k], the choices of one row side by side
            # A node costs microseconds, and there are X experts in each layer: sort once and split, so that an expert
            # is its two products and nothing else.
            _, order = op.several("TopK", 2, choices, op("Shape", choices), largest=0)
            counts = _count(op, choices, num_experts)
            mine = op("Gather", rows, op("Div", order, op.scalar(top_k, ir.DataType.INT64)), axis=0)
            both = self._each_expert(op, model, mine, counts, gate_up, (2 * width, hidden_size))
            gate, up = op.several("Split", 2, both, num_outputs=2, axis=1)
            gated = op("Mul", op("Gelu", gate, approximate="tanh"), up)
            outputs = self._each_expert(op, model, gated, counts, down, (hidden_size, width))
            _, place = op.several("TopK", 2, order, op("Shape", order), largest=0)  # the inverse of a permutation
            ordered = op("Gather", outputs, place, axis=0)
            by_row = op("Reshape", ordered, op.ints(-1, top_k, hidden_size))
            weighted = op("MatMul", op("Reshape", weights, op.ints(-1, 1, top_k)), by_row)  # [rows, 1, E]
            op.replace(node, [op("Reshape", weighted, op("Shape", hidden_states))])
            modified = True
        return ir.passes.PassResult(model, modified)

    def _each_expert(
        self,
        op: NodeBuilder,
        model: ir.Model,
        rows: ir.Value,
        counts: ir.Value,
        fused: ir.Value,
        shape: tuple[int, int],
    ) -> ir.Value:
        """Rows sorted by expert times their expert's slice of ``fused``, in the same order."""
        parts = op.several("Split", dim(fused, 0), rows, counts, axis=0)
        weights = (_expert_initializer(model, fused, expert, shape) for expert in range(len(parts)))
        return op("Concat", *(self.matmul(op, model, *pair) for pair in zip(parts, weights, strict=True)), axis=0)


def _count(op: NodeBuilder, choices: ir.Value, num_experts: int) -> ir.Value:
    """How many of ``choices`` each expert got, [X]."""
    experts = op("Constant", value=ir.tensor([[expert] for expert in range(num_experts)], dtype=ir.DataType.INT64))
    is_mine = op("Equal", choices, experts)  # [X, rows * top_k]
    return op("ReduceSum", op("Cast", is_mine, to=ir.DataType.INT64), op.ints(1), keepdims=0)


def _route(op: NodeBuilder, logits: ir.Value, per_expert_scale: ir.Value, top_k: int) -> tuple[ir.Value, ir.Value]:
    """Chosen experts and their weights, [B, T, top_k] each.

    The softmax over all experts, cut to the best and renormalised, is the softmax over the best alone.
    """
    best, experts = op.several("TopK", 2, logits, op.ints(top_k), axis=-1)
    return experts, op("Mul", op("Softmax", best, axis=-1), op("Gather", per_expert_scale, experts, axis=0))


def _expert_initializer(model: ir.Model, fused: ir.Value, expert: int, shape: tuple[int, int]) -> ir.Value:
    """One expert's matrix as an initialiser of its own: a slice of the fused weight's bytes, nothing is copied."""
    assert fused.name is not None
    value = ir.Value(
        name=expert_tensor(fused.name, expert), shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT)
    )
    model.graph.initializers[str(value.name)] = value
    return value

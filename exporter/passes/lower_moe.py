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
            rows = op("Reshape", hidden_states, op.ints(-1, hidden_size))
            experts, weights = _route(op, input_of(node, 1), input_of(node, 2), attribute(node, "top_k"))
            flat_experts, flat_weights = op("Reshape", experts, op.ints(-1)), op("Reshape", weights, op.ints(-1, 1))
            places, outputs = [], []
            for expert in range(num_experts):
                up_weight = _expert_initializer(model, gate_up, expert, (2 * width, hidden_size))
                down_weight = _expert_initializer(model, down, expert, (hidden_size, width))
                # Positions in the flattened [rows, top_k] choice; integer division by top_k gives the row.
                is_mine = op("Equal", flat_experts, op.scalar(expert, ir.DataType.INT64))
                place = op("Squeeze", op("NonZero", is_mine), op.ints(0))
                token = op("Div", place, op.scalar(attribute(node, "top_k"), ir.DataType.INT64))
                both = self.matmul(op, model, op("Gather", rows, token, axis=0), up_weight)
                gate, up = op.several("Split", 2, both, num_outputs=2, axis=1)
                gated = op("Mul", op("Gelu", gate, approximate="tanh"), up)
                expert_output = self.matmul(op, model, gated, down_weight)
                outputs.append(op("Mul", expert_output, op("Gather", flat_weights, place, axis=0)))
                places.append(token)
            total = op(
                "ScatterND",
                op("ConstantOfShape", op("Shape", rows), value=ir.tensor([0.0], dtype=ir.DataType.FLOAT)),
                op("Unsqueeze", op("Concat", *places, axis=0), op.ints(-1)),
                op("Concat", *outputs, axis=0),
                reduction="add",
            )
            op.replace(node, [op("Reshape", total, op("Shape", hidden_states))])
            modified = True
        return ir.passes.PassResult(model, modified)


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

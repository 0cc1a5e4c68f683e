"""Which parts of a TensorRT graph compute in the float type, and the casts at their borders.

Matrix products, attention and caches are in the float type; norms, residual sums, RoPE, GELU and its product, softmax
and the router are in float32. Their values outgrow float16 (V of 888 squared, norm weights of 1248) and lose in
bfloat16 what decides an expert; between two products they are one fused kernel, so float32 costs no traffic of note.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from gemma4_export.configs.target import FloatType
from gemma4_export.exporter.passes.builder import NodeBuilder

FLOAT_TYPES: dict[FloatType, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


@dataclass(frozen=True, slots=True)
class Precision:
    """Casts into the float type and back to float32; in the float32 twin both are nothing."""

    float_type: ir.DataType

    def narrow(self, op: NodeBuilder, value: ir.Value) -> ir.Value:
        return cast(op, value, ir.DataType.FLOAT, self.float_type)

    def widen(self, op: NodeBuilder, value: ir.Value) -> ir.Value:
        return cast(op, value, self.float_type, ir.DataType.FLOAT)


def cast(op: NodeBuilder, value: ir.Value, found: ir.DataType, wanted: ir.DataType) -> ir.Value:
    return value if found == wanted else op("Cast", value, to=wanted)

"""Multiplies by a stored weight [N, K]: Gemm for plain values, onnxruntime's MatMulNBits for codes and scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from gemma4_export.exporter.packing import matmul_block
from gemma4_export.exporter.passes.builder import NodeBuilder, dim
from gemma4_export.exporter.passes.external import codes_and_scales
from gemma4_export.exporter.weights import Placement

Activations = Literal["int8", "fp32"]
# MatMulNBits' accuracy_level: 4 rounds each block of activations to int8 for integer products, 1 keeps them float32.
_ACCURACY_LEVEL: dict[Activations, int] = {"int8": 4, "fp32": 1}


@dataclass(frozen=True, slots=True)
class MatMul:
    """Writes the product of rows with a named weight, whatever that weight is stored as."""

    placement: Placement
    activations: Activations

    def __call__(self, op: NodeBuilder, model: ir.Model, rows: ir.Value, weight: ir.Value) -> ir.Value:
        """[…, K] times the transpose of ``weight`` [N, K] -> […, N]; plain values take [n, K] only."""
        name = str(weight.name)
        placed = self.placement.weights[name]
        if not placed.format.is_quantized:
            return op("Gemm", rows, weight, transB=1)
        columns = dim(weight, 1)
        block = matmul_block(placed.format, columns)
        codes, scales = codes_and_scales(model, name, placed, block)
        return op(
            "MatMulNBits",
            rows,
            codes,
            scales,
            domain="com.microsoft",
            K=columns,
            N=dim(weight, 0),
            bits=4 if placed.format.kind == "int4" else 8,
            block_size=block,
            accuracy_level=_ACCURACY_LEVEL[self.activations],
        )

"""Canonical codes and scales to the bytes that a backend reads: each an exact conversion, none rounds.

``ort-cpu`` is onnxruntime's MatMulNBits: unsigned codes with zero point 8 (int4) or 128 (int8), blocks along K, float32
scales because its activations are. Where an int8 row has one scale, it is repeated: MatMulNBits wants one per block.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gemma4_export.configs.formats import WeightFormat
from gemma4_export.exporter.quantize import QuantizedRows

Array = np.ndarray[Any, np.dtype[Any]]

_LARGEST_BLOCK = 256  # of MatMulNBits' sizes; fewer scales to read than with a smaller one


def matmul_block(form: WeightFormat, columns: int) -> int:
    """Weights per scale in MatMulNBits: the format's own block, or for int8 rows the largest that divides K."""
    if form.block:
        return form.block
    block = _LARGEST_BLOCK
    while columns % block:
        block //= 2
    assert block >= 16, f"{columns} columns: WeightFormat.check_columns lets only multiples of 16 through"
    return block


def offset_codes(rows: QuantizedRows) -> Array:
    """Signed codes -> unsigned ones, [n, bytes] uint8: flipping the sign bit adds 8 (or 128)."""
    sign_bits = np.uint8(0x88 if rows.format.kind == "int4" else 0x80)
    return np.asarray(rows.codes.view(np.uint8) ^ sign_bits)


def matmul_scales(rows: QuantizedRows, columns: int) -> Array:
    """[n, K // block] float32, one per block of MatMulNBits."""
    per_row = columns // matmul_block(rows.format, columns)
    return np.ascontiguousarray(np.broadcast_to(rows.scales, (len(rows.scales), per_row)), np.float32)

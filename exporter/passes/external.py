"""Initialisers whose bytes lie in the artifact's data files."""

from __future__ import annotations

from pathlib import PurePosixPath

import onnx_ir as ir

from gemma4_export.configs.evidence import GRAPHS_FOLDER
from gemma4_export.exporter.weights import PlacedWeight

_DTYPES = {"float32": ir.DataType.FLOAT, "bfloat16": ir.DataType.BFLOAT16}


def point_at_values(value: ir.Value, weight: PlacedWeight) -> None:
    """Make ``value`` an initialiser that reads a weight stored as plain values."""
    _point(value, weight.file, weight.offset, weight.code_bytes, _DTYPES[weight.format.kind], weight.shape)


def codes_and_scales(model: ir.Model, name: str, weight: PlacedWeight, block: int) -> tuple[ir.Value, ir.Value]:
    """The two initialisers that MatMulNBits reads: codes [N, K // block, bytes] uint8 and scales [N, K // block]."""
    assert weight.scales is not None
    rows, columns = weight.row_shape
    blocks = columns // block
    codes = _initializer(model, f"{name}.codes")
    block_bytes = weight.format.row_bytes(block)
    _point(codes, weight.file, weight.offset, weight.code_bytes, ir.DataType.UINT8, (rows, blocks, block_bytes))
    scales = _initializer(model, f"{name}.scales")
    _point(scales, weight.file, weight.scales.offset, weight.scale_bytes, ir.DataType.FLOAT, (rows, blocks))
    return codes, scales


def _initializer(model: ir.Model, name: str) -> ir.Value:
    value = ir.Value(name=name)
    model.graph.initializers[name] = value
    return value


def _point(value: ir.Value, file: str, offset: int, size: int, dtype: ir.DataType, shape: tuple[int, ...]) -> None:
    location = PurePosixPath(file).relative_to(GRAPHS_FOLDER).as_posix()
    value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)
    value.const_value = ir.ExternalTensor(location, offset, size, dtype, shape=value.shape, name=str(value.name))

"""Stored weights as TensorRT reads them: plain values, or signed codes and scales through DequantizeLinear.

Codes stay [N, K] as stored and are transposed behind DequantizeLinear: TensorRT-RTX folds that into the product and
keeps them packed. The scales are cast, never the result: a Cast behind DequantizeLinear makes it write the whole weight
out in 16 bits on every call (2048 x 4096 in int4: 27.0 MB of scratch instead of 8.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

import onnx_ir as ir

from gemma4_export.configs.evidence import GRAPHS_FOLDER
from gemma4_export.exporter.passes.builder import NodeBuilder
from gemma4_export.exporter.passes.trt_precision import cast
from gemma4_export.exporter.weights import PlacedWeight, Placement, run_of_experts

_STORED = {
    "float32": ir.DataType.FLOAT,
    "bfloat16": ir.DataType.BFLOAT16,
    "float16": ir.DataType.FLOAT16,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
}
_CODES, _SCALES = ".codes", ".scales"


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Writes the nodes that read a named weight in a wanted type."""

    placement: Placement

    def placed(self, weight: ir.Value) -> PlacedWeight:
        return _placed(self.placement, str(weight.name))

    def experts(self, model: ir.Model, weight: ir.Value, start: int, stop: int) -> ir.Value:
        """Experts ``start:stop`` of a fused weight as a weight of their own: the same bytes, nothing is copied."""
        shape = self.placed(weight).shape
        return _initializer(model, f"{weight.name}.{start}-{stop}", ir.DataType.FLOAT, (stop - start, *shape[1:]))

    def values(self, op: NodeBuilder, model: ir.Model, weight: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``weight`` in its own shape and ``dtype``, dequantised where it is stored as codes."""
        placed = self.placed(weight)
        if not placed.format.is_quantized:
            return self.plain(op, weight, dtype)
        codes, scales = self.codes_and_scales(model, weight)
        narrow = cast(op, scales, scale_dtype(placed), dtype)
        block = block_size(placed)
        if block:
            return op("DequantizeLinear", codes, narrow, axis=len(placed.shape) - 1, block_size=block)
        return op("DequantizeLinear", codes, narrow, axis=0)

    def plain(self, op: NodeBuilder, weight: ir.Value, dtype: ir.DataType) -> ir.Value:
        stored = _STORED[self.placed(weight).format.kind]
        weight.type = ir.TensorType(stored)
        weight.const_value = None  # the traced stand-in: folding must not try to cast it
        return cast(op, weight, stored, dtype)

    def codes_and_scales(self, model: ir.Model, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The two initialisers of a quantised weight: codes in its shape, and one scale per block or row."""
        placed = self.placed(weight)
        codes = _initializer(model, f"{weight.name}{_CODES}", _STORED[placed.format.kind], placed.shape)
        scales = _initializer(model, f"{weight.name}{_SCALES}", scale_dtype(placed), _scale_shape(placed))
        return codes, scales


def _placed(placement: Placement, name: str) -> PlacedWeight:
    """A weight by its name, or by the name that `StoredWeights.experts` gives to neighbours in it."""
    if name in placement.weights:
        return placement.weights[name]
    fused, _, run = name.rpartition(".")
    start, stop = (int(number) for number in run.split("-"))
    return run_of_experts(placement.weights[fused], start, stop)


def block_size(placed: PlacedWeight) -> int:
    """Codes per scale along the last axis; 0: a matrix with one scale per row.

    DequantizeLinear knows one scale per index of one axis, so rows of a fused expert weight are blocks of full length.
    """
    return placed.format.block or (placed.shape[-1] if len(placed.shape) == 3 else 0)


def scale_dtype(placed: PlacedWeight) -> ir.DataType:
    assert placed.scales is not None
    return _STORED[placed.scales.dtype]


def _scale_shape(placed: PlacedWeight) -> tuple[int, ...]:
    assert placed.scales is not None
    return (*placed.shape[:-1], placed.scales.per_row) if block_size(placed) else placed.shape[:-1]


def _initializer(model: ir.Model, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    if name not in model.graph.initializers:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        model.graph.initializers[name] = value
    return model.graph.initializers[name]


class PlaceStoredWeights(ir.passes.InPlacePass):
    """Points every initialiser at its bytes in the artifact's files. Those that nobody reads are gone afterwards.

    Runs last: folding constants must never see, let alone widen, the weights themselves.
    """

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.placement = placement

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for name, value in tuple(model.graph.initializers.items()):
            if not value.uses():
                del model.graph.initializers[name]
                modified = True
            elif not isinstance(value.const_value, ir.ExternalTensor):
                self._place(name, value)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _place(self, name: str, value: ir.Value) -> None:
        placed = _placed(self.placement, name.removesuffix(_CODES).removesuffix(_SCALES))
        offset, size = placed.offset, placed.code_bytes
        if name.endswith(_SCALES):
            assert placed.scales is not None
            offset, size = placed.scales.offset, placed.scale_bytes
        location = PurePosixPath(placed.file).relative_to(GRAPHS_FOLDER).as_posix()
        dtype, shape = value.dtype, value.shape
        assert dtype is not None, f"{name} has no type"
        assert shape is not None, f"{name} has no shape"
        value.const_value = ir.ExternalTensor(location, offset, size, dtype, shape=shape, name=name)

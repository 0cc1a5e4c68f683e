"""Rounds rows of a weight to int8, int4 or fp8 codes with scales, and back. Canonical, independent of any backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from gemma4_export.configs.errors import CheckpointError
from gemma4_export.configs.formats import WeightFormat

Array = np.ndarray[Any, np.dtype[Any]]
Float32 = np.ndarray[Any, np.dtype[np.float32]]
UInt8 = np.ndarray[Any, np.dtype[np.uint8]]

# Largest code, symmetric, and the dtype of scales that our own rounding makes.
_LIMITS: dict[str, tuple[int, type[np.floating[Any]]]] = {"int8": (127, np.float32), "int4": (7, np.float16)}
_LARGEST_FLOAT16 = float(np.finfo(np.float16).max)
_LARGEST_FP8 = 448.0
_LEAST_EXPONENT = -100  # rows below 448 * 2^-100 count as zeros: 2^-9, the least code, times the scale stays normal


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows of a quantised weight: its value is code times scale.

    ``int4``: codes [n, K // 2] uint8, two signed nibbles each, the lower column in the low one; scales [n, K // block].
    ``int8``: codes [n, K] int8; scales [n, K // block], or [n, 1] without a block.
    ``fp8``: codes [n, K] uint8, the bits of E4M3FN; scales [n, 1] float32, powers of two.

    Scales are float16 or float32; a source's bfloat16 ones are carried as float32, which holds them exactly.
    """

    format: WeightFormat
    codes: Array
    scales: Array

    @property
    def num_bytes(self) -> int:
        return int(self.codes.nbytes + self.scales.nbytes)


def quantize(rows: Float32, form: WeightFormat, where: str) -> QuantizedRows:
    """Round to nearest: scale = max |x| of its block or row / 7 (int4, float16) or / 127 (int8, float32).

    The scale is rounded to its dtype first and the codes are rounded against that, so that a weight which already is a
    code times such a scale keeps its code.

    Args:
        rows: [n, K] float32.
        where: the weight's name, for errors.
    Raises:
        CheckpointError: NaN or Inf among the values, or a block too large for a float16 scale.
    """
    if form.kind == "fp8":
        return _round_to_fp8(rows, form, where)
    n, columns = rows.shape
    limit, dtype = _LIMITS[form.kind]
    block = form.block or columns
    blocks = rows.reshape(n, columns // block, block)
    largest = np.maximum(blocks.max(axis=2), -blocks.min(axis=2))
    if not np.isfinite(largest).all():
        check_finite(rows, where)
    if form.kind == "int4" and largest.max(initial=0) > limit * _LARGEST_FLOAT16:
        raise CheckpointError(f"{where}: holds {largest.max():.3g}, too large for a float16 scale", hint="use int8")
    scales = (largest / np.float32(limit)).astype(dtype)
    exact = scales.astype(np.float32)
    # A block of zeros, or one too small for its scale's dtype, has scale 0 and codes 0. Scales below float32's normal
    # numbers count as too small: their reciprocal overflows.
    is_zero = exact < np.finfo(np.float32).tiny
    scales[is_zero] = 0
    inverse = np.divide(np.float32(1), exact, out=np.zeros_like(exact), where=~is_zero)
    codes = np.rint(blocks * inverse[:, :, None])
    # A scale rounded down can push its largest weight half a code past the limit.
    np.clip(codes, -limit, limit, out=codes)
    signed = codes.reshape(n, columns).astype(np.int8)
    return QuantizedRows(form, pack_int4(signed) if form.kind == "int4" else signed, scales)


def _round_to_fp8(rows: Float32, form: WeightFormat, where: str) -> QuantizedRows:
    """Scale: the least power of two that keeps the row within 448.

    A float code loses nothing by a scale that is not the smallest, and a power of two is exact in every float type that
    an engine computes in.
    """
    check_finite(rows, where)
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    mantissa, exponent = np.frexp(largest.astype(np.float64) / _LARGEST_FP8)  # largest / 448 = mantissa * 2^exponent
    exponent -= mantissa == 0.5
    is_zero = (largest == 0) | (exponent < _LEAST_EXPONENT)
    exponent = np.where(is_zero, 0, exponent)
    codes = np.where(is_zero, np.float32(0), np.ldexp(rows, -exponent)).astype(ml_dtypes.float8_e4m3fn)
    scales = np.where(is_zero, np.float32(0), np.ldexp(np.float32(1), exponent))
    return QuantizedRows(form, codes.view(np.uint8), scales)


def dequantize(rows: QuantizedRows) -> Float32:
    """[n, K] float32: each code times its scale, exact in float32 for int4 codes with float16 scales, and for fp8."""
    codes = unpack_int4(rows.codes) if rows.format.kind == "int4" else rows.codes
    if rows.format.kind == "fp8":
        codes = codes.view(ml_dtypes.float8_e4m3fn)
    n, columns = codes.shape
    scales = rows.scales.astype(np.float32)
    blocks = codes.reshape(n, scales.shape[1], columns // scales.shape[1]).astype(np.float32)
    return np.asarray((blocks * scales[:, :, None]).reshape(n, columns))


def pack_int4(codes: np.ndarray[Any, np.dtype[np.int8]]) -> UInt8:
    """[n, K] codes -8…7 -> [n, K // 2] bytes, the even column in the low nibble."""
    nibbles = codes.view(np.uint8) & np.uint8(15)
    return np.asarray(nibbles[:, 0::2] | (nibbles[:, 1::2] << np.uint8(4)))


def unpack_int4(packed: UInt8) -> np.ndarray[Any, np.dtype[np.int8]]:
    """The inverse of ``pack_int4``."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.int8)
    # Shifting left and back extends the sign of the low nibble.
    codes[:, 0::2] = (packed << np.uint8(4)).view(np.int8) >> np.int8(4)
    codes[:, 1::2] = packed.view(np.int8) >> np.int8(4)
    return codes


def check_scales(rows: QuantizedRows, where: str) -> None:
    """Refuse codes of a checkpoint that cannot be weights: scales NaN or Inf, or zero where codes are not.

    Raises:
        CheckpointError: with the number of such scales.
    """
    check_finite(rows.scales, f"{where}, scales")
    is_zero = rows.scales == 0
    if is_zero.any():
        codes = rows.codes.reshape(*rows.scales.shape, -1)
        lost = int((is_zero & (codes != 0).any(axis=2)).sum())
        if lost:
            raise CheckpointError(
                f"{where}: {lost} of {rows.scales.size} scales are 0 where the codes are not",
                hint="the checkpoint is damaged; fetch it again",
            )


def check_finite(values: Array, where: str) -> None:
    """Raise CheckpointError when ``values`` holds NaN or Inf."""
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{where}: {int((~np.isfinite(values)).sum())} values are NaN or Inf",
            hint="the checkpoint is damaged; fetch it again",
        )

"""How far an array is from what it should be: one measure for bounds that are recorded and results held to them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def row_scale(expected: Array) -> Array:
    """Root mean square of each row (the last axis), kept as an axis; 1 where a row is all zeros."""
    scale = np.sqrt(np.mean(np.square(expected.astype(np.float64)), axis=-1, keepdims=True))
    return np.where(scale == 0, 1.0, scale)


def drift(found: Array, expected: Array) -> float:
    """max over all values of |found - expected| / rms of the value's row; inf where ``found`` is not finite.

    The largest error and not the mean: one wrong row of a matrix moves one value per token, one wrong expert a few
    tokens, and neither may drown in those that are right.

    Args:
        found, expected: one shape, rows along the last axis.
    Returns:
        0 for no rows.
    """
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not found.size:
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        largest = float((np.abs(found.astype(np.float64) - expected) / row_scale(expected)).max())
    return largest if math.isfinite(largest) else math.inf

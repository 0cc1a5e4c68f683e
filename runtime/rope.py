"""Cosines and sines of this call's positions, with the reference's float32 roundings."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from gemma4_export.configs.manifest import RopeEntry

Float32 = np.ndarray[Any, np.dtype[np.float32]]

_RUN = 64
_NUM_RUNS = 8
"""Kept, so that some sequences can take turns."""


class RopeTable:
    """``cos(p * theta ** (-2 i / head_dim))`` and the sine, for i below num_frequencies.

    transformers computes exponent, power, reciprocal and the product with the position in float32, and at position
    100,000 an angle moves by 0.006 with the last bit of its frequency. So the same steps are rounded here; only the
    power is rounded from float64, because float32 powers differ in the last bit from machine to machine.
    """

    def __init__(self, entry: RopeEntry) -> None:
        exponents = np.arange(0, 2 * entry.num_frequencies, 2, dtype=np.float32) / np.float32(entry.head_dim)
        powers = np.power(np.float64(entry.theta), exponents.astype(np.float64)).astype(np.float32)
        self.inv_freq: Float32 = np.float32(1) / powers
        self._run = lru_cache(_NUM_RUNS)(lambda number: self._computed(number * _RUN, _RUN))

    def cos_sin(self, start: int, count: int) -> Float32:
        """[1, count, 2, num_frequencies] for positions ``start`` … ``start + count - 1``.

        A single position comes from a run of them that is computed at once when the first is asked for.
        """
        if count > 1:
            return self._computed(start, count)
        number, at = divmod(start, _RUN)
        return self._run(number)[:, at : at + 1]

    def _computed(self, start: int, count: int) -> Float32:
        positions = np.arange(start, start + count, dtype=np.float32)
        angles = (positions[:, None] * self.inv_freq).astype(np.float64)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)[None]

"""Embedding tables on the host: memory-mapped rows, gathered, dequantised and widened to float32 per call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.formats import WeightFormat
from gemma4_export.configs.manifest import TableEntry

Array = np.ndarray[Any, np.dtype[Any]]
Float32 = np.ndarray[Any, np.dtype[np.float32]]
Int64 = np.ndarray[Any, np.dtype[np.int64]]

# NumPy has no bfloat16; its bits are the upper half of a float32.
_STORED = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.uint8, "int4": np.uint8}


class EmbeddingTable:
    """[rows, columns] of an artifact's file, mapped: a gather touches only the pages of the rows asked for."""

    def __init__(self, artifact: Artifact, entry: TableEntry) -> None:
        self._format, self._scale = WeightFormat.parse(entry.format), np.float32(entry.scale)
        dtype = np.dtype(_STORED[self._format.kind])
        row_items = self._format.row_bytes(entry.columns) // dtype.itemsize
        path = artifact.path(entry.file)
        # Plain views: indexing a memmap runs Python code of NumPy's, longer than a row's copy takes.
        self._rows = np.asarray(np.memmap(path, dtype, mode="r", offset=entry.offset, shape=(entry.rows, row_items)))
        self._columns = entry.columns
        self._values = _values_of_codes(self._format.kind, are_signed=entry.has_signed_codes)
        self._scales: Array | None = None
        if entry.scales is not None:
            shape = (entry.rows, entry.scales.per_row)
            offset = entry.scales.offset
            self._scales = np.asarray(np.memmap(path, entry.scales.dtype, mode="r", offset=offset, shape=shape))

    def gather(self, ids: Sequence[int] | Int64, out: Float32 | None = None) -> Float32:
        """[T] ids -> [T, columns] float32, scaled; into ``out``, where given, which lies in one piece."""
        if out is None:
            out = np.empty((len(ids), self._columns), np.float32)
        rows = _taken(self._rows, ids)
        if self._format.kind == "float32":
            out[...] = rows
        elif self._format.kind == "bfloat16":
            np.left_shift(rows, 16, out=out.view(np.uint32), dtype=np.uint32)
        else:
            assert self._scales is not None
            assert self._values is not None
            # "clip": no code is out of range, and "raise" would go through a copy of ``out``.
            self._values.take(rows, out=out.view(self._values.dtype), mode="clip")
            scales = _taken(self._scales, ids)
            blocks = out.reshape(*scales.shape, -1)
            np.multiply(blocks, scales.astype(np.float32)[:, :, None], out=blocks)
        if self._scale != 1:
            np.multiply(out, self._scale, out=out)
        return out


def _taken(rows: Array, ids: Sequence[int] | Int64) -> Array:
    """[T, ...] the rows ``ids``; a single one as a view, without NumPy's gather of 10 µs."""
    return rows[ids[0] : ids[0] + 1] if len(ids) == 1 else rows[np.asarray(ids)]


def _values_of_codes(kind: str, *, are_signed: bool) -> Array | None:
    """[256] what a byte stands for before its scale: a float32, or two in one 8-byte item, the low half first."""
    if kind not in ("int4", "int8"):
        return None
    codes = np.arange(256, dtype=np.uint8)
    if kind == "int8":  # flipping the sign bit adds 128 (or 8)
        return (codes ^ np.uint8(0x80 if are_signed else 0)).astype(np.float32) - np.float32(128)
    codes ^= np.uint8(0x88 if are_signed else 0)
    pairs = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], axis=1).astype(np.float32) - np.float32(8)
    return pairs.view(np.uint64)[:, 0].copy()

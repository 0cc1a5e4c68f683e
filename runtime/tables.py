"""Embedding tables on the host: memory-mapped rows, gathered, dequantised and widened to float32 per call."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.formats import WeightFormat
from gemma4_export.configs.manifest import TableEntry

Array = np.ndarray[Any, np.dtype[Any]]
Float32 = np.ndarray[Any, np.dtype[np.float32]]

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
        self._has_signed_codes = entry.has_signed_codes
        self._scales: Array | None = None
        if entry.scales is not None:
            shape = (entry.rows, entry.scales.per_row)
            offset = entry.scales.offset
            self._scales = np.asarray(np.memmap(path, entry.scales.dtype, mode="r", offset=offset, shape=shape))

    def gather(self, ids: np.ndarray[Any, np.dtype[np.int64]]) -> Float32:
        """[T] ids -> [T, columns] float32, scaled."""
        rows = self._rows[ids]
        if self._format.kind == "float32":
            values: Float32 = rows
        elif self._format.kind == "bfloat16":
            values = (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            assert self._scales is not None
            is_int4 = self._format.kind == "int4"
            if self._has_signed_codes:  # flipping the sign bit adds 8 (or 128)
                rows = rows ^ np.uint8(0x88 if is_int4 else 0x80)
            values = _dequantize(rows, self._scales[ids], is_int4=is_int4)
        return values if self._scale == 1 else np.asarray(values * self._scale, np.float32)


def _dequantize(codes: Array, scales: Array, *, is_int4: bool) -> Float32:
    """Unsigned codes [T, bytes] with scales [T, per_row] -> [T, columns] float32."""
    if is_int4:
        values = np.empty((codes.shape[0], codes.shape[1] * 2), np.float32)
        values[:, 0::2] = codes & np.uint8(15)
        values[:, 1::2] = codes >> np.uint8(4)
        values -= np.float32(8)
    else:
        values = codes.astype(np.float32) - np.float32(128)
    blocks = values.reshape(len(values), scales.shape[1], -1)
    blocks *= scales.astype(np.float32)[:, :, None]
    return values

"""Embedding tables on the host: memory-mapped rows, gathered and widened to float32 per call."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.manifest import TableEntry

Float32 = np.ndarray[Any, np.dtype[np.float32]]


class EmbeddingTable:
    """[rows, columns] of an artifact's file, mapped: a gather touches only the pages of the rows asked for."""

    def __init__(self, artifact: Artifact, entry: TableEntry) -> None:
        # NumPy has no bfloat16; its bits are the upper half of a float32.
        dtype = np.dtype(np.float32) if entry.format == "float32" else np.dtype(np.uint16)
        self._rows = np.memmap(
            artifact.path(entry.file), dtype, mode="r", offset=entry.offset, shape=(entry.rows, entry.columns)
        )
        self._scale = np.float32(entry.scale)

    def gather(self, ids: np.ndarray[Any, np.dtype[np.int64]]) -> Float32:
        """[T] ids -> [T, columns] float32, scaled."""
        rows = self._rows[ids]
        if rows.dtype == np.uint16:
            rows = (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return np.asarray(rows * self._scale, np.float32)

"""Writes a checkpoint's decoder weights into an artifact's data files, some rows at a time, in the recipe's formats."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from gemma4_export.configs.names import EMBED_TOKENS, EMBED_TOKENS_PER_LAYER, TensorSpec, expert_tensor
from gemma4_export.configs.recipe import ITEM_BYTES, Recipe, WeightFormat
from gemma4_export.exporter.checkpoint import Checkpoint

WEIGHTS_FOLDER = "graphs/weights"
# A table that the host gathers rows from has a file of its own, so that it can be mapped alone. The token table is also
# the decoder's head; it lies below graphs/ because onnxruntime refuses external data outside a graph's own folder.
_OWN_FILES = {
    EMBED_TOKENS: f"{WEIGHTS_FOLDER}/embed_tokens.bin",
    EMBED_TOKENS_PER_LAYER: f"{WEIGHTS_FOLDER}/embed_tokens_per_layer.bin",
}
_DECODER_FILE = f"{WEIGHTS_FOLDER}/decoder.bin"
_ALIGNMENT = 64  # bytes: a cache line, and the widest vector load of a CPU

_NUMPY: dict[WeightFormat, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedWeight:
    """Where one weight lies in the artifact: file relative to its root, byte offset, format, shape."""

    file: str
    offset: int
    format: WeightFormat
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * ITEM_BYTES[self.format]


def place_weights(specs: Iterable[TensorSpec], recipe: Recipe) -> dict[str, PlacedWeight]:
    """Decide file and offset of every weight. Each expert of a fused weight is listed as well, as a slice of it."""
    placed: dict[str, PlacedWeight] = {}
    ends: dict[str, int] = {}
    for spec in specs:
        file, form = _OWN_FILES.get(spec.name, _DECODER_FILE), recipe.format_of(spec.role)
        offset = -(-ends.get(file, 0) // _ALIGNMENT) * _ALIGNMENT
        whole = placed[spec.name] = PlacedWeight(file=file, offset=offset, format=form, shape=spec.shape)
        ends[file] = offset + whole.num_bytes
        if spec.role == "decoder.experts":
            expert_bytes = whole.num_bytes // spec.shape[0]
            for expert in range(spec.shape[0]):
                placed[expert_tensor(spec.name, expert)] = PlacedWeight(
                    file=file, offset=offset + expert * expert_bytes, format=form, shape=spec.shape[1:]
                )
    return placed


def write_weights(
    checkpoint: Checkpoint, placed: dict[str, PlacedWeight], folder: Path, on_bytes: Callable[[str, int], None]
) -> dict[str, tuple[int, str]]:
    """Stream every decoder weight into its place; memory stays at a slice, whatever the tensor.

    Args:
        on_bytes: called with a weight's name and the bytes just written.
    Returns:
        file -> (bytes, sha256), hashed while writing.
    """
    (folder / WEIGHTS_FOLDER).mkdir(parents=True)
    with ExitStack() as stack:
        files = {placed[name].file for name in checkpoint.specs}
        writers = {file: _HashingWriter(stack.enter_context((folder / file).open("wb"))) for file in sorted(files)}
        for name in checkpoint.specs:
            target = placed[name]
            writer = writers[target.file]
            writer.write(bytes(target.offset - writer.num_bytes))  # the gap up to the next aligned offset
            for rows in _converted(checkpoint.slices(name), target.format):
                writer.write(rows)
                on_bytes(name, rows.nbytes)
        return {file: (writer.num_bytes, writer.hash.hexdigest()) for file, writer in writers.items()}


class _HashingWriter:
    """Appends to a file and hashes what it appends."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | np.ndarray[Any, np.dtype[Any]]) -> None:
        buffer = memoryview(data if isinstance(data, bytes) else data.view(np.uint8).data).cast("B")
        self.file.write(buffer)
        self.hash.update(buffer)
        self.num_bytes += len(buffer)


def _converted(
    slices: Iterator[np.ndarray[Any, np.dtype[Any]]], form: WeightFormat
) -> Iterator[np.ndarray[Any, np.dtype[Any]]]:
    for rows in slices:
        yield np.ascontiguousarray(rows.astype(_NUMPY[form], copy=False))

"""Decides where every weight of a decoder lies in an artifact: file, offset, format, and the place of its scales."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from gemma4_export.configs.formats import WeightFormat
from gemma4_export.configs.names import EMBED_TOKENS, EMBED_TOKENS_PER_LAYER, LM_HEAD, Role, TensorSpec, expert_tensor
from gemma4_export.configs.recipe import Recipe
from gemma4_export.exporter.packing import matmul_block

WEIGHTS_FOLDER = "graphs/weights"
# A table that the host gathers rows from has a file of its own, so that it can be mapped alone. All lie below graphs/
# because onnxruntime refuses external data outside a graph's own folder, and the token table can be the head as well.
_DECODER_FILE = f"{WEIGHTS_FOLDER}/decoder.bin"
_FILES = {
    EMBED_TOKENS: f"{WEIGHTS_FOLDER}/embed_tokens.bin",
    EMBED_TOKENS_PER_LAYER: f"{WEIGHTS_FOLDER}/embed_tokens_per_layer.bin",
    LM_HEAD: f"{WEIGHTS_FOLDER}/lm_head.bin",
}
_ALIGNMENT = 64  # bytes: a cache line, and the widest vector load of a CPU
_ITEM_BYTES = {"float16": 2, "float32": 4}

Packing = Literal["ort-cpu", "tensorrt"]
"""``ort-cpu``: what MatMulNBits reads. ``tensorrt``: canonical codes and scales, which DequantizeLinear reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedScales:
    """Scales [rows, per_row] of a quantised weight, in the same file as its codes."""

    offset: int
    dtype: Literal["float16", "float32"]
    per_row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedWeight:
    """Where one weight lies: file relative to the artifact's root, byte offsets, format, shape."""

    file: str
    offset: int
    format: WeightFormat
    shape: tuple[int, ...]
    scales: PlacedScales | None = None
    has_signed_codes: bool = False
    """Codes as ``quantize.py`` makes them; else 8 (int4) or 128 (int8) above."""

    @property
    def row_shape(self) -> tuple[int, int]:
        return math.prod(self.shape[:-1]), self.shape[-1]

    @property
    def code_bytes(self) -> int:
        """Bytes of values or codes."""
        rows, columns = self.row_shape
        return rows * self.format.row_bytes(columns)

    @property
    def end(self) -> int:
        """Offset of the byte behind codes and scales."""
        if self.scales is None:
            return self.offset + self.code_bytes
        return self.scales.offset + self.scale_bytes

    @property
    def scale_bytes(self) -> int:
        if self.scales is None:
            return 0
        return self.row_shape[0] * self.scales.per_row * _ITEM_BYTES[self.scales.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """One weight to write: which tensor it is made from, what for, and where to."""

    name: str
    source: str
    role: Role
    placed: PlacedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """All weights of an artifact: what is written, in order, and every name that a graph or a table may ask for."""

    stored: tuple[StoredWeight, ...]
    weights: dict[str, PlacedWeight] = field(default_factory=dict)

    @property
    def num_bytes(self) -> dict[str, int]:
        """File -> bytes."""
        sizes: dict[str, int] = {}
        for weight in self.stored:
            end = (
                weight.placed.scales.offset if weight.placed.scales else weight.placed.offset + weight.placed.code_bytes
            )
            sizes[weight.placed.file] = max(sizes.get(weight.placed.file, 0), end + weight.placed.scale_bytes)
        return sizes


def place_weights(
    specs: Iterable[TensorSpec], recipe: Recipe, *, wide_scales: Collection[str] = (), packing: Packing = "ort-cpu"
) -> Placement:
    """Lay out an artifact for one kind of backend.

    Where head and token table have one format, one copy serves both. Each expert of a fused weight is listed as well,
    as a slice of it.

    Args:
        wide_scales: names of weights whose scales come from a checkpoint that has them in more than float16.
    Raises:
        ConfigError: a recipe's block does not divide the rows of a weight; the hint names one that does.
    """
    stored: list[StoredWeight] = []
    weights: dict[str, PlacedWeight] = {}
    ends: dict[str, int] = {}

    def place(name: str, source: TensorSpec, role: Role, *, is_matrix: bool) -> None:
        form, file = recipe.format_of(role), _FILES.get(name, _DECODER_FILE)
        form.check_columns(source.row_shape[1], role, name)
        is_matrix = is_matrix and packing == "ort-cpu"
        has_wide_scales = is_matrix or source.name in wide_scales
        placed = _place(file, ends, form, source.shape, is_matrix=is_matrix, has_wide_scales=has_wide_scales)
        placed = replace(placed, has_signed_codes=form.is_quantized and packing == "tensorrt")
        stored.append(StoredWeight(name=name, source=source.name, role=role, placed=placed))
        weights[name] = placed

    for spec in specs:
        if spec.name == EMBED_TOKENS:
            is_shared = recipe.format_of("decoder.head") == recipe.format_of(spec.role)
            place(spec.name, spec, spec.role, is_matrix=is_shared)
            if is_shared:
                weights[LM_HEAD] = weights[EMBED_TOKENS]
            else:
                place(LM_HEAD, spec, "decoder.head", is_matrix=True)
        else:
            place(spec.name, spec, spec.role, is_matrix=spec.name != EMBED_TOKENS_PER_LAYER)
        if spec.role == "decoder.experts":
            for expert in range(spec.shape[0]):
                one = run_of_experts(weights[spec.name], expert, expert + 1)
                weights[expert_tensor(spec.name, expert)] = replace(one, shape=one.shape[1:])
    return Placement(stored=tuple(stored), weights=weights)


def _place(
    file: str,
    ends: dict[str, int],
    form: WeightFormat,
    shape: tuple[int, ...],
    *,
    is_matrix: bool,
    has_wide_scales: bool,
) -> PlacedWeight:
    """Append a weight to ``file``. Matrices get the scales that MatMulNBits reads, tables the canonical ones."""
    placed = PlacedWeight(file=file, offset=_align(ends.get(file, 0)), format=form, shape=shape)
    if form.is_quantized:
        columns = placed.row_shape[1]
        block = matmul_block(form, columns) if is_matrix else form.block or columns
        scales = PlacedScales(
            offset=_align(placed.end),
            dtype="float32" if has_wide_scales or form.kind != "int4" else "float16",
            per_row=columns // block,
        )
        placed = replace(placed, scales=scales)
    ends[file] = placed.end
    return placed


def _align(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def run_of_experts(whole: PlacedWeight, start: int, stop: int) -> PlacedWeight:
    """Experts ``start:stop`` of a fused weight: neighbours in it, so nothing is copied."""
    num_experts, scales = whole.shape[0], whole.scales
    if scales is not None:
        scales = replace(scales, offset=scales.offset + start * (whole.scale_bytes // num_experts))
    offset = whole.offset + start * (whole.code_bytes // num_experts)
    return replace(whole, offset=offset, shape=(stop - start, *whole.shape[1:]), scales=scales)

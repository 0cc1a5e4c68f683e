"""What a backend holds in memory of the weights that an artifact stores, and at the peak of loading them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gemma4_export.configs.names import EMBED_TOKENS, EMBED_TOKENS_PER_LAYER, LM_HEAD
from gemma4_export.configs.step_bytes import PROCESS_BYTES, cpu_memory_bytes
from gemma4_export.exporter.weights import Placement, StoredWeight


@dataclass(slots=True)
class RoleSize:
    """The weights of one role, summed."""

    format: str
    parameters: int = 0
    bytes: int = 0


def role_sizes(placement: Placement) -> dict[str, RoleSize]:
    """Role -> its weights as they are stored, as the manifest's census will have them."""
    sizes: dict[str, RoleSize] = {}
    for weight in placement.stored:
        size = sizes.setdefault(weight.role, RoleSize(str(weight.placed.format)))
        size.parameters += math.prod(weight.placed.shape)
        size.bytes += weight.placed.code_bytes + weight.placed.scale_bytes
    return sizes


def held_bytes(placement: Placement, *, is_cpu: bool) -> dict[str, int]:
    """Role -> bytes of its matrices in the backend's memory. Tables that are mapped count nothing."""
    if is_cpu:
        return cpu_memory_bytes(role_sizes(placement), activations="int8")
    sizes: dict[str, int] = {}
    for weight in _matrices(placement):
        sizes[weight.role] = sizes.get(weight.role, 0) + _gpu_bytes(weight)
    return sizes


def load_peak_bytes(placement: Placement, *, is_cpu: bool) -> int:
    """At the peak of loading, pages of weight files that are read meanwhile not counted: the system can drop those.

    onnxruntime's CPU provider first widens all of bfloat16 in memory and then packs one matrix after the other, which
    exists twice until it is packed; glibc keeps some of what is freed then, which is not counted. Other matrices are
    packed straight from the mapped file. A GPU is taken to hold one matrix twice.
    """
    if is_cpu:
        twice = [4 * _size(w) for w in _matrices(placement) if w.placed.format.kind == "bfloat16"]
    else:
        twice = [_gpu_bytes(weight) for weight in _matrices(placement)]
    return PROCESS_BYTES + sum(held_bytes(placement, is_cpu=is_cpu).values()) + max(twice, default=0)


def engine_bytes(placement: Placement) -> int:
    """Disk that compiled engines take: each is about as large as the weights that it was built from."""
    return sum(weight.placed.code_bytes + weight.placed.scale_bytes for weight in _matrices(placement))


def _matrices(placement: Placement) -> list[StoredWeight]:
    """All but the tables. The token table is the head as well where both have one format."""
    is_head = placement.weights[LM_HEAD] == placement.weights[EMBED_TOKENS]
    tables = {EMBED_TOKENS_PER_LAYER} if is_head else {EMBED_TOKENS_PER_LAYER, EMBED_TOKENS}
    return [weight for weight in placement.stored if weight.name not in tables]


def _size(weight: StoredWeight) -> int:
    return math.prod(weight.placed.shape)


def _gpu_bytes(weight: StoredWeight) -> int:
    """Codes with their canonical scales: float16 for int4, float32 for int8."""
    form, (rows, columns) = weight.placed.format, weight.placed.row_shape
    scales = rows * (columns // (form.block or columns)) if form.is_quantized else 0
    return weight.placed.code_bytes + scales * (2 if form.kind == "int4" else 4)

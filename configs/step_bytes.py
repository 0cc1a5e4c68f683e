"""Bytes that a decode step reads and that loaded weights take, for whoever predicts a model and whoever runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from gemma4_export.configs.formats import WeightFormat
from gemma4_export.configs.manifest import KVLayout

PROCESS_BYTES = 370_000_000
"""Python, NumPy, onnxruntime and the tokenizer's 262,144 entries without a weight, resident: 52, 27 and 290 MB."""


class StoredRole(Protocol):
    """What is known of the weights of one role: their format's name, how many values, bytes of codes and scales."""

    @property
    def format(self) -> str: ...
    @property
    def parameters(self) -> int: ...
    @property
    def bytes(self) -> int: ...


def cpu_matrix_bytes(roles: Mapping[str, StoredRole]) -> dict[str, int]:
    """Role -> bytes of the matrices that onnxruntime's CPU provider multiplies with.

    Codes and scales as they are stored; float matrices four bytes a weight, because it widens bfloat16 at load. Tables
    are mapped and count nothing; the token table does where it is the head as well.
    """
    sizes = {}
    for role, stored in roles.items():
        is_head = role == "embeddings.tokens" and "decoder.head" not in roles
        if is_head or not role.startswith("embeddings."):
            sizes[role] = stored.bytes if WeightFormat.parse(stored.format).is_quantized else stored.parameters * 4
    return sizes


def cpu_memory_bytes(roles: Mapping[str, StoredRole], *, activations: str) -> dict[str, int]:
    """Role -> bytes of memory that its matrices take in onnxruntime's CPU provider.

    For int8 activations it packs codes and scales together with the sum of each block's codes, a float32 beside each
    scale. For others it packs codes alone and reads the scales where they are mapped.
    """
    sizes = cpu_matrix_bytes(roles)
    for role in sizes:
        stored, form = roles[role], WeightFormat.parse(roles[role].format)
        if form.is_quantized and activations == "int8":
            sizes[role] += stored.bytes - form.row_bytes(stored.parameters)
    return sizes


def step_bytes(
    matrices: Mapping[str, int], kv: KVLayout, length: int, *, num_experts: int, top_k_experts: int, kv_item_bytes: int
) -> int:
    """Bytes that one decode step at ``length`` tokens reads: every matrix once, top-k of the experts, every cache.

    A cache is read by each layer that attends to it: layers that share one are apart, and at long contexts a cache is
    larger than what a processor keeps between them.

    Args:
        matrices: role -> bytes.
        kv_item_bytes: of one value in the caches.
    """
    total = 0
    for role, size in matrices.items():
        total += size * top_k_experts // num_experts if role == "decoder.experts" else size
    for cache in kv.caches:
        tokens = min(length, kv.sliding_window or 0) if cache.kind == "sliding" else length
        total += 2 * kv_item_bytes * cache.num_kv_heads * cache.head_dim * tokens * cache.num_readers
    return total

"""What a backend holds in memory of the weights that an artifact stores."""

from __future__ import annotations

from gemma4_export.configs.names import EMBED_TOKENS, EMBED_TOKENS_PER_LAYER, LM_HEAD
from gemma4_export.exporter.weights import Placement, StoredWeight

PROCESS_BYTES = 300 << 20  # Python, NumPy and onnxruntime's own code and tables, measured on an empty session


def held_bytes(weight: StoredWeight, placement: Placement, *, is_cpu: bool) -> int:
    """What the backend holds of a weight; mapped tables count nothing.

    onnxruntime's CPU provider widens float matrices to float32 and keeps, beside each scale of a quantised one, the sum
    of its block's codes. GPUs keep codes with their canonical scales.
    """
    placed, form = weight.placed, weight.placed.format
    rows, columns = placed.row_shape
    # The token table is the head as well where both have one format.
    is_head = placement.weights[LM_HEAD] == placed
    if weight.name == EMBED_TOKENS_PER_LAYER or (weight.name == EMBED_TOKENS and not is_head):
        return 0
    if not form.is_quantized:
        return 4 * rows * columns if is_cpu else placed.code_bytes
    if is_cpu:
        return placed.code_bytes + 2 * placed.scale_bytes
    return placed.code_bytes + rows * (columns // (form.block or columns)) * (2 if form.kind == "int4" else 4)


def load_peak_bytes(placement: Placement, *, is_cpu: bool) -> int:
    """At the peak of loading: a weight being packed or widened exists twice for a moment, one at a time."""
    held = {weight.name: held_bytes(weight, placement, is_cpu=is_cpu) for weight in placement.stored}
    largest = max(weight.placed.code_bytes + held[weight.name] for weight in placement.stored if held[weight.name])
    return PROCESS_BYTES + sum(held.values()) + largest

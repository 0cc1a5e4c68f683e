"""What the attention ops mean: loops over batch, query and head, sums in float64, one rounding at the end."""

# ruff: noqa: N806 (shape letters are capitals, as in the contract)

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gemma4_export.plugins.attention.contract import ATTENTION, SHARED_ATTENTION

Array = npt.NDArray[Any]


def attention(
    query: Array,
    key: Array,
    value: Array,
    key_cache: Array,
    value_cache: Array,
    write_index: Array,
    visible_start: Array | None,
    visible_end: Array,
    *,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Write this call's keys and values into the cache, then attend to the run of slots that each query sees.

        present_key[b, :, write_index[b] + t] = key[b, t];  present_value likewise;  all other slots are copied
        output[b, t, h] = softmax_s(scale * query[b, t, h] · present_key[b, h // G, s]) @ present_value[b, h // G, s]
        over slots s with visible_start[b, t] <= s < visible_end[b, t], and G = Hq // Hkv

    Slots outside a query's run are never read for it: whatever bits lie there change nothing.

    Args:
        query: [B, T, Hq, D]; key, value: [B, T, Hkv, D], this call's tokens, normed, RoPE already applied.
        key_cache, value_cache: [B, Hkv, C, D]; which position lies in which slot is the caller's business.
        write_index: [B] int64, slot of this call's first token.
        visible_start, visible_end: [B, T] int32, slots; no ``visible_start`` means that runs start at slot 0.
        scale: factor on the scores (1.0 in Gemma 4, whose query norm takes its place).
    Returns:
        output [B, T, Hq, D] in the dtype of ``query``; present_key and present_value [B, Hkv, C, D].
    Raises:
        ContractError: sizes or dtypes disagree, Hq is not a multiple of Hkv, the write passes C, or a run is empty
            or leaves the cache.
    Source: transformers, sliding-window mask: a query sees itself and the W - 1 positions before it.
    """
    sizes = ATTENTION.check(
        {
            "query": query,
            "key": key,
            "value": value,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "write_index": write_index,
            "visible_start": visible_start,
            "visible_end": visible_end,
        },
        {"scale": scale},
    )
    present_key, present_value = key_cache.copy(), value_cache.copy()
    for b in range(sizes["B"]):
        for t in range(sizes["T"]):
            present_key[b, :, write_index[b] + t] = key[b, t]
            present_value[b, :, write_index[b] + t] = value[b, t]
    output = _attend(query, present_key, present_value, visible_start, visible_end, scale)
    return output, present_key, present_value


def shared_attention(
    query: Array,
    key_cache: Array,
    value_cache: Array,
    visible_start: Array | None,
    visible_end: Array,
    *,
    scale: float,
) -> Array:
    """Attend to another layer's cache, which already holds this call's tokens, without writing to it.

    The formula is that of ``attention`` with present_key = key_cache and present_value = value_cache.

    Args:
        query: [B, R, Hq, D], the rows whose output is wanted.
        key_cache, value_cache: [B, Hkv, C, D], the present caches of the layer that owns them.
        visible_start, visible_end: [B, R] int32, slots; no ``visible_start`` means that runs start at slot 0.
        scale: factor on the scores.
    Returns:
        output [B, R, Hq, D] in the dtype of ``query``.
    Raises:
        ContractError: sizes or dtypes disagree, Hq is not a multiple of Hkv, or a run is empty or leaves the cache.
    """
    SHARED_ATTENTION.check(
        {
            "query": query,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "visible_start": visible_start,
            "visible_end": visible_end,
        },
        {"scale": scale},
    )
    return _attend(query, key_cache, value_cache, visible_start, visible_end, scale)


def _attend(
    query: Array, keys: Array, values: Array, visible_start: Array | None, visible_end: Array, scale: float
) -> Array:
    B, R, Hq, _ = query.shape
    group_size = Hq // keys.shape[1]
    output = np.empty_like(query)
    for b, r, h in np.ndindex(B, R, Hq):
        start = 0 if visible_start is None else int(visible_start[b, r])
        run = slice(start, int(visible_end[b, r]))
        run_keys = keys[b, h // group_size, run].astype(np.float64)  # [S, D]
        run_values = values[b, h // group_size, run].astype(np.float64)
        weights = softmax(scale * (run_keys @ query[b, r, h].astype(np.float64)))  # [S]
        output[b, r, h] = weights @ run_values
    return output


def softmax(scores: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis; subtracting the maximum keeps exp finite and changes nothing else."""
    exponentials: Array = np.exp(scores - scores.max(axis=-1, keepdims=True))
    normalised: Array = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return normalised

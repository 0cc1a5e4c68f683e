"""Greedy decoding of one sequence: prefill once, then one token at a time until something stops it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from gemma4_export.runtime.decoder import Decoder, Float32
from gemma4_export.runtime.kv_cache import KVCache

Pick = Callable[[Float32], int]
"""Logits [V] -> the id to go on with."""


def prefill(decoder: Decoder, ids: Sequence[int], cache: KVCache, pick: Pick) -> int:
    """Run the prompt and pick the first token of the answer."""
    return pick(decoder.forward(ids, cache, rows=[len(ids) - 1])[0])


def decode_one_token(decoder: Decoder, token: int, cache: KVCache, pick: Pick) -> int:
    """Run the newest token and pick the next."""
    return pick(decoder.forward([token], cache)[0])


def generate_ids(
    decoder: Decoder,
    ids: Sequence[int],
    cache: KVCache,
    *,
    pick: Pick,
    max_new_tokens: int,
    stop_ids: Collection[int],
) -> Iterator[int]:
    """Yield new ids until a stop id (yielded too), ``max_new_tokens``, or the end of the context."""
    if max_new_tokens < 1:
        return
    token = prefill(decoder, ids, cache, pick)
    yield token
    for _ in range(max_new_tokens - 1):
        if token in stop_ids or cache.length >= cache.context:
            return
        token = decode_one_token(decoder, token, cache, pick)
        yield token


def pick_greedily(suppressed_ids: Sequence[int]) -> Pick:
    """The most likely id that the checkpoint's generation_config does not forbid."""
    forbidden = np.asarray(suppressed_ids, np.int64)

    def pick(logits: Float32) -> int:
        if len(forbidden):
            logits = logits.copy()
            logits[forbidden] = -np.inf
        return int(logits.argmax())

    return pick

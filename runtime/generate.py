"""Greedy decoding of one sequence: prefill once, then one token at a time until something stops it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from gemma4_export.runtime.decoder import Decoder
from gemma4_export.runtime.kv_cache import KVCache


def prefill(decoder: Decoder, ids: Sequence[int], cache: KVCache) -> int:
    """Run the prompt and pick the first token of the answer."""
    return int(decoder.forward(ids, cache, rows=[len(ids) - 1])[0].argmax())


def decode_one_token(decoder: Decoder, token: int, cache: KVCache) -> int:
    """Run the newest token and pick the next."""
    return int(decoder.forward([token], cache)[0].argmax())


def greedy(
    decoder: Decoder, ids: Sequence[int], cache: KVCache, *, max_new_tokens: int, stop_ids: Collection[int]
) -> Iterator[int]:
    """Yield new ids until a stop id (yielded too), ``max_new_tokens``, or the end of the context."""
    if max_new_tokens < 1:
        return
    token = prefill(decoder, ids, cache)
    yield token
    for _ in range(max_new_tokens - 1):
        if token in stop_ids or cache.length >= cache.context:
            return
        token = decode_one_token(decoder, token, cache)
        yield token

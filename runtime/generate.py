"""Decoding of one sequence: prefill once, then one token at a time until something stops it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence

from gemma4_export.runtime.decoder import Decoder, Float32
from gemma4_export.runtime.kv_cache import KVCache

Pick = Callable[[Float32], int]
"""Logits [V] -> the id to go on with."""


def generate_ids(
    decoder: Decoder,
    ids: Sequence[int],
    cache: KVCache,
    *,
    pick: Pick,
    max_new_tokens: int,
    stop_ids: Collection[int],
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Generator[int]:
    """Yield new ids until a stop id (yielded too), ``max_new_tokens``, the end of the context, or a cancel.

    ``cache`` holds the first ``cache.length`` of ``ids`` already, fewer than all. A cancel is seen between two chunks
    of the prompt and between two tokens.
    """
    chunk = decoder.manifest.chunk
    while len(ids) - cache.length > chunk:
        if is_cancelled():
            return
        decoder.forward(ids[cache.length : cache.length + chunk], cache, rows=[])
    rest = ids[cache.length :]
    rows, logits = [len(rest) - 1], decoder.new_logits()
    for _ in range(max_new_tokens):
        if is_cancelled():
            return
        token = pick(decoder.forward(rest, cache, rows=rows, out=logits)[0])
        yield token
        if token in stop_ids or cache.length >= cache.context:
            return
        rest, rows = [token], [0]

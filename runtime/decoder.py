"""The decoder of an artifact as one function: ids in, logits out, in chunks, over one sequence's KV cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4_export.configs.artifact import Artifact
from gemma4_export.configs.errors import ContractError
from gemma4_export.runtime import checks
from gemma4_export.runtime.kv_cache import KVCache
from gemma4_export.runtime.rope import RopeTable
from gemma4_export.runtime.session import open_session
from gemma4_export.runtime.tables import EmbeddingTable

if TYPE_CHECKING:
    from gemma4_export.runtime.session_ort import Activations

Float32 = np.ndarray[Any, np.dtype[np.float32]]
Int64 = np.ndarray[Any, np.dtype[np.int64]]
Array = np.ndarray[Any, np.dtype[Any]]

_SLOTS = ("sliding_write_index", "sliding_start", "sliding_end", "global_write_index", "global_end")


class Decoder:
    """Embedding tables, RoPE and the decoder graph of one artifact."""

    def __init__(
        self, artifact: Artifact, *, num_threads: int | None = None, activations: Activations | None = None
    ) -> None:
        manifest = self.manifest = artifact.manifest
        self._session = open_session(artifact, num_threads=num_threads, activations=activations)
        self._tokens = EmbeddingTable(artifact, manifest.embed_tokens)
        per_layer = manifest.embed_tokens_per_layer
        self._per_layer = None if per_layer is None else EmbeddingTable(artifact, per_layer)
        self._slot_names = [name for name in _SLOTS if name in manifest.graphs["decoder"].inputs]
        self._rope = {"rope_global": RopeTable(manifest.rope_global)}
        if manifest.rope_sliding is not None:
            self._rope["rope_sliding"] = RopeTable(manifest.rope_sliding)
        # One call's buffers serve all; threads with caches of their own take turns.
        self._lock = threading.Lock()
        self._one_token = self._new_feeds(1, 1)

    @property
    def seconds_in_graph(self) -> float:
        """Time spent in the backend's run so far; the rest of a call is ours."""
        return self._session.seconds_in_graph

    def new_cache(self) -> KVCache:
        return KVCache(self.manifest.kv, self.manifest.context)

    def new_logits(self, num_rows: int = 1) -> Float32:
        """[R, V] for ``forward`` to write to."""
        return np.empty((num_rows, self.manifest.model.vocab_size), np.float32)

    def forward(
        self,
        ids: Sequence[int],
        cache: KVCache,
        *,
        chunk: int | None = None,
        rows: Sequence[int] | None = None,
        out: Float32 | None = None,
    ) -> Float32:
        """Append ``ids`` to the sequence in ``cache`` and compute logits.

        Args:
            ids: [T] token ids, at least one.
            cache: the sequence so far; grows by T tokens.
            chunk: tokens per call of the graph, at most the artifact's ``chunk`` (the default).
            rows: indices into ``ids`` whose logits are wanted, any order, repeats allowed; None: all of them.
            out: ``new_logits(R)``, whose values go and which is returned; None: a new array. The same one for every
                token saves 0.1 ms of each.
        Returns:
            logits [R, V] float32, in the order of ``rows``.
        Raises:
            ContractError: no ids, an id or a row out of range, a chunk too long, or no room in the context.
        """
        tokens = self._check_ids(ids)
        chunk = self._check_chunk(chunk)
        if (
            cache.layout is not self.manifest.kv and cache.layout != self.manifest.kv
        ) or cache.context != self.manifest.context:
            raise ContractError("cache: made by another artifact", hint="model.new_cache() makes one that fits")
        wanted = np.arange(len(tokens)) if rows is None else self._check_rows(rows, len(tokens))
        if cache.length + len(tokens) > cache.context:
            raise ContractError(
                f"{cache.length} + {len(tokens)} tokens do not fit the context of {cache.context}",
                hint="shorten the prompt, or build with a larger --context",
            )
        if len(tokens) <= chunk and len(wanted):
            return self._call(tokens, cache, wanted, out)
        wanted = np.asarray(wanted)
        logits = self.new_logits(len(wanted)) if out is None else out
        for start, part in self._chunks(tokens, chunk):
            here = np.flatnonzero((wanted >= start) & (wanted < start + len(part)))
            # The graph needs one row at least; one is cheap where KV-shared layers run for the wanted rows only.
            local = wanted[here] - start if len(here) else np.zeros(1, np.int64)
            result = self._call(part, cache, local)
            logits[here] = result[: len(here)]
        return logits

    def _call(
        self,
        tokens: Sequence[int] | Int64,
        cache: KVCache,
        rows: Sequence[int] | Int64,
        out: Float32 | None = None,
    ) -> Float32:
        position, count = cache.length, len(tokens)
        with self._lock:
            slots = cache.reserve(count)
            # The same arrays at every decode step: a session binds an array once.
            feeds = self._one_token if count == len(rows) == 1 else self._new_feeds(count, len(rows))
            self._tokens.gather(tokens, feeds["inputs_embeds"][0])
            if self._per_layer is not None:
                self._per_layer.gather(tokens, feeds["per_layer_inputs"].reshape(count, -1))
            for name, table in self._rope.items():
                feeds[name][...] = table.cos_sin(position, count)
            feeds["output_rows"][...] = rows
            for name in self._slot_names:
                feeds[name][...] = getattr(slots, name)
            logits = self._session.run(feeds, cache, out)
            cache.advance(count)
        return logits

    def _new_feeds(self, count: int, num_rows: int) -> dict[str, Array]:
        """The graph's inputs beside the caches, for ``count`` tokens and ``num_rows`` rows of logits."""
        model = self.manifest.model
        feeds: dict[str, Array] = {
            "inputs_embeds": np.empty((1, count, model.hidden_size), np.float32),
            "output_rows": np.empty(num_rows, np.int64),
        }
        for name, table in self._rope.items():
            feeds[name] = np.empty((1, count, 2, len(table.inv_freq)), np.float32)
        if self._per_layer is not None:
            shape = (1, count, model.num_layers, model.hidden_size_per_layer_input)
            feeds["per_layer_inputs"] = np.empty(shape, np.float32)
        for name in self._slot_names:
            is_index = name.endswith("_write_index")
            feeds[name] = np.empty(1, np.int64) if is_index else np.empty((1, count), np.int32)
        return feeds

    def _chunks(self, tokens: Sequence[int] | Int64, chunk: int) -> Iterator[tuple[int, Sequence[int] | Int64]]:
        for start in range(0, len(tokens), chunk):
            yield start, tokens[start : start + chunk]

    def _check_ids(self, ids: Sequence[int]) -> Sequence[int] | Int64:
        if _is_one_below(ids, self.manifest.model.vocab_size):
            return ids
        tokens = checks.token_ids(ids, self.manifest.model.vocab_size)
        if not len(tokens):
            raise ContractError(
                "ids: expected a list of at least one integer, found none",
                hint="model.encode(messages) or model.encode_raw(text) makes one",
            )
        return tokens

    def _check_chunk(self, chunk: int | None) -> int:
        longest = self.manifest.chunk
        if chunk is None:
            return longest
        hint = "build with a larger --chunk for longer ones"
        return checks.integer("chunk", chunk, 1, longest, hint, kind=ContractError)

    def _check_rows(self, rows: Sequence[int], count: int) -> Sequence[int] | Int64:
        if _is_one_below(rows, count):
            return rows
        wanted = checks.integers("rows", rows, "rows=[len(ids) - 1] is the last")
        if wanted.size and (wanted.min() < 0 or wanted.max() >= count):
            worst = int(wanted.min()) if wanted.min() < 0 else int(wanted.max())
            raise ContractError(
                f"rows: {worst} is not an index into {count} ids", hint="rows count from the first of ids"
            )
        return wanted


def _is_one_below(values: Sequence[int], end: int) -> bool:
    """Whether this is a list of one index below ``end``, as every decode step has: told without NumPy's 10 µs."""
    return type(values) is list and len(values) == 1 and type(values[0]) is int and 0 <= values[0] < end
